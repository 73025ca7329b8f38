"""Weakly-supervised grounding."""
