"""Names on the hub: a cached one needs no network, and a mistyped one fails at once."""

import socket
import time
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from mamo.hub import hub_folder
from mamo.models.text_encoder import bert_config_from
from mamo.tasks.sources import load_tokenizer
from mamo.world.vocabulary import scenes_tokenizer


@pytest.fixture
def unplugged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """A machine that believes itself online and has no network, with an empty cache; returns the look-ups it tries."""
    tried: list[Any] = []

    def refuse(*arguments: Any, **_: Any) -> Any:
        tried.append(arguments)
        raise socket.gaierror(-2, "Name or service not known")

    def never(seconds: float) -> None:
        raise AssertionError(f"waits {seconds} s to try again")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(time, "sleep", never)
    return tried


def test_a_mistyped_name_fails_at_once(unplugged: list[Any]) -> None:
    """Bug: `data.tokenizer: scense` retries for most of a minute before it says anything."""
    expected = r"'scense'.*did you mean 'scenes'\?.*cannot be fetched from the hub"
    with pytest.raises(ValueError, match=expected):
        load_tokenizer("scense")
    with pytest.raises(ValueError, match=r"no config of a text encoder at 'bert-bas'.*cannot be fetched from the hub"):
        bert_config_from("bert-bas")
    assert 1 <= len(unplugged) <= 4  # asked, and no more than once for each (IPv4 and IPv6 may count apart)


def test_a_cached_name_asks_nobody(unplugged: list[Any], tmp_path: Path) -> None:
    """Bug: what was fetched once cannot be used on a machine without network."""
    repository = tmp_path / "cache" / "models--some--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    scenes_tokenizer().save_pretrained(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert load_tokenizer("some/name").get_vocab() == scenes_tokenizer().get_vocab()
    assert not unplugged
    with pytest.raises(ValueError, match="some/name"):
        hub_folder("some/name", ("*.safetensors",))  # the cached part of it has none
    assert unplugged
