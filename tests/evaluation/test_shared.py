"""Evaluation by two processes gives the very numbers of one process, within a run and after it, in flat memory."""

import contextlib
import io
import json
import os
import runpy
import socket
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

import mamo.trainer
from mamo.config.schema import RunConfig
from mamo.data.images import BadSampleError
from mamo.data.pairs import load_image
from mamo.data.transforms import eval_transform
from mamo.evaluation.predictor import Predictor
from mamo.evaluation.scorer import EncodedImages, Scorer
from mamo.evaluator import evaluate
from mamo.tasks.pretrain.evaluate import evaluate_pretrained
from mamo.tasks.registry import load_config
from mamo.tasks.restore import restore_task
from mamo.trainer import train
from mamo.training import checkpoint, run_dir
from tests.tiny import config_of, spread_weights, values_of, write_config

ROOT = Path(__file__).parents[2]
SIZES = {"retrieval_items": 5, "probe_items": 4, "rerank_k": 3, "batch_size": 2}
CONFIG: dict[str, Any] = {
    "data": {"train_scenes": 8, "text_max_tokens": 16},
    "losses": {"queue_size": 8, "itm_pool_size": 2},
    "training": {"total_steps": 1, "batch_size_global": 4, "warmup_steps": 0, "parallel": "fsdp"},
    "evaluation": {"enabled": True, **SIZES},
}
COMMAND = ["protocol=scenes-easy-zeroshot", *(f"evaluation.{name}={value}" for name, value in SIZES.items())]
GALLERIES = {"odd": 9, "smaller than the processes": 1, "broken": 4}


def write_gallery(folder: Path, n_images: int) -> None:
    """Noise, two captions an image; of a broken gallery the third image, which the second process reads."""
    folder.mkdir()
    rng = np.random.default_rng(n_images)
    rows, statements = [], []
    for k in range(n_images):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{k}.png")
        several = [f"{('a', 'two', 'three')[k % 3]} red circle {'and a large blue square ' * k}", f"one shape {k}"]
        rows.append({"image": f"{k}.png", "caption": several, "image_id": k})
        for text, label in zip(several, (True, False)):
            statements.append({"image": f"{k}.png", "sentence": text, "label": label, "directory": str(k % 2)})
    if folder.name == "broken":
        (folder / "2.png").write_bytes(b"")
    for name, lines in (("pairs", rows), ("statements", statements)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def gallery_config(folder: Path, rerank_k: int = 3) -> RunConfig:
    """The run's config, to be evaluated on a gallery."""
    files = {f"{key}_file": str(folder / f"{name}.jsonl") for key, name in (("eval", "pairs"), ("train", "pairs"))}
    files["statements_file"] = str(folder / "statements.jsonl")
    data = {"source": "pairs", "text_max_tokens": 16, **files}
    return config_of(**{**CONFIG, "data": data, "evaluation": {"enabled": True, **SIZES, "rerank_k": rerank_k}})


def wild(folder: Path) -> Predictor:
    """The run's network with weights far from the small start, where all scores are nearly equal."""
    run = folder / "run"
    step = checkpoint.resolve(run)
    _, predictor = restore_task(step, load_config(run / run_dir.CONFIG), torch.device("cpu"))
    torch.manual_seed(0)
    spread_weights(predictor.network)
    return predictor


def on_galleries(folder: Path) -> dict[str, Any]:
    """Metrics of each gallery, or what was wrong with it."""
    predictor, found = wild(folder), {}
    for name in GALLERIES:
        try:
            found[name] = evaluate_pretrained(predictor, gallery_config(folder / name), folder / f"{name}.scores")
        except BadSampleError as error:
            found[name] = str(error)
    return found


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Two processes train, evaluate within the run, by the script and on the galleries: folder, and what each found."""
    folder = tmp_path_factory.mktemp("shared")
    for name, n_images in GALLERIES.items():
        write_gallery(folder / name, n_images)
    write_config(folder / "config.yaml", values_of(output_dir=str(folder / "run"), **CONFIG))
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        ports = [str(free.getsockname()[1]) for free in (one, other)]
    environment = {
        **os.environ, "MPLBACKEND": "Agg", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT),
        "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2",
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), *ports],
            env={**environment, "RANK": str(number), "LOCAL_RANK": str(number)},
        )
        for number in (0, 1)
    ]
    assert [process.wait() for process in started] == [0, 0]
    return folder, [json.loads((folder / f"found-{number}.json").read_text()) for number in (0, 1)]


def test_two_processes_score_galleries_as_one_does(shared: tuple[Path, list[dict[str, Any]]]) -> None:
    """Bug: pairs that no process scored, scores of other pairs, features in another order, one error alone."""
    folder, found = shared
    scores = {name: (folder / f"{name}.scores").read_text() for name in ("odd", "smaller than the processes")}
    expected = on_galleries(folder)
    assert {name: (folder / f"{name}.scores").read_text() for name in scores} == scores
    for alone in found:
        assert alone["galleries"] == expected
    assert "2.png" in expected["broken"]
    assert 0 < expected["odd"]["rerank/i2t_r5"] < 100
    recalls = [f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)]
    assert any(expected["odd"][f"rerank/{name}"] != expected["odd"][f"itc/{name}"] for name in recalls)


def test_two_processes_evaluate_a_run_as_one_does(shared: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    """Bug: weights of one FSDP shard alone, numbers by the number of processes, results printed or written twice."""
    folder, found = shared
    settings = [f"evaluation.{name}={value}" for name, value in SIZES.items()]
    entry = evaluate(folder / "run", "scenes-easy-zeroshot", settings, tmp_path)
    [within] = run_dir.read_evaluations(folder / "run")
    assert within["metrics"] == entry["metrics"]
    assert {"rerank/rsum", "grounding/pointing"} <= entry["metrics"].keys()
    assert run_dir.read_evaluations(folder / "by script") == [entry]
    assert "rerank/rsum" in found[0]["printed"]
    assert found[1]["printed"] == ""


def test_galleries_are_scored_as_pair_by_pair(shared: tuple[Path, list[dict[str, Any]]]) -> None:
    """Bug: an image encoded again is another one than the row that its feature stands in."""
    folder, _ = shared
    predictor, config = wild(folder), gallery_config(folder / "odd", rerank_k=20)
    network, tokenizer = predictor.network, predictor.processor.tokenizer
    backbone = network.backbone
    metrics = evaluate_pretrained(predictor, config)
    records = [json.loads(line) for line in (folder / "odd/pairs.jsonl").read_text().splitlines()]
    texts = [text for record in records for text in record["caption"]]
    score = np.empty((len(records), len(texts)))
    with torch.inference_mode():
        for i, record in enumerate(records):
            pixels = eval_transform(load_image(str(folder / "odd" / record["image"])), (16, 16))[None]
            image = backbone.fusion.embed_image(backbone.image_encoder(pixels))
            for t, text in enumerate(texts):
                ids = torch.tensor([tokenizer(text.strip(), truncation=True, max_length=16)["input_ids"]])
                is_valid = torch.ones_like(ids, dtype=torch.bool)
                fused = backbone.fusion(image, backbone.text_encoder(ids, is_valid), is_valid)
                mismatch, match = network.itm(fused[:, int(backbone.fusion.text_positions(torch.tensor(0)))])[0]
                score[i, t] = match - mismatch
    for depth in (1, 5, 10):
        best = np.array([max(row[2 * i : 2 * i + 2]) for i, row in enumerate(score)])
        wrong = [(np.delete(row, [2 * i, 2 * i + 1]) >= best[i]).sum() for i, row in enumerate(score)]
        assert metrics[f"rerank/i2t_r{depth}"] == pytest.approx(100 * np.mean(np.array(wrong) < depth))
        rank = [(np.delete(column, t // 2) >= column[t // 2]).sum() for t, column in enumerate(score.T)]
        assert metrics[f"rerank/t2i_r{depth}"] == pytest.approx(100 * np.mean(np.array(rank) < depth))


def test_tokens_of_a_gallery_are_not_kept(
    shared: tuple[Path, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: memory that grows with the gallery: 5,000 images at 384 px are 9 GB of tokens."""
    folder, _ = shared
    original, seen, alive = Scorer.encode_images, [], []

    def encode_images(self: Scorer, batches: Any) -> EncodedImages:
        encoded = original(self, batches)
        seen.append(weakref.ref(encoded.tokens))
        alive.append(sum(len(tokens) for tokens in (found() for found in seen) if tokens is not None))
        return encoded

    monkeypatch.setattr(Scorer, "encode_images", encode_images)
    evaluate_pretrained(wild(folder), gallery_config(folder / "odd"))
    assert len(seen) >= 2 * 3
    assert max(alive) <= 2 * SIZES["batch_size"]


def main() -> None:
    """One of the two processes."""
    folder, ports = Path(sys.argv[1]), sys.argv[2:]
    mamo.trainer.plot_curves = lambda *_: None
    mamo.trainer.write_run_report = lambda run, loop: None
    os.environ["MASTER_PORT"] = ports[0]
    train(load_config(folder / "config.yaml"), is_resume=False)
    os.environ["MASTER_PORT"] = ports[1]
    sys.argv = ["evaluate.py", f"checkpoint={folder / 'run'}", f"output_dir={folder / 'by script'}", *COMMAND]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(str(ROOT / "scripts/evaluate.py"), run_name="__main__")
    number = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=number, world_size=2)
    found = {"printed": printed.getvalue(), "galleries": on_galleries(folder)}
    (folder / f"found-{number}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
