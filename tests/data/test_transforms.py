"""Augmentation: a pure function of the generator, and torchvision's and Pillow's results for the same parameters."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as classic
from torchvision.transforms.v2 import functional as F

from mamo.data import transforms
from mamo.data.transforms import draw_crop, eval_transform, train_transform

# Middle values, because bicubic overshoots and the libraries clip at 0 and 255 at different moments.
PIXELS = np.random.default_rng(0).integers(64, 192, (60, 90, 3), dtype=np.uint8)
IMAGE = torch.from_numpy(PIXELS).permute(2, 0, 1).contiguous()


def smooth() -> torch.Tensor:
    rows, columns = np.mgrid[0:60, 0:90]
    pixels = np.stack([rows * 4, columns * 2, (rows + columns)], 0).astype(np.uint8)
    return torch.from_numpy(pixels)


@pytest.mark.parametrize("size", [(32, 32), (24, 48), (100, 100)])
def test_eval_equals_pillow_bicubic(size: tuple[int, int]) -> None:
    """Bug: width and height swapped, a crop, or resizing without antialiasing."""
    expected = np.asarray(Image.fromarray(PIXELS).resize(size[::-1], Image.Resampling.BICUBIC)).astype(int)
    resized = eval_transform(IMAGE, size).permute(1, 2, 0).numpy()
    assert resized.dtype == np.uint8
    assert np.abs(resized - expected).max() <= 1


def test_train_is_a_pure_function_of_the_generator() -> None:
    """Bug: a draw from torch's or Python's global state, so that resumed or re-sharded runs differ."""
    outputs = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        np.random.seed(global_seed)  # noqa: NPY002
        state = torch.get_rng_state()
        rng = np.random.default_rng(7)
        outputs.append(
            [train_transform(IMAGE, (32, 40), rng, horizontal_flip=True, rand_augment=True) for _ in range(20)]
        )
        assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(*outputs))
    assert len({output.numpy().tobytes() for output in outputs[0]}) == 20
    assert all(output.shape == (3, 32, 40) and output.dtype == torch.uint8 for output in outputs[0])


def test_crop_equals_torchvision_for_the_same_box() -> None:
    """Bug: the box handed over in another order than it was drawn in."""
    top, left, height, width = draw_crop(60, 90, (32, 32), np.random.default_rng(3), 0.2)
    cropped = Image.fromarray(PIXELS[top : top + height, left : left + width])
    expected = np.asarray(cropped.resize((32, 32), Image.Resampling.BICUBIC)).astype(int)
    result = train_transform(IMAGE, (32, 32), np.random.default_rng(3)).permute(1, 2, 0).numpy()
    assert np.abs(result - expected).max() <= 1


@pytest.mark.parametrize("shape", [(80, 80), (60, 90), (20, 200), (200, 20)])
def test_crop_boxes_are_distributed_as_torchvisions(shape: tuple[int, int]) -> None:
    """Bug: area drawn over sides, an aspect ratio that is not log-uniform, or boxes that leave the image."""
    rng, reference = np.random.default_rng(0), torch.empty(3, *shape)
    torch.manual_seed(0)
    ours = np.array([draw_crop(*shape, (32, 32), rng, 0.2) for _ in range(4000)])
    theirs = np.array([RandomResizedCrop.get_params(reference, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)])
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= shape[0]).all()
    assert (ours[:, 1] + ours[:, 3] <= shape[1]).all()
    spread = theirs.std(0) / np.sqrt(4000)
    assert (np.abs(ours.mean(0) - theirs.mean(0)) <= 6 * spread + 1e-9).all()
    np.testing.assert_allclose(ours.std(0), theirs.std(0), rtol=0.1, atol=1e-9)


def test_crop_follows_the_shape_of_the_target() -> None:
    """Bug: square crops of a wide image stretched to a wide target."""
    rng = np.random.default_rng(0)
    boxes = np.array([draw_crop(100, 400, (32, 128), rng, 0.2) for _ in range(500)])
    assert ((boxes[:, 3] / boxes[:, 2] > 2.8) & (boxes[:, 3] / boxes[:, 2] < 5.6)).all()
    assert draw_crop(100, 400, (32, 128), rng, 1.0) == (0, 0, 100, 400)
    assert draw_crop(1, 1, (32, 32), rng, 0.2) == (0, 0, 1, 1)


def test_flip_is_off_unless_asked() -> None:
    """Bug: mirrored images under captions that say left and right; or a flip that never happens."""
    half = torch.zeros(3, 32, 32, dtype=torch.uint8)
    half[:, :, 16:] = 255

    def is_mirrored(seed: int, flip: bool) -> bool:
        result = train_transform(half, (32, 32), np.random.default_rng(seed), min_crop_scale=1.0, horizontal_flip=flip)
        return bool(result[0, 0, 0] > 128)

    assert not any(is_mirrored(seed, flip=False) for seed in range(100))
    assert 30 <= sum(is_mirrored(seed, flip=True) for seed in range(100)) <= 70


def test_rand_augment_operations_equal_torchvisions_classic_ones() -> None:
    """Bug: a wrong magnitude, axis, sign, or operation; each is compared with the older torchvision functions."""
    image, nearest, degrees = smooth(), InterpolationMode.NEAREST, float(np.degrees(np.arctan(0.21)))

    def affine(angle: float = 0, shift: tuple[int, int] = (0, 0), shear: tuple[float, float] = (0, 0)) -> torch.Tensor:
        return classic.affine(image, angle, list(shift), 1.0, list(shear), nearest, [128.0] * 3)

    for sign in (-1, 1):
        expected = [
            image,
            classic.autocontrast(image),
            classic.equalize(image),
            classic.adjust_brightness(image, 1.36),
            classic.adjust_sharpness(image, 1.36),
            affine(shear=(sign * degrees, 0)),
            affine(shear=(0, sign * degrees)),
            affine(shift=(sign * round(90 * 7 / 256), 0)),
            affine(shift=(0, sign * round(60 * 7 / 256))),
            affine(angle=sign * 21),
        ]
        results = [operation(image, float(sign), 128) for operation in transforms.OPERATIONS]
        assert len(results) == len(expected)
        for index, (result, wanted) in enumerate(zip(results, expected)):
            difference = (result.int() - wanted.int()).abs()
            assert difference.max() <= 1, (index, sign, difference.max())


def test_rand_augment_applies_two_operations_half_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: N or the probability not as in the recipe."""
    calls: list[float] = []

    def count(image: torch.Tensor, sign: float, _: object) -> torch.Tensor:
        calls.append(sign)
        return image

    monkeypatch.setattr(transforms, "OPERATIONS", (count,) * 10)
    for seed in range(500):
        train_transform(IMAGE, (8, 8), np.random.default_rng(seed), rand_augment=True)
    assert abs(len(calls) - 500) < 80  # 500 images x 2 operations x 1/2; 5 standard deviations
    assert abs(sum(calls)) < 120


@pytest.mark.parametrize("size", [(37, 53), (64, 64), (2, 5)])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_fast_operations_equal_torchvision(size: tuple[int, int], sign: float) -> None:
    """Bug: a pixel off in a moved image or a rounding in a sharpened one, where our way is not the library's."""
    image = torch.randint(256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    image = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # laid out as it is decoded
    before = image.clone()
    shear, degrees = sign * math.degrees(math.atan(0.21)), sign * 21.0
    shift_x, shift_y = round(sign * 7 / 256 * size[1]), round(sign * 7 / 256 * size[0])
    plain = {
        4: F.adjust_sharpness(image, 0.7 * 1.8 + 0.1),
        5: F.affine(image, 0, [0, 0], 1.0, [shear, 0], fill=[128.0]),
        6: F.affine(image, 0, [0, 0], 1.0, [0, shear], fill=[128.0]),
        7: F.affine(image, 0, [shift_x, 0], 1.0, [0, 0], fill=[128.0]),
        8: F.affine(image, 0, [0, shift_y], 1.0, [0, 0], fill=[128.0]),
        9: F.affine(image, degrees, [0, 0], 1.0, [0, 0], fill=[128.0]),
    }
    for index, expected in plain.items():
        for _ in range(2):  # the second time from what the first left
            assert torch.equal(transforms.OPERATIONS[index](image, sign, 128), expected), index
    assert torch.equal(image, before)


def test_random_operations_fill_with_the_given_colour() -> None:
    """Bug: grey corners on white pictures, or the channels of the colour exchanged."""
    image = torch.full((3, 20, 20), 255, dtype=torch.uint8)
    for operation in transforms.OPERATIONS[5:]:
        assert int(operation(image, 1.0, 255).min()) == 255
        coloured = operation(image, 1.0, (10, 20, 30))
        outside = operation(image, 1.0, 0)[0] == 0
        assert outside.any()
        assert [coloured[channel][outside].unique().tolist() for channel in range(3)] == [[10], [20], [30]]


def test_a_shift_moves_whole_pixels_and_fills() -> None:
    """Bug: a shift in the wrong direction or axis, larger than asked, or one that blurs."""
    seen = set()
    for seed in range(60):
        moved = transforms.move(IMAGE, np.random.default_rng(seed), 0.1, 0.0, (1, 2, 3))
        rng = np.random.default_rng(seed)
        dx, dy = (round(rng.uniform(-0.1, 0.1) * side) for side in (90, 60))
        seen.add((dx, dy))
        expected = torch.tensor([1, 2, 3], dtype=torch.uint8)[:, None, None].repeat(1, 60, 90)
        rows, columns = slice(max(0, dy), 60 + min(0, dy)), slice(max(0, dx), 90 + min(0, dx))
        expected[:, rows, columns] = IMAGE[:, max(0, -dy) : 60 - max(0, dy), max(0, -dx) : 90 - max(0, dx)]
        assert torch.equal(moved, expected), (dx, dy)
    assert max(abs(dx) for dx, _ in seen) == 9
    assert max(abs(dy) for _, dy in seen) == 6


def test_a_zoom_stays_in_its_range_about_the_centre() -> None:
    """Bug: a zoom that only grows, or that moves the picture."""
    square = torch.zeros(1, 101, 101, dtype=torch.uint8).expand(3, -1, -1).clone()
    square[:, 30:71, 30:71] = 255
    areas = []
    for seed in range(80):
        moved = transforms.move(square, np.random.default_rng(seed), 0.0, 0.25, 0)
        areas.append(float((moved[0] > 127).sum()) / 41**2)
        rows = (moved[0] > 127).any(dim=1).nonzero().flatten()
        assert abs(float(rows.float().mean()) - 50) <= 1
    assert 1 / 1.25**2 - 0.06 <= min(areas) < 0.75
    assert 1.35 < max(areas) <= 1.25**2 + 0.06


def test_colour_jitter_keeps_hues() -> None:
    """Bug: red becomes orange under a caption that says red; or nothing changes."""
    colours = torch.tensor([[200, 40, 40], [40, 200, 40], [40, 40, 200], [120, 120, 120]], dtype=torch.uint8)
    image = colours.T[:, :, None].expand(-1, -1, 4).contiguous()  # [3, 4, 4]
    changed = [transforms.jitter_colours(image, np.random.default_rng(seed), 0.4) for seed in range(30)]
    assert len({result.numpy().tobytes() for result in changed}) == 30
    for result in changed:
        assert result[:, :3, 0].argmax(dim=0).tolist() == [0, 1, 2]
        assert result[:, 3, 0].float().std() <= 1  # grey stays grey


def test_new_augmentations_draw_nothing_while_off() -> None:
    """Bug: a default run that no longer repeats to the same bits."""
    outputs = [
        train_transform(IMAGE, (32, 40), np.random.default_rng(3), rand_augment=True, **more)
        for more in ({}, {"max_shift": 0.0, "max_zoom": 0.0, "colour_jitter": 0.0, "fill": 128})
    ]
    assert torch.equal(*outputs)
