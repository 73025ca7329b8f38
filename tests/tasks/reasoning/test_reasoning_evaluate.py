"""Judgements of statements: in any batches, with intervals and subsets."""

from pathlib import Path

import pytest
import torch

from mamo.data.records import ReasoningRecord
from mamo.evaluation.metrics.statements import read_scores
from mamo.tasks.reasoning.evaluate import judgement_metrics, predict_reasoning, write_logits
from mamo.tasks.reasoning.head import ReasoningHead
from mamo.tasks.reasoning.network import ReasoningNetwork
from tests.tiny import make_backbone, predictor_of, spread_weights


def network() -> ReasoningNetwork:
    backbone = make_backbone(width=32, fusion_layers=1)
    pair = ReasoningHead(backbone.fusion, 1)
    spread_weights(backbone.fusion, pair)
    return ReasoningNetwork(backbone, pair).eval()


def records() -> list[ReasoningRecord]:
    rows = [("both images show a circle", "0", "1"), ("there is one red square in total", "1", "2"),
            ("the left image shows a ring", "2", "0"), ("both images show a circle", "2", "1")]  # fmt: skip
    return [
        ReasoningRecord(images=[left, right], sentence=text, label=k % 2 == 0, identifier=f"dev-{k // 2}-{k % 2}-0")
        for k, (text, left, right) in enumerate(rows)
    ]


def picture(name: str) -> torch.Tensor:
    return torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(int(name)))


@torch.inference_mode()
def test_judgements_do_not_depend_on_batches() -> None:
    """Bug: left and right of another statement, or an image shared by two statements given to one of them alone."""
    predictor = predictor_of(network(), text_max_tokens=20)
    alone = predict_reasoning(predictor, records(), picture, 1)
    together = predict_reasoning(predictor, records()[::-1], picture, 4)
    assert alone == pytest.approx(together, abs=1e-4)
    turned = [record.model_copy(update={"images": record.images[::-1]}) for record in records()]
    exchanged = predict_reasoning(predictor, turned, picture, 4)
    same = {key for key in alone if abs(alone[key] - exchanged[key]) < 1e-4}
    assert same == {"dev-0-0-0", "dev-0-1-0", "dev-1-1-0"}  # all but the sentence that says "left"


def test_subsets_and_interval() -> None:
    """Bug: a subset's accuracy over the whole split, or a subset of another split that is scored in silence."""
    logits = {"dev-0-0-0": 1.0, "dev-0-1-0": 1.0, "dev-1-0-0": 1.0, "dev-1-1-0": -1.0}  # right, wrong, right, right
    found = judgement_metrics(logits, records(), {"balanced": {"dev-1-0-0", "dev-1-1-0"}})
    assert (found["accuracy"], found["consistency"], found["majority"]) == (75, 50, 50)
    assert (found["balanced/accuracy"], found["balanced/consistency"]) == (100, 100)
    assert found["interval_low"] <= 75 <= found["interval_high"]
    with pytest.raises(ValueError, match="1 unbalanced statements are not of the split, the first test1-0-0-0"):
        judgement_metrics(logits, records(), {"unbalanced": {"test1-0-0-0"}})


def test_logits_are_written_as_scores_of_statements(tmp_path: Path) -> None:
    """Bug: runs that cannot be pooled, or scores in another order than their labels."""
    placed = [record.model_copy(update={"images": [f"/x/{k}/a.png"]}) for k, record in enumerate(records())]
    write_logits(tmp_path / "scores.jsonl", {r.identifier: k - 1.5 for k, r in enumerate(placed)}, placed)
    score, found = read_scores(tmp_path / "scores.jsonl")
    assert score.tolist() == [-1.5, -0.5, 0.5, 1.5]
    assert [(record.label, record.directory) for record in found] == [
        (True, "0"), (False, "1"), (True, "2"), (False, "3")
    ]  # fmt: skip
