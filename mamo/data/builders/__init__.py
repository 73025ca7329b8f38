"""Builders that convert the official releases of public data sets to JSON Lines, one module for each family."""
