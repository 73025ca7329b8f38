"""Studies: variants of one base config times seeds, each trained once, reported with confidence intervals."""
