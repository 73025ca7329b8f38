"""Decoding against an independent Pillow reading, and the bad-sample policy."""

import io
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from mamo.data.images import FREE_SKIPS, BadSampleError, BadSamplePolicy, decode_image

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (24, 36, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(data: bytes) -> np.ndarray:
    tensor = decode_image(data)
    assert tensor.dtype == torch.uint8
    return tensor.permute(1, 2, 0).numpy()


def on_white(image: Image.Image) -> np.ndarray:
    rgba = np.asarray(image.convert("RGBA")).astype(np.float64)
    alpha = rgba[..., 3:] / 255
    return rgba[..., :3] * alpha + 255 * (1 - alpha)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_plain_images_equal_pillow(kind: str, mode: str) -> None:
    """Bug: BGR order, H and W swapped, or a grey image left with one channel."""
    data = encoded(Image.fromarray(NOISE).convert(mode), kind)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(decoded(data) - expected).max() <= 1


def test_cmyk_jpeg() -> None:
    """Bug: ink values taken for light, so that the picture comes out as its negative."""
    data = encoded(Image.new("CMYK", (8, 6), (0, 255, 255, 0)), "JPEG", quality=95)
    pixels = decoded(data)
    assert pixels.shape == (6, 8, 3)
    np.testing.assert_allclose(pixels.reshape(-1, 3).mean(0), (255, 0, 0), atol=6)  # no cyan, all magenta, yellow: red
    np.testing.assert_array_equal(pixels, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_16_bit_grey_png() -> None:
    """Bug: every value over 255 clipped to white, which is what a plain conversion does."""
    values = RNG.integers(0, 65536, (5, 7), dtype=np.uint16)
    expected = np.repeat((values // 256)[..., None], 3, axis=2)
    np.testing.assert_array_equal(decoded(encoded(Image.fromarray(values), "PNG")), expected)


def test_16_bit_colour_png() -> None:
    """Bug: a uint16 tensor handed on as if it were uint8 (a 16-bit RGB file written by hand; Pillow writes none)."""
    import struct
    import zlib

    values = RNG.integers(0, 65536, (3, 4, 3), dtype=np.uint16)
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", 4, 3, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    np.testing.assert_array_equal(decoded(data), values // 256)


def test_palette_with_transparency_is_laid_on_white() -> None:
    """Bug: transparent palette entries shown in whatever colour they hide."""
    image = Image.fromarray(RNG.integers(0, 3, (6, 9), dtype=np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    data = encoded(image, "PNG", transparency=1)
    pixels = decoded(data)
    assert (pixels[np.asarray(image) == 1] == 255).all()
    assert (pixels[np.asarray(image) == 0] == (255, 0, 0)).all()
    np.testing.assert_array_equal(decoded(encoded(image, "PNG"))[np.asarray(image) == 1][0], (0, 255, 0))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_alpha_is_composited_on_white(mode: str, kind: str) -> None:
    """Bug: the alpha channel dropped, or composited on black."""
    image = Image.fromarray(RNG.integers(0, 256, (6, 9, 4), dtype=np.uint8), "RGBA").convert(mode)
    data = encoded(image, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    assert np.abs(decoded(data) - on_white(image)).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation_is_applied(orientation: int, kind: str) -> None:
    """Bug: a photograph taken sideways enters sideways, or is turned the wrong way."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(NOISE), kind, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert expected.shape == ((36, 24, 3) if orientation > 4 else (24, 36, 3))
    assert np.abs(decoded(data).astype(int) - expected).max() <= 1


def test_one_pixel_and_very_wide() -> None:
    """Bug: sizes at the ends of the range refused."""
    assert decoded(encoded(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG")).tolist() == [[[1, 2, 3]]]
    wide = np.repeat(np.arange(20_000, dtype=np.int64)[None, :, None] % 256, 3, axis=2).astype(np.uint8)
    np.testing.assert_array_equal(decoded(encoded(Image.fromarray(wide), "PNG")), wide)


def test_animation_gives_its_first_frame() -> None:
    """Bug: a fourth dimension for frames, or the last frame."""
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decoded(data) == (255, 0, 0)).all()


def test_pixel_limit_is_read_from_the_header() -> None:
    """Bug: a decompression bomb is decoded before it is measured, or Pillow's own limit lets it crash."""
    small = encoded(Image.new("RGB", (20, 10)), "PNG")
    assert decode_image(small, max_pixels=200).shape == (3, 10, 20)
    with pytest.raises(BadSampleError, match="20 x 10 px is over the limit of 199"):
        decode_image(small, max_pixels=199)
    bomb = encoded(Image.new("1", (14_000, 14_000)), "PNG")
    with pytest.raises(BadSampleError, match=r"bomb\.png"):
        decode_image(bomb, name="bomb.png")


def truncated(kind: str) -> bytes:
    data = encoded(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)), kind)
    return data[: len(data) // 2]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda: None, "No such file"),
        (lambda: b"", "zero bytes"),
        (lambda: b"<html>404 Not Found</html>", "not an image of a format"),
        (lambda: truncated("JPEG"), "truncated"),
        (lambda: truncated("PNG"), "truncated"),
        (lambda: truncated("WEBP"), "WEBP|webp|image"),
        (lambda: encoded(Image.fromarray(NOISE).convert("CMYK"), "JPEG")[:1500], "truncated"),
        (lambda: encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "floating-point"),
    ],
    ids=["missing", "zero-bytes", "text", "cut-jpeg", "cut-png", "cut-webp", "cut-cmyk", "float"],
)
def test_unreadable_images_are_bad_samples(tmp_path: Path, content: Callable[[], bytes | None], reason: str) -> None:
    """Bug: a grey half picture enters training, another exception type escapes, or the message names no file."""
    file, data = tmp_path / "photo.jpg", content()
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(BadSampleError, match=reason) as caught:
        decode_image(file)
    assert str(caught.value).startswith(str(file))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_policy_stops_above_the_budget() -> None:
    """Bug: the budget compared with the wrong count, or tripping on the first bad sample of a young run."""
    policy = BadSamplePolicy("skip", budget=0.01)
    policy.record(7, ["a"] * FREE_SKIPS)  # 30 % so far, but only the free ones
    policy.record(983, ["b"] * (10 - FREE_SKIPS))  # exactly 1 % of 1,000
    with pytest.raises(BadSampleError, match=r"11 of 1001 .*the last: c\.jpg"):
        policy.record(0, ["c.jpg"])


def test_a_chain_of_replacements_is_counted_one_by_one(caplog: pytest.LogCaptureFixture) -> None:
    """Bug: "skipped sample 11 of 8 seen", because the skipped ones were not among the seen."""
    policy = BadSamplePolicy("skip", budget=1.0)
    policy.record(2, ["a", "b", "c"])
    assert (policy.seen, policy.skipped) == (5, 3)
    assert [f"skipped sample {k} of 5 seen" in caplog.text for k in (1, 2, 3)] == [True] * 3


def test_what_is_no_image_is_told_in_words() -> None:
    """Bug: the message names Pillow's in-memory file object."""
    with pytest.raises(BadSampleError, match=r"^x\.jpg: not an image of a format that is read \(JPEG, PNG, "):
        decode_image(b"plain text", name="x.jpg")


def test_policy_without_budget_and_with_raise() -> None:
    """Bug: a budget of 0 forgives the free skips, or `raise` lets a skip pass."""
    for policy in (BadSamplePolicy("skip", budget=0.0), BadSamplePolicy("raise", budget=1.0)):
        policy.record(1000, [])
        with pytest.raises(BadSampleError, match="1 of 2001"):
            policy.record(1000, ["a.jpg"])


@pytest.mark.parametrize(
    ("policy", "told"),
    [
        (BadSamplePolicy("skip", budget=0.01), "4 of 4 samples could not be used, more than the budget of 1.00% "
         f"(and {FREE_SKIPS} free ones); the last: d"),
        (BadSamplePolicy("skip", budget=0.0), "4 of 4 samples could not be used, more than the budget of 0.00%; "
         "the last: d"),
        (BadSamplePolicy("raise", budget=1.0), "4 of 4 samples could not be used; the last: d"),
    ],
)  # fmt: skip
def test_policy_tells_the_limit_that_holds(policy: BadSamplePolicy, told: str) -> None:
    """Bug: the message grants free ones, or a budget, where the policy grants none."""
    with pytest.raises(BadSampleError) as caught:
        policy.record(0, ["a", "b", "c", "d"])
    assert str(caught.value) == told


def test_policy_names_every_skip(caplog: pytest.LogCaptureFixture) -> None:
    """Bug: skips are counted but never named."""
    BadSamplePolicy("skip", budget=0.5).record(100, ["a.jpg: zero bytes", "b.jpg: missing"])
    assert "a.jpg: zero bytes" in caplog.text
    assert "b.jpg: missing" in caplog.text


@pytest.mark.parametrize("arguments", [("ignore", 0.1), ("skip", 1.5), ("skip", -0.1)])
def test_policy_refuses_nonsense(arguments: tuple[str, float]) -> None:
    """Bug: a mistyped policy behaves like one of the others."""
    with pytest.raises(ValueError, match="bad-sample"):
        BadSamplePolicy(*arguments)  # type: ignore[arg-type]
