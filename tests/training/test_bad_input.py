"""Mistakes of the user: one clear message, exit code 2, nothing lost. Bad samples: counted, named, within a budget."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import BertConfig

from mamo.config.schema import RunConfig
from mamo.data.images import FREE_SKIPS
from mamo.data.loader import loader_errors
from mamo.tasks.registry import load_config
from mamo.trainer import TrainingRun, train
from mamo.training import checkpoint, run_dir
from mamo.world.vocabulary import scenes_tokenizer

pytestmark = pytest.mark.usefixtures("no_curves")

SCRIPT = Path(__file__).parents[2] / "scripts" / "pretrain.py"
BAD = (3, 11, 20, 41, 60)
SHORT = {"total_steps": 6, "checkpoint_every_steps": 3}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.lerning_rate=1e-3", "training.lerning_rate: unknown key; did you mean `learning_rate`?"),
        ("masking.image_ratio=1.5", "masking.image_ratio:"),
        ("training.total_steps=true", "training.total_steps:"),
        ("training.learning_rate=true", "training.learning_rate:"),
        ("losses.itm_pool_size=3", "losses.itm_pool_size: 3 does not divide the micro-batch of 8"),
        ("losses.itc_candidates=batch", "losses.queue_size: contradicts losses.itc_candidates: batch"),
        ("data.train_file=x.jsonl", "data.train_file: contradicts data.source: scenes"),
        ("checkpoint=/nowhere", "/nowhere: no checkpoint found"),
        ("output_dir=/dev/null/run", "output_dir /dev/null/run cannot be written"),
        ("output_dir=/proc/run", "output_dir /proc/run cannot be written"),
        ("data.tokenizer=/nowhere/tokenizer", "no such folder"),
        ("data.image_size_px=17", "17x17 px is not divisible by the patch size 8"),
        ("data.image_size_px=8", "8x8 px is one patch of 8 px"),
        ("model.image.name=vit_tny", "vit_tny"),
    ],
)
def test_a_mistake_is_one_message(
    tiny_file: Callable[..., Path], tmp_path: Path, fails: Callable[..., str], override: str, expected: str
) -> None:
    """Bug: a traceback, exit code 1 or 0, or files of a run that never began, which then block the next start."""
    file = tiny_file(training=SHORT)
    assert expected in fails(lambda: train(load_config(file, [override]), is_resume=False))
    run_dir.create_output_dir(tmp_path / "run")  # still free


def test_a_number_in_any_notation(tiny_file: Callable[..., Path]) -> None:
    """Bug: PyYAML reads `1e-4` as text."""
    file = tiny_file()
    file.write_text(file.read_text() + "\nteacher: {momentum: 9e-1}\n")
    config = load_config(file, ["training.learning_rate=1e-4"])
    assert (config.training.learning_rate, config.teacher.momentum) == (1e-4, 0.9)


def test_the_script_exits_with_2_and_one_line(tiny_file: Callable[..., Path]) -> None:
    """Bug: the script itself does not go through the common way out."""
    command = [sys.executable, str(SCRIPT), "--config", str(tiny_file()), "masking.image_ratio=1.5", "sead=1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "masking.image_ratio" in done.stderr
    assert "sead: unknown key; did you mean `seed`?" in done.stderr


def test_starting_from_another_architecture_or_vocabulary(
    tiny: Callable[..., RunConfig], tmp_path: Path, fails: Callable[..., str]
) -> None:
    """Bug: weights are loaded in part, or words mean other words than in the checkpoint."""
    train(tiny(training=SHORT), is_resume=False)
    parent = str(tmp_path / "run")
    wider = tiny(checkpoint=parent, output_dir=str(tmp_path / "a"), model={"fusion_layers": 2}, training=SHORT)
    message = fails(lambda: train(wider, is_resume=False))
    assert "step-0000006: student is of another architecture" in message
    assert "backbone.fusion.layers.1" in message
    tokenizer = tmp_path / "run" / "tokenizer" / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["red"], vocabulary["blue"] = vocabulary["blue"], vocabulary["red"]
    tokenizer.write_text(json.dumps(content))
    data = {"tokenizer": str(tokenizer.parent)}
    swapped = tiny(checkpoint=parent, output_dir=str(tmp_path / "b"), data=data, training=SHORT)
    assert "another vocabulary; set data.tokenizer=" in fails(lambda: train(swapped, is_resume=False))


def test_heads_of_attention_are_part_of_the_architecture(
    tiny: Callable[..., RunConfig], tmp_path: Path, fails: Callable[..., str]
) -> None:
    """Bug: weights of the same shapes mean something else with other heads, and the run goes on in silence."""
    train(tiny(training=SHORT), is_resume=False)
    model = {"image": {"heads": 4}, "text": {"heads": 4}}
    config = tiny(checkpoint=str(tmp_path / "run"), output_dir=str(tmp_path / "next"), model=model, training=SHORT)
    message = fails(lambda: train(config, is_resume=False))
    assert "model.image.heads is 4 here, 2 there; model.text.heads is 4 here, 2 there" in message
    run_dir.create_output_dir(tmp_path / "next")  # still free


@pytest.mark.parametrize("key", ["eval_file", "statements_file"])
def test_files_to_evaluate_on_are_read_before_the_first_step(
    tiny: Callable[..., RunConfig], pairs: Callable[..., Any], fails: Callable[..., str], tmp_path: Path, key: str
) -> None:
    """Bug: a mistyped file is found after hours of training, and the run can then not be resumed with the right one."""
    data = pairs((), "raise")
    data["eval_file"] = str(tmp_path / "eval.jsonl")
    Path(data["eval_file"]).write_text(Path(data["train_file"]).read_text().replace("shape", "picture"))
    settings = {"training": {"total_steps": 2, "checkpoint_every_steps": 1}, "evaluation": {"enabled": True}}
    config = tiny(data={**data, key: str(tmp_path / "nowhere.jsonl")}, **settings)
    assert "nowhere.jsonl" in fails(lambda: train(config, is_resume=False))
    assert not (tmp_path / "run/checkpoints").exists()
    folds = tiny(data=data, training=settings["training"], evaluation={"enabled": True, "retrieval_folds": 7})
    assert "7 does not divide 64 images" in fails(lambda: train(folds, is_resume=False))
    train(tiny(data={**data, "eval_file": None}, training=settings["training"]), is_resume=False)
    later = tiny(data=data, **settings)
    train(later, is_resume=True)  # an evaluation is no part of what a run computes
    assert (tmp_path / "run/results.json").is_file()


def test_a_bert_with_fewer_positions_than_tokens(
    tiny: Callable[..., RunConfig], tmp_path: Path, fails: Callable[..., str]
) -> None:
    """Bug: an index error out of transformers in the first step, once the folder is claimed."""
    values = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48, "max_position_embeddings": 16}
    BertConfig(vocab_size=len(scenes_tokenizer()), **values).save_pretrained(tmp_path / "bert")
    config = tiny(model={"text": {"bert": str(tmp_path / "bert")}}, training=SHORT)
    message = fails(lambda: train(config, is_resume=False))
    assert "data.text_max_tokens: 24 is more than the 16 positions of" in message


def test_a_damaged_start_is_refused(tiny: Callable[..., RunConfig], tmp_path: Path, fails: Callable[..., str]) -> None:
    """Bug: a run starts from half a checkpoint, or the good one beside it is not offered."""
    train(tiny(training=SHORT), is_resume=False)
    file = tmp_path / "run" / "checkpoints" / "step-0000006" / "student.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    config = tiny(checkpoint=str(tmp_path / "run"), output_dir=str(tmp_path / "next"), training=SHORT)
    message = fails(lambda: train(config, is_resume=False))
    assert "damaged checkpoint, student.safetensors has 100 bytes" in message
    assert f"checkpoint={tmp_path}/run/checkpoints/step-0000003" in message


def test_a_full_disk_stops_a_run_that_then_resumes(
    tiny: Callable[..., RunConfig], fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: closing and drawing fail too on a full disk and hide the message, or the run cannot go on afterwards."""
    config = tiny(training=SHORT)
    run = Path(config.output_dir)
    real = checkpoint.save_file

    def full(tensors: Any, path: Path) -> None:
        if "step-0000006" in str(path):
            raise OSError(28, "No space left on device")
        real(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        patch.setattr("mamo.trainer.plot_curves", lambda folder, _: full({}, folder / "step-0000006"))
        message = fails(lambda: train(config, is_resume=False))
    assert "No space left on device" in message
    assert f"{run}/checkpoints/step-0000006" in message
    assert checkpoint.resolve(run).name == "step-0000003"
    train(config, is_resume=True)
    assert checkpoint.resolve(run).name == "step-0000006"


# ---- bad samples ---------------------------------------------------------------------------------------------------


@pytest.fixture
def pairs(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`pairs(bad)` writes 64 pairs, those named with a broken image; returns the `data` section that reads them."""

    def write(bad: Sequence[int], policy: str, budget: float = 0.5, workers: int = 0) -> dict[str, Any]:
        for i in range(64):
            path = tmp_path / f"{i}.png"
            Image.new("RGB", (20, 16), (4 * i, 0, 99)).save(path)
            if i in bad:
                path.write_bytes(path.read_bytes()[:40])
        lines = [{"image": f"{i}.png", "caption": f"a shape {i}", "image_id": str(i)} for i in range(64)]
        file = tmp_path / "pairs.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        samples = {"policy": policy, "budget": budget}
        return {"source": "pairs", "train_file": str(file), "workers": workers, "bad_samples": samples}

    return write


def counts(run: Path) -> tuple[int, int]:
    state = json.loads((run / "checkpoints" / "last" / "state.json").read_text())
    return state["samples_seen"], state["samples_skipped"]


def test_skipped_samples_are_counted_and_named_across_a_resume(
    tiny: Callable[..., RunConfig], pairs: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Bug: bad samples vanish in silence, stop a run within its budget, or are forgotten at a resume."""
    config = tiny(data=pairs(BAD, "skip"), training={"total_steps": 8, "checkpoint_every_steps": 4})  # 8 x 8: one epoch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mamo.training.loop.Loop.save", _save_then_stop(4))
        with pytest.raises(KeyboardInterrupt):
            train(config, is_resume=False)
    run = Path(config.output_dir)
    first = [record.message for record in caplog.records if record.message.startswith("skipped sample")]
    assert counts(run)[1] == len(first)
    train(config, is_resume=True)
    lines = [record.message for record in caplog.records if record.message.startswith("skipped sample")]
    assert counts(run)[1] == len(lines) == len(BAD)  # one epoch draws each once
    assert all(sum(f"/{i}.png:" in line for line in lines) == 1 for i in BAD)


def _save_then_stop(at: int) -> Callable[..., None]:
    from mamo.training.async_writer import AsyncWriter
    from mamo.training.loop import Loop

    save = Loop.save

    def wrapped(self: Loop, step: int, writing: AsyncWriter) -> None:
        save(self, step, writing)
        writing.wait()
        if step == at:
            raise KeyboardInterrupt

    return wrapped


def test_a_run_out_of_budget_resumes_with_a_larger_one(
    tiny: Callable[..., RunConfig], pairs: Callable[..., Any], fails: Callable[..., str]
) -> None:
    """Bug: hours of training are lost to a few broken images, since the budget counts as part of the run."""
    training = {"total_steps": 8, "checkpoint_every_steps": 2}
    fails(lambda: train(tiny(data=pairs(BAD, "skip", budget=0.0), training=training), is_resume=False))
    config = tiny(data=pairs(BAD, "skip", budget=0.5), training=training)
    train(config, is_resume=True)
    assert counts(Path(config.output_dir))[1] == len(BAD)


def test_over_budget_stops(
    tiny: Callable[..., RunConfig], pairs: Callable[..., Any], fails: Callable[..., str]
) -> None:
    """Bug: a folder that is half gone trains on the other half."""
    config = tiny(data=pairs(range(0, 64, 2), "skip", budget=0.001), training={"total_steps": 8})
    message = fails(lambda: train(config, is_resume=False))
    assert "samples could not be used, more than the budget of 0.10%" in message
    assert f"and {FREE_SKIPS} free ones" in message
    assert ".png" in message


def test_workers_tell_a_bad_sample_in_the_same_line(tiny: Callable[..., RunConfig], pairs: Callable[..., Any]) -> None:
    """Bug: with workers the message is a traceback of another process, or another sample is named."""
    messages = []
    for workers in (0, 2):
        later = [n for n in BAD if n >= 8]  # the first samples are read when the run is built
        run = TrainingRun(tiny(data=pairs(later, "raise", workers=workers), training={"total_steps": 8}))
        with pytest.raises(ValueError) as caught, loader_errors(workers):
            for _ in run.batches(0, workers):
                pass
        messages.append(re.sub(r" at 0x\w+", "", str(caught.value)))
    assert messages[0] == messages[1]
    assert "\n" not in messages[0]
    assert ".png: " in messages[0]


def test_policy_raise_stops_the_run(
    tiny: Callable[..., RunConfig], pairs: Callable[..., Any], fails: Callable[..., str]
) -> None:
    """Bug: the default policy forgives."""
    message = fails(lambda: train(tiny(data=pairs([0], "raise")), is_resume=False))
    assert "/0.png: " in message
    assert message.count("\n") == 1
