"""Decoding of images as they come, and what to do with a sample that cannot be used.

Legend: H, W height and width in pixels.
"""

import io
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

logger = logging.getLogger(__name__)

# This many bad samples are forgiven whatever the budget, so that the first bad one of a young run does not stop it.
FREE_SKIPS = 3


class BadSampleError(ValueError):
    """One sample that cannot be used. The message names it and says why; survives the way out of a worker process.

    >>> import mamo
    >>> mamo.load("runs/scenes").encode_image(["absent.jpg"])
    Traceback (most recent call last):
    mamo.data.images.BadSampleError: absent.jpg: FileNotFoundError: No such file or directory
    """


@dataclass
class BadSamplePolicy:
    """Counts the skipped samples in the main process and stops the run above a budget.

    Workers return what they skipped as data (`Sample.skipped`); `record` is called once a batch. The run stops when
    `skipped > max(FREE_SKIPS, budget * seen)`; a budget of 0 stops at the first skip. Both counts are plain fields, to
    be saved and restored with the run.
    """

    policy: Literal["raise", "skip"] = "raise"
    budget: float = 0.001
    seen: int = 0
    skipped: int = 0

    def __post_init__(self) -> None:
        if self.policy not in ("raise", "skip"):
            raise ValueError(f"bad-sample policy must be 'raise' or 'skip', got {self.policy!r}")
        if not 0 <= self.budget <= 1:
            raise ValueError(f"bad-sample budget must be a share between 0 and 1, got {self.budget}")

    def record(self, n_used: int, skipped: Sequence[str]) -> None:
        """Adds a batch of `n_used` samples and those skipped on the way to it; both were seen.

        Raises BadSampleError, naming the last one, when the budget is spent.
        """
        self.seen += n_used + len(skipped)
        for reason in skipped:
            self.skipped += 1
            logger.warning("skipped sample %d of %d seen: %s", self.skipped, self.seen, reason)
        allowed = max(FREE_SKIPS, self.budget * self.seen) if self.budget > 0 else 0
        if skipped and (self.policy == "raise" or self.skipped > allowed):
            limit = "" if self.policy == "raise" else f", more than the budget of {self.budget:.2%}"
            free = f" (and {FREE_SKIPS} free ones)" if limit and self.budget > 0 else ""
            raise BadSampleError(
                f"{self.skipped} of {self.seen} samples could not be used{limit}{free}; the last: {skipped[-1]}"
            )


def decode_image(data: bytes | Path | Image.Image, max_pixels: int = 100_000_000, name: str | None = None) -> Tensor:
    """Decodes one image that Pillow reads to RGB, uint8 [3, H, W], upright (EXIF orientation applied).

    Transparency is laid on white, CMYK and palettes become RGB, 16-bit samples keep their high byte, the first frame of
    an animation is taken. Memory is bounded by `max_pixels`: a larger image is refused from its header, undecoded.

    Raises BadSampleError, naming the file (`name`, default the path), for anything that cannot be decoded whole.
    """
    label = name or (str(data) if isinstance(data, Path) else "image")
    try:
        if isinstance(data, Image.Image):
            return _decode(data, max_pixels)
        content = data.read_bytes() if isinstance(data, Path) else data
        if not content:
            raise BadSampleError("zero bytes")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `max_pixels` decides
            image = Image.open(io.BytesIO(content))
        with image:
            return _decode(image, max_pixels)
    except BadSampleError as error:
        raise BadSampleError(f"{label}: {error}") from None
    except UnidentifiedImageError:
        raise BadSampleError(f"{label}: not an image of a format that Pillow reads") from None
    except Exception as error:  # damaged bytes make decoders raise errors of every kind; all mean the same here
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise BadSampleError(f"{label}: {type(error).__name__}: {reason}") from error


def _decode(image: Image.Image, max_pixels: int) -> Tensor:
    """`image` may have only its header read yet."""
    if image.width * image.height > max_pixels:
        raise BadSampleError(f"{image.width} x {image.height} px is over the limit of {max_pixels} pixels")
    image.load()
    upright = ImageOps.exif_transpose(image)
    return torch.from_numpy(np.array(to_rgb(upright))).permute(2, 0, 1)  # [3, H, W]


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB, transparency on white; see `decode_image`. Raises BadSampleError for floating point."""
    if image.mode == "F":
        raise BadSampleError("floating-point samples; save the image with 8 bits a channel")
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip at 255
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
