"""Conventions of weights: set where a file leaves them open, inherited, kept by a resume."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mamo
from mamo.config.conventions import ALBEF, conventions_of, with_conventions
from mamo.config.schema import RunConfig
from mamo.evaluation.protocols import PROTOCOLS, apply_protocol, protocol_name
from mamo.models.convert_albef import _views
from mamo.reports.card import model_card
from mamo.tasks.registry import build_config, finetune_config, is_same_network, load_stored_config
from mamo.trainer import TrainingRun, train
from mamo.training import checkpoint
from tests.tiny import config_of, finetuning_values, write_config

CROSS: dict[str, Any] = {
    "model": {"fusion_type": "cross"},
    "losses": {"weights": {"mim": 0, "mrm_image": 0, "mrm_text": 0}},
}
STEPS = {"training": {"total_steps": 2, "checkpoint_every_steps": 1, "warmup_steps": 0}}


@pytest.fixture(scope="module")
def albef_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in ALBEF's layout, of a tiny random network."""
    network = TrainingRun(config_of(**CROSS)).task.network
    state = dict(_views(network.backbone, network.mlm)) | {"temp": network.temperature.detach()}
    state |= {f"itm_head.{key}": value for key, value in network.itm.classifier.state_dict().items()}
    path = tmp_path_factory.mktemp("albef") / "ALBEF.pth"
    torch.save({"model": {key: value.clone() for key, value in state.items()}}, path)
    return path


def test_a_file_of_ones_own_keeps_the_keys_that_it_sets() -> None:
    """Bug: a key that the user wrote is replaced in silence."""
    adopted, contradicted = with_conventions(config_of(model={"text": {"sep": True}}), ALBEF)
    assert contradicted == {"model.text.sep": False}
    assert conventions_of(adopted) == {**ALBEF, "model.text.sep": True}
    assert set(conventions_of(config_of())) == set(ALBEF)
    assert not set(conventions_of(config_of()).items()) & set(ALBEF.items())
    assert with_conventions(config_of("mlim"), ALBEF)[0].evaluation.itm_score == "match"  # it has no other of the keys


@pytest.mark.usefixtures("no_curves")
def test_runs_that_start_from_albefs_weights_have_its_conventions(
    albef_file: Path, tmp_path: Path, tiny: Callable[..., RunConfig]
) -> None:
    """Bug: published weights see other pixels and words than they were trained on, at first or after a fine-tuning."""
    folder = tmp_path / "run"
    config = tiny(checkpoint=str(albef_file), output_dir=str(folder), **CROSS, **STEPS)
    train(config, is_resume=False)
    stored = load_stored_config(checkpoint.resolve(folder))
    assert conventions_of(stored) == ALBEF
    step = checkpoint.resolve(folder)
    card = model_card(step, stored)
    assert "`model.image.pixel_statistics: clip`" in card
    assert "(ALBEF's)" in card
    model = mamo.load(folder)
    assert model.network.backbone.image_encoder.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    words = model.processor(texts=["A red-and-blue circle, isn't it?"])["input_ids"][0].tolist()
    tokenizer = model.processor.tokenizer
    assert words == [
        tokenizer.cls_token_id, *tokenizer("a red and blue circle isnt it", add_special_tokens=False)["input_ids"]
    ]  # fmt: skip
    model.save_pretrained(tmp_path / "exported")
    again = mamo.load(tmp_path / "exported")
    assert again.processor(texts=["red?"])["input_ids"].tolist() == model.processor(texts=["red"])["input_ids"].tolist()

    train(config, is_resume=True)  # its own file says nothing of the conventions
    head = {"head": "classifier", "answer_min_count": 1}
    fine = write_config(tmp_path / "fine.yaml", finetuning_values("vqa", output_dir=str(tmp_path / "vqa"), vqa=head))
    tuned = finetune_config(fine, [f"checkpoint={folder}"], is_resume=False)
    assert conventions_of(tuned) == ALBEF
    batch = TrainingRun(tuned).example_batch(2)
    assert tokenizer.sep_token_id not in batch.input_ids  # but each answer ends with it
    assert (batch.answer_ids == tokenizer.sep_token_id).any(dim=2).equal(batch.answer_is_valid.any(dim=2))
    second = tiny(checkpoint=str(folder), output_dir=str(tmp_path / "second"), **CROSS, **STEPS)
    assert conventions_of(TrainingRun(second).config) == ALBEF
    values = apply_protocol("pairs-zeroshot", stored.model_dump(mode="json"), is_same_network)
    values["data"]["eval_file"] = "x"
    evaluated = build_config(values)
    assert conventions_of(evaluated) == {**ALBEF, "evaluation.heat_resize": "cut"}  # which it does not read
    assert protocol_name("pairs-zeroshot", evaluated) == "pairs-zeroshot-k16-match"


def test_public_protocols_have_the_published_rules() -> None:
    """Bug: a number beside published ones is ranked by another score, or by merged captions."""
    values = config_of().model_dump(mode="json")
    for name in [name for name in PROTOCOLS if name.startswith(("coco", "flickr30k"))]:
        fixed = apply_protocol(name, values, is_same_network)["evaluation"]
        assert (fixed["itm_score"], fixed["repeated_captions"]) == ("match", "separate")
    fixed = apply_protocol("refcocop-weak", values, is_same_network)["evaluation"]
    assert (fixed["itm_score"], fixed["heat_resize"]) == ("match", "uncut")
    assert apply_protocol("scenes-easy-zeroshot", values, is_same_network)["evaluation"]["itm_score"] == "difference"
