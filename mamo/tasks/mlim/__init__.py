"""MLIM: pre-training and matching of listings."""
