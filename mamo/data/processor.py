"""Conversion of images and texts to the input tensors of a model.

Legend: I images, T texts, L text tokens, H, W height and width of an image, h, w of the model's input.
"""

import logging
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mamo.config.schema import MamoModelConfig, RunConfig
from mamo.data.cleaning import Cleaning, cleaner
from mamo.data.collate import TOKENIZER_LOCK
from mamo.data.images import BadSampleError, decode_image
from mamo.data.transforms import Resizing, eval_transform

logger = logging.getLogger(__name__)

ImageLike = str | Path | Image.Image | Tensor | NDArray[Any]
"""A path, a PIL image of any mode, a tensor [3, H, W], or an array [H, W, 3], [H, W, 4] or [H, W]; tensors and arrays
are uint8, or float from 0 to 1."""
Images = ImageLike | Sequence[ImageLike]
"""One image or several: also a tensor [I, 3, H, W] or an array [I, H, W, 3]."""


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

    def __call__(self, images: Images = (), texts: Sequence[str] = ()) -> dict[str, Tensor]:
        """Convert images to `image` uint8 [I, 3, h, w] and texts to `input_ids` int64 and `is_valid` bool [T, L].

        Raises as `images` and `texts`.
        """
        batch: dict[str, Tensor] = {}
        if not isinstance(images, tuple) or images:
            batch["image"] = self.images(images)
        if texts:
            batch["input_ids"], lengths = self.texts(texts)
            batch["is_valid"] = torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]
        return batch

    def images(self, images: Images) -> Tensor:
        """Decode and resize images to uint8 [I, 3, h, w], as in evaluation. Raises as `pixels`."""
        return torch.stack([self.resize(self.pixels(image)) for image in image_list(images)])

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
        if isinstance(image, np.ndarray):
            image = _from_array(image)
        if not isinstance(image, Tensor):
            raise BadSampleError(
                f"an image must be a path, a PIL image, an array or a tensor, not {type(image).__name__}"
            )
        if image.ndim != 3 or image.shape[0] != 3 or not image.numel():
            raise BadSampleError(f"an image tensor must be uint8 or float [3, H, W], not {_kind(image)}")
        return _as_bytes(image)

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

    def warn_of_cuts(self, texts: Sequence[str], lengths: Tensor) -> None:
        """Log once the number of texts that are cut.

        Args:
            texts: as they are tokenized.
            lengths: numbers of tokens, int64 [T], after the cut.
        """
        full = [text for text, length in zip(texts, lengths.tolist()) if length >= self.text_max_tokens]
        if full and not self._has_warned:
            with TOKENIZER_LOCK:
                counts = [len(ids) for ids in self.tokenizer(full)["input_ids"]]
            self.warn_of_lengths(counts, len(texts))

    def warn_of_lengths(self, counts: Sequence[int], n_texts: int) -> None:
        """Log once how many of `n_texts` texts are cut; `counts` are the tokens of the longest ones before the cut."""
        n_cut = sum(count > self.text_max_tokens for count in counts)
        if n_cut and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%d of %d texts are longer than data.text_max_tokens = %d tokens, the longest has %d; they are cut "
                "there (logged once)",
                n_cut,
                n_texts,
                self.text_max_tokens,
                max(counts),
            )


def image_list(images: Images, least: int = 1) -> Sequence[ImageLike]:
    """Return one image or several as a list. Raises ValueError as `check_list`."""
    if isinstance(images, str | Path | Image.Image) or (isinstance(images, Tensor | np.ndarray) and images.ndim < 4):
        return [images]
    check_list("images", images, least)
    return cast(Sequence[ImageLike], images)


def _from_array(array: NDArray[Any]) -> Tensor:
    """Return an array [H, W, 3], [H, W, 4] or [H, W] as a tensor [3, H, W]; transparency is blended with white."""
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)) or not array.size:
        hint = "; move its channels to the end" if array.ndim == 3 and array.shape[0] in (1, 3, 4) else ""
        raise BadSampleError(f"an image array must be [H, W, 3], [H, W, 4] or [H, W], not {list(array.shape)}{hint}")
    kind = array.dtype if array.dtype.isnative else array.dtype.newbyteorder("=")
    if kind.kind not in "fu":
        raise BadSampleError(f"an image array must be uint8, or float from 0 to 1, not {array.dtype}")
    tensor = _as_bytes(torch.from_numpy(np.ascontiguousarray(array, dtype=kind)))
    if array.ndim == 3 and array.shape[2] == 3:
        return tensor.permute(2, 0, 1)
    return decode_image(Image.fromarray(tensor.squeeze(-1).numpy() if array.ndim == 3 else tensor.numpy()))


def _as_bytes(image: Tensor) -> Tensor:
    """Return uint8 of uint8, or of float from 0 to 1. Raises BadSampleError for other types and values."""
    if image.dtype == torch.uint8:
        return image
    if not image.is_floating_point():
        raise BadSampleError(f"an image must be uint8, or float from 0 to 1, not {_kind(image)}")
    low, high = float(image.min()), float(image.max())
    if not (low >= 0 and high <= 1):
        raise BadSampleError(
            f"an image of floats must have values from 0 to 1, not {low:.4g} to {high:.4g}; undo its normalisation, or "
            "give uint8"
        )
    return (image.detach().cpu() * 255).round().to(torch.uint8)


def _kind(image: Tensor) -> str:
    return f"{str(image.dtype).removeprefix('torch.')} {list(image.shape)}"


def check_list(what: str, values: object, least: int = 1) -> None:
    """Raise ValueError for a single image or text, a mapping, values without a length, and for fewer than `least`."""
    is_list = isinstance(values, Sized) and hasattr(values, "__getitem__")
    if not is_list or isinstance(values, str | bytes | Mapping) or len(cast(Sized, values)) < least:
        raise ValueError(f"give a list of {what}, not {values!r:.200}")
