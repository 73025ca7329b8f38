"""Speed and memory on the machine at hand, as ratios to what that machine can do."""
