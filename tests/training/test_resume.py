"""Resuming is invisible: a killed run and an unbroken one end in the same bits."""

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mamo.trainer
from mamo.commands.pretrain import main as pretrain
from mamo.config.schema import RunConfig
from mamo.data.pairs import PairDataset
from mamo.tasks.registry import load_config
from mamo.trainer import train
from mamo.training import checkpoint, precision, run_dir

pytestmark = pytest.mark.usefixtures("no_curves")

SCRIPT = Path(__file__).parents[2] / "scripts" / "pretrain.py"
STATE = ("student", "teacher", "queue", "optimizer")


def ends_of(run: Path, step: int = 30) -> dict[str, bytes]:
    """Everything that must be bit-identical."""
    folder = run / "checkpoints" / f"step-{step:07d}"
    files = {name: (folder / f"{name}.safetensors").read_bytes() for name in STATE}
    return files | {"metrics": (run / run_dir.METRICS).read_bytes()}


def kill_after(config: Path, step: int, delay_s: float, *options: str) -> bool:
    """Run the script and `kill -9` it some time after `step` is in the metrics; whether it was still running."""
    command = [sys.executable, str(SCRIPT), "--config", str(config), *options]
    output_dir = Path(load_config(config).output_dir)
    metrics = output_dir / run_dir.METRICS
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= step):
            time.sleep(0.001)
        time.sleep(delay_s)
        was_running = process.poll() is None
        process.send_signal(signal.SIGKILL)
        assert process.stderr is not None
        output = process.stderr.read()
    assert metrics.exists(), output
    assert metrics.read_bytes().count(b"\n") >= step, output
    return was_running


@pytest.mark.parametrize("over", [{}, {"data": {"curriculum_scenes": [10, 24]}, "training": {"optimizer": "muon"}}])
def test_killed_run_ends_in_the_bits_of_an_unbroken_one(
    tiny_file: Callable[..., Path], tmp_path: Path, over: dict[str, Any]
) -> None:
    """Bug: queue, Adam's moments, dropout's random numbers or the place within an epoch start anew at a resume."""
    train(load_config(tiny_file(output_dir=str(tmp_path / "whole"), **over)), is_resume=False)
    config = tiny_file(**over)
    assert kill_after(config, random.randint(15, 22), random.uniform(0, 0.03))
    resumed = load_config(config, ["data.workers=1"])
    train(resumed, is_resume=True)
    whole, broken = ends_of(tmp_path / "whole"), ends_of(tmp_path / "run")
    assert [name for name in whole if whole[name] != broken[name]] == []
    steps = [row["step"] for row in run_dir.read_jsonl(tmp_path / "run" / run_dir.TIMING)]
    assert steps == list(range(1, 31))


def test_two_threads_resume_to_their_bits_and_another_number_is_told(
    tiny_file: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Bug: sums of several threads in no fixed order; a resume on fewer cores says nothing of its other last bits."""
    short = {"total_steps": 6, "checkpoint_every_steps": 3}
    names = ("whole", "broken", "moved")
    for name in names:
        tiny_file(training=short, output_dir=str(tmp_path / name)).rename(tmp_path / f"{name}.yaml")
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    files = [str(tmp_path / f"{name}.yaml") for name in names]
    child = subprocess.run(
        [sys.executable, __file__, *files], env=environment, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    assert "last bits" not in child.stderr
    assert ends_of(tmp_path / "broken", 6) == ends_of(tmp_path / "whole", 6)

    train(load_config(tmp_path / "moved.yaml"), is_resume=True)
    assert "this resume is not bit-identical: threads 1 (was 2)" in caplog.text
    assert ends_of(tmp_path / "moved", 6) != ends_of(tmp_path / "whole", 6)


@pytest.mark.slow
def test_any_number_of_kills_changes_nothing(tiny_file: Callable[..., Path], tmp_path: Path) -> None:
    """Bug: a kill in a rare moment (saving, moving the pointer, cutting back) leaves a run that resumes differently."""
    train(load_config(tiny_file(output_dir=str(tmp_path / "whole"))), is_resume=False)
    whole = ends_of(tmp_path / "whole")
    for trial in range(5):
        config = tiny_file(output_dir=str(tmp_path / f"killed-{trial}"))
        kill_after(config, random.randint(1, 14), random.uniform(0, 0.1), f"data.workers={trial % 3}")
        kill_after(config, random.randint(15, 28), random.uniform(0, 0.1), "--resume")
        command = [sys.executable, str(SCRIPT), "--config", str(config), "--resume", f"data.workers={trial % 2}"]
        subprocess.run(command, check=True)
        broken = ends_of(tmp_path / f"killed-{trial}")
        assert [name for name in whole if whole[name] != broken[name]] == []


class Stop(Exception):
    """An in-process stand-in for a kill."""


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Make the log of step `step` raise `Stop`."""
    write = run_dir.JsonlWriter.write

    def write_or_stop(self: run_dir.JsonlWriter, values: dict[str, Any]) -> None:
        write(self, values)
        if values["step"] == step and self.path.name == run_dir.METRICS:
            raise Stop

    monkeypatch.setattr(run_dir.JsonlWriter, "write", write_or_stop)


def interrupted(config: RunConfig, step: int) -> None:
    """Run `config` until the metrics of `step` are written."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(Stop):
            train(config, is_resume=False)


def test_auto_is_resolved_once(tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a resumed run probes the precision again and goes on in another one, or probing moves the first weights."""
    config = tiny(training={"precision": "auto", "device": "auto", "total_steps": 6, "checkpoint_every_steps": 3})
    timed: list[str] = []
    choose = precision.choose_precision

    def spy(device: torch.device, run_step: Callable[[Any], None]) -> str:
        timed.append("probed")
        choose(device, run_step)
        for name in ("bf16", "fp32"):
            run_step(name)
        return "fp32"

    monkeypatch.setattr("mamo.trainer.choose_precision", spy)
    interrupted(config, 4)
    train(config, is_resume=True)
    assert timed == ["probed"]
    resolved = load_config(Path(config.output_dir) / run_dir.CONFIG)
    assert resolved.training.precision == "fp32"
    assert resolved.training.device in ("cpu", "cuda")
    named = tiny(
        training={"precision": "fp32", "device": "cpu", "total_steps": 6, "checkpoint_every_steps": 3},
        output_dir=f"{config.output_dir}-named",
    )
    train(named, is_resume=False)
    if resolved.training.device == "cpu":
        assert ends_of(Path(named.output_dir), 6) == ends_of(Path(config.output_dir), 6)


def test_a_damaged_checkpoint_is_passed_over_by_name(
    tiny: Callable[..., RunConfig], caplog: pytest.LogCaptureFixture
) -> None:
    """Bug: a resume from a truncated checkpoint fails, or says nothing about going back to the one before it."""
    config = tiny(training={"total_steps": 15})
    run = Path(config.output_dir)
    interrupted(config, 12)
    (run / run_dir.METRICS).open("a").write('{"step": 13, "loss')  # torn by the kill
    with (run / "checkpoints" / "step-0000010" / "queue.safetensors").open("r+b") as file:
        file.truncate(40)
    train(config, is_resume=True)
    assert "step-0000010: damaged checkpoint, queue.safetensors has 40 bytes" in caplog.text
    whole = tiny(training={"total_steps": 15}, output_dir=f"{run}-whole")
    train(whole, is_resume=False)
    assert ends_of(run, 15) == ends_of(Path(whole.output_dir), 15)


def test_resume_needs_a_run_and_its_config(tiny: Callable[..., RunConfig], fails: Callable[..., str]) -> None:
    """Bug: a resume with another learning rate or data goes on in silence; a refused one damages the run."""
    config = tiny(training={"total_steps": 6, "checkpoint_every_steps": 3})
    assert "nothing to resume" in fails(lambda: train(config, is_resume=True))
    interrupted(config, 5)
    run = Path(config.output_dir)
    before = {
        path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.parent.name != "tensorboard"
    }
    other = tiny(training={"total_steps": 6, "checkpoint_every_steps": 3, "learning_rate": 1e-3}, seed=4)
    message = fails(lambda: train(other, is_resume=True))
    assert "seed: 3 in the run, 4 now" in message
    assert "training.learning_rate: 0.0001 in the run, 0.001 now" in message
    assert "checkpoint_every_steps" not in message
    assert "not empty: continue that run with --resume" in fails(lambda: train(config, is_resume=False))
    assert {path: path.read_bytes() for path in before} == before


def test_a_finished_run_goes_on_where_its_schedule_allows(tiny: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Bug: a constant rate cannot be prolonged, or the prolonged run is not the one that was long from the start."""
    short = {"total_steps": 4, "checkpoint_every_steps": 2, "schedule": "warmup-stable-decay"}
    longer = {**short, "total_steps": 8, "decay_steps": 3}
    whole = tiny(training=longer, output_dir=str(tmp_path / "whole"))
    train(whole, is_resume=False)
    train(tiny(training=short), is_resume=False)
    train(tiny(training=longer), is_resume=True)
    assert ends_of(tmp_path / "run", 8) == ends_of(tmp_path / "whole", 8)
    rates = [row["learning_rate"] for row in run_dir.read_jsonl(tmp_path / "run" / run_dir.METRICS)]
    assert rates[4] > rates[6] > rates[7]


@pytest.mark.parametrize(
    ("training", "now", "teacher", "key"),
    [
        ({}, {}, {}, "training.schedule: cosine"),
        (
            {"schedule": "warmup-stable-decay", "decay_steps": 2},
            {"decay_steps": 2},
            {},
            "training.schedule: warmup-stable-decay",
        ),
        ({"schedule": "warmup-stable-decay"}, {}, {"schedule": "cosine"}, "teacher.schedule: cosine"),
    ],
)
def test_a_run_that_cannot_be_longer_says_how_to_go_on(
    tiny: Callable[..., RunConfig],
    fails: Callable[..., str],
    training: dict[str, Any],
    now: dict[str, Any],
    teacher: dict[str, Any],
    key: str,
) -> None:
    """Bug: steps at a rate that fell to its end are done again at a higher one; the message's command does not run."""
    short = {"total_steps": 4, "checkpoint_every_steps": 4, "warmup_steps": 1, **training}
    config = tiny(training=short, teacher=teacher)
    train(config, is_resume=False)
    longer = tiny(training={**short, "total_steps": 7, **now}, teacher=teacher)
    message = fails(lambda: train(longer, is_resume=True))
    assert "training.total_steps: 7 now, 4 in the run" in message
    assert f"by {key} the 4 steps that are done would have been others" in message
    command = message.partition("new run: ")[2].split()
    assert command[:2] == ["mamo", "pretrain"]
    pretrain(command[2:])
    assert checkpoint.step_folder(Path(f"{config.output_dir}-longer"), 3).is_dir()
    less = tiny(training={**short, "total_steps": 3, "decay_steps": 0}, teacher=teacher)
    assert "training.total_steps: 3 now" in fails(lambda: train(less, is_resume=True))


def test_changed_training_data_is_refused(
    tiny: Callable[..., RunConfig], tmp_path: Path, fails: Callable[..., str]
) -> None:
    """Bug: the annotation file is edited between two halves of a run, and sample 7 is another picture."""
    from PIL import Image

    for i in range(8):
        Image.new("RGB", (16, 16), (i * 30, 0, 0)).save(tmp_path / f"{i}.png")
    lines = [{"image": f"{i}.png", "caption": f"a red number {i}", "image_id": str(i)} for i in range(8)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"source": "pairs", "train_file": str(file)}
    config = tiny(data=data, training={"total_steps": 6, "checkpoint_every_steps": 3})
    interrupted(config, 5)
    file.write_text("".join(json.dumps({**line, "caption": "a blue number"}) + "\n" for line in lines))
    assert "the training data or its vocabulary changed" in fails(lambda: train(config, is_resume=True))


def test_a_run_of_an_older_version_resumes(
    tiny: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]
) -> None:
    """Bug: a run whose fingerprint was made row by row is taken for one whose data changed, or changes are let pass."""
    from PIL import Image

    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    rows = [{"image": "a.png", "caption": f"a red number {i}", "image_id": "a"} for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = moved(tmp_path, tiny)
    with monkeypatch.context() as older:
        items = PairDataset.fingerprint_items
        older.setattr(PairDataset, "fingerprint_items", lambda data: items(data, by_row=True))
        interrupted(config, 3)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]))
    assert "the training data or its vocabulary changed" in fails(lambda: train(config, is_resume=True))
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(config, is_resume=True)


def test_a_run_resumes_after_its_data_folder_moved(
    tiny: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: absolute paths in the data's fingerprint, so that a moved project or another mount is "changed data"."""
    from PIL import Image

    data = tmp_path / "project" / "data"
    data.mkdir(parents=True)
    for i in range(8):
        Image.new("RGB", (16, 16), (i * 30, 0, 0)).save(data / f"{i}.png")
    lines = [json.dumps({"image": f"{i}.png", "caption": f"a red number {i}"}) + "\n" for i in range(8)]
    (data / "pairs.jsonl").write_text("".join(lines))
    monkeypatch.chdir(tmp_path / "project")
    short = {"total_steps": 6, "checkpoint_every_steps": 3}
    config = tiny(data={"source": "pairs", "train_file": "data/pairs.jsonl"}, training=short)
    interrupted(config, 5)
    (tmp_path / "project").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    train(config, is_resume=True)
    assert (tmp_path / "run" / "checkpoints" / "last").resolve().name == "step-0000006"


def test_a_moved_run_resumes_without_its_parent(tiny: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Bug: a resume wants the checkpoint that the run once started from, or the folder's old name."""
    short = {"total_steps": 6, "checkpoint_every_steps": 3}
    train(tiny(output_dir=str(tmp_path / "parent"), training=short), is_resume=False)
    config = tiny(checkpoint=str(tmp_path / "parent"), training=short)
    interrupted(config, 4)
    (tmp_path / "parent").rename(tmp_path / "elsewhere")
    (tmp_path / "run").rename(tmp_path / "moved")
    train(config.model_copy(update={"output_dir": str(tmp_path / "moved")}), is_resume=True)
    assert (tmp_path / "moved" / "checkpoints" / "last").resolve().name == "step-0000006"


def test_a_start_killed_before_its_first_checkpoint_resumes(tiny: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Bug: between the first file and the first checkpoint neither a start nor a resume is possible."""
    short = {"total_steps": 4, "checkpoint_every_steps": 4}
    config = tiny(training=short)
    run = Path(config.output_dir)
    run.mkdir()
    (run / ".config.yaml.writing").write_text("seed: ")  # killed in the first write
    interrupted(config, 2)
    for path in (run / "tokenizer").iterdir():
        path.unlink()
    (run / "tokenizer").rmdir()  # killed before the tokenizer was there
    train(config, is_resume=True)
    whole = tiny(training=short, output_dir=str(tmp_path / "whole"))
    train(whole, is_resume=False)
    assert ends_of(run, 4) == ends_of(tmp_path / "whole", 4)


def main() -> None:
    """The child process of several threads: a whole run, a broken and resumed one, one that is left broken."""
    logging.basicConfig(level=logging.INFO)
    mamo.trainer.plot_curves = lambda *_: None
    whole, broken, moved = (load_config(Path(name)) for name in sys.argv[1:])
    train(whole, is_resume=False)
    for config in (broken, moved):
        interrupted(config, 4)
    train(broken, is_resume=True)


if __name__ == "__main__":
    main()


def test_a_bad_line_of_metrics_stops_the_resume_before_it_changes_anything(
    tiny: Callable[..., RunConfig], fails: Callable[..., str]
) -> None:
    """Bug: `--resume` after an editor or a power cut put a bad line into metrics.jsonl loses the steps after it."""
    config = tiny(training={"total_steps": 4, "checkpoint_every_steps": 2})
    interrupted(config, 3)
    run = Path(config.output_dir)
    lines = (run / run_dir.METRICS).read_bytes().splitlines(keepends=True)
    (run / run_dir.METRICS).write_bytes(b"".join([lines[0], b"garbage\n", *lines[1:]]))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    message = fails(lambda: train(config, is_resume=True))
    assert "metrics.jsonl, line 2: not a JSON object with a whole number `step`: b'garbage'" in message
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def moved(folder: Path, tiny: Callable[..., RunConfig], **data: str) -> RunConfig:
    """The config of a run on the pairs in a folder."""
    short = {"total_steps": 4, "checkpoint_every_steps": 2}
    return tiny(data={"source": "pairs", "train_file": str(folder / "pairs.jsonl"), **data}, training=short)


def test_data_and_tokenizer_may_be_elsewhere_with_the_same_content(
    tiny: Callable[..., RunConfig], tmp_path: Path, fails: Callable[..., str]
) -> None:
    """Bug: data that were moved, with the same fingerprint, make a run impossible to resume; or a tokenizer of another
    vocabulary is passed over."""
    from PIL import Image

    from mamo.world.vocabulary import scenes_tokenizer

    data = tmp_path / "data"
    data.mkdir()
    for i in range(8):
        Image.new("RGB", (16, 16), (i * 30, 0, 0)).save(data / f"{i}.png")
    rows = [json.dumps({"image": f"{i}.png", "caption": f"a red number {i}"}) + "\n" for i in range(8)]
    (data / "pairs.jsonl").write_text("".join(rows))
    scenes_tokenizer().save_pretrained(data / "words")
    interrupted(moved(data, tiny, tokenizer=str(data / "words")), 3)
    elsewhere = tmp_path / "elsewhere"
    data.rename(elsewhere)
    other = scenes_tokenizer()
    other.add_tokens(["new"])
    other.save_pretrained(tmp_path / "other")
    changed = moved(elsewhere, tiny, tokenizer=str(tmp_path / "other"))
    assert "has another vocabulary than the run" in fails(lambda: train(changed, is_resume=True))
    (elsewhere / "pairs.jsonl").rename(elsewhere / "whole.jsonl")
    (elsewhere / "pairs.jsonl").write_text("".join(rows[1:]))
    same_words = moved(elsewhere, tiny, tokenizer=str(elsewhere / "words"))
    assert "the training data or its vocabulary changed" in fails(lambda: train(same_words, is_resume=True))
    (elsewhere / "whole.jsonl").replace(elsewhere / "pairs.jsonl")
    train(same_words, is_resume=True)
    assert load_config(tmp_path / "run" / "config.yaml").data.train_file == str(elsewhere / "pairs.jsonl")
    assert (tmp_path / "run" / "checkpoints" / "last").resolve().name == "step-0000004"


def test_other_heads_than_a_named_berts_are_refused(tmp_path: Path) -> None:
    """Bug: the weights of a BERT of four heads are read as two heads, as their shapes are the same."""
    from transformers import BertConfig

    from mamo.training.checkpoint import CheckpointError
    from mamo.training.resume import check_architecture
    from tests.tiny import config_of

    for name, values in {"own": {"num_attention_heads": 4}, "relu": {"hidden_act": "relu"}}.items():
        BertConfig(**{"hidden_size": 32, "num_attention_heads": 2, **values}).save_pretrained(tmp_path / name)
    stored = tmp_path / "step"
    BertConfig(hidden_size=32, num_attention_heads=4).save_pretrained(stored / run_dir.BERT)

    def with_text(**text: object) -> RunConfig:
        return config_of(model={"text": text})

    parent = with_text(bert="gone")
    for text in ({"heads": 4}, {"bert": str(tmp_path / "own")}, {"bert": "gone"}, {"bert": "gone", "heads": 1}):
        check_architecture(with_text(**text), parent, stored)
    with pytest.raises(CheckpointError, match=r"another architecture: model\.text\.heads is 2 here, 4 there$"):
        check_architecture(with_text(heads=2), parent, stored)
    with pytest.raises(CheckpointError, match=r"model\.text\.heads is 4 here, 2 there$"):
        check_architecture(with_text(bert=str(tmp_path / "own")), with_text(heads=2), tmp_path)
    with pytest.raises(CheckpointError, match=r"hidden_act of model\.text\.bert is relu here, gelu there$"):
        check_architecture(with_text(bert=str(tmp_path / "relu")), with_text(heads=2), tmp_path)


def test_a_finished_run_keeps_as_many_checkpoints_as_configured(tiny: Callable[..., RunConfig]) -> None:
    """Bug: a kill in the last save leaves a checkpoint too many, a hidden link, or `last` at another one."""
    training = {"total_steps": 3, "warmup_steps": 0, "checkpoint_every_steps": 1, "checkpoints_kept": 2}
    config = tiny(training=training)
    train(config, is_resume=False)
    folder = Path(config.output_dir) / "checkpoints"
    shutil.copytree(folder / "step-0000002", folder / "step-0000001")
    (folder / "last").unlink()
    (folder / "last").symlink_to("step-0000002")
    (folder / ".last").symlink_to("step-0000003")
    train(config, is_resume=True)
    assert sorted(path.name for path in folder.iterdir()) == ["last", "step-0000002", "step-0000003"]
    assert (folder / "last").resolve().name == "step-0000003"
