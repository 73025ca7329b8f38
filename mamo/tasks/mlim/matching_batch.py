"""Pairs of listings as samples and batches, with modality dropout.

Legend: B pairs, 2 listings of each, L text tokens, H, W height and width in pixels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mamo.config.schema import DataConfig
from mamo.data.collate import MASK_STREAM, Batch, sample_rng, tokenize
from mamo.world.listings import listing_pair
from mamo.world.rendering import render
from mamo.world.scene import WORLD_SEED, Scene, SceneWorld, Split

Modality = Literal["both", "image_only", "text_only"]
MODALITIES: tuple[Modality, ...] = ("both", "image_only", "text_only")


@dataclass(frozen=True, slots=True)
class ListingSample:
    """Two listings: `images` uint8 [2, 3, H, W], black where missing, and `texts`, empty where missing."""

    images: Tensor
    texts: tuple[str, str]
    has_image: tuple[bool, bool]
    is_match: bool
    sample_id: int


class CataloguePairs:
    """The embedded catalogue's pairs; `mamo.world.listings` says what they are."""

    group_size = 1

    def __init__(self, data: DataConfig, split: Split, n_pairs: int) -> None:
        self.world = SceneWorld(data.difficulty, WORLD_SEED)
        self.split = split
        self.n_pairs = n_pairs
        self.image_size_px = data.image_size

    def __len__(self) -> int:
        return self.n_pairs

    def fingerprint_items(self) -> Iterator[str]:
        """Yield what the fingerprint of the data covers."""
        yield f"catalogue {self.world.difficulty} {self.split} {self.n_pairs} {self.image_size_px}"

    def dataset_names(self) -> list[str]:
        """Name the data set."""
        return ["scenes"]

    def load(self, index: int, rng: np.random.Generator | None = None) -> ListingSample:
        """Draw pair `index`; nothing is augmented, so `rng` is not read."""
        pair = listing_pair(self.world, self.split, index)
        listings = (pair.first, pair.second)
        return ListingSample(
            images=torch.stack([self._picture(listing.image) for listing in listings]),
            texts=(pair.first.text, pair.second.text),
            has_image=(pair.first.image is not None, pair.second.image is not None),
            is_match=pair.is_match,
            sample_id=index,
        )

    def _picture(self, scene: Scene | None) -> Tensor:
        if scene is None:
            return torch.zeros(3, *self.image_size_px, dtype=torch.uint8)
        return torch.from_numpy(render(scene, self.image_size_px)).permute(2, 0, 1)


@dataclass(frozen=True, slots=True)
class ListingBatch(Batch):
    """Pairs of listings."""

    image: Tensor
    """uint8 [B, 2, 3, H, W]."""
    input_ids: Tensor
    """int64 [B, 2, L]."""
    is_valid: Tensor
    """bool [B, 2, L], False at padding."""
    has_image: Tensor
    """bool [B, 2], False where the image is missing or dropped."""
    has_text: Tensor
    """bool [B, 2], False where the text is missing or dropped."""
    is_match: Tensor
    """bool [B], whether both are of the same item."""
    sample_id: Tensor
    """int64 [B], index in the data set."""
    skipped: tuple[str, ...] = ()
    """Always empty: the embedded catalogue has no bad samples."""

    def given(self, modality: Modality) -> tuple[Tensor, Tensor]:
        """Return `has_image` and `has_text`, bool [B, 2] each, where only this modality is kept."""
        nothing = torch.zeros_like(self.has_image)
        has_image = nothing if modality == "text_only" else self.has_image
        has_text = nothing if modality == "image_only" else self.has_text
        return has_image, has_text


class ListingCollator:
    """Tokenizes texts and drops modalities (MDO of MLIM, section 3); runs in the loader's worker.

    Args:
        modality_dropout: how often one modality of both listings of a pair is dropped, either with equal chance.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, text_max_tokens: int, modality_dropout: float, seed: int
    ) -> None:
        self.tokenizer = tokenizer
        self.text_max_tokens = text_max_tokens
        self.modality_dropout = modality_dropout
        self.seed = seed

    def __call__(self, drawn: Sequence[tuple[int, ListingSample]]) -> ListingBatch:
        """Collate (epoch, sample) pairs."""
        samples = [sample for _, sample in drawn]
        texts = [text for sample in samples for text in sample.texts]
        input_ids, is_valid = tokenize(self.tokenizer, texts, self.text_max_tokens)
        fates = [sample_rng(self.seed, epoch, sample.sample_id, MASK_STREAM).random() for epoch, sample in drawn]
        fate = torch.tensor(fates)[:, None]
        drops_image = fate < self.modality_dropout / 2
        drops_text = ~drops_image & (fate < self.modality_dropout)
        return ListingBatch(
            image=torch.stack([sample.images for sample in samples]),
            input_ids=input_ids.view(len(samples), 2, -1),
            is_valid=is_valid.view(len(samples), 2, -1),
            has_image=torch.tensor([sample.has_image for sample in samples]) & ~drops_image,
            has_text=torch.tensor([[text != "" for text in sample.texts] for sample in samples]) & ~drops_text,
            is_match=torch.tensor([sample.is_match for sample in samples]),
            sample_id=torch.tensor([sample.sample_id for sample in samples]),
        )
