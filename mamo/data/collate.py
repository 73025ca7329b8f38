"""Parts that the collators of all tasks share: the batch, random numbers of a sample, tokenization.

Legend: B batch, I images of a sample, L text tokens, H, W height and width in pixels.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from mamo.config.values import Values
from mamo.data.tokenizer import ends_with_sep, word_numbers

TOKENIZER_LOCK = threading.Lock()
"""Held while a tokenizer is called: padding and truncation are state of the object, which threads share."""
MASK_STREAM = 1
"""Random stream of a sample for masks and noise; loading uses stream 0 (`loader.LOAD_STREAM`)."""


class Batch:
    """Base class of batches; a subclass is a dataclass of tensors, with `skipped`."""

    __slots__ = ()
    image: Tensor
    """uint8 [B, 3, H, W], or [B, I, 3, H, W] with several images a sample."""
    sample_id: Tensor
    """int64 [B], indices in the data set."""
    is_valid: Tensor
    """bool [B, L], False at padding; [B, 2, L] with two texts a sample."""
    skipped: tuple[str, ...]
    """One line for each bad sample that was replaced."""

    def __len__(self) -> int:
        return self.image.shape[0]

    def to(self, device: torch.device) -> Self:
        """Copy the batch to `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def part(self, start: int, stop: int) -> Self:
        """Return the samples from `start` to `stop` (exclusive)."""
        return self._map(lambda tensor: tensor[start:stop])

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "skipped"}  # type: ignore[arg-type]

    def pin_memory(self) -> Self:
        """Copy the batch to page-locked memory."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        changed: Values = {name: function(tensor) for name, tensor in self.tensors().items()}
        return replace(self, **changed)  # type: ignore[type-var]


def sample_rng(seed: int, epoch: int, index: int, stream: int) -> np.random.Generator:
    """Return the generator of one sample in one epoch; a pure function of the four numbers."""
    return np.random.Generator(np.random.PCG64([seed, epoch, index, stream]))


def caption_id_rows(samples: Sequence[tuple[int, tuple[int, ...]]], n_ids: int) -> Tensor:
    """Return the caption ids of samples, int64 [B, n_ids]: the drawn caption's, then those of the record's others.

    A row with fewer distinct ones repeats the drawn one's.

    Args:
        samples: (id of the drawn caption, ids of all captions of its record) of each.
        n_ids: at least the number of distinct ids of any sample, or 1, which keeps the drawn ones only.
    """
    rows = [list(dict.fromkeys((drawn, *others)))[:n_ids] for drawn, others in samples]
    return torch.tensor([[*row, *[row[0]] * (n_ids - len(row))] for row in rows])


def tokenize(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], max_tokens: int, multiple: int = 1
) -> tuple[Tensor, Tensor]:
    """Tokenize texts to (input_ids int64 [B, L], is_valid bool [B, L]), padded to the longest, cut to `max_tokens`.

    With a `multiple`, L is the next multiple of it, at most `max_tokens`: batches then have few shapes.
    """
    return tokenize_words(tokenizer, texts, max_tokens, multiple)[:2]


def tokenize_words(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], max_tokens: int, multiple: int = 1, by_word: bool = False
) -> tuple[Tensor, Tensor, NDArray[np.int64] | None]:
    """Tokenize as `tokenize`; with `by_word` return also the number of each token's word (`word_numbers`) [B, L]."""
    with TOKENIZER_LOCK:
        encoded = tokenizer(list(texts), padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
    input_ids, is_valid = encoded["input_ids"], encoded["attention_mask"].bool()
    more = min(-(-input_ids.shape[1] // multiple) * multiple, max_tokens) - input_ids.shape[1]
    if more > 0:
        input_ids = functional.pad(input_ids, (0, more), value=tokenizer.pad_token_id)
        is_valid = functional.pad(is_valid, (0, more))
    return input_ids, is_valid, word_numbers(encoded, input_ids.shape[1]) if by_word else None


def tokenize_closed(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], max_tokens: int) -> tuple[Tensor, Tensor]:
    """Tokenize as `tokenize`, with a [SEP] at the end of each text even if the tokenizer writes none."""
    if ends_with_sep(tokenizer):
        return tokenize(tokenizer, texts, max_tokens)
    ids, is_valid = tokenize(tokenizer, texts, max_tokens - 1)
    lengths = is_valid.sum(dim=1, keepdim=True)
    closed = functional.pad(ids, (0, 1), value=tokenizer.pad_token_id).scatter(1, lengths, tokenizer.sep_token_id)
    return closed, torch.arange(closed.shape[1]) <= lengths
