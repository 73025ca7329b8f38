"""Tabulate answers against gold answers by question type, as HTML for the report."""

import html
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mamo.data.records import VqaRecord
from mamo.evaluation.metrics.vqa import vqa_accuracy
from mamo.evaluation.metrics.vqa_answers import distinct_answers

MOST_ANSWERS = 8
"""Gold answers of a type that have a row of their own, and answered ones that have a column: the commonest."""
_GREEN, _RED = "44,159,75", "192,57,43"


@dataclass(frozen=True, slots=True)
class _Answered:
    """`gold` is what most people answered, `accuracy` what the official rules give to `answered`, 0 to 1."""

    gold: str
    answered: str
    accuracy: float

    @property
    def is_right(self) -> bool:
        # people disagree: "small" and "little" are both right
        return self.answered == self.gold or self.accuracy >= 0.5


def answer_confusion(answered: Mapping[int, str], records: Sequence[VqaRecord], n_types: int) -> list[tuple[str, str]]:
    """Return (title, HTML fragment): a bar of the official accuracy for each question type, and tables.

    The `n_types` types with the most questions get a table of answers against gold ones. Where the answers are withheld
    there is nothing.

    The type is `question_type`, where a record has none `answer_type`, and without either "all questions".

    Args:
        answered: answers by question_id.
        records: the questions, each of which has been answered.
        n_types: how many tables.
    """
    types: dict[str, list[_Answered]] = defaultdict(list)
    for record in records:
        if record.answers:
            answer, gold = answered[record.question_id], next(iter(distinct_answers(record)), "")
            judged = _Answered(gold, answer, vqa_accuracy(answer, record.answers))
            types[record.question_type or record.answer_type or "all questions"].append(judged)
    if not types:
        return []
    by_size = sorted(types, key=lambda name: -len(types[name]))
    bars = "".join(_bar(name, types[name]) for name in by_size)
    tables = "".join(
        f"<div><h3>{html.escape(name)}</h3><table class=confusion>{_table(types[name])}</table></div>"
        for name in by_size[:n_types]
    )
    legend = (
        "Rows: what most people answered, and how often. Columns: the answer, in percent of the row, green where "
        "it is right for most of the questions, else red."
    )
    bars = f"<table><tr><td>question type</td><td>questions</td><td>accuracy</td></tr>{bars}</table>"
    return [("Answers by question type", f'{bars}<p>{legend}</p><div class="row">{tables}</div>')]


def _bar(name: str, answered: Sequence[_Answered]) -> str:
    accuracy = 100 * sum(one.accuracy for one in answered) / len(answered)
    return (
        f"<tr><td>{html.escape(name)}</td><td class=n>{len(answered):,}</td><td><div class=bar>"
        f'<i style="width:{accuracy:.1f}%"></i></div></td><td class=n>{accuracy:.1f}</td></tr>'
    )


def _table(answered: Sequence[_Answered]) -> str:
    """Return the rows of one type.

    Columns are the gold answers of the rows, so that right ones lie on the diagonal, then further answers; what has no
    row or column of its own is counted in the last (None).
    """
    golds = [answer for answer, _ in Counter(one.gold for one in answered).most_common(MOST_ANSWERS)]
    commonest = [answer for answer, _ in Counter(one.answered for one in answered).most_common(MOST_ANSWERS)]
    columns = list(dict.fromkeys([*golds, *commonest]))
    cells: dict[tuple[str | None, str | None], list[_Answered]] = defaultdict(list)
    for one in answered:
        cells[one.gold if one.gold in golds else None, one.answered if one.answered in columns else None].append(one)
    shown_rows = [*golds, *([None] if any(gold is None for gold, _ in cells) else [])]
    shown_columns = [*columns, *([None] if any(answer is None for _, answer in cells) else [])]
    lines = ["<tr><th></th><th></th>" + "".join(f"<th>{_name(answer)}</th>" for answer in shown_columns) + "</tr>"]
    for gold in shown_rows:
        row = [cells.get((gold, answer), []) for answer in shown_columns]
        total = sum(map(len, row))
        shaded = "".join(_cell(found, total) for found in row)
        lines.append(f"<tr><th>{_name(gold)}</th><td>{total:,}</td>{shaded}</tr>")
    return "".join(lines)


def _name(answer: str | None) -> str:
    return "<i>others</i>" if answer is None else html.escape(answer)


def _cell(found: Sequence[_Answered], total: int) -> str:
    """Return the share of the row's `total`, as number and shade; the colour is that of most of its questions."""
    if not found:
        return "<td></td>"
    colour = _GREEN if 2 * sum(one.is_right for one in found) >= len(found) else _RED
    share = len(found) / total
    return f'<td style="background:rgba({colour},{share:.2f})" title="{len(found)}">{100 * share:.0f}</td>'
