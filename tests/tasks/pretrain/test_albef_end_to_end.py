"""An evaluation of ALBEF's weights beside that of the public implementation: ids, scores, recalls, heat.

The whole is found through MAMO_TEST_DATA (`albef/end-to-end`); `tests/fixtures/albef` is cut from it.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from mamo.config.conventions import ALBEF, conventions_of
from mamo.data.cleaning import albef_caption
from mamo.data.images import decode_image
from mamo.data.tokenizer import read_tokenizer
from mamo.evaluation.metrics.grounding import to_image_size_albef
from mamo.evaluation.metrics.retrieval import rank_shortlist, recalls
from mamo.evaluation.scorer import Scorer, eval_mode, heatmaps
from mamo.tasks.pretrain.evaluate import evaluate_pretrained
from mamo.tasks.registry import build_config
from mamo.trainer import TrainingRun

CUT = Path(__file__).parents[2] / "fixtures" / "albef"
WHOLE = Path(os.environ.get("MAMO_TEST_DATA", "absent")) / "albef" / "end-to-end"
needs_whole = pytest.mark.skipif(not WHOLE.is_dir(), reason="MAMO_TEST_DATA names no folder with albef/end-to-end")
EXPECTED = json.loads((CUT / "expected.json").read_text())
K = 10


def captions_of(folder: Path) -> list[list[str]]:
    return [row["caption"] for row in json.loads((folder / "pairs.json").read_text())]


@pytest.fixture
def vocabulary(tmp_path: Path) -> str:
    """A tokenizer folder with nothing but BERT's vocabulary."""
    shutil.copyfile(CUT / "vocab.txt", tmp_path / "vocab.txt")
    return str(tmp_path)


def test_token_ids_equal_albefs(vocabulary: str) -> None:
    """Bug: another cleaning, a [SEP], capitals, or another cut."""
    tokenizer = read_tokenizer(vocabulary, has_sep=False)
    texts = [albef_caption(text) for several in captions_of(CUT) for text in several]
    found = tokenizer(texts, padding="max_length", truncation=True, max_length=30)
    assert found["input_ids"] == EXPECTED["token_ids"]


def test_recalls_of_its_scores_equal_albefs() -> None:
    """Bug: another rank, another rule of ties, directions exchanged."""
    scores = {key: torch.from_numpy(value) for key, value in load_file(CUT / "scores.safetensors").items()}
    owner = torch.arange(16).repeat_interleave(5)
    right = torch.stack([owner, torch.arange(80)], dim=1)
    ranks = []
    for score, positive in ((scores["itm_image_to_text"], right), (scores["itm_text_to_image"], right.flip(1))):
        shortlist = score.topk(K, dim=1)
        worst = torch.full((len(score),), score.shape[1])
        ranks.append(rank_shortlist(shortlist.values, shortlist.indices, positive, score.shape[1], worst))
    check_recalls(recalls(*ranks, "rerank"))


def check_recalls(found: dict[str, float]) -> None:
    for ours, theirs in (("i2t", "txt"), ("t2i", "img")):
        for depth in (1, 5, 10):
            expected = EXPECTED["recalls_k10"][f"{theirs}_r{depth}"]
            assert found[f"rerank/{ours}_r{depth}"] == pytest.approx(expected), (ours, depth)


@pytest.fixture
def run(vocabulary: str, tmp_path: Path) -> TrainingRun:
    """A run that starts from the file, of which the config says nothing but the sizes."""
    data = {
        "source": "pairs",
        "train_file": str(WHOLE / "pairs.json"),
        "eval_file": str(WHOLE / "pairs.json"),
        "tokenizer": vocabulary,
        "image_size_px": 384,
        "text_max_tokens": 30,
        "workers": 0,
    }
    sizes = {"width": 96, "heads": 12}
    image = {**sizes, "name": "vit_base_patch16_384", "depth": 2, "patch_size_px": 16}
    text = {**sizes, "mlp_width": 384, "layers": 2}
    weights = {"mlm": 0, "mim": 0, "mrm_image": 0, "mrm_text": 0}
    values: dict[str, Any] = {
        "output_dir": str(tmp_path / "run"),
        "checkpoint": str(WHOLE / "ALBEF.pth"),
        "data": data,
        "model": {"image": image, "text": text, "fusion_type": "cross", "fusion_layers": 6, "itc_width": 256},
        "losses": {"weights": weights, "itm_pool_size": 2},
        "training": {"batch_size_global": 2, "warmup_steps": 0, "precision": "fp32", "device": "cpu"},
        "evaluation": {"rerank_k": K, "batch_size": 16},
    }
    return TrainingRun(build_config(values))


@needs_whole
def test_evaluation_equals_albefs(run: TrainingRun) -> None:
    """Bug: other pixels, other words, another score or another heat than the published weights were trained on."""
    assert conventions_of(run.config) == ALBEF
    expected = np.load(WHOLE / "expected.npz")
    check_recalls(evaluate_pretrained(run.predictor, run.config))
    rows = json.loads((WHOLE / "pairs.json").read_text())
    scorer = Scorer(run.predictor, 16, run.config.evaluation.itm_score)
    processor = scorer.processor
    with eval_mode(run.task.network):
        images = scorer.encode_images([processor.images([WHOLE / row["image"] for row in rows])])
        texts = scorer.encode_texts(*processor.texts([text for row in rows for text in row["caption"]]))
        pairs = torch.cartesian_prod(torch.arange(16), torch.arange(80))
        score = scorer.itm_scores(images, texts, *pairs.T, scorer.itm_score).view(16, 80).numpy()
        similarity = (images.feature @ texts.feature.T).numpy()
        for ours, order, theirs in (
            (score, similarity, expected["itm_image_to_text"]),
            (score.T, similarity.T, expected["itm_text_to_image"]),
        ):
            shortlist = theirs > -100
            best = np.sort(np.argsort(order, axis=1)[:, -K:], axis=1)
            assert np.array_equal(best.ravel(), shortlist.nonzero()[1])
            np.testing.assert_allclose(ours[shortlist], theirs[shortlist], atol=1e-4)
        for line in (WHOLE / "expressions.jsonl").read_text().splitlines():
            record = json.loads(line)
            image = processor.images([WHOLE / record["image"]])
            one, row = scorer.encode_texts(*processor.texts([record["expression"]])), torch.zeros(1).long()
            heat = heatmaps(scorer, image, one, row, row, "fusion")[0].double()
            (place,) = (expected["heat_expression_id"] == record["expression_id"]).nonzero()[0]
            theirs = torch.from_numpy(expected["heat"][place]).double()
            assert torch.cosine_similarity(heat.flatten(), theirs.flatten(), dim=0) > 0.9999, record["expression_id"]
            size = decode_image(WHOLE / record["image"]).shape[1:]
            whole = torch.nn.functional.interpolate(theirs[None, None], size, mode="bicubic")[0, 0].numpy()
            np.testing.assert_allclose(to_image_size_albef(theirs, size), whole, atol=1e-12)


@needs_whole
def test_the_cut_is_of_the_whole() -> None:
    """Bug: the fixture was made by something else than what its provenance says."""
    for name in ("vocab.txt", "pairs.json", "expected.json"):
        assert (CUT / name).read_bytes() == (WHOLE / name).read_bytes()
    whole, cut = np.load(WHOLE / "expected.npz"), load_file(CUT / "scores.safetensors")
    assert all(np.array_equal(cut[key], whole[key]) for key in cut)
