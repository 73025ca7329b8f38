"""The files of a run besides its checkpoints."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mamo.training import run_dir


def test_cut_back_keeps_what_the_checkpoint_has_seen(tmp_path: Path) -> None:
    """Bug: steps are logged twice after a resume, or a line torn by the kill makes the file unreadable."""
    path = tmp_path / "metrics.jsonl"
    lines = [f'{{"step": {i}, "loss": 0.{i}}}\n' for i in range(1, 6)]
    path.write_text("".join(lines) + '{"step": 6, "lo')
    run_dir.truncate_jsonl(path, 9)
    assert path.read_text() == "".join(lines)
    run_dir.truncate_jsonl(path, 3)
    assert path.read_text() == "".join(lines[:3])
    run_dir.truncate_jsonl(path, 0)
    assert path.read_text() == ""
    run_dir.truncate_jsonl(tmp_path / "absent.jsonl", 3)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_line_log_appends_full_precision_at_once(tmp_path: Path) -> None:
    """Bug: lines wait in a buffer when the process is killed, or numbers are rounded."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    log = run_dir.JsonlWriter(path)
    log.write({"step": 2, "loss": 0.1 + 0.2})
    assert run_dir.read_jsonl(path) == [{"step": 1}, {"step": 2, "loss": 0.30000000000000004}]  # not closed yet
    log.close()


def test_a_full_disk_is_told_with_the_path(tmp_path: Path) -> None:
    """Bug: `[Errno 28] No space left on device` without a word about where."""
    log = run_dir.JsonlWriter(Path("/dev/full"))
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        log.write({"step": 1})
    log.close()


def test_replace_text_leaves_old_or_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a kill or a full disk in the middle of `results.json` loses the evaluations before it."""
    run_dir.write_evaluations(tmp_path, [{"step": 1}])

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"results\.json"):
        run_dir.write_evaluations(tmp_path, [{"step": 1}, {"step": 2}])
    assert json.loads((tmp_path / "results.json").read_text()) == {"evaluations": [{"step": 1}]}


@pytest.mark.parametrize("text", ['{"evaluations": [{"st', "", "\0" * 40, "[]", "{}", '{"evaluations": 5}'])
def test_torn_results_are_named(tmp_path: Path, text: str) -> None:
    """Bug: a resume stops with "Unterminated string starting at: line 1" and no word of which file and what to do."""
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=r"results\.json is not a valid results\.json: .*Delete it"):
        run_dir.read_evaluations(tmp_path)


@pytest.mark.parametrize("below", ["file/run", "file"])
def test_claim_refuses_what_it_cannot_write(tmp_path: Path, below: str) -> None:
    """Bug: an output_dir under a file is found out after the model was built, or as a traceback."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="cannot be written"):
        run_dir.create_output_dir(tmp_path / below)


def test_claim_refuses_a_folder_in_use(tmp_path: Path) -> None:
    """Bug: a second start overwrites the first run."""
    run_dir.create_output_dir(tmp_path / "new" / "run")
    run_dir.create_output_dir(tmp_path / "new" / "run")
    (tmp_path / "new" / "run" / "config.yaml").write_text("")
    with pytest.raises(ValueError, match="--resume"):
        run_dir.create_output_dir(tmp_path / "new" / "run")


LINES = [f'{{"step": {i}, "loss": 0.{i}}}\n'.encode() for i in range(1, 6)]
BAD_LINES = [
    b"garbage\n",
    b"\0" * 20 + b"\n",
    b"\n",
    b"null\n",
    b"{}\n",
    b"[3]\n",
    b'{"step": null}\n',
    b'{"step": "2"}\n',
    b'{"step": true}\n',
    b'{"step": 1.5}\n',
    b"\xff\xfe{}\n",
    b'{"step": 2, "lo{"step": 3}\n',
    b"[" * 100_000 + b"\n",
    b'{"step": ' + b"1" * 5000 + b"}\n",
]


@pytest.mark.parametrize("place", [0, 1, 5])
@pytest.mark.parametrize("bad", BAD_LINES, ids=lambda line: repr(line[:12]))
def test_a_bad_line_is_named_and_nothing_is_cut(tmp_path: Path, bad: bytes, place: int) -> None:
    """Bug: metrics.jsonl is cut at the first line that does not parse, and a resume loses all steps after it."""
    path = tmp_path / "metrics.jsonl"
    content = b"".join([*LINES[:place], bad, *LINES[place:]])
    path.write_bytes(content)
    for read in (lambda: run_dir.truncate_jsonl(path, 5), lambda: run_dir.read_jsonl(path)):
        with pytest.raises(ValueError, match=rf"metrics\.jsonl, line {place + 1}: not a JSON object") as caught:
            read()
        assert len(str(caught.value)) < 300
    assert path.read_bytes() == content


@pytest.mark.parametrize("torn", [b'{"step": 6, "lo', b"\0" * 30, b"\xff", b"{}", b"null", b" "])
def test_a_torn_last_line_is_dropped_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture, torn: bytes) -> None:
    """Bug: the line that a kill cut off stops the resume, or goes without a word."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(LINES) + torn)
    run_dir.truncate_jsonl(path, 5)
    assert path.read_bytes() == b"".join(LINES)
    assert f"{path}: removing the last line (6), which was cut off" in caplog.text


def test_steps_that_are_cut_are_logged_and_a_whole_last_line_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Bug: a resume removes the steps after its checkpoint without a word; a line without its line break is lost."""
    caplog.set_level("INFO")
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(LINES).rstrip())
    run_dir.truncate_jsonl(path, 5)
    assert path.read_bytes() == b"".join(LINES)
    assert caplog.text == ""
    run_dir.truncate_jsonl(path, 3)
    assert path.read_bytes() == b"".join(LINES[:3])
    assert f"{path}: removing 2 lines after step 3" in caplog.text


@pytest.mark.parametrize("entry", ["{}", "3", '{"step": "6"}', "null", "[" * 100_000])
def test_results_without_steps_are_named(tmp_path: Path, entry: str) -> None:
    """Bug: a resume ends in a traceback at an evaluation without a step."""
    (tmp_path / "results.json").write_text('{"evaluations": [' + entry + "]}")
    with pytest.raises(ValueError, match=r"results\.json is not a valid results\.json"):
        run_dir.read_evaluations(tmp_path)


class Lines:
    """A tracker that fails at a step."""

    def __init__(self, fails_at: int = -1) -> None:
        self.fails_at = fails_at
        self.steps: list[int] = []

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if step == self.fails_at:
            raise RuntimeError("no network\nat all")
        self.steps.append(step)

    def close(self) -> None:
        raise RuntimeError("no network")


def test_a_tracker_that_fails_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """Bug: a tracker that raises ends the training with a traceback and without a checkpoint."""
    trackers: list[run_dir.Tracker] = [failing := Lines(2), whole := Lines()]
    for step in (1, 2, 3):
        run_dir.log_to(trackers, step, {"loss/itc": 1.0})
    assert (failing.steps, whole.steps) == ([1], [1, 2, 3])
    assert trackers == [whole]
    run_dir.close(trackers)
    assert [record.getMessage() for record in caplog.records] == [
        "the tracker Lines failed at step 2; it gets no further steps: RuntimeError no network at all",
        "the tracker Lines failed at its end: RuntimeError no network",
    ]


@pytest.mark.parametrize(
    ("trackers", "message"),
    [
        (Lines(), "pass a list of objects with `log` and `close`, not Lines"),
        (Lines, "pass a list of objects with `log` and `close`, not Lines"),
        (None, "not NoneType"),
        ("tensorboard", "not str"),
        ([Lines], "number 0 is the class Lines; pass an object of it"),
        ([Lines(), print], "number 1, builtin_function_or_method, has no method log"),
    ],
)
def test_trackers_are_checked_before_training(trackers: Any, message: str) -> None:
    """Bug: one tracker in place of a list is a bare TypeError, after the run's folder was made."""
    import mamo
    from tests.tiny import values_of

    with pytest.raises(ValueError, match=f"^trackers: .*{message}"):
        mamo.train(values_of(), trackers=trackers)
