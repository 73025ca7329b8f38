"""The whole way on the embedded world: its table, and that a killed chain goes on."""

from pathlib import Path

import pytest

from mamo.config.values import merge
from mamo.study import pipeline
from mamo.study.pipeline import ROWS, Row, errors_removed, run_pipeline, table_of
from mamo.training import run_dir
from tests.tiny import config_of

ROOT = Path(__file__).parents[2]
FEW = [
    *("training.total_steps=2", "training.warmup_steps=1", "training.batch_size_global=4"),
    *("training.precision=fp32", "training.device=cpu", "training.checkpoint_every_steps=1", "data.workers=0"),
    *("evaluation.probe_items=4", "evaluation.retrieval_items=4", "evaluation.rerank_k=2"),
]


def test_errors_removed_is_a_share_of_the_errors() -> None:
    """Bug: a difference in points passes for a share of errors: 90 against 80 removes half of them, not a tenth."""
    assert errors_removed(90.0, 80.0) == pytest.approx(50.0)
    assert errors_removed(70.0, 80.0) == pytest.approx(-50.0)
    assert errors_removed(100.0, 100.0) == 0.0


def test_the_table_sets_each_number_in_its_column() -> None:
    """Bug: fine-tuned and from scratch exchanged, or a baseline taken from the run from scratch."""
    row = Row("vqa", ("vqa/accuracy",), 80.0, ("question_only/accuracy",), "scenes-full-vqa")
    results = {
        "vqa": {"vqa/accuracy": 90.0, "question_only/accuracy": 40.0},
        "vqa-from-scratch": {"vqa/accuracy": 60.0, "question_only/accuracy": 35.0},
        "vqa/zero-shot": {"vqa/accuracy": 50.0},
    }
    *_, line = table_of(results, [row]).splitlines()
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["vqa", "`vqa/accuracy`", "80.0", "90.0", "60.0", "75.0", "50.0", "`question_only/accuracy` 40.0"]


def small_pretraining(folder: Path) -> Path:
    file = folder / "pretraining.yaml"
    file.write_text(
        "output_dir: x\ndata: {image_size_px: 32, difficulty: full}\nlosses: {itm_pool_size: 2}\nmodel:\n"
        "  image: {width: 16, depth: 1, heads: 2}\n"
        "  text: {width: 16, heads: 2, mlp_width: 32, layers: 1}\n"
        "  fusion_layers: 1\n"
    )
    return file


def test_the_table_holds_every_task(tmp_path: Path) -> None:
    """Bug: a row asks for a number that its task does not give, which ends the chain after all its trainings."""
    arguments = (tmp_path / "chain", small_pretraining(tmp_path), ROOT / "configs" / "finetune")
    table = run_pipeline(*arguments, [*FEW, "training.batch_size_global=32"])
    _, _, *lines = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()]
    assert [line[0] for line in lines] == ["retrieval", "retrieval", "vqa", "nlvr2", "entailment", "grounding"]
    for line in lines:
        assert 0 <= float(line[3]) <= 100
        assert 0 <= float(line[4]) <= 100
        assert (line[6] != "—") == (line[0] in ("retrieval", "grounding"))


def test_a_killed_chain_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: finished stages are trained again, a begun one is refused as not empty, or the table differs."""
    pretraining = small_pretraining(tmp_path)
    trained: list[str] = []
    real_train, rows = pipeline.train, [row for row in ROWS if row.task == "nlvr2"]

    def counting_train(config: pipeline.RunConfig, is_resume: bool) -> None:
        if len(trained) == 2 and not is_resume:  # killed as the third stage begins
            trained.append("killed")
            raise KeyboardInterrupt
        trained.append(Path(config.output_dir).name)
        real_train(config, is_resume)

    monkeypatch.setattr(pipeline, "train", counting_train)
    arguments = (tmp_path / "chain", pretraining, ROOT / "configs" / "finetune", FEW, rows)
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(*arguments)
    table = run_pipeline(*arguments)
    assert trained == ["pretraining", "nlvr2", "killed", "nlvr2-from-scratch"]
    assert run_pipeline(*arguments) == table == (tmp_path / "chain" / "table.md").read_text()
    assert len(trained) == 4
    assert "`reasoning/accuracy`" in table


def test_a_finished_stage_of_another_config_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a chain run again with another learning rate tabulates the results of the old one."""
    config = config_of(output_dir=str(tmp_path), evaluation={"enabled": True})
    run_dir.write_config(tmp_path, config)
    run_dir.write_evaluations(tmp_path, [{"step": config.training.total_steps, "metrics": {}}])
    monkeypatch.setattr(pipeline, "step_folders", lambda folder: [folder])
    monkeypatch.setattr(pipeline, "train", lambda *_: pytest.fail("it is finished"))
    pipeline.stage(config)
    for section, key, value in (("training", "learning_rate", 0.5), ("evaluation", "rerank_k", 3)):
        over = merge({"evaluation": {"enabled": True}}, {section: {key: value}})
        other = config_of(output_dir=str(tmp_path), **over)
        with pytest.raises(ValueError, match=rf"{section}\.{key}"):
            pipeline.stage(other)
