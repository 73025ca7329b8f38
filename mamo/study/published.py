"""What the papers report beside what our studies found: the same direction or not."""

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
"""Points. The papers report single runs, whose difference below this says nothing."""
Claim = tuple[float, float]
"""Points between which a paper says that a difference lies."""
ABOVE_ZERO: Claim = (0.0, math.inf)
BELOW_ZERO: Claim = (-math.inf, 0.0)
_HEAD = ("study", "question", "metric", "paper's difference", "ours, in points", "seeds", "direction")


class Column(Section):
    """A column of a paper's table: on which data, and our metric that is its like."""

    data: str
    metric: str


class Published(Section):
    """What a paper reports of one study's variants."""

    source: str
    columns: Annotated[list[Column], Field(min_length=1)]
    rows: dict[str, list[float]] = Field(default_factory=dict)
    """Variant -> a value a column, in percent."""
    lower: list[str] = Field(default_factory=list)
    """Variants which a plot or a sentence says to be below what they are compared with."""
    within: float | None = None
    """Points between which, up and down, every difference is said to lie."""


def read_published(path: Path) -> dict[str, Published]:
    """By study. Raises ValueError naming file and key."""
    found = {}
    for name, values in read_values(path).items():
        try:
            found[name] = Published.model_validate(values)
        except ValidationError as error:
            lines = [line for problem in error.errors() for line in explain(problem, Published)]
            raise ValueError(f"{path}: {name}: " + "; ".join(lines)) from None
        for variant, row in found[name].rows.items():
            if len(row) != len(found[name].columns):
                raise ValueError(f"{path}: {name}.rows.{variant}: {len(row)} values; there are as many as columns")
    return found


def published_table(path: Path, results: Path) -> str:
    """The Markdown table of all studies that `path` names, which lie beside it, from the finished cells in `results`.

    All finished seeds count. Planned comparisons of which the papers report nothing are left to the studies' reports.
    """
    rows = read_rows(results)
    lines = [_HEAD, ("---",) * len(_HEAD)]
    for name, published in read_published(path).items():
        lines += table_lines(read_study(path.parent / f"{name}.yaml"), published, rows)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def table_lines(study: Study, published: Published, rows: Mapping[str, Row]) -> Iterator[tuple[str, ...]]:
    """One line for each metric of each planned comparison of which the paper reports something."""
    for planned in study.file.comparisons:
        for metric in dict.fromkeys(column.metric for column in published.columns):
            reported = _reported(published, planned, metric)
            if reported is None:
                continue
            values = values_of(study, rows, metric, "all")
            ours = paired_difference(values[planned.variant], values[planned.against])
            what = f"{planned.question}: {planned.variant} − {planned.against}"
            found = (format_interval(ours, signed=True), str(ours.n)) if ours else ("—", "0")
            text, claim = reported
            yield study.name, what, f"`{metric}`", f"{text}; {published.source}", *found, direction(ours, claim)


def direction(ours: Estimate | None, claim: Claim | None) -> str:
    """Whether our interval lies within the claim (`same`), outside of it (`opposite`), or neither, and why."""
    if ours is None:
        return "not run"
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
    """What a paper reports of a difference, and what it claims by it, if anything; None where it reports nothing."""
    if published.within is not None:
        return f"within ±{published.within}", (-published.within, published.within)
    if planned.variant in published.lower:
        return "lower, no number", BELOW_ZERO
    if not {planned.variant, planned.against} <= published.rows.keys():
        return None
    pairs = zip(published.columns, published.rows[planned.variant], published.rows[planned.against])
    of_data = {column.data: round(a - b, 6) for column, a, b in pairs if column.metric == metric}
    mean = round(sum(of_data.values()) / len(of_data), 6)
    claim = None if abs(mean) < PAPER_NOISE else ABOVE_ZERO if mean > 0 else BELOW_ZERO
    return ", ".join(f"{value:+.1f} on {data}" for data, value in of_data.items()), claim
