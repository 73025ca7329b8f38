"""Mixtures of files: exact shares, repeats, batches of one file, resume, several processes."""

import itertools
import logging
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mamo.config.schema import RunConfig
from mamo.data.pairs import PairDataset
from mamo.data.pairs_reader import write_json_lines
from mamo.data.sampler import OneSourceSampler, StepSampler, samples_seen, turns
from mamo.reports.card import model_card
from mamo.tasks.sources import pair_dataset
from mamo.trainer import TrainingRun, train
from mamo.training import checkpoint
from mamo.training.run_dir import read_jsonl
from tests.tiny import TWO_STEPS, config_of

SIZES = {"a": 3, "b": 7, "c": 12}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Three files of 3, 7 and 12 pairs with captions of several sentences."""
    for k in range(4):
        Image.new("RGB", (24, 24), (60 * k, 0, 0)).save(tmp_path / f"{k}.png")
    for name, size in SIZES.items():
        rows = [
            {"image": f"{k % 4}.png", "caption": f"{name} red {k}. blue circle. A star.", "image_id": f"{name}/{k}",
             "long": f"{name} long {k}"}
            for k in range(size)
        ]  # fmt: skip
        write_json_lines(tmp_path / f"{name}.jsonl", rows)
    return {name: str(tmp_path / f"{name}.jsonl") for name in SIZES}


def data_of(config: RunConfig) -> PairDataset:
    found = pair_dataset(config)
    assert isinstance(found, PairDataset)
    return found


def mixture(files: dict[str, str], **data: Any) -> dict[str, Any]:
    entries = [{"file": files["a"], "repeat": 3}, {"file": files["b"], "caption_keys": {"long": 0.5, "caption": 0.5}}]
    return {"source": "pairs", "train": entries, **data}


def test_a_repeat_is_the_file_named_again(files: dict[str, str]) -> None:
    """Bug: `repeat: 3` is not three times the pairs, in another order, or another run than the file named thrice."""
    entries = [{"file": files["a"], "repeat": 3}, {"file": files["b"]}]
    repeated = data_of(config_of(data={"source": "pairs", "train": entries}))
    named = data_of(config_of(data={"source": "pairs", "train_file": [files["a"]] * 3 + [files["b"]]}))
    assert len(repeated) == len(named) == 3 * 3 + 7
    assert list(repeated.fingerprint_items()) == list(named.fingerprint_items())
    for k in range(len(named)):
        one, two = (data.load(k, np.random.default_rng(k)) for data in (repeated, named))
        assert (one.caption, one.image_id, one.sample_id) == (two.caption, two.image_id, two.sample_id)
    assert repeated.sources == [(files["a"], 9), (files["b"], 7)]


def test_each_file_has_its_own_keys(files: dict[str, str]) -> None:
    """Bug: the keys of one entry are those of all, or `data.caption_keys` overrules an entry's own."""
    data = data_of(config_of(data=mixture(files, caption_keys={"caption": 1.0})))
    texts = [{data.load(k, np.random.default_rng(n)).caption[:6] for n in range(20)} for k in (0, 9)]
    assert texts == [{"a red "}, {"b red ", "b long"}]


def test_files_take_turns_in_proportion() -> None:
    """Bug: a file's share of the batches drifts, or one waits for many turns."""
    for sizes in ((3, 7, 12), (1, 1), (1, 1000), (5,)):
        counts = Counter[int]()
        for step, source in enumerate(itertools.islice(turns(sizes), 3 * sum(sizes)), 1):
            counts[source] += 1
            for k, size in enumerate(sizes):
                assert abs(counts[k] - step * size / sum(sizes)) < 1
        assert [counts[k] for k in range(len(sizes))] == [3 * size for size in sizes]


@pytest.mark.parametrize("world", [1, 2])
def test_batches_of_one_file(world: int) -> None:
    """Bug: a batch mixes files, an epoch of a file repeats or loses pairs, processes draw different files, or a resume
    begins anew.
    """
    sizes, first = (3, 7, 12), (0, 3, 10, 22)

    def batches(start: int, stop: int) -> list[list[tuple[int, int]]]:
        shares = [list(OneSourceSampler(sizes, 4, 5, start, stop, rank, world)) for rank in range(world)]
        return [[key for part in parts for key in part] for parts in zip(*shares)]

    found = batches(0, 88)
    assert batches(31, 88) == found[31:]
    alone = list(OneSourceSampler(sizes, 4, 5, 0, 88, 0, 1))
    assert found == alone
    drawn: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for batch in found:
        (source,) = {next(k for k in range(3) if first[k] <= index < first[k + 1]) for _, index in batch}
        drawn[source] += [index for _, index in batch]
    for source, size in enumerate(sizes):
        assert len(drawn[source]) == 88 * 4 * size // 22
        for epoch in range(len(drawn[source]) // size):
            assert sorted(drawn[source][epoch * size : (epoch + 1) * size]) == [
                *range(first[source], first[source + 1])
            ]
    assert drawn[2][:12] != drawn[2][12:24]


@pytest.mark.parametrize("batch_from", ["mixture", "one_file"])
def test_a_mixture_resumes_to_the_same_bits_and_counts_its_pictures(
    files: dict[str, str], tmp_path: Path, batch_from: str, no_curves: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Bug: a resume in the middle of a mixture draws other pairs, captions or sentences; or the card counts what the
    batches did not have.
    """
    data = mixture(files, batch_from=batch_from, sub_caption_sentences=2, workers=0)
    training = {"total_steps": 7, "checkpoint_every_steps": 3, "checkpoints_kept": 5}
    config = config_of(data=data, training=training, output_dir=str(tmp_path / "run"), losses={"queue_size": 8})
    with caplog.at_level(logging.INFO):
        train(config, is_resume=False)
    whole = read_jsonl(tmp_path / "run/metrics.jsonl")
    newest = checkpoint.step_folders(tmp_path / "run")[-1]
    bits = {name: (newest / f"{name}.safetensors").read_bytes() for name in ("student", "queue")}
    for folder in checkpoint.step_folders(tmp_path / "run")[1:]:
        shutil.rmtree(folder)
    train(config, is_resume=True)
    assert read_jsonl(tmp_path / "run/metrics.jsonl") == whole
    assert {name: (newest / f"{name}.safetensors").read_bytes() for name in ("student", "queue")} == bits
    run = TrainingRun(config)
    sampler_counts = Counter[str]()
    for batch in run.batches(0, 0):
        sampler_counts.update("a" if index < 9 else "b" for index in batch.sample_id.tolist())
    line = f"{sampler_counts['a']} of {files['a']}, {sampler_counts['b']} of {files['b']}"
    assert f"pictures seen in 7 steps: {line}" in caplog.text
    assert f"| pictures seen | {line} |" in model_card(newest, config)


def test_the_count_of_pictures_is_that_of_the_batches() -> None:
    """Bug: the partial epoch is counted by shares, or an epoch too many."""
    sizes = [3, 7, 12]
    for steps in (0, 1, 5, 6, 23):
        indices = [index for keys in StepSampler(22, 4, 9, 0, steps, 0, 1) for _, index in keys]
        assert samples_seen(sizes, 4, 9, steps) == [
            sum(low <= index < high for index in indices) for low, high in ((0, 3), (3, 10), (10, 22))
        ]


def test_what_may_change_at_a_resume(
    files: dict[str, str], tmp_path: Path, no_curves: None, fails: Callable[..., str]
) -> None:
    """Bug: a moved mixture cannot be resumed, or one with another repeat can."""
    config = config_of(data=mixture(files, workers=0), output_dir=str(tmp_path / "run"), training=TWO_STEPS)
    train(config, is_resume=False)
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in (*tmp_path.glob("*.jsonl"), *tmp_path.glob("*.png")):
        file.rename(moved / file.name)
    elsewhere = {name: str(moved / f"{name}.jsonl") for name in SIZES}
    other = mixture(elsewhere, workers=0)
    train(config_of(**{**config_over(config), "data": other}), is_resume=True)
    other["train"][0]["repeat"] = 2
    message = fails(lambda: train(config_of(**{**config_over(config), "data": other}), is_resume=True))
    assert "the training data or its vocabulary changed" in message


def config_over(config: RunConfig) -> dict[str, Any]:
    return {"output_dir": config.output_dir, "training": TWO_STEPS}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": [{"file": "a", "repeat": 0}]}, "data.train.0.repeat"),
        ({"train": [{"file": "a", "caption_keys": {"x": 0.0}}]}, "data.train.0.caption_keys: the weights sum to 0"),
        ({"train": [{"file": "a"}], "train_file": "b"}, "data.train: contradicts data.train_file"),
        ({"train_file": "b", "caption_keys": {"x": 0.0, "y": 0.0}}, "data.caption_keys: the weights sum to 0"),
        ({"train_file": "b", "caption_keys": {"x": -1.0}}, "data.caption_keys.x"),
        ({"source": "scenes", "batch_from": "one_file"}, "data.batch_from: contradicts data.source: scenes"),
    ],
)
def test_a_mistake_in_a_mixture_is_one_line(data: dict[str, Any], message: str) -> None:
    """Bug: weights that choose nothing, or keys that nothing reads, are accepted."""
    with pytest.raises(ValueError) as caught:
        config_of(data={"source": "pairs", **data})
    assert message in str(caught.value)
    assert str(caught.value).count("\n") == 1
