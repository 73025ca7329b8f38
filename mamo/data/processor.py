"""Conversion of images and texts to the input tensors of a model.

Legend: I images, T texts, L text tokens, H, W height and width of an image, h, w of the model's input.
"""

import logging
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import cast

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mamo.config.schema import MamoModelConfig, RunConfig
from mamo.data.cleaning import Cleaning, cleaner
from mamo.data.collate import TOKENIZER_LOCK
from mamo.data.images import BadSampleError, decode_image
from mamo.data.transforms import Resizing, eval_transform

logger = logging.getLogger(__name__)

ImageLike = str | Path | Image.Image | Tensor
"""A path, a PIL image of any mode, or a tensor uint8 [3, H, W]."""


def cleaning_of(config: RunConfig) -> Cleaning:
    """Return how a config's texts are cleaned."""
    return config.model.text.cleaning if isinstance(config.model, MamoModelConfig) else "plain"


def resizing_of(config: RunConfig) -> Resizing:
    """Return which library resizes a config's images in evaluation."""
    return config.model.image.resizing if isinstance(config.model, MamoModelConfig) else "torchvision"


def has_sep(config: RunConfig) -> bool:
    """Return whether a config's texts end with [SEP]."""
    return config.model.text.sep if isinstance(config.model, MamoModelConfig) else True


class Processor:
    """The tokenizer, image size and text length of a model.

    >>> import mamo
    >>> processor = mamo.load("runs/scenes").processor
    >>> batch = processor(images=["a.jpg"], texts=["a red circle", "a small blue square"])
    >>> batch["image"].dtype, batch["image"].shape[:2]
    (torch.uint8, torch.Size([1, 3]))
    >>> batch["is_valid"].sum(dim=1).tolist()
    [5, 6]
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        image_size_px: tuple[int, int],
        text_max_tokens: int,
        cleaning: Cleaning = "plain",
        resizing: Resizing = "torchvision",
    ) -> None:
        self.tokenizer = tokenizer
        self.cleaning, self.resizing = cleaning, resizing
        self.clean, self.clean_question = cleaner(cleaning), cleaner(cleaning, is_question=True)
        self.image_size_px = image_size_px
        self.text_max_tokens = text_max_tokens
        self._has_warned = False

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, config: RunConfig) -> "Processor":
        """Create the processor of a config, with its tokenizer."""
        sizes = config.data.image_size, config.data.text_max_tokens
        return cls(tokenizer, *sizes, cleaning_of(config), resizing_of(config))

    def __call__(self, images: Sequence[ImageLike] = (), texts: Sequence[str] = ()) -> dict[str, Tensor]:
        """Convert images to `image` uint8 [I, 3, h, w] and texts to `input_ids` int64 and `is_valid` bool [T, L].

        Raises as `images` and `texts`.
        """
        batch: dict[str, Tensor] = {}
        if images:
            batch["image"] = self.images(images)
        if texts:
            batch["input_ids"], lengths = self.texts(texts)
            batch["is_valid"] = torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]
        return batch

    def images(self, images: Sequence[ImageLike]) -> Tensor:
        """Decode and resize images to uint8 [I, 3, h, w], as in evaluation. Raises as `pixels`."""
        return torch.stack([self.resize(self.pixels(image)) for image in images])

    def resize(self, image: Tensor) -> Tensor:
        """Resize uint8 [3, H, W] to uint8 [3, h, w], as in evaluation."""
        return eval_transform(image, self.image_size_px, self.resizing)

    def pixels(self, image: ImageLike) -> Tensor:
        """Decode one image to uint8 [3, H, W]. Raises BadSampleError, with its name, if it is not a valid image."""
        if isinstance(image, str | Path):
            return decode_image(Path(image))
        if isinstance(image, Image.Image):
            if not (image.width and image.height):
                raise BadSampleError(f"an image must have pixels, not {image.width} x {image.height}")
            return decode_image(image, name=str(getattr(image, "filename", "")) or None)
        if not isinstance(image, Tensor):
            raise BadSampleError(f"an image must be a path, a PIL image or a tensor, not {type(image).__name__}")
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or not image.numel():
            raise BadSampleError(f"an image tensor must be uint8 [3, H, W], not {image.dtype} {list(image.shape)}")
        return image

    def texts(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokenize texts to padded ids int64 [T, L] and lengths int64 [T]. Longer texts are cut, with one warning.

        Texts are cleaned like training captions.

        Raises:
            ValueError: `texts` is a single string, is empty, or contains something else than strings.
        """
        check_list("texts", texts)
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"give a list of texts, not {texts!r:.200}")
        cleaned = [self.clean(text) for text in texts]
        with TOKENIZER_LOCK:
            longest = max(len(ids) for ids in self.tokenizer(cleaned)["input_ids"])
            encoded = self.tokenizer(cleaned, padding=True, truncation=True, max_length=self.text_max_tokens)
        self.warn_if_truncated(longest)
        return torch.tensor(encoded["input_ids"]), torch.tensor(encoded["attention_mask"]).sum(dim=1)

    def warn_if_truncated(self, longest: int) -> None:
        """Log once that texts are cut, if `longest`, the number of tokens of the longest, is over the limit."""
        if longest > self.text_max_tokens and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "texts are cut to %d tokens; the longest has %d (logged once)", self.text_max_tokens, longest
            )

    def warn_if_full(self, lengths: Tensor) -> None:
        """Log once that texts may be cut, if any of the numbers of tokens int64 [T] is the limit."""
        n_full = int((lengths >= self.text_max_tokens).sum())
        if n_full and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%d of %d texts have data.text_max_tokens = %d tokens or more and are cut there (logged once)",
                n_full,
                len(lengths),
                self.text_max_tokens,
            )


def check_list(what: str, values: object, least: int = 1) -> None:
    """Raise ValueError for a single image or text, a mapping, values without a length, and for fewer than `least`."""
    is_list = isinstance(values, Sized) and hasattr(values, "__getitem__")
    if not is_list or isinstance(values, str | bytes | Mapping) or len(cast(Sized, values)) < least:
        raise ValueError(f"give a list of {what}, not {values!r:.200}")
