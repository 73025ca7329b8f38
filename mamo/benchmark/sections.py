"""Names of the sections of the benchmark."""

from typing import Literal

SectionName = Literal[
    "step", "passes", "memory", "waiting", "growth", "processes", "reranking", "checkpoint", "shortcuts"
]
"""Sections that are measured for each preset."""
LOADING = "loading"
"""The section that is measured once, whatever the presets."""
