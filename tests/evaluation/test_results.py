"""Facts and remarks of an evaluation."""

import logging
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mamo.evaluation.metrics.retrieval import chance_recalls, rank_and_ties
from mamo.evaluation.results import Metrics, facts_line, remarks, summary
from mamo.reports.page import write_report
from mamo.trainer import train
from tests.tiny import TWO_STEPS, config_of


def recalls(itc: float, rerank: float) -> dict[str, float]:
    return {f"{stage}/{way}_r1": value for stage, value in (("itc", itc), ("rerank", rerank)) for way in ("i2t", "t2i")}


def test_an_itm_that_does_not_help_is_said(tmp_path: Path) -> None:
    """Bug: re-ranking by an ITM that has not learned is worse than ITC, and the report shows the worse of the two."""
    said = "ITM does not help yet: ITC 20.3, re-ranked 7.6"
    (line,) = remarks(recalls(20.3, 7.6))
    assert line.startswith(said)
    assert said in write_report(tmp_path, "t", recalls(20.3, 7.6), []).read_text()
    for metrics in (recalls(7.6, 20.3), recalls(5.0, 5.0), {"itc/i2t_r1": 9.0, "itc/t2i_r1": 9.0}, {}):
        assert not remarks(metrics)


def test_an_accuracy_below_the_commonest_answer_is_said() -> None:
    """Bug: a classifier that is worse than one answer to everything is reported without a word."""
    below = {"vqa/accuracy": 42.3, "vqa/majority": 46.4}
    assert remarks(below) == ["vqa is below the commonest answer: accuracy 42.3, majority 46.4"]
    assert summary(below) == "vqa/accuracy 42.3, vqa/majority 46.4"
    assert not remarks({"vqa/accuracy": 50.0, "vqa/majority": 46.4})


def test_the_log_of_a_run_says_it(
    tmp_path: Path, no_curves: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: the remark and the facts are only in files."""
    found = Metrics(recalls(20.3, 7.6), {"gallery_images": 64, "rerank_k": 16, "chance/i2t_r1": 100 / 64})
    monkeypatch.setattr("mamo.tasks.pretrain.task.evaluate_pretrained", lambda *_: found)
    monkeypatch.setattr("mamo.tasks.pretrain.task.sample_pictures", lambda *_: [])
    with caplog.at_level(logging.INFO):
        train(config_of(output_dir=str(tmp_path), training=TWO_STEPS, evaluation={"enabled": True}), is_resume=False)
    assert "step 2: ITM does not help yet: ITC 20.3, re-ranked 7.6" in caplog.text
    assert "step 2: gallery images 64; rerank k 16; chance i2t r1 1.562" in caplog.text
    assert facts_line({}) == ""


@given(st.lists(st.integers(0, 6), min_size=1, max_size=9), st.integers(6, 30))
def test_chance_is_that_of_a_random_order(n_right: list[int], n_items: int) -> None:
    """Bug: chance that ignores the captions of an image, or a gallery smaller than K."""
    pairs = [(query, item) for query, n in enumerate(n_right) for item in range(n)]
    positive = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
    found = chance_recalls(positive, len(n_right), n_items, "chance/i2t")
    assert found["chance/i2t_r1"] == pytest.approx(100 * sum(n_right) / len(n_right) / n_items)
    order = torch.rand(2000, n_items, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
    is_hit = torch.stack([(order[:, :5] < n).any(dim=1) for n in n_right]).double().mean()
    assert found["chance/i2t_r5"] == pytest.approx(100 * is_hit.item(), abs=5)


@given(st.lists(st.lists(st.integers(0, 3), min_size=5, max_size=5), min_size=1, max_size=6))
def test_ties_are_counted(scores: list[list[int]]) -> None:
    """Bug: recalls that ties decide look like those of a ranking."""
    score = torch.tensor(scores, dtype=torch.float32)
    is_positive = torch.zeros_like(score, dtype=torch.bool)
    is_positive[:, :2] = True
    _, n_ties = rank_and_ties(score, is_positive)
    assert n_ties == sum(max(row[:2]) in row[2:] for row in scores)
    assert rank_and_ties(torch.full_like(score, torch.nan), is_positive)[1] == 0
