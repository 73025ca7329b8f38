"""Tasks: each joins networks, losses and metrics into what the one training loop runs."""
