"""Zero-shot evaluation: metrics as pure functions, scores of a network, and `zero_shot`, which joins them."""
