"""Given answers against gold ones: who is in which cell, in which colour."""

import re
from typing import Any

import pytest

from mamo.data.records import VqaRecord
from mamo.evaluation.metrics.vqa import VqaAnswers, vqa_metrics
from mamo.tasks.vqa import report
from mamo.tasks.vqa.report import answer_confusion


def asked(golds: list[str], first: int = 0, **types: Any) -> list[VqaRecord]:
    return [
        VqaRecord(image="0", question_id=first + k, question="what?", answers=[gold] * 10, **types)
        for k, gold in enumerate(golds)
    ]


def tables_of(page: str) -> dict[str, list[list[str]]]:
    """The cells of each table by its heading; shaded ones as "percent colour"."""
    colours = {report._GREEN: "green", report._RED: "red"}
    tables = {}
    for name, table in re.findall(r"<h3>(.*?)</h3><table class=confusion>(.*?)</table>", page):
        tables[name] = [
            [
                f"{text} {colours[shade[0]]}" if (shade := re.findall(r"rgba\((.*),[\d.]+\)", style)) else text
                for style, text in re.findall(r"<t[dh]([^>]*)>(.*?)</t[dh]>", row)
            ]
            for row in re.findall("<tr>(.*?)</tr>", table)
        ]
    return tables


def bars_of(page: str) -> dict[str, tuple[int, float]]:
    found = re.findall(r"<tr><td>([^<]*)</td><td class=n>(\d+)</td><td>.*?<td class=n>([\d.]+)</td>", page)
    return {name: (int(n), float(accuracy)) for name, n, accuracy in found}


def test_each_question_is_in_its_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: rows and columns exchanged, shares of another total, a synonym in red, rare answers lost or unbounded."""
    monkeypatch.setattr(report, "MOST_ANSWERS", 2)
    records = asked(["red"] * 4 + ["blue"] * 2 + ["green"], question_type="what <colour>")
    given = dict(enumerate(["red", "red", "blue", "pink", "red", "blue", "green"]))
    sizes = asked(["small", "small"], 7, question_type="size", answer_type="other")
    records += [record.model_copy(update={"answers": ["small"] * 6 + ["little"] * 4}) for record in sizes]
    given |= {7: "little", 8: "large"}
    ((_, page),) = answer_confusion(given, records, 2)
    assert tables_of(page) == {
        "what &lt;colour&gt;": [
            ["", "", "red", "blue", "<i>others</i>"],
            ["red", "4", "50 green", "25 red", "25 red"],
            ["blue", "2", "50 red", "50 green", ""],
            ["<i>others</i>", "1", "", "", "100 green"],
        ],
        "size": [["", "", "small", "little", "large"], ["small", "2", "", "50 green", "50 red"]],
    }
    answered = {record.question_id: VqaAnswers(tuple(record.answers), record.question_type) for record in records}
    official = vqa_metrics(given, answered)  # of our types, in the place of answer types
    bars = {name.replace("<", "&lt;").replace(">", "&gt;"): official[f"accuracy/{name}"] for name in
            ("what <colour>", "size")}  # fmt: skip
    assert bars_of(page) == {name: (n, pytest.approx(bars[name], abs=0.051)) for name, n in zip(bars, (7, 2))}
    ((_, page),) = answer_confusion(given, records, 1)
    assert list(tables_of(page)) == ["what &lt;colour&gt;"]
    assert len(bars_of(page)) == 2


def test_types_that_a_record_lacks() -> None:
    """Bug: one nameless table of everything, questions without answers counted as wrong, an error without answers."""
    records = [*asked(["yes", "no"], answer_type="yes/no"), *asked(["cat"], 2)]
    withheld = [VqaRecord(image="0", question_id=3, question="what?", answer_type="number")]
    given = {0: "yes", 1: "yes", 2: "cat", 3: "7"}
    ((_, page),) = answer_confusion(given, [*records, *withheld], 8)
    assert bars_of(page) == {"yes/no": (2, 50.0), "all questions": (1, 100.0)}
    assert answer_confusion(given, withheld, 8) == []
