"""Weight files: other formats are named, nothing is unpickled, wrappers' prefixes are removed."""

import argparse
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from mamo.models.image_encoder import ImageEncoder, load_image_weights
from mamo.models.weights import read_weights

SIZE = {"patch_size_px": 8, "width": 16, "depth": 1, "heads": 2}


class Harmful:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('unpickled')",)


def write(path: Path, content: str) -> Path:
    """Write a file that is no file of weights."""
    tensors = {"a": torch.zeros(1)}
    if content == "TorchScript":
        torch.jit.save(torch.jit.script(nn.Linear(1, 1)), path)
    elif content == "a pickled object":
        torch.save({"model": tensors, "args": argparse.Namespace(lr=1)}, path)
    elif content == "a harmful pickle":
        torch.save({"model": tensors, "args": Harmful()}, path)
    elif content == "an old harmful pickle":
        path.write_bytes(pickle.dumps(Harmful()))
    elif content == "a module":
        torch.save(nn.Linear(1, 1), path)
    elif content == "a list":
        torch.save([torch.zeros(1)], path)
    elif content == "a tensor":
        torch.save(torch.zeros(1), path)
    elif content == "an optimizer":
        torch.save({**tensors, "optimizer": {"lr": 1.0}}, path)
    elif content == "numbers as names":
        torch.save({1: torch.zeros(1)}, path)
    elif content == "cut safetensors":
        save_file({"a": torch.zeros(100)}, path)
        path.write_bytes(path.read_bytes()[:-7])
    elif content == "cut archive":
        torch.save({"a": torch.zeros(100)}, path)
        path.write_bytes(path.read_bytes()[:-300])
    else:
        path.write_bytes(
            {
                "an LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5\n",
                "a web page": b"\n<!DOCTYPE html><html>404</html>",
                "nothing": b"",
                "noise": bytes(range(256)) * 4,
                "text": b"not weights",
            }[content]
        )
    return path


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".bin"])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("TorchScript", "is a TorchScript archive, which contains code: save its state_dict()"),
        ("a pickled object", "contains a pickled object other than tensors (argparse.Namespace), which is not loaded"),
        ("a harmful pickle", "contains a pickled object other than tensors (exec)"),
        ("an old harmful pickle", "cannot be read as weights"),
        ("a module", "contains a pickled object other than tensors (torch.nn.modules.linear.Linear)"),
        ("a list", "holds a list, not tensors by name"),
        ("a tensor", "holds a Tensor, not tensors by name"),
        ("an optimizer", "'optimizer' is a dict; values that are not tensors by name are not read"),
        ("numbers as names", "1 is a Tensor; values that are not tensors by name are not read"),
        ("cut safetensors", "is a damaged safetensors file"),
        ("cut archive", "cannot be read as weights: it is damaged or of another format"),
        ("an LFS pointer", "is a pointer of Git LFS, not the weights: fetch them with `git lfs pull`"),
        ("a web page", "is a web page, not weights"),
        ("nothing", "is empty"),
        ("noise", "cannot be read as weights"),
        ("text", "cannot be read as weights"),
    ],
)
def test_what_is_no_weight_file_is_named(tmp_path: Path, content: str, expected: str, suffix: str) -> None:
    """Bug: a library's text of a thousand characters, which advises weights_only=False, or a traceback."""
    path = write(tmp_path / f"w{suffix}", content)
    with pytest.raises(ValueError) as caught:
        read_weights(path)
    message = str(caught.value)
    assert expected in message
    assert message.startswith(str(path))
    assert "weights_only" not in message
    assert len(message) - len(str(path)) < 200
    assert "\n" not in message


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "model.",
        "backbone.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "model.backbone.module.",
    ],
)
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_prefixes_of_wrappers_are_removed_in_any_order(tmp_path: Path, prefix: str, wrapper: str | None) -> None:
    """Bug: weights saved through torch.compile, DDP or Lightning are refused, each name listed as missing."""
    saved, other = (ImageEncoder("vit_tiny_patch16_224", (16, 16), **SIZE) for _ in range(2))
    state = OrderedDict((prefix + key, value) for key, value in saved.vit.state_dict().items())
    torch.save(state if wrapper is None else {wrapper: state}, tmp_path / "w.pt")
    report = load_image_weights(other, str(tmp_path / "w.pt"))
    assert len(report.loaded) == len(state)
    assert torch.equal(other.vit.blocks[0].mlp.fc1.weight, saved.vit.blocks[0].mlp.fc1.weight)


@pytest.mark.parametrize("names", [["model.a", "b"], ["model."], ["a", "b"], ["modela"]])
def test_a_prefix_of_some_names_stays(tmp_path: Path, names: list[str]) -> None:
    """Bug: `model.` is removed from the names of a part, and two tensors become one."""
    torch.save({name: torch.zeros(1) for name in names}, tmp_path / "w.pt")
    assert sorted(read_weights(tmp_path / "w.pt")) == sorted(names)


def test_shards_share_a_prefix_or_keep_it(tmp_path: Path) -> None:
    """Bug: of two shards only one loses its prefix."""
    save_file({"model.a": torch.zeros(1)}, tmp_path / "1.safetensors")
    save_file({"model.b": torch.zeros(1), "c": torch.zeros(1)}, tmp_path / "2.safetensors")
    assert sorted(read_weights(tmp_path)) == ["c", "model.a", "model.b"]


def test_a_parameter_named_as_a_wrapper_is_a_parameter(tmp_path: Path) -> None:
    """Bug: a tensor called `model` is taken for a dict of tensors."""
    torch.save({"model": torch.zeros(1), "a": torch.zeros(1)}, tmp_path / "w.pt")
    assert sorted(read_weights(tmp_path / "w.pt")) == ["a", "model"]


@pytest.mark.parametrize("name", ["vit_base_patch16_224.no_such_tag", "vit_tiny_patch16_224.orig_in21k_typo"])
def test_a_tag_that_timm_does_not_know_is_a_mistake(name: str) -> None:
    """Bug: timm's RuntimeError for a tag of a model's name ends in a traceback."""
    with pytest.raises(ValueError, match=r"has a tag that timm does not know; use vit_\w+\.") as caught:
        ImageEncoder(name, (16, 16), **SIZE)
    assert len(str(caught.value)) < 500


def test_a_model_without_published_weights_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: timm's text is passed on."""
    encoder = ImageEncoder("vit_tiny_patch16_224", (16, 16), **SIZE)

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("No pretrained weights exist for x. Use `pretrained=False` for random init.")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(ValueError, match="timm has no published weights of vit_tiny_patch16_224: name a file, or use"):
        load_image_weights(encoder, "timm")


UNUSABLE: dict[str, Callable[[], torch.Tensor]] = {
    "int8": lambda: torch.zeros(2, dtype=torch.int8),
    "bool": lambda: torch.zeros(2, dtype=torch.bool),
    "float8": lambda: torch.zeros(2).to(torch.float8_e4m3fn),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    "complex": lambda: torch.zeros(2, dtype=torch.complex64),
    "NaN": lambda: torch.tensor([0.0, float("nan")]),
    "infinite": lambda: torch.tensor([0.0, float("-inf")]),
    "sparse": lambda: torch.eye(2).to_sparse(),
    "compressed": lambda: torch.eye(2).to_sparse_csr(),
    "meta": lambda: torch.zeros(2, device="meta"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", UNUSABLE)
def test_tensors_that_are_no_weights_are_named(tmp_path: Path, kind: str, suffix: str) -> None:
    """Bug: rounded, complex or NaN weights are loaded in silence; sparse ones and those without values: a traceback."""
    path = tmp_path / f"w{suffix}"
    tensors = {"fc.bias": torch.zeros(2), "fc.weight": UNUSABLE[kind]()}
    if suffix == ".pt":
        torch.save(tensors, path)
    elif kind in ("quantised", "complex", "sparse", "compressed", "meta"):
        pytest.skip("safetensors holds none")
    else:
        save_file(tensors, path)
    with pytest.raises(ValueError) as caught:
        read_weights(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: fc.weight ")
    assert "\n" not in message


def test_buffers_of_whole_numbers_are_no_weights(tmp_path: Path) -> None:
    """Bug: a published file is refused for its positions, its counters or a mask of minus infinity."""
    buffers = {
        "a.position_ids": torch.arange(3),
        "a.num_batches_tracked": torch.tensor(1),
        "a.attn_mask": torch.full((2,), float("-inf")),
        "a.relative_position_index": torch.arange(3),
    }
    save_file({**buffers, "a.weight": torch.zeros(2, dtype=torch.bfloat16)}, tmp_path / "w.safetensors")
    assert read_weights(tmp_path / "w.safetensors").keys() == {*buffers, "a.weight"}
