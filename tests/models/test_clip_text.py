"""The text towers of CLIP and SigLIP give the states and the pooled tokens of transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mamo.models.clip_start import clip_path, load_clip_text
from mamo.models.convert_clip_text import clip_weights
from mamo.models.published_text import build_text_tower, text_config_from
from mamo.models.weights import read_weights
from tests.published import POSITIONS, save_published

LENGTHS = torch.tensor([12, 5, 3])


def tower_of(folder: Path) -> Any:
    torch.manual_seed(1)
    tower = build_text_tower(text_config_from(str(folder)), 1).eval()
    load_clip_text(tower, clip_weights(read_weights(clip_path(str(folder)))), str(folder))
    return tower


def is_valid() -> Tensor:
    return torch.arange(int(LENGTHS.max())) < LENGTHS[:, None]


def test_clip_is_causal_and_pools_the_end_of_the_text(tmp_path: Path) -> None:
    """Bug: a word sees those after it, or the pooled token is the start, padding, or the highest id."""
    model = save_published("clip", tmp_path)
    end, valid = model.config.text_config.eos_token_id, is_valid()
    torch.manual_seed(2)
    ids = torch.randint(0, end - 1, valid.shape)
    ids[:, 0] = end - 1
    ids[torch.arange(3), LENGTHS - 1] = end
    padded = ids.masked_fill(~valid, end)
    with torch.no_grad():
        theirs = model.text_model(padded, attention_mask=valid.long())
        tower = tower_of(tmp_path)
        tokens = tower(padded, valid)
    torch.testing.assert_close(tower.pool(tokens), theirs.pooler_output, atol=1e-5, rtol=0)
    is_word = valid.clone()
    is_word[:, 0] = False
    torch.testing.assert_close(tokens[is_word], theirs.last_hidden_state[is_word], atol=1e-5, rtol=0)


def test_siglip_reads_all_positions_and_pools_the_last(tmp_path: Path) -> None:
    """Bug: padding is masked, or texts are padded to the longest of a batch, so that a text's feature depends on it."""
    model = save_published("siglip", tmp_path)
    pad, valid = model.config.text_config.pad_token_id, is_valid()
    torch.manual_seed(2)
    ids = torch.randint(3, model.config.text_config.vocab_size, valid.shape).masked_fill(~valid, pad)
    whole = torch.full((3, POSITIONS), pad)
    whole[:, : ids.shape[1] - 1] = ids[:, 1:]
    with torch.no_grad():
        theirs = model.text_model(whole)
        tower = tower_of(tmp_path)
        tokens = tower(ids, valid)
        shorter = tower(ids[2:, :3], valid[2:, :3])
    linear = model.text_model.head
    torch.testing.assert_close(linear(tower.pool(tokens)), theirs.pooler_output, atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens[:, 1:], theirs.last_hidden_state[:, : ids.shape[1] - 1], atol=1e-5, rtol=0)
    torch.testing.assert_close(shorter, tokens[2:, :3], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_an_added_word_is_the_only_new_one(kind: str, tmp_path: Path) -> None:
    """Bug: the row of [MASK] shifts the vocabulary, or stays out of it."""
    save_published(kind, tmp_path)
    config = text_config_from(str(tmp_path))
    n = config.vocab_size
    config.vocab_size += 1
    tower = build_text_tower(config, 1)
    row = tower.word_embeddings.weight[n].detach().clone()
    report = load_clip_text(tower, clip_weights(read_weights(clip_path(str(tmp_path)))), str(tmp_path))
    assert report.new == (f"words.weight[{n}:]",)
    assert torch.equal(tower.word_embeddings.weight[n], row)
    assert torch.equal(tower.word_embeddings.weight[:n], tower_of(tmp_path).word_embeddings.weight)
