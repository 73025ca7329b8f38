"""Reports of runs: curves, pages, cards and comparisons."""
