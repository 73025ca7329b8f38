"""Studies: one base config, variants of it times seeds, run once each and reported with intervals."""
