"""ITM against foils in pre-training: the losses a pair at a time, and where foils come from."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from mamo.data.pairs import PairDataset, Sample
from mamo.data.pairs_reader import read_pairs
from mamo.tasks.pretrain.foils import FoilItm, PoolAndFoilItm
from mamo.tasks.pretrain.losses import Itm
from mamo.tasks.pretrain.task import PretrainTask
from mamo.trainer import TrainingRun, train
from tests.tasks.pretrain.naive_step import CAPTIONS, make, tiny
from tests.tiny import TWO_STEPS, config_of, predictor_of

FOILS = ("a blue circle", "", "three circles", "a green ring left of a red square and of a cross", "", "a", "b", "c")
N_FOILS = 6


def with_foils(mode: str) -> tuple[PretrainTask, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A task, the ITM loss of a step, its trivial value, and each foil's loss from a pass of its own."""
    task, plain = make(tiny(("itc", "itm"), itm_negatives=mode))
    drawn = [
        (0, Sample(plain.image[row], caption, int(plain.image_id[row]), int(plain.caption_id[row]), row, (), foil))
        for row, (caption, foil) in enumerate(zip(CAPTIONS, FOILS, strict=True))
    ]
    batch = task.collator(drawn)
    targets, _ = task.compute_targets(batch, len(batch), 0)
    losses, _ = task.losses(batch, targets, 0)
    body, found = task.network.backbone, []
    for row, text in enumerate(FOILS):
        if text:
            ids = torch.tensor([task.tokenizer(text)["input_ids"]])
            valid = torch.ones_like(ids, dtype=torch.bool)
            slots = body.fusion.embed_image(body.image_encoder(batch.image[row : row + 1]))
            fused = body.fusion(slots, body.text_encoder(ids, valid), valid)
            logits = task.network.itm(fused[:, body.fusion.num_image_positions])
            found.append(functional.cross_entropy(logits, torch.tensor([0])))
    return task, losses["itm"], targets.counts["itm"], torch.stack(found).sum()


def test_foils_and_pool_add_up() -> None:
    """Bug: a foil of another sample, an empty foil as a negative, a sum divided by the number of all rows."""
    task, pool, n_pool, _ = with_foils("pool")
    assert type(next(loss for loss in task.active if loss.name == "itm")) is Itm
    task, both, n_both, foils = with_foils("both")
    assert type(next(loss for loss in task.active if loss.name == "itm")) is PoolAndFoilItm
    assert int(n_both) == int(n_pool) + N_FOILS
    torch.testing.assert_close(both * n_both, pool * n_pool + foils, atol=1e-4, rtol=1e-4)
    task, only, n_only, again = with_foils("foils")
    assert type(next(loss for loss in task.active if loss.name == "itm")) is FoilItm
    torch.testing.assert_close(again, foils)
    assert int(n_only) == len(CAPTIONS) + N_FOILS
    matches = only * n_only - foils  # those of the pairs, which are in the pool's loss too
    assert 0 < float(matches.detach()) < float((pool * n_pool).detach())


def test_a_predictor_of_the_class_prior_has_the_trivial_loss() -> None:
    """Bug: an alarm at the prior of another number of negatives."""
    for mode, n_negatives in (("pool", 2), ("foils", 1), ("both", 3)):
        task, batch = make(tiny(("itc", "itm"), itm_negatives=mode))
        share = torch.tensor(1 / (1 + n_negatives))
        entropy = -(share * share.log() + (1 - share) * (1 - share).log())
        assert task.trivial_losses(batch)["loss/itm"] == pytest.approx(float(entropy), abs=1e-6)


def pairs_file(folder: Path, **last: object) -> Path:
    for k in range(8):
        Image.new("RGB", (24, 24), (30 * k,) * 3).save(folder / f"{k}.png")
    rows = [{"image": f"{k}.png", "caption": [f"grey {k}", f"tone {k}"]} for k in range(8)]
    rows[1] |= last
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "pairs.jsonl"


def test_foils_of_pairs_are_drawn_and_disturb_no_other_draw(tmp_path: Path) -> None:
    """Bug: the caption or the crop changes where a row has foils; a foil that is the caption once cleaned."""
    file = pairs_file(tmp_path, foils=["white 1", "black 1", "  TONE   1"])
    records = read_pairs(file)
    dataset, plain = PairDataset(records, (24, 24)), PairDataset([replace(r, foils=()) for r in records], (24, 24))
    assert dataset.has_foils()
    assert not plain.has_foils()
    seen = set()
    for seed in range(40):
        sample, other = (each.load(1, np.random.default_rng(seed)) for each in (dataset, plain))
        assert sample.caption == other.caption
        assert torch.equal(sample.image, other.image)
        assert other.foil == ""
        assert sample.foil.lower() not in ("grey 1", "tone 1")
        seen.add(sample.foil)
    assert seen == {"white 1", "black 1", ""}
    assert dataset.load(0, np.random.default_rng(0)).foil == ""
    lines = ["".join(each.fingerprint_items(by_row=True)) for each in (dataset, plain)]
    assert lines[0].replace("\t('white 1', 'black 1', '  TONE   1')", "") == lines[1]
    with pytest.raises(ValueError, match=r"pairs\.jsonl:2: field 'foils' has a caption of the row, \"tone 1\""):
        read_pairs(pairs_file(tmp_path, foils=["black 1", "tone 1"]))
    for wrong in (3, [], [None], {"a": "b"}):
        with pytest.raises(ValueError, match=r"pairs\.jsonl:2: field 'foils' must be a string or a non-empty list"):
            read_pairs(pairs_file(tmp_path, foils=wrong))


def test_a_file_without_foils_is_refused(tmp_path: Path) -> None:
    """Bug: ITM learns that everything matches."""
    files = {"source": "pairs", "train_file": str(pairs_file(tmp_path)), "image_size_px": 16}
    config = config_of(data=files, losses={"itm_negatives": "both"}, output_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"data\.train_file: no pair has foils; add a field 'foils'"):
        TrainingRun(config)
    pairs_file(tmp_path, foils="white 1")
    assert TrainingRun(config).example_batch(8).has_foil.sum() == 1


@pytest.mark.usefixtures("no_curves")
def test_scenes_with_foils_train_and_their_probes_are_marked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bug: probe numbers of a network that was trained on the same rule look as those of one that was not."""
    evaluation = {"enabled": True, "retrieval_items": 8, "probe_items": 4, "rerank_k": 2}
    for mode in ("foils", "pool"):
        over = {"losses": {"itm_negatives": mode}, "training": TWO_STEPS, "evaluation": evaluation}
        train(config_of(output_dir=str(tmp_path / mode), **over), is_resume=False)
        (entry,) = json.loads((tmp_path / mode / "results.json").read_text())["evaluations"]
        assert ("foils_of_same_rule" in entry["facts"]) == (mode == "foils")
        assert ("probe/*: their foils follow the rules of the training's" in caplog.text) == (mode == "foils")
        caplog.clear()
    task = TrainingRun(config_of(**{**over, "losses": {"itm_negatives": "both"}}, output_dir=str(tmp_path / "x"))).task
    task.check_held_out(["pairs.jsonl"])  # the run was on files, whose foils follow rules of their own
    with caplog.at_level(logging.WARNING):
        found = task.evaluate(predictor_of(task.network.eval(), 24), tmp_path)
    assert "foils_of_same_rule" not in found.facts
    assert "probe/*" not in caplog.text
