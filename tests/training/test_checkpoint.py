"""Checkpoints: atomic, complete, strict."""

import errno
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from mamo.training import checkpoint
from mamo.training.checkpoint import CheckpointError


class Tied(nn.Module):
    """A decoder that shares the embedding's weight, as the masked-word head does."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, width)
        self.decoder = nn.Linear(width, 6)
        self.decoder.weight = self.embedding.weight


def make(width: int = 4) -> tuple[dict[str, nn.Module], torch.optim.AdamW]:
    network = Tied(width)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    network.decoder(network.embedding(torch.arange(6))).square().sum().backward()
    optimizer.step()
    return {"student": network, "queue": nn.BatchNorm1d(0)}, optimizer


def save(run: Path, step: int, kept: int = 2, seed: int = 0) -> dict[str, nn.Module]:
    torch.manual_seed(seed)
    modules, optimizer = make()
    checkpoint.save(run, step, checkpoint.snapshot(modules, optimizer), {"note": "x"}, {}, kept)
    return modules


def test_round_trip_of_a_tied_weight_and_the_optimizer(tmp_path: Path) -> None:
    """Bug: a tied weight comes back untied, from two values, or makes the file unreadable; Adam's count is lost."""
    torch.manual_seed(1)
    modules, optimizer = make()
    folder = checkpoint.save(tmp_path, 7, checkpoint.snapshot(modules, optimizer), {}, {}, 2)
    torch.manual_seed(2)
    others, fresh = make()
    checkpoint.load_module(folder, "student", others["student"])
    checkpoint.load_optimizer_tensors(fresh, others["student"], checkpoint.read_tensors(folder, "optimizer"))
    other = others["student"]
    assert isinstance(other, Tied)
    assert other.decoder.weight is other.embedding.weight
    for name, value in modules["student"].state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    for mine, theirs in zip(modules["student"].parameters(), other.parameters()):
        assert optimizer.state[mine].keys() == fresh.state[theirs].keys() >= {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(optimizer.state[mine][key], fresh.state[theirs][key]) for key in optimizer.state[mine])
    assert json.loads((folder / "state.json").read_text())["step"] == 7


def test_last_is_a_relative_link_and_old_ones_go(tmp_path: Path) -> None:
    """Bug: an absolute link breaks when the run is moved; the disk fills with checkpoints."""
    for step in (1, 2, 3):
        save(tmp_path / "run", step)
    last = tmp_path / "run" / "checkpoints" / "last"
    assert os.readlink(last) == "step-0000003"
    assert [folder.name for folder in checkpoint.step_folders(tmp_path / "run")] == ["step-0000002", "step-0000003"]
    (tmp_path / "run").rename(tmp_path / "moved")
    assert checkpoint.resolve(tmp_path / "moved").name == "step-0000003"


def damage(folder: Path, how: str) -> str:
    file = folder / "student.safetensors"
    if how == "flipped":
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(data)
        return "the content of student.safetensors has changed"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-4])
        return "student.safetensors has"
    if how == "missing":
        file.unlink()
        return "student.safetensors is missing"
    if how == "state":
        (folder / "state.json").write_text(json.dumps({"note": "x", "step": 9}, indent=1))
        return "the content of state.json has changed"
    manifest = folder / checkpoint.MANIFEST
    if how == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text(manifest.read_text().replace("sha256", "sha257"))
    return "manifest.json is missing or unreadable"


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing", "state", "no manifest", "manifest"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_offered(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Bug: half a file is loaded, or the user is left without a hint at the good checkpoint beside it."""
    save(tmp_path, 4)
    save(tmp_path, 8)
    bad = checkpoint.step_folder(tmp_path, 8)
    message = damage(bad, how)
    with pytest.raises(CheckpointError) as error:
        checkpoint.resolve(tmp_path)
    assert str(bad) in str(error.value)
    assert message in str(error.value)
    assert f"checkpoint={checkpoint.step_folder(tmp_path, 4)}" in str(error.value)
    assert checkpoint.last_good(tmp_path) == checkpoint.step_folder(tmp_path, 4)
    assert message in caplog.text
    damage(checkpoint.step_folder(tmp_path, 4), how)
    with pytest.raises(CheckpointError, match="no undamaged checkpoint"):
        checkpoint.last_good(tmp_path)


@pytest.mark.parametrize("left", [(), ("state.json",), ("student.safetensors",), ("state.json", "student.safetensors")])
def test_a_manifest_that_lacks_a_file_is_refused(tmp_path: Path, left: tuple[str, ...]) -> None:
    """Bug: a manifest that is empty, or lacks a file, verifies whatever is there."""
    save(tmp_path, 4)
    folder = checkpoint.step_folder(tmp_path, 4)
    manifest = folder / checkpoint.MANIFEST
    entries = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({name: entries[name] for name in left}))
    with pytest.raises(CheckpointError, match=r"damaged checkpoint, manifest\.json does not list [a-z]+\."):
        checkpoint.resolve(tmp_path)
    manifest.write_text(json.dumps(entries))
    (folder / "NOTES.md").write_text("good")
    checkpoint.resolve(tmp_path)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/vocab.txt").write_text("added later")
    with pytest.raises(CheckpointError, match=r"does not list tokenizer/vocab\.txt"):
        checkpoint.resolve(tmp_path)


def test_saving_after_a_damaged_one_keeps_the_good(tmp_path: Path) -> None:
    """Bug: the newest folders by name are kept, which are the damaged ones that the resumed run passed over."""
    for step in (5, 20, 30):
        save(tmp_path, step, kept=3)
    damage(checkpoint.step_folder(tmp_path, 20), "truncated")
    damage(checkpoint.step_folder(tmp_path, 30), "truncated")
    save(tmp_path, 6)
    assert [folder.name for folder in checkpoint.step_folders(tmp_path)] == ["step-0000005", "step-0000006"]
    assert checkpoint.resolve(tmp_path).name == "step-0000006"


def test_a_checkpoint_is_never_gone_while_it_is_written_again(tmp_path: Path) -> None:
    """Bug: a resumed run that saves a step again deletes it first, and a kill leaves `last` pointing at nothing."""
    save(tmp_path, 4)
    save(tmp_path, 8)
    child = multiprocessing.get_context("fork").Process(target=_die_in, args=("rename", 1, tmp_path))
    child.start()
    child.join()
    assert child.exitcode == 9
    assert (tmp_path / "checkpoints/last").is_symlink()
    assert not (tmp_path / "checkpoints/last").exists()
    assert checkpoint.resolve(tmp_path).name == "step-0000004"
    save(tmp_path, 8)
    assert checkpoint.resolve(tmp_path).name == "step-0000008"
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "last",
        "step-0000004",
        "step-0000008",
    ]


def _die_in(function: str, call: int, run: Path) -> None:
    calls = iter(range(10_000))
    owner, name = {"fsync": (os, "fsync"), "rename": (Path, "rename"), "replace": (Path, "replace")}[function]
    original = getattr(owner, name)

    def wrapped(*args: object) -> object:
        if next(calls) == call:
            os._exit(9)
        return original(*args)

    setattr(owner, name, wrapped)
    save(run, 8, seed=8)


@pytest.mark.parametrize(
    ("function", "call"), [("fsync", 0), ("fsync", 4), ("rename", 0), ("fsync", 5), ("replace", 0)]
)
def test_a_kill_during_saving_leaves_a_loadable_checkpoint(tmp_path: Path, function: str, call: int) -> None:
    """Bug: a kill between two writes leaves `last` on half a checkpoint, or its remains stay for ever."""
    before = save(tmp_path, 4)
    child = multiprocessing.get_context("fork").Process(target=_die_in, args=(function, call, tmp_path))
    child.start()
    child.join()
    assert child.exitcode == 9
    folder = checkpoint.resolve(tmp_path)
    assert folder.name == "step-0000004"
    others, _ = make()
    checkpoint.load_module(folder, "student", others["student"])
    assert torch.equal(others["student"].decoder.weight, before["student"].decoder.weight)
    assert checkpoint.last_good(tmp_path).name in ("step-0000004", "step-0000008")
    save(tmp_path, 9, kept=5)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert not [name for name in names if name.startswith(".")]
    assert checkpoint.resolve(tmp_path).name == "step-0000009"


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left on device (os error 28)")],
)
def test_a_full_disk_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Bug: a full disk ends in a traceback of a library, half a checkpoint, or remains that keep the disk full."""
    save(tmp_path, 4)

    def full(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path, 8)
    assert str(checkpoint.step_folder(tmp_path, 8)) in str(caught.value)
    assert "No space left" in str(caught.value)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["last", "step-0000004"]
    assert checkpoint.resolve(tmp_path).name == "step-0000004"


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A file system of four megabytes, where the system lets a test mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    if shutil.which("mount") is None or os.system(f"mount -t tmpfs -o size=4m none {folder} 2>/dev/null") != 0:
        pytest.skip("cannot mount a small file system here")
    yield folder
    os.system(f"umount {folder}")


@pytest.mark.slow
def test_a_really_full_disk_stops_a_run_with_one_message(
    small_disk: Path, tiny: Callable[..., object], fails: Callable[..., str]
) -> None:
    """Bug: what a mock raises is not what a full disk does: partial writes, errors at closing, a torn log."""
    from mamo.trainer import train

    config = tiny(output_dir=str(small_disk / "run"), training={"total_steps": 200, "checkpoints_kept": 50})
    message = fails(lambda: train(config, is_resume=False))
    assert "No space left" in message
    assert str(small_disk) in message
    checkpoint.verify(checkpoint.last_good(small_disk / "run"))


def test_another_architecture_is_refused_by_key(tmp_path: Path) -> None:
    """Bug: weights of other shapes or names are loaded in part, in silence."""
    save(tmp_path, 4)
    folder = checkpoint.resolve(tmp_path)
    with pytest.raises(CheckpointError, match=r"another architecture: `embedding.weight` is \[6, 4\].*\[6, 8\]"):
        checkpoint.load_module(folder, "student", Tied(8))
    with pytest.raises(CheckpointError, match=r"another architecture: 2 missing \(bias, weight\); 2 unexpected"):
        checkpoint.load_module(folder, "student", nn.Linear(4, 6))
    with pytest.raises(CheckpointError, match="no checkpoint found"):
        checkpoint.resolve(tmp_path / "nowhere")


def test_optimizer_state_must_cover_the_network(tmp_path: Path) -> None:
    """Bug: a parameter without Adam state starts anew after a resume."""
    modules, optimizer = make()
    tensors = checkpoint.optimizer_tensors(optimizer, modules["student"])
    lost = {key: value for key, value in tensors.items() if not key.startswith("decoder.bias")}
    with pytest.raises(CheckpointError, match=r"1 missing \(decoder.bias\)"):
        checkpoint.load_optimizer_tensors(optimizer, modules["student"], lost)


def follow_links(run: Path) -> Path:
    """Copy a run as `cp -rL` does."""
    copy = run.with_name(f"{run.name}-copy")
    shutil.copytree(run, copy, symlinks=False)
    return copy


def states(output_dir: Path, *steps: int) -> None:
    """Save checkpoints with the values that `read_state` needs."""
    state = {"data_fingerprint": "f", "ancestry": [], "versions": {}, "samples_seen": 1, "samples_skipped": 0}
    for step in steps:
        modules, optimizer = make(step)
        checkpoint.save(output_dir, step, checkpoint.snapshot(modules, optimizer), state, {}, kept=2)


@pytest.mark.parametrize("how", ["copied", "a step is gone", "the copy is damaged", "its step is damaged", "no state"])
def test_a_run_that_was_copied_with_links_followed_goes_on(tmp_path: Path, how: str) -> None:
    """Bug: `last` is a folder then; the run dies at its next checkpoint, and an old copy is read for ever."""
    states(tmp_path / "run", 4, 8)
    run = follow_links(tmp_path / "run")
    last = run / "checkpoints" / "last"
    expected = "step-0000008"
    if how == "a step is gone":
        shutil.rmtree(checkpoint.step_folder(run, 8))
    elif how == "the copy is damaged":
        damage(last, "flipped")
    elif how == "its step is damaged":
        damage(checkpoint.step_folder(run, 8), "flipped")
    elif how == "no state":
        (last / "state.json").unlink()
    for path in (run, run / "checkpoints", last):
        folder = checkpoint.resolve(path)
        assert json.loads((folder / "state.json").read_text())["step"] == 8
    checkpoint.restore_step_folder(run)
    assert checkpoint.last_good(run).name in (expected, "last")
    assert checkpoint.step_folder(run, 8).is_dir()
    states(run, 9)
    assert last.is_symlink()
    assert checkpoint.resolve(run).name == "step-0000009"
    assert sorted(path.name for path in last.parent.iterdir()) == ["last", "step-0000008", "step-0000009"]


@pytest.mark.parametrize("last", ["missing", "dangling", "a file"])
def test_without_last_the_newest_whole_folder_counts(
    tmp_path: Path, last: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Bug: after a copy without links, or a kill before the first link, whole checkpoints are not found."""
    states(tmp_path, 4, 8)
    pointer = tmp_path / "checkpoints" / "last"
    pointer.unlink()
    if last == "dangling":
        pointer.symlink_to("step-0000012")
    elif last == "a file":
        pointer.write_text("step-0000008")
    for path in (tmp_path, tmp_path / "checkpoints", pointer):
        assert checkpoint.resolve(path).name == "step-0000008"
    damage(checkpoint.step_folder(tmp_path, 8), "flipped")
    assert checkpoint.resolve(tmp_path).name == "step-0000004"
    assert "step-0000008: damaged checkpoint" in caplog.text
    states(tmp_path, 9)
    assert checkpoint.resolve(pointer).name == "step-0000009"


def test_a_file_system_without_links_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: training dies at its first checkpoint where links cannot be made."""

    def refuse(self: Path, target: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    states(tmp_path, 4, 8)
    assert checkpoint.resolve(tmp_path).name == "step-0000008"


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077, 0o027])
def test_files_have_the_permissions_of_new_files(tmp_path: Path, umask: int) -> None:
    """Bug: weights are readable by their owner only, whatever the umask, and a colleague cannot evaluate them."""
    before = os.umask(umask)
    try:
        states(tmp_path / "run", 4)
    finally:
        os.umask(before)
    for path in (tmp_path / "run").rglob("*"):
        if not path.is_symlink():
            assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


FORGED = {
    "another step": {"step": 9},
    "a negative step": {"step": -4},
    "a step in words": {"step": "4"},
    "a step that is true": {"step": True},
    "no fingerprint": {"data_fingerprint": None},
    "another ancestry": {"ancestry": [3]},
    "an ancestor without step": {"ancestry": [{"checkpoint": "a", "data_fingerprint": "f"}]},
    "versions in a list": {"versions": ["torch"]},
    "a version that is a list": {"versions": {"torch": [2]}},
    "negative samples": {"samples_seen": -1},
    "samples in words": {"samples_skipped": "many"},
    "a machine in words": {"machine": "this"},
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_state_is_refused_by_name(tmp_path: Path, name: str) -> None:
    """Bug: a state.json of another shape, with a manifest that fits, ends in a traceback; its step is believed."""
    states(tmp_path, 4)
    folder = checkpoint.step_folder(tmp_path, 4)
    state = json.loads((folder / "state.json").read_text())
    for text in (json.dumps({**state, **FORGED[name]}), "[]", "nonsense", "null", "[" * 100_000):
        (folder / "state.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"step-0000004/state\.json .*use another checkpoint") as caught:
            checkpoint.read_state(folder)
        assert "\n" not in str(caught.value)


def test_optimizer_state_of_another_shape_is_refused(tmp_path: Path) -> None:
    """Bug: moments of another shape pass, and the first step ends in a traceback."""
    modules, optimizer = make()
    name = next(name for name, _ in modules["student"].named_parameters())
    tensors = checkpoint.optimizer_tensors(optimizer, modules["student"])
    tensors[f"{name}/exp_avg"] = torch.zeros(3, 5, 7)
    with pytest.raises(CheckpointError, match=rf"`{name}/exp_avg` is \[3, 5, 7\], its parameter"):
        checkpoint.load_optimizer_tensors(optimizer, modules["student"], tensors)
