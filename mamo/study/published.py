"""Compare the papers' results with the results of our studies: same direction or not."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from mamo.config.load import explain
from mamo.config.schema import Section
from mamo.config.values import read_values
from mamo.study.report import format_interval, values_of
from mamo.study.results import Row, read_rows
from mamo.study.spec import Comparison, Study, read_study
from mamo.study.statistics import Estimate, paired_difference

PUBLISHED = "published.yaml"
PAPER_NOISE = 0.5
"""Points. A smaller difference between single runs, which the papers report, is not conclusive."""
Claim = tuple[float, float]
"""Range of points in which a difference lies according to a paper."""
ABOVE_ZERO: Claim = (0.0, math.inf)
BELOW_ZERO: Claim = (-math.inf, 0.0)
_HEAD = ("study", "question", "metric", "paper's difference", "ours, in points", "seeds", "direction")


class Column(Section):
    """A column of a paper's table: its data set, and the metric of ours that corresponds to it."""

    data: str
    metric: str


class Published(Section):
    """Results that a paper reports for the variants of one study."""

    source: str
    columns: Annotated[list[Column], Field(min_length=1)]
    rows: dict[str, list[float]] = Field(default_factory=dict)
    """Variant -> one value per column, in percent."""
    lower: list[str] = Field(default_factory=list)
    """Variants that are worse than their comparison according to a plot or a sentence."""
    within: float | None = None
    """Largest difference, in points up or down, according to the paper."""


def read_published(path: Path) -> dict[str, Published]:
    """Read the published results by study. Raises ValueError naming file and key."""
    found = {}
    for name, values in read_values(path).items():
        try:
            found[name] = Published.model_validate(values)
        except ValidationError as error:
            lines = [line for problem in error.errors() for line in explain(problem, Published)]
            raise ValueError(f"{path}: {name}: " + "; ".join(lines)) from None
        for variant, row in found[name].rows.items():
            if len(row) != len(found[name].columns):
                raise ValueError(
                    f"{path}: {name}.rows.{variant}: {len(row)} values for {len(found[name].columns)} columns"
                )
    return found


def published_table(path: Path, results: Path) -> str:
    """Format the Markdown table of the studies in `path` from the finished trials in `results`.

    A study's file is in `results`, where these are of earlier code, or else in the folder of `path`. All finished seeds
    count. Planned comparisons without published results, or without finished trials, are left out.
    """
    rows = read_rows(results)
    lines = [_HEAD, ("---",) * len(_HEAD)]
    for name, published in read_published(path).items():
        files = [folder / f"{name}.yaml" for folder in (results, path.parent)]
        lines += table_lines(read_study(next(filter(Path.is_file, files), files[-1])), published, rows)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def table_lines(study: Study, published: Published, rows: Mapping[str, Row]) -> Iterator[tuple[str, ...]]:
    """Yield one line for each metric of each planned comparison with published results."""
    for planned in study.file.comparisons:
        for metric in dict.fromkeys(column.metric for column in published.columns):
            reported = _reported(published, planned, metric)
            if reported is None:
                continue
            values = values_of(study, rows, metric, "all")
            ours = paired_difference(values[planned.variant], values[planned.against])
            if ours is None:
                continue
            what = f"{planned.question}: {planned.variant} − {planned.against}"
            found = (format_interval(ours, signed=True), str(ours.n))
            text, claim = reported
            yield study.name, what, f"`{metric}`", f"{text}; {published.source}", *found, direction(ours, claim)


def direction(ours: Estimate, claim: Claim | None) -> str:
    """Classify our interval: within the claim (`same`), outside of it (`opposite`), or undecided with the reason."""
    if claim is None:
        return f"not decided: the paper's is below {PAPER_NOISE}"
    if ours.n == 1:
        return "not decided: one seed"
    low, high = claim
    if low < ours.low and ours.high < high:
        return "same"
    if ours.high < low or high < ours.low:
        return "opposite"
    return "not decided: the interval holds " + ("zero" if 0 in claim else f"{low} or {high}")


def _reported(published: Published, planned: Comparison, metric: str) -> tuple[str, Claim | None] | None:
    """Return the published difference and the claim it supports, if any; None where the paper reports nothing."""
    if published.within is not None:
        return f"within ±{published.within}", (-published.within, published.within)
    if planned.variant in published.lower:
        return "lower, no number", BELOW_ZERO
    if not {planned.variant, planned.against} <= published.rows.keys():
        return None
    pairs = zip(published.columns, published.rows[planned.variant], published.rows[planned.against])
    by_data = {column.data: round(a - b, 6) for column, a, b in pairs if column.metric == metric}
    mean = round(sum(by_data.values()) / len(by_data), 6)
    claim = None if abs(mean) < PAPER_NOISE else ABOVE_ZERO if mean > 0 else BELOW_ZERO
    return ", ".join(f"{value:+.1f} on {data}" for data, value in by_data.items()), claim
