"""Trained models as objects."""
