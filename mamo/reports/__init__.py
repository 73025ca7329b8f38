"""Curves, pages, cards and comparisons of runs."""
