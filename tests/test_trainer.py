"""A run from its config to `results.json`."""

import importlib.metadata
import itertools
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mamo import evaluator, trainer
from mamo.config.schema import RunConfig
from mamo.evaluator import evaluate
from mamo.tasks.pretrain.task import PretrainTask
from mamo.tasks.registry import finetune_config, load_config
from mamo.tasks.restore import restore_task
from mamo.training import checkpoint, run_dir
from mamo.training.async_writer import AsyncWriter
from mamo.training.loop import Loop
from tests.tiny import TWO_STEPS, config_of, finetuning_values, write_config

EVALUATION = {"enabled": True, "retrieval_items": 8, "probe_items": 8, "rerank_k": 3, "batch_size": 8}


def test_a_run_leaves_what_the_readme_promises(tiny: Callable[..., RunConfig]) -> None:
    """Bug: a file, a key or a loss is missing from what a run writes; a clock's number is in the metrics."""
    config = tiny(training={"total_steps": 3, "checkpoint_every_steps": 2}, evaluation=EVALUATION)
    trainer.train(config, is_resume=False)
    run = Path(config.output_dir)
    names = {path.name for path in run.iterdir()}
    assert names == {
        "config.yaml",
        "metrics.jsonl",
        "timing.jsonl",
        "tensorboard",
        "tokenizer",
        "checkpoints",
        "results.json",
        "curves.png",
        "report.html",
    }
    assert load_config(run / "config.yaml") == config
    rows = run_dir.read_jsonl(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    losses = {f"loss/{name}" for name in ("itc", "itm", "mlm", "mim", "mrm_image", "mrm_text")}
    weights = {name.replace("loss", "weight") for name in losses}
    assert losses | weights | {"learning_rate", "gradient_norm"} <= rows[0].keys()
    assert not {"samples_per_s", "data_wait_share", "peak_memory_mib"} & rows[0].keys()
    timing = run_dir.read_jsonl(run / "timing.jsonl")
    assert timing[0].keys() == {"step", "samples_per_s", "data_wait_share", "peak_memory_mib"}
    (result,) = json.loads((run / "results.json").read_text())["evaluations"]
    assert {"protocol", "split", "checkpoint", "seed", "versions", "metrics"} <= result.keys()
    assert (result["split"], result["seed"]) == ("test", 3)
    assert (run / result["checkpoint"]).resolve() == checkpoint.resolve(run)
    assert result["versions"]["torch"] == importlib.metadata.version("torch")
    wanted = {"itc/i2t_r1", "itc/t2i_r10", "rerank/t2i_r1", "probe/attribute_swap/itm", "masked_word/colour"}
    assert wanted <= result["metrics"].keys()
    assert all(0 <= value <= 100 for name, value in result["metrics"].items() if "rsum" not in name)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the evaluation by one that costs nothing; returns the list it appends to."""
    calls: list[str] = []

    def zero_shot(predictor: Any, *others: Any) -> dict[str, float]:
        calls.append("evaluated")
        return {"itc/i2t_r1": float(sum(p.detach().double().sum() for p in predictor.network.parameters()))}

    monkeypatch.setattr("mamo.tasks.pretrain.task.evaluate_pretrained", zero_shot)
    return calls


@pytest.mark.usefixtures("no_curves")
def test_a_kill_around_an_evaluation_loses_and_doubles_none(
    tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Bug: an evaluation that was due at the checkpoint is left out after a resume, or stands there twice."""
    calls = counted(monkeypatch)
    settings = {
        "training": {"total_steps": 8, "checkpoint_every_steps": 2},
        "evaluation": {**EVALUATION, "every_steps": 4},
    }
    trainer.train(tiny(output_dir=str(tmp_path / "whole"), **settings), is_resume=False)
    assert len(calls) == 2

    config = tiny(**settings)
    save = Loop.save
    for stop in (4, 6, 8):  # right after the checkpoint, before the evaluation that is due

        def save_then_stop(self: Loop, step: int, writing: AsyncWriter, stop: int = stop) -> None:
            save(self, step, writing)
            writing.wait()
            if step == stop:
                raise KeyboardInterrupt

        monkeypatch.setattr(Loop, "save", save_then_stop)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(config, is_resume=(stop > 4))
    monkeypatch.setattr(Loop, "run", lambda *_: pytest.fail("a step was trained after the last"))
    trainer.train(config, is_resume=True)  # the last evaluation alone
    trainer.train(config, is_resume=True)  # nothing at all
    assert len(calls) == 4
    whole, broken = (run_dir.read_evaluations(tmp_path / name) for name in ("whole", "run"))
    assert [entry["step"] for entry in whole] == [4, 8]
    assert whole == broken


@pytest.mark.usefixtures("no_curves")
def test_results_are_cut_back_to_the_checkpoint(
    tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: an evaluation of weights that no checkpoint holds any more stays in `results.json`."""
    counted(monkeypatch)
    config = tiny(training={"total_steps": 8, "checkpoint_every_steps": 4}, evaluation={**EVALUATION, "every_steps": 2})
    trainer.train(config, is_resume=False)
    run = Path(config.output_dir)
    whole = run_dir.read_evaluations(run)
    assert [entry["step"] for entry in whole] == [2, 4, 6, 8]
    run_dir.write_evaluations(run, [*whole[:2], {**whole[2], "metrics": {"stale": 1.0}}])
    file = run / "checkpoints" / "step-0000008" / "student.safetensors"
    file.write_bytes(b"")
    trainer.train(config, is_resume=True)
    assert run_dir.read_evaluations(run) == whole


def test_a_run_begins_with_its_curriculum(tiny: Callable[..., RunConfig]) -> None:
    """Bug: the stages of the config do not reach the order of the run's batches."""
    batches = itertools.islice(trainer.TrainingRun(tiny(data={"curriculum_scenes": [16, 16]})).batches(0, 0), 4)
    seen = [number for batch in batches for number in batch.sample_id.tolist()]
    assert sorted(seen[:16]) == list(range(16))
    assert sorted(seen[16:]) == list(range(16, 32))


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize("start", [0, 3, 29])
def test_the_first_batch_waits_for_no_worker(
    start: int, tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: the first step waits for the imports of a loader process, or a batch is loaded twice or not at all."""
    run = trainer.TrainingRun(tiny())
    expected = [batch.sample_id.tolist() for batch in run.batches(start, 0)]
    make_loader, asked = trainer.make_loader, []

    def recorded(source: Any, collator: Any, sampler: Any, workers: int, pin_memory: bool) -> Any:
        asked.append((len(sampler), workers))
        return make_loader(source, collator, sampler, 0, pin_memory)

    monkeypatch.setattr(trainer, "make_loader", recorded)
    assert [batch.sample_id.tolist() for batch in run.batches(start, 2)] == expected
    assert asked == [(1, 0), (29 - start, 2)]


def test_a_data_set_smaller_than_the_batch_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bug: each picture is several times in a batch, and nothing says so."""
    few = "4 samples are fewer than training.batch_size_global = 8: a batch has each 2.0 times"
    for n_scenes, said in ((4, few), (8, "")):
        caplog.clear()
        folder = str(tmp_path / str(n_scenes))
        config = config_of(data={"train_scenes": n_scenes}, training=TWO_STEPS, output_dir=folder)
        with caplog.at_level(logging.INFO):
            trainer.train(config, is_resume=False)
        assert said in caplog.text
        assert ("are fewer than" in caplog.text) == bool(said)


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_loading_is_said_once_and_counts_come_first(
    precision: str, pretrained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Bug: a fine-tuning with automatic precision prints its loading lines twice, the counts between long lists."""
    values = finetuning_values("vqa", output_dir=str(tmp_path / "run"), training={"precision": precision})
    config = finetune_config(write_config(tmp_path / "c.yaml", values), [f"checkpoint={pretrained}"], is_resume=False)
    with caplog.at_level(logging.INFO):
        trainer.train(config, is_resume=False)
    lines = [message for message in caplog.messages if "tensors loaded" in message]
    assert len(lines) == 1
    assert re.search(r": \d+ tensors loaded, \d+ interpolated, \d+ new, \d+ unused; new: answer", lines[0])
    assert sum("answer list" in message for message in caplog.messages) == 1


@pytest.mark.usefixtures("no_curves")
def test_a_finished_run_is_not_resumed_with_another_evaluation(
    tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Bug: config.yaml and the report are of another evaluation file than results.json, at exit code 0."""
    counted(monkeypatch)
    monkeypatch.setattr("mamo.trainer.write_run_report", lambda *_: None)
    for name in ("train", "first", "second"):
        Image.new("RGB", (16, 16), (len(name) * 30, 0, 0)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.json").write_text(json.dumps([{"image": f"{name}.png", "caption": f"a {name} dog"}] * 8))
    files = {"source": "pairs", "train_file": str(tmp_path / "train.json")}

    def config(name: str, **evaluation: int) -> RunConfig:
        return tiny(
            training={"total_steps": 2, "checkpoint_every_steps": 1},
            evaluation={"enabled": True, **evaluation},
            data={**files, "eval_file": str(tmp_path / f"{name}.json")},
        )

    trainer.train(config("first"), is_resume=False)
    before = {path: path.read_bytes() for path in (tmp_path / "run").glob("*.*") if path.is_file()}
    for other in (config("second"), config("first", rerank_k=3)):
        with pytest.raises(ValueError, match=r"is finished, and its results are of another .*`mamo evaluate check"):
            trainer.train(other, is_resume=True)
    assert {path: path.read_bytes() for path in before} == before
    trainer.train(config("first", batch_size=3), is_resume=True)
    run_dir.write_evaluations(tmp_path / "run", [])  # as if killed before the evaluation
    trainer.train(config("second"), is_resume=True)
    assert len(run_dir.read_evaluations(tmp_path / "run")) == 1


def test_the_teacher_is_evaluated_on_request(
    tiny: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: the student is evaluated under the teacher's name, the weights stay exchanged, or a head that shares its
    embeddings keeps the student's."""
    monkeypatch.setattr(trainer, "write_run_report", lambda *_: None)
    monkeypatch.setattr(trainer, "plot_curves", lambda *_: None)
    long = {"total_steps": 4, "checkpoint_every_steps": 2, "learning_rate": 1e-2, "warmup_steps": 0}
    over = {"training": long, "model": {"dropout": 0.0}}
    config = tiny(evaluation={**EVALUATION, "network": "teacher", "every_steps": 2}, **over)
    trainer.train(config, is_resume=False)
    plain = tiny(evaluation=EVALUATION, output_dir=str(tmp_path / "plain"), **over)
    trainer.train(plain, is_resume=False)
    run, folder = Path(config.output_dir), checkpoint.step_folder(Path(config.output_dir), 4)
    other = Path(plain.output_dir)
    assert (run / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    *_, result = run_dir.read_evaluations(run)
    assert result["protocol"].endswith("-teacher-custom")
    assert result["metrics"] != run_dir.read_evaluations(other)[-1]["metrics"]

    task, predictor = restore_task(folder, plain, torch.device("cpu"))
    teacher = checkpoint.read_tensors(folder, "teacher")
    backbone = {key.removeprefix("module."): value for key, value in teacher.items()}
    task.network.backbone.load_state_dict(backbone)
    assert task.evaluate(predictor, tmp_path) == result["metrics"]
    again, averaged = restore_task(folder, config, torch.device("cpu"))
    assert again.evaluate(averaged, tmp_path) == result["metrics"]
    sizes = [f"evaluation.{key}={EVALUATION[key]}" for key in ("retrieval_items", "probe_items", "rerank_k")]
    entry = evaluate(other, "scenes-easy-zeroshot", [*sizes, "evaluation.network=teacher"], tmp_path / "elsewhere")
    assert entry["metrics"] == result["metrics"]
    assert entry["protocol"] == "scenes-easy-zeroshot-teacher-custom"


def test_a_network_without_a_teacher_evaluates_none(tmp_path: Path) -> None:
    """Bug: a task without a teacher fails at its first evaluation, hours later."""
    with pytest.raises(ValueError, match=r"evaluation\.network: task vqa has no teacher; use student"):
        config_of("vqa", evaluation={"network": "teacher"})


def test_the_best_checkpoint_is_kept(
    tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]
) -> None:
    """Bug: the newest, the worst or a later one of equals is kept; the best is pruned; a resume forgets it."""
    values = iter([1.0, 3.0, 2.0, 3.0, 0.0, 4.0, 1.0])
    monkeypatch.setattr(PretrainTask, "evaluate", lambda *_: {"itc/i2t_r1": next(values), "recon/error": 1.0})
    monkeypatch.setattr(trainer, "write_run_report", lambda *_: None)
    monkeypatch.setattr(trainer, "plot_curves", lambda *_: None)
    short = {"total_steps": 5, "checkpoint_every_steps": 1, "schedule": "warmup-stable-decay"}
    every = {**EVALUATION, "every_steps": 1}
    config = tiny(training={**short, "keep_best": "itc/i2t_r1"}, evaluation=every)
    trainer.train(config, is_resume=False)
    run = Path(config.output_dir)
    best = run / "checkpoints" / "best"
    assert [path.name for path in checkpoint.step_folders(run)] == [f"step-{k:07d}" for k in (2, 4, 5)]
    assert checkpoint.resolve(best).name == "step-0000002"
    trainer.train(
        tiny(training={**short, "keep_best": "itc/i2t_r1", "total_steps": 7}, evaluation=every), is_resume=True
    )
    assert [path.name for path in checkpoint.step_folders(run)] == [f"step-{k:07d}" for k in (6, 7)]
    assert checkpoint.resolve(best).name == "step-0000006"
    restored = evaluator.restore(best, "scenes-easy-zeroshot", [])  # whose evaluation has no `every_steps`
    assert (restored.folder.name, restored.config.training.keep_best) == ("step-0000006", None)
    values = iter([9.0])
    other = tiny(training={**short, "keep_best": "itc/i2t_r5"}, evaluation=every, output_dir=f"{run}-other")
    message = fails(lambda: trainer.train(other, is_resume=False))
    assert "training.keep_best: the evaluation has no 'itc/i2t_r5', but itc/i2t_r1" in message
    typo = tiny(training={**short, "keep_best": "itc/i2t"}, evaluation=every, output_dir=f"{run}-typo")
    message = fails(lambda: trainer.train(typo, is_resume=False))
    assert (
        "training.keep_best: task pretrain has no metric 'itc/i2t'; its metrics: itc/rsum, itc/i2t_r1, itc/i2t_r5"
        in message
    )
    assert not Path(f"{run}-typo/metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({}, "needs evaluation.every_steps"),
        ({"enabled": False, "every_steps": 5}, "needs evaluation.every_steps"),
        ({"enabled": True, "every_steps": 7}, "evaluation.every_steps 7 is no multiple of"),
    ],
)
def test_only_saved_and_evaluated_steps_can_be_the_best(evaluation: dict[str, Any], message: str) -> None:
    """Bug: a run learns at its end that nothing was compared, or that the best step was never saved."""
    with pytest.raises(ValueError, match=f"training.keep_best: {message}"):
        config_of(training={"keep_best": "itc/i2t_r1"}, evaluation=evaluation)
