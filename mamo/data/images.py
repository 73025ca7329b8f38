"""Decoding of images, and the policy for samples that cannot be used.

Legend: H, W height and width in pixels.
"""

import contextlib
import functools
import io
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError
from torch import Tensor

from mamo.data.files import open_regular, path_hint, read_bytes
from mamo.data.shard_index import MAX_MEMBER_BYTES

logger = logging.getLogger(__name__)

# So many bad samples are allowed under any budget above 0: early in a run a single one exceeds every share.
FREE_SKIPS = 3
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "HEIF")
"""Formats that Pillow, or a plugin of it, decodes by itself. Others start a program (EPS) or open any format (IPTC)."""
_ORIENTATION = 0x0112
"""EXIF tag."""
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transposition that makes an image of an EXIF orientation upright."""
_FIRST_TURNED = 5
"""From this orientation on, height and width are exchanged."""
_FORMATS_OF_16_BITS = ("PPM", "PNG")
"""Formats whose 16-bit grey images Pillow opens in the mode of 32 bits."""
_DARK = 4096
"""A 16-bit image without a larger value has probably 12 bits a sample; its high byte is at most 15 of 255."""


class BadSampleError(ValueError):
    """A sample that cannot be used. The message contains its name and the reason. Can be raised in a loader worker.

    >>> import mamo
    >>> mamo.load("runs/scenes").encode_image(["absent.jpg"])
    Traceback (most recent call last):
    mamo.data.images.BadSampleError: absent.jpg: FileNotFoundError: No such file or directory
    """


@dataclass
class BadSamplePolicy:
    """Count of skipped samples in the main process, with a budget.

    Workers return the skipped samples as data (`Sample.skipped`). The main process calls `record` once a batch. The run
    stops if `skipped > max(FREE_SKIPS, budget * seen)`. A budget of 0 stops it at the first skip. `seen` and `skipped`
    are plain fields that are saved and restored with the run.
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
        """Add a batch of `n_used` samples and the lines of the skipped ones; `seen` counts both.

        Raises:
            BadSampleError: the budget is exceeded. The message contains the last skipped sample.
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
    """Decode an image to RGB uint8 [3, H, W], with its EXIF orientation applied.

    Transparent pixels are blended with white, CMYK and palettes become RGB, 16-bit samples keep their high byte, and an
    animation gives its first frame. `max_pixels` bounds the memory: a larger image is rejected from its header. Only
    `_FORMATS` are decoded, from regular files of at most `MAX_MEMBER_BYTES` bytes.

    Args:
        data: content of a file, a path, or a PIL image.
        max_pixels: largest number of pixels.
        name: used in messages; the path by default.

    Raises:
        BadSampleError: the image cannot be read or decoded completely.
    """
    with _as_bad_sample(name or (str(data) if isinstance(data, Path) else "image"), data):
        if isinstance(data, Image.Image):
            return _decode(data, max_pixels)
        content = read_bytes(data, MAX_MEMBER_BYTES) if isinstance(data, Path) else data
        with _open(io.BytesIO(content), len(content)) as image:
            return _decode(image, max_pixels)


def read_size(data: bytes | Path, max_pixels: int = 100_000_000, name: str | None = None) -> tuple[int, int]:
    """Read (width, height) of an image from its header, as they are with its EXIF orientation applied.

    Arguments as of `decode_image`. Raises BadSampleError for an image that cannot be opened.
    """
    with (
        _as_bad_sample(name or (str(data) if isinstance(data, Path) else "image"), data),
        contextlib.ExitStack() as opened,
    ):
        if isinstance(data, Path):
            file = opened.enter_context(open_regular(data))
            n_bytes = os.fstat(file.fileno()).st_size
        else:
            file, n_bytes = io.BytesIO(data), len(data)
        image = opened.enter_context(_open(file, n_bytes))
        _check_size(image, max_pixels)
        is_turned = image.format != "TIFF" and _orientation(image) >= _FIRST_TURNED  # Pillow turns a TIFF's size
        return (image.height, image.width) if is_turned else image.size


@contextlib.contextmanager
def _open(file: IO[bytes], n_bytes: int) -> Iterator[Image.Image]:
    if not n_bytes:
        raise BadSampleError("zero bytes: the file is empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `max_pixels` is the limit here, and metadata decide about nothing
        with Image.open(file, formats=_formats()) as image:
            yield image


@contextlib.contextmanager
def _as_bad_sample(label: str, data: bytes | Path | Image.Image) -> Iterator[None]:
    """Raise any error as BadSampleError with the label and the reason."""
    try:
        yield
    except BadSampleError as error:
        raise BadSampleError(f"{label}: {error}") from None
    except UnidentifiedImageError:
        names = ", ".join(_formats())
        raise BadSampleError(f"{label}: not an image of a format that is read ({names}); convert it") from None
    except Exception as error:  # damaged bytes can raise any error in a decoder
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        hint = path_hint(data) if isinstance(data, Path) and isinstance(error, FileNotFoundError) else ""
        raise BadSampleError(f"{label}: {type(error).__name__}: {reason}{hint}") from error


@functools.cache
def _formats() -> tuple[str, ...]:
    """Return those of `_FORMATS` that this Pillow can decode."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _decode(image: Image.Image, max_pixels: int) -> Tensor:
    """Decode a PIL image; its pixels may not be loaded so far."""
    _check_size(image, max_pixels)
    if isinstance(image, ImageFile.ImageFile) and image.tile and image.format not in _FORMATS:
        raise BadSampleError(f"{image.format} is not a format that is read; convert the image first")
    image.load()
    if image.mode == "I" and image.format not in _FORMATS_OF_16_BITS:
        raise BadSampleError("32-bit integer samples are not supported; save the image with 8 or 16 bits a channel")
    turn = _UPRIGHT.get(_orientation(image))
    upright = image if turn is None else image.transpose(turn)
    return torch.from_numpy(np.array(to_rgb(upright))).permute(2, 0, 1)  # [3, H, W]


def _check_size(image: Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise BadSampleError(
            f"{image.width} x {image.height} px is over the limit of {max_pixels} pixels; downscale it"
        )


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 (upright) if there is none or the EXIF data are damaged."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged metadata can raise any error, and the pixels do not depend on them
        return 1
    return value if isinstance(value, int) and value in _UPRIGHT else 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB as `decode_image` does. Raises BadSampleError for floating-point samples."""
    if image.mode == "F":
        raise BadSampleError("floating-point samples are not supported; save the image with 8 bits a channel")
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip at 255
        samples = np.asarray(image)
        if 0 < samples.max() < _DARK:
            _warn_of_dark(int(samples.max()))
        return Image.fromarray((samples.clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


@functools.cache
def _warn_of_dark(largest: int) -> None:
    """Log, once for each value, that a 16-bit image is nearly black."""
    logger.warning(
        "a 16-bit image has no value above %d of 65,535 and becomes nearly black; scale its samples to 16 bits", largest
    )
