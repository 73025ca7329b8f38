"""The `mamo` command: light help, configs by name, and an exit code and one line for whatever ends it."""

import importlib
import os
import pkgutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import mamo.commands
from mamo.cli import COMMANDS, main, run
from mamo.config.shipped import config_folder, config_names, find_config
from mamo.training.preemption import Preempted

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "torchvision", "transformers", "timm", "sklearn", "scipy", "matplotlib", "tensorboard"}
HELP = """
import contextlib, io, sys
from mamo.cli import COMMANDS, main
subcommands = ("validate", "check", "tokenizer", "index", "audit", "export", "build")
for words in [[], *([name] for name in COMMANDS), *(["data", name] for name in subcommands)]:
    with contextlib.redirect_stdout(io.StringIO()) as text:
        main([*words, "--help"])
    assert "usage: mamo " + " ".join(words) in text.getvalue(), words
    loaded = HEAVY & sys.modules.keys()
    assert not loaded, f"mamo {' '.join(words)} --help imports {loaded}"
"""

PRINTS = (
    "-c",
    "from mamo.cli import run; run(lambda: print('\\N{GREATER-THAN OR EQUAL TO} output_dir\\n' * 5000))",
)
"""A command that prints much and imports little."""
HELPS = ("-m", "mamo", "finetune", "--help")


def child(*words: str, stdout: int = subprocess.PIPE, **environment: str) -> "subprocess.Popen[str]":
    """Start `python WORDS`."""
    return subprocess.Popen(
        [sys.executable, *words],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


@pytest.fixture
def ends(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """`ends(word, ...)` runs `mamo WORD ...`; returns the exit code and stderr."""

    def call(*words: object) -> tuple[int, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        assert isinstance(ended.value.code, int)
        return ended.value.code, capsys.readouterr().err

    return call


def test_help_imports_nothing_heavy() -> None:
    """Bug: a line of help takes seconds, because a module that it needs imports torch."""
    process = child("-c", HELP.replace("HEAVY", repr(HEAVY)))
    assert process.communicate()[1] == ""
    assert process.returncode == 0


def test_every_command_has_a_module_and_a_script() -> None:
    """Bug: a command that `mamo --help` does not list, or a script that runs another one."""
    modules = {module.name for module in pkgutil.iter_modules(mamo.commands.__path__)} - {"shared"}
    assert modules == {name.replace("-", "_") for name in COMMANDS}
    for name in COMMANDS:
        script = (ROOT / "scripts" / f"{name.replace('-', '_')}.py").read_text()
        assert script == (
            f'"""Run `mamo {name}`."""\n\nfrom mamo.cli import run_command\n\n'
            f'if __name__ == "__main__":\n    run_command("{name}")\n'
        )


def test_the_list_of_commands(capsys: pytest.CaptureFixture[str], ends: Callable[..., tuple[int, str]]) -> None:
    """Bug: a mistyped or missing command ends in a traceback, or with success."""
    main(["--help"])
    text = capsys.readouterr().out
    for name in COMMANDS:
        assert f"\n  {name} " in text
    code, message = ends("pretrian")
    assert code == 2
    assert "unknown command 'pretrian'; did you mean pretrain?" in message
    assert ends()[0] == 2
    main(["--version"])
    assert capsys.readouterr().out.startswith("mamo ")


# ---- configs by name -----------------------------------------------------------------------------------------------


def test_a_name_is_looked_up_in_the_folder_of_the_command() -> None:
    """Bug: `finetune --config nlvr` takes the config of the pre-training that has the same name."""
    assert find_config("nlvr", "pretrain") == ROOT / "configs/pretrain/nlvr.yaml"
    assert find_config("nlvr", "finetune") == ROOT / "configs/finetune/nlvr.yaml"
    assert find_config("losses", "studies") == ROOT / "configs/studies/losses.yaml"
    with pytest.raises(ValueError, match="another command: `mamo finetune --config questions`"):
        find_config("questions", "pretrain")
    for folder in ("pretrain", "finetune", "studies"):
        assert config_names(folder)
        for name in config_names(folder):
            assert find_config(name, folder).is_file()
    assert not {"published", "base_scenes"} & set(config_names("studies"))


def test_a_path_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the user's own file is ignored for the shipped one; a folder of that name (`scenes/`) hides the config."""
    monkeypatch.chdir(tmp_path)
    assert find_config("scenes", "pretrain") == ROOT / "configs/pretrain/scenes.yaml"
    Path("scenes").mkdir()
    assert find_config("scenes", "pretrain") == ROOT / "configs/pretrain/scenes.yaml"
    Path("scenes").rmdir()
    Path("scenes").write_text("output_dir: mine\n")
    assert find_config("scenes", "pretrain") == Path("scenes")


def test_an_unknown_name_lists_the_nearest(ends: Callable[..., tuple[int, str]]) -> None:
    """Bug: a mistyped name ends in a traceback, or the user has to look for the folder of the configs."""
    assert ends("pretrain", "--config", "scnes") == (
        2,
        "error: config file not found: scnes; shipped configs: scenes, scenes_1h, mlim_scenes\n",
    )
    assert "shipped configs: vqa2, vqa_scenes\n" in ends("finetune", "--config", "vqa", "checkpoint=x")[1]
    assert "shipped configs: losses\n" in ends("study", "--config", "configs/losses.yml")[1]
    everything = ", ".join(config_names("pretrain"))
    assert f"shipped configs: {everything}\n" in ends("pretrain", "--config", "qqqqqq")[1]


def test_names_reach_the_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Bug: a command reads `--config` as a path alone, or the default of another command."""
    seen: list[object] = []
    monkeypatch.setattr("mamo.trainer.train", lambda config, is_resume: seen.append((config.output_dir, is_resume)))
    monkeypatch.setattr("mamo.study.pipeline.run_pipeline", lambda *arguments: seen.append(arguments))
    monkeypatch.chdir(tmp_path)
    main(["pretrain"])
    main(["pretrain", "output_dir=x", "--config", "scenes_1h", "--resume", "seed=4"])
    main(["pipeline", "--to", "here", "seed=1"])
    pretraining = config_folder("pretrain") / "scenes_1h.yaml"
    assert seen == [
        ("runs/scenes", False),
        ("x", True),
        (Path("here"), pretraining, config_folder("finetune"), ["seed=1"]),
    ]


# ---- ways to end ---------------------------------------------------------------------------------------------------


def _raises(error: BaseException) -> Callable[..., None]:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    return fail


def test_ctrl_c_is_one_line_and_130(monkeypatch: pytest.MonkeyPatch, ends: Callable[..., tuple[int, str]]) -> None:
    """Bug: `data check` ends with 1, which means a gap; a command without --resume tells the user to use it."""
    for name in ("trainer.train", "estimate.print_estimate", "data.validate.check_pairs", "evaluator.evaluate"):
        module, _, function = f"mamo.{name}".rpartition(".")
        monkeypatch.setattr(importlib.import_module(module), function, _raises(KeyboardInterrupt()))
    assert ends("pretrain") == (130, "interrupted; continue with --resume\n")
    assert ends("pretrain", "--plan") == (130, "interrupted\n")
    assert ends("data", "check", "x.jsonl") == (130, "interrupted\n")
    assert ends("evaluate", "checkpoint=x", "protocol=pairs-zeroshot") == (130, "interrupted\n")


def test_data_reports_a_mistake_as_every_command_does(
    monkeypatch: pytest.MonkeyPatch, ends: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    """Bug: `data` has a way out of its own, without the traceback that MAMO_TRACEBACK=1 asks for."""
    missing = tmp_path / "nowhere.jsonl"
    code, message = ends("data", "validate", missing)
    assert (code, message.count("\n")) == (2, 1)
    assert message.startswith("error: ")
    monkeypatch.setenv("MAMO_TRACEBACK", "1")
    with pytest.raises((ValueError, OSError)):
        main(["data", "validate", str(missing)])


def test_sigterm_is_143(monkeypatch: pytest.MonkeyPatch, ends: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    """Bug: a scheduler cannot tell the end that it asked for from a failure; a study leaves its cells running."""
    stopped: list[bool] = []

    def run_study(*arguments: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.sigtimedwait([signal.SIGUSR1], 10)  # the handler runs before this returns
        finally:
            stopped.append(True)

    monkeypatch.setattr("mamo.study.execute.run_study", run_study)
    code, message = ends("study", "--config", "losses", "--results", tmp_path)
    assert (code, message.count("\n"), stopped) == (143, 1, [True])
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    for raised in ("terminated", "terminated; continue with --resume"):
        monkeypatch.setattr("mamo.trainer.train", _raises(Preempted(raised)))
        assert ends("pretrain") == (143, "terminated; continue with --resume\n")


@pytest.mark.parametrize(
    "words",
    [
        ("benchmark", "--threads", "0"),
        ("benchmark", "--threads", "-3"),
        ("evaluate", "checkpoint=x", "protocol=y", "--pictures", "--rows", "0"),
        ("evaluate", "checkpoint=x", "protocol=y", "--rows", "-1"),
        ("evaluate", "checkpoint=x", "protocol=y", "--rows", "1.5"),
        ("evaluate", "checkpoint=x", "protocol=y", "--rows", "1" * 5000),
        ("data", "index", "x", "--workers", "0"),
    ],
    ids=lambda words: " ".join(words)[:40],
)
def test_counts_are_at_least_one(words: tuple[str, ...], ends: Callable[..., tuple[int, str]]) -> None:
    """Bug: `--threads 0` is a traceback of torch, `--rows 0` leaves the pictures out in silence."""
    code, message = ends(*words)
    assert code == 2
    assert "must be a whole number of at least 1, got '" in message


def test_ctrl_c_in_data_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: Callable[..., tuple[int, str]]
) -> None:
    """Bug: Ctrl-C in `mamo data` is a traceback with the exit code of a gap, and half of the files stay."""
    monkeypatch.setattr("mamo.world.export._write_json", _raises(KeyboardInterrupt()))
    monkeypatch.setattr("mamo.data.tokenizer.build_tokenizer", _raises(KeyboardInterrupt()))
    (tmp_path / "captions.txt").write_text("a red kite\n")
    for words in (
        ("export", "scenes", "--count", 1, "--layout", "vqa2"),
        ("tokenizer", tmp_path / "captions.txt", "--size", 250),
    ):
        assert ends("data", *words, "--to", tmp_path / "to") == (130, "interrupted\n")
        assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", [PRINTS, HELPS], ids=["print", "help"])
def test_a_closed_pipe_ends_quietly(words: tuple[str, ...], unbuffered: str) -> None:
    """Bug: `mamo keys | true` prints a traceback or "Exception ignored"; argparse swallows the error of --help."""
    reader, writer = os.pipe()
    os.close(reader)
    process = child(*words, stdout=writer, PYTHONUNBUFFERED=unbuffered)
    os.close(writer)
    assert process.communicate()[1] == ""
    is_swallowed = "--help" in words and unbuffered  # by argparse, which leaves nothing to flush
    assert process.returncode == (0 if is_swallowed else 141)


def test_a_broken_pipe_elsewhere_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: a worker's broken pipe passes for a reader that left, and the command ends in silence."""
    with pytest.raises(SystemExit) as ended:
        run(_raises(BrokenPipeError(32, "Broken pipe")))
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: Broken pipe\n"


@pytest.mark.parametrize("words", [PRINTS, HELPS], ids=["print", "help"])
def test_a_full_disk_below_the_output_is_one_line(words: tuple[str, ...]) -> None:
    """Bug: the last flush fails after the command, in a traceback of the interpreter with exit code 120."""
    with open("/dev/full", "w") as full:
        process = child(*words, stdout=full.fileno(), PYTHONUNBUFFERED="")
        message = process.communicate()[1]
    assert process.returncode == 2
    assert message.startswith("error: ")
    assert message.endswith("No space left on device\n")
    assert message.count("\n") == 1


def test_a_mistake_in_the_config_is_reported_by_one_rank(
    monkeypatch: pytest.MonkeyPatch, ends: Callable[..., tuple[int, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: eight processes print the same mistake; or a mistake that rank 1 alone finds later is lost."""
    for rank, is_printed in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        for words in (("pretrain", "sead=1"), ("finetune", "--config", "vqa2"), ("evaluate", "protocol=x")):
            code, message = ends(*words)
            assert (code, "error: " in message) == (2, is_printed), words
    monkeypatch.setattr("mamo.trainer.train", _raises(ValueError("found on rank 1")))
    assert ends("pretrain") == (2, "error: found on rank 1\n")


@pytest.mark.parametrize("locale", [{"LC_ALL": "C"}, {"LC_ALL": "POSIX"}, {"PYTHONIOENCODING": "latin-1"}], ids=str)
def test_any_character_can_be_printed(locale: dict[str, str]) -> None:
    """Bug: "'ascii' codec can't encode character" where the locale is ASCII and Python does not change it."""
    process = child(*PRINTS, PYTHONCOERCECLOCALE="0", PYTHONUTF8="0", **locale)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "output_dir" in output


def test_a_message_is_bounded(capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: an error line of five megabytes, or of 20,000 lines."""
    for error in (ValueError("x" * 5_000_000), ValueError("line\n" * 20_000), OSError(2, "No such file", "n" * 9000)):
        with pytest.raises(SystemExit):
            run(_raises(error))
        assert len(capsys.readouterr().err) < 5000


def test_a_home_is_expanded_in_evaluate(monkeypatch: pytest.MonkeyPatch, ends: Callable[..., tuple[int, str]]) -> None:
    """Bug: `checkpoint=~/run` is looked up in a folder named `~`; an empty output_dir means the default one."""
    monkeypatch.setenv("HOME", "/home/nobody-of-this-name")
    command = ("evaluate", "protocol=pairs-zeroshot")
    assert "/home/nobody-of-this-name/run: no checkpoint found" in ends(*command, "checkpoint=~/run")[1]
    assert "output_dir: give a path" in ends(*command, "checkpoint=x", "output_dir=")[1]
    assert "checkpoint: the environment variable $NO_SUCH is not set" in ends(*command, "checkpoint=$NO_SUCH/x")[1]
    finetune = ("finetune", "--config", "vqa_scenes")
    assert "/home/nobody-of-this-name/run: no checkpoint found" in ends(*finetune, "checkpoint=~/run")[1]
    assert "checkpoint: the environment variable $NO_SUCH is not set" in ends(*finetune, "checkpoint=$NO_SUCH/x")[1]


FAULTS = """
import resource, torch
from mamo.cli import run

def main():
    for step in range(24):
        if step == 12:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(12_000_000).add(1)  # 46 MiB twice
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

run(main)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_freed_memory_serves_the_next_step() -> None:
    """Bug: each step gets its large tensors from the system anew, page by page; a user's own setting is overruled."""
    faults = []
    for own in ({}, {"MALLOC_TRIM_THRESHOLD_": "131072"}):
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "LD_PRELOAD"))}
        out = subprocess.run([sys.executable, "-c", FAULTS], env={**kept, **own}, capture_output=True, check=True)
        faults.append(int(out.stdout))
    assert faults[1] > 12 * 12_000_000 * 4 // 4096
    assert faults[0] < faults[1] / 3
