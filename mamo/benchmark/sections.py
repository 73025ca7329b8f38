"""Names of the sections of the benchmark."""

from typing import Literal

SectionName = Literal[
    "step",
    "passes",
    "memory",
    "waiting",
    "growth",
    "processes",
    "reranking",
    "checkpoint",
    "shortcuts",
    "neighbour",
]
"""Sections that are measured for each preset."""
LOADING = "loading"
"""Section that is measured once, independent of the presets."""
