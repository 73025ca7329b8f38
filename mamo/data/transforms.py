"""Image augmentation as pure functions of a numpy generator, from uint8 to uint8.

The recipe is ALBEF's: random resized crop (bicubic), an optional horizontal flip, and an optional RandAugment without
colour operations, because captions mention colours. For small data there are small shifts, changes of size, and a
jitter of brightness, contrast and saturation. Images are normalised on the device, not in the workers.

Legend: H, W height and width of the source, h, w of the target, in pixels.
"""

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mamo.config.schema import DataConfig

# Level 7 of 10 on ALBEF's scales: 30 degrees, 0.3 shear, 10 px of 256, enhancement factor 0.1 to 1.9.
_ROTATE_DEGREES = 21.0
_SHEAR_DEGREES = math.degrees(math.atan(0.21))
_TRANSLATE_SHARE = 7 / 256
_ENHANCE_FACTOR = 0.7 * 1.8 + 0.1
Fill = int | tuple[int, int, int]
"""Grey level or (red, green, blue) of pixels that come from outside the image."""
FILL: Fill = 128
RAND_AUGMENT_N = 2
RAND_AUGMENT_PROBABILITY = 0.5


class _Functional:
    """The functions of torchvision, imported when an image is first changed: that takes three seconds."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module("torchvision.transforms.v2.functional"), name)


F = _Functional()

Resizing = Literal["torchvision", "pillow"]
"""Library that resizes images in evaluation; the two differ by 2 of 255 at most, and scores in the third digit."""


def eval_transform(image: Tensor, image_size_px: tuple[int, int], resizing: Resizing = "torchvision") -> Tensor:
    """Resize uint8 [3, H, W] to uint8 [3, h, w] (bicubic, antialiased), without cropping."""
    if resizing == "pillow":
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        pixels = np.array(picture.resize(image_size_px[::-1], Image.Resampling.BICUBIC))
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
    if image.shape[-2:] == image_size_px:
        return image
    resized: Tensor = F.resize(image, list(image_size_px), interpolation="bicubic", antialias=True)  # [3, h, w]
    return resized


def train_transform(
    image: Tensor,
    image_size_px: tuple[int, int],
    rng: np.random.Generator,
    *,
    min_crop_scale: float = 0.2,
    horizontal_flip: bool = False,
    rand_augment: bool = False,
    max_shift: float = 0.0,
    max_zoom: float = 0.0,
    colour_jitter: float = 0.0,
    fill: Fill = FILL,
) -> Tensor:
    """Augment uint8 [3, H, W] to uint8 [3, h, w]; a pure function of the arguments and the generator's state.

    Args:
        image: the source.
        image_size_px: (h, w).
        rng: draws the augmentation.
        min_crop_scale: smallest share of the area that a crop keeps; 1 disables cropping.
        horizontal_flip: mirror half of the images. Do not use it if captions mention left or right.
        rand_augment: apply `RAND_AUGMENT_N` random operations.
        max_shift, max_zoom: of `move`; with both 0 nothing is moved.
        colour_jitter: of `jitter_colours`; 0 changes nothing.
        fill: of `move` and of the random operations.
    """
    top, left, height, width = draw_crop(image.shape[-2], image.shape[-1], image_size_px, rng, min_crop_scale)
    image = F.resized_crop(
        image, top, left, height, width, list(image_size_px), interpolation="bicubic", antialias=True
    )
    if horizontal_flip and rng.random() < 0.5:
        image = F.horizontal_flip(image)
    if max_shift or max_zoom:
        image = move(image, rng, max_shift, max_zoom, fill)
    if colour_jitter:
        image = jitter_colours(image, rng, colour_jitter)
    if rand_augment:
        for index in rng.integers(len(OPERATIONS), size=RAND_AUGMENT_N):
            is_applied, sign = rng.random() < RAND_AUGMENT_PROBABILITY, float(rng.choice([-1.0, 1.0]))
            if is_applied:
                image = OPERATIONS[index](image, sign, fill)
    return image


def move(image: Tensor, rng: np.random.Generator, max_shift: float, max_zoom: float, fill: Fill) -> Tensor:
    """Shift and scale uint8 [3, h, w] about its centre, bilinearly.

    Args:
        image: the source.
        rng: draws the two shifts in whole pixels, uniform, and the factor, log-uniform.
        max_shift: largest shift in each direction, as a share of the side.
        max_zoom: the image becomes 1 / (1 + max_zoom) to 1 + max_zoom times as large.
        fill: of pixels from outside.
    """
    from torchvision.transforms import InterpolationMode  # here: importing it takes seconds

    height, width = image.shape[-2:]
    shift = [round(rng.uniform(-max_shift, max_shift) * side) for side in (width, height)]
    scale = (1 + max_zoom) ** rng.uniform(-1, 1)
    colour = [float(fill)] * 3 if isinstance(fill, int) else [float(level) for level in fill]
    moved: Tensor = F.affine(image, 0.0, shift, scale, [0.0, 0.0], InterpolationMode.BILINEAR, colour)
    return moved


def jitter_colours(image: Tensor, rng: np.random.Generator, most: float) -> Tensor:
    """Change brightness, contrast and saturation of uint8 [3, h, w] by factors in [1 - most, 1 + most]; hues stay."""
    for change in (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation):
        image = change(image, rng.uniform(1 - most, 1 + most))
    return image


def train_transform_from(data: DataConfig) -> Callable[[Tensor, tuple[int, int], np.random.Generator], Tensor]:
    """Return `train_transform` with the settings of `data.augmentation`."""
    augmentation = data.augmentation
    red_green_blue: Any = augmentation.fill if isinstance(augmentation.fill, int) else tuple(augmentation.fill)
    return functools.partial(
        train_transform,
        min_crop_scale=augmentation.crop_scale_min,
        horizontal_flip=augmentation.horizontal_flip,
        rand_augment=augmentation.randaugment,
        max_shift=augmentation.shift_max,
        max_zoom=augmentation.zoom_max,
        colour_jitter=augmentation.colour_jitter,
        fill=red_green_blue,
    )


def draw_crop(
    height: int, width: int, image_size_px: tuple[int, int], rng: np.random.Generator, min_scale: float
) -> tuple[int, int, int, int]:
    """Draw (top, left, height, width) of a random resized crop within `height` x `width`.

    The distribution is that of torchvision's RandomResizedCrop: area uniform in [min_scale, 1], aspect ratio
    log-uniform in 3/4 to 4/3, ten tries, then a central crop. The one difference: the aspect ratio is relative to the
    target's, so that a wide image for a wide target is not squeezed. With a square image and target the two agree.
    `min_scale` 1 keeps the whole image.
    """
    if min_scale >= 1:
        return 0, 0, height, width
    target_aspect = image_size_px[1] / image_size_px[0]
    for _ in range(10):
        area = height * width * rng.uniform(min_scale, 1.0)
        aspect = target_aspect * math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(rng.integers(height - crop_height + 1))
            left = int(rng.integers(width - crop_width + 1))
            return top, left, crop_height, crop_width
    aspect = min(max(width / height, target_aspect * 3 / 4), target_aspect * 4 / 3)
    crop_width = max(1, min(width, round(height * aspect)))
    crop_height = max(1, min(height, round(width / aspect)))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def _affine(image: Tensor, degrees: float, shift: tuple[int, int], shear: tuple[float, float], fill: Fill) -> Tensor:
    """Apply `F.affine` (nearest pixel) in a sixth of its time: source positions are computed once an image size."""
    source, is_outside = _sources(image.shape[-2], image.shape[-1], degrees, shift, shear)
    moved = image.flatten(1).gather(1, source.expand(image.shape[0], -1))  # [3, h * w]
    if isinstance(fill, int):
        return moved.masked_fill_(is_outside, fill).view(image.shape)
    return torch.where(is_outside, torch.tensor(fill, dtype=moved.dtype)[:, None], moved).view(image.shape)


@functools.lru_cache(maxsize=64)
def _sources(
    height: int, width: int, degrees: float, shift: tuple[int, int], shear: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Return the source pixel of each target pixel of `F.affine`, int64 [h * w], and bool [h * w], True for no source.

    They are found by transforming an image of pixel numbers. float32 represents these exactly up to 2**24.
    """
    assert height * width < 2**24
    numbers = torch.arange(height * width, dtype=torch.float32).view(1, height, width)
    moved = F.affine(numbers, degrees, list(shift), 1.0, list(shear), fill=[-1.0]).flatten()
    return moved.clamp(min=0).long(), moved < 0


def _sharpen(image: Tensor) -> Tensor:
    """Apply `F.adjust_sharpness` in a quarter of its time: the 3 x 3 mean is an integer sum, not a convolution."""
    if min(image.shape[-2:]) <= 2:
        return image
    small = image.to(torch.int16)
    rows = small[:, :-2] + small[:, 1:-1] + small[:, 2:]
    total = (
        rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * small[:, 1:-1, 1:-1]
    )  # weights 1, and 5 at the centre
    blurred = (total.float() / 13).round_()  # no ties, because the divisor is odd
    sharp = image.float()
    middle = sharp[:, 1:-1, 1:-1]
    middle.add_(blurred.sub_(middle), alpha=1 - _ENHANCE_FACTOR)
    return sharp.clamp_(0, 255).to(torch.uint8)


def _shift_px(length: int, sign: float) -> int:
    return round(sign * _TRANSLATE_SHARE * length)


# (image uint8 [3, h, w], sign -1 or 1, fill) -> uint8 [3, h, w]
OPERATIONS: tuple[Callable[[Tensor, float, Fill], Tensor], ...] = (
    lambda image, sign, fill: image,
    lambda image, sign, fill: F.autocontrast(image),
    lambda image, sign, fill: F.equalize(image),
    lambda image, sign, fill: F.adjust_brightness(image, _ENHANCE_FACTOR),
    lambda image, sign, fill: _sharpen(image),
    lambda image, sign, fill: _affine(image, 0, (0, 0), (sign * _SHEAR_DEGREES, 0), fill),
    lambda image, sign, fill: _affine(image, 0, (0, 0), (0, sign * _SHEAR_DEGREES), fill),
    lambda image, sign, fill: _affine(image, 0, (_shift_px(image.shape[-1], sign), 0), (0, 0), fill),
    lambda image, sign, fill: _affine(image, 0, (0, _shift_px(image.shape[-2], sign)), (0, 0), fill),
    lambda image, sign, fill: _affine(image, sign * _ROTATE_DEGREES, (0, 0), (0, 0), fill),
)
