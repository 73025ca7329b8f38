"""Rankings of retrieval in a file: ids, order, and agreement with the recalls."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mamo.config.schema import RunConfig
from mamo.tasks.pretrain.evaluate import evaluate_pretrained
from mamo.tasks.pretrain.rankings import coco_id
from mamo.tasks.registry import build_config
from tests.tiny import make_backbone, make_network, predictor_of, spread_weights

N = 7


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Seven images with two captions each, with ids of COCO's kind; the last without."""
    rows = []
    for k in range(N):
        pixels = np.random.default_rng(k).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{k}.png")
        texts = [f"{('a', 'one', 'two')[k % 3]} red circle {'and a blue square ' * k}", f"shape {k}"]
        row: dict[str, Any] = {"image": f"{k}.png", "caption": texts, "image_id": f"coco/{100 + k}"}
        rows.append(row if k == N - 1 else {**row, "caption_id": [10 * k, 10 * k + 1]})
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return tmp_path / "pairs.jsonl"


def config_of(pairs: Path, **evaluation: Any) -> RunConfig:
    data = {"source": "pairs", "train_file": "unused", "eval_file": str(pairs), "image_size_px": 16}
    fixed = {"rerank_k": 3, "batch_size": 4, "repeated_captions": "separate", **evaluation}
    return build_config({"output_dir": "unused", "data": data, "evaluation": fixed})


@pytest.mark.parametrize("heads", [("itc",), ("itc", "itm")])
def test_rankings_agree_with_the_recalls(pairs: Path, tmp_path: Path, heads: tuple[str, ...]) -> None:
    """Bug: the file has the order before re-ranking, rows of other queries, or items twice."""
    torch.manual_seed(0)
    network = make_network(make_backbone(), *heads)
    spread_weights(network)
    file = tmp_path / "rankings.jsonl"
    metrics = evaluate_pretrained(predictor_of(network), config_of(pairs, rankings_depth=9), None, file)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    of_caption = {str(10 * k + n): f"coco/{100 + k}" for k in range(N - 1) for n in (0, 1)}
    of_caption |= {f"coco/106#{n}": "coco/106" for n in (0, 1)}
    by = {kind: {row["query"]: row["ranking"] for row in rows if row["kind"] == kind} for kind in ("image", "caption")}
    assert set(by["caption"]) == set(of_caption)
    assert set(by["image"]) == {f"coco/{100 + k}" for k in range(N)}
    assert all(len(set(items)) == len(items) == 9 for items in by["image"].values())
    assert all(len(set(items)) == len(items) == N for items in by["caption"].values())
    stage = "rerank" if "itm" in heads else "itc"
    for depth in (1, 5):
        hits = [any(of_caption[item] == query for item in items[:depth]) for query, items in by["image"].items()]
        assert metrics[f"{stage}/i2t_r{depth}"] == pytest.approx(100 * np.mean(hits))
        hits = [of_caption[query] in items[:depth] for query, items in by["caption"].items()]
        assert metrics[f"{stage}/t2i_r{depth}"] == pytest.approx(100 * np.mean(hits))
    without = evaluate_pretrained(predictor_of(network), config_of(pairs))
    assert (dict(without), without.facts) == (dict(metrics), metrics.facts)


def test_what_contradicts_rankings(pairs: Path, tmp_path: Path) -> None:
    """Bug: merged captions, which have several ids, are named by one of them."""
    with pytest.raises(ValueError, match="rankings_depth: needs repeated_captions: separate"):
        config_of(pairs, rankings_depth=3, repeated_captions="merged")
    with pytest.raises(ValueError, match="corrected: needs rankings_depth"):
        config_of(pairs, corrected=True)
    network = make_network(make_backbone(), "itc")
    with pytest.raises(ValueError, match="'coco/106#0' is not COCO's id of an image or caption"):
        evaluate_pretrained(predictor_of(network), config_of(pairs, rankings_depth=14, corrected=True))
    assert [coco_id(name) for name in ("coco/12", "coco_3", "7")] == [12, 3, 7]
