"""Published text encoders, each with its own tokenizer, train, resume, are exported and loaded again."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mamo
from mamo.config.schema import RunConfig
from mamo.data.collate import tokenize, tokenize_words
from mamo.data.tokenizer import read_tokenizer
from mamo.trainer import TrainingRun, train
from tests.published import CAPTIONS, LAYERS, WIDTH, save_published

ENCODERS = ["roberta", "xlm-roberta", "distilbert", "modernbert", "bert", "clip", "siglip"]
TEXTS = ["a small red circle is above the yellow star", "a large Blue square"]


def values_for(kind: str, folder: Path, steps: int) -> dict[str, Any]:
    """Return the sections of a run that starts from an encoder: two lower layers, one for the fusion."""
    n_text = LAYERS - 1 if kind in ("roberta", "xlm-roberta", "distilbert", "bert") else LAYERS
    text = {"bert": str(folder), "weights": "bert", "layers": n_text}
    return {
        "data": {"tokenizer": str(folder), "text_max_tokens": 32},
        "model": {"text": text, "fusion_layers": 1},
        "masking": {"text_unit": "word" if kind != "siglip" else "token"},
        "training": {"total_steps": steps, "checkpoint_every_steps": 2, "warmup_steps": 1},
    }


def train_resume_export(kind: str, tiny: Callable[..., RunConfig], tmp_path: Path, steps: int) -> None:
    save_published(kind, tmp_path / "source")
    sections = values_for(kind, tmp_path / "source", steps)
    train(tiny(**sections), is_resume=False)
    model = mamo.load(tmp_path / "run")
    expected = model.encode_text(TEXTS)
    filled = model.fill_mask(
        torch.zeros(3, 16, 16, dtype=torch.uint8), f"a {model.processor.tokenizer.mask_token} circle"
    )
    assert filled.endswith(" circle")
    model.save_pretrained(tmp_path / "exported")
    (tmp_path / "source").rename(tmp_path / "gone")
    assert torch.equal(mamo.load(tmp_path / "exported").encode_text(TEXTS), expected)
    earlier = tmp_path / "run" / "checkpoints" / f"step-{steps:07d}"
    shutil.rmtree(earlier)
    train(tiny(**sections), is_resume=True)
    assert torch.equal(mamo.load(tmp_path / "run").encode_text(TEXTS), expected)


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_trains_resumes_and_is_exported(kind: str, tiny: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Bug: a tokenizer without [CLS], of bytes or of pieces is refused or misread, or a run asks for its source."""
    train_resume_export(kind, tiny, tmp_path, 4)


@pytest.mark.slow
@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_trains_fifty_steps(kind: str, tiny: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Bug: a loss that is not finite, or a resume of other bits, after the first steps."""
    train_resume_export(kind, tiny, tmp_path, 50)


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta", "modernbert", "clip"])
def test_whole_words_are_the_tokenizers_own(kind: str, tmp_path: Path) -> None:
    """Bug: only WordPiece marks pieces, so that pieces of other tokenizers are masked as words, or words as one."""
    save_published(kind, tmp_path)
    tokenizer = read_tokenizer(str(tmp_path))
    ids, is_valid, words = tokenize_words(tokenizer, CAPTIONS, 32, by_word=True)
    assert words is not None
    for row, caption in enumerate(CAPTIONS):
        numbers = words[row][words[row] >= 0]
        assert len(numbers) == is_valid[row].sum() - 2
        spelled = [tokenizer.decode(ids[row][words[row] == word]).strip() for word in np.unique(numbers)]
        assert {"red", "green", "blue"} & {word.lower() for word in spelled}
        assert [word.lower() for word in spelled][:2] == caption.lower().split()[:2]
    plain, plain_is_valid = tokenize(tokenizer, CAPTIONS, 32)
    assert torch.equal(plain, ids)
    assert torch.equal(plain_is_valid, is_valid)


def test_masked_words_need_a_mask_token(tiny: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Bug: a CLIP's tower that never got a row of [MASK] is trained to fill it."""
    save_published("clip", tmp_path / "source")
    sections = values_for("clip", tmp_path / "source", 2)
    off = {"losses": {"weights": {"mlm": 0, "mrm_text": 0}}}
    run = TrainingRun(tiny(**sections, **off))
    assert run.tokenizer.mask_token is None
    assert run.task.network.backbone.text_encoder.word_embeddings.num_embeddings == len(run.tokenizer)
    with_mask = TrainingRun(tiny(**sections))
    assert len(with_mask.tokenizer) == len(run.tokenizer) + 1
    with pytest.raises(ValueError, match=r"no mask token, with which mlm and mrm_text hide words; set "
                       r"losses\.weights\.mlm and losses\.weights\.mrm_text to 0"):  # fmt: skip
        type(run.task)(tiny(**sections), run.tokenizer)


def test_widths_of_the_fusion_follow_the_encoder(tiny: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Bug: the fusion keeps the epsilon of BERT over a RoBERTa, whose upper layers it holds."""
    save_published("roberta", tmp_path / "source")
    network = TrainingRun(tiny(**values_for("roberta", tmp_path / "source", 2))).task.network
    assert network.backbone.fusion.layers[0].norm1.eps == network.mlm.norm.eps == 1e-5
    assert network.backbone.fusion.width == WIDTH
