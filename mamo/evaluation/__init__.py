"""Evaluation: metrics as pure functions, scores of a network, and named protocols."""
