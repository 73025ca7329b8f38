"""Builders: one file per public data set, from its official release to our JSON Lines."""
