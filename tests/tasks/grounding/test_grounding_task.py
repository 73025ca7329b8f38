"""Grounding fine-tuning: what ITM is trained on, and what it is refused on."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from mamo.config.schema import RunConfig
from mamo.data.pairs_reader import clean_caption
from mamo.evaluation.metrics.grounding import to_image_size, to_image_size_albef, to_image_size_bicubic
from mamo.evaluation.results import Metrics
from mamo.tasks.grounding import evaluate
from mamo.tasks.registry import finetune_config
from mamo.trainer import TrainingRun
from tests.tiny import finetuning_values, write_config


def config(folder: Path, pretrained: Path, **data: object) -> RunConfig:
    losses = {"itm_negatives": "foils"}
    values = finetuning_values("grounding", output_dir=str(folder / "run"), data=data, losses=losses)
    file = write_config(folder / "grounding.yaml", values)
    return finetune_config(file, [f"checkpoint={pretrained}"], is_resume=False)


def test_each_image_meets_its_expression_and_its_foil(pretrained: Path, tmp_path: Path) -> None:
    """Bug: foils of other samples, labels exchanged, padding that is attended to, a mean over the micro-batch."""
    run = TrainingRun(config(tmp_path, pretrained))
    network = run.task.network.eval()
    batch = run.example_batch(8)
    targets, _ = run.task.compute_targets(batch, 4, 0)
    parts = [run.task.losses(batch.part(k, k + 4), targets, k) for k in (0, 4)]
    losses = []
    for k, record in enumerate(run.source.source.records[:8]):
        slots = network.backbone.fusion.embed_image(network.backbone.image_encoder(batch.image[k : k + 1]))
        for text, label in ((record.expression, 1), (record.foil, 0)):
            ids = torch.tensor([run.tokenizer(clean_caption(text))["input_ids"]])
            valid = torch.ones_like(ids, dtype=torch.bool)
            fused = network.backbone.fusion(slots, network.backbone.text_encoder(ids, valid), valid)
            logits = network.itm(fused[:, network.backbone.fusion.num_image_positions])
            losses.append(functional.cross_entropy(logits, torch.tensor([label])))
    torch.testing.assert_close(sum(part["itm"] for part, _ in parts), torch.stack(losses).mean(), atol=1e-5, rtol=1e-4)
    assert 0 <= float(sum(metrics["itm_accuracy"] for _, metrics in parts)) <= 1


def test_a_record_without_a_foil_is_named(pretrained: Path, tmp_path: Path) -> None:
    """Bug: an empty text as a negative, which any network tells at once."""
    rows = [
        {"image": "a.png", "expression_id": 1, "expression": "a red circle", "foil": "a blue circle"},
        {"image": "a.png", "expression_id": 2, "expression": "a red square"},
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"source": "records", "train_file": str(tmp_path / "train.jsonl")}
    with pytest.raises(ValueError, match=r"expression_id 2 \(.*a\.png\) has no foil"):
        TrainingRun(config(tmp_path, pretrained, **data))


def test_heat_of_records_is_resized_as_the_config_says(
    tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: numbers on RefCOCO+ that are not its protocol's, or flat heat at the border of the embedded world."""
    used: list[object] = []
    monkeypatch.setattr(evaluate, "load_records", lambda *asked: ([], None))
    monkeypatch.setattr(evaluate, "ground_records", lambda *asked: used.append(asked[-1]) or Metrics({}))
    files = {"source": "records", "train_file": "a.jsonl", "eval_file": "b.jsonl"}
    run = TrainingRun(tiny(task="grounding"))
    for data, resize in (({}, "cut"), (files, "cut"), (files, "uncut")):
        config = tiny(task="grounding", data=data, evaluation={"heat_resize": resize})
        evaluate.evaluate_grounding(config, run.predictor)
    assert used == [to_image_size, to_image_size_bicubic, to_image_size_albef]
