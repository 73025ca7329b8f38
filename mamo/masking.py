"""Draw masks as data: exact counts from a passed random generator, never at special or padding tokens.

The caller seeds the generator from (seed, epoch, sample), so a mask depends on nothing else.
Legend: P patches, L text tokens.
"""

from typing import Literal

import numpy as np

IntArray = np.ndarray[tuple[int], np.dtype[np.int64]]
BoolArray = np.ndarray[tuple[int], np.dtype[np.bool_]]


def mask_count(n: int, ratio: float) -> int:
    """Return the number of masked elements among `n`: `ratio * n` rounded half up, at least 1, and below n if n > 1."""
    return min(max(1, int(ratio * n + 0.5)), max(1, n - 1))


def draw_image_mask(
    rng: np.random.Generator, grid: tuple[int, int], ratio: float, style: Literal["random", "block"]
) -> tuple[IntArray, IntArray]:
    """Choose the masked patches of one image.

    Args:
        grid: (rows, columns) of patches, row-major.
        style: `random` draws patches independently; `block` covers the grid with rectangles until the count is reached
            (BEiT's way), the last rectangle cut short.

    Returns:
        (visible, masked): ascending int64 patch indices, `mask_count(P, ratio)` of them masked.
    """
    n_patches = grid[0] * grid[1]
    n_masked = mask_count(n_patches, ratio)
    is_masked = np.zeros(n_patches, dtype=bool)
    if style == "random":
        is_masked[rng.permutation(n_patches)[:n_masked]] = True
    else:
        _cover_with_blocks(rng, is_masked.reshape(grid), n_masked)
    return np.flatnonzero(~is_masked), np.flatnonzero(is_masked)


def _cover_with_blocks(rng: np.random.Generator, is_masked: np.ndarray, n_masked: int) -> None:
    """Mark rectangles of random shape (aspect 0.3 to 3.3) in place until exactly `n_masked` patches are marked."""
    rows, columns = is_masked.shape
    while (missing := n_masked - int(is_masked.sum())) > 0:
        area = rng.uniform(min(4.0, missing), max(4.0, missing))
        aspect = np.exp(rng.uniform(np.log(0.3), -np.log(0.3)))
        height = int(np.clip(round(np.sqrt(area * aspect)), 1, rows))
        width = int(np.clip(round(np.sqrt(area / aspect)), 1, columns))
        top, left = rng.integers(rows - height + 1), rng.integers(columns - width + 1)
        block = np.zeros_like(is_masked)
        block[top : top + height, left : left + width] = True
        fresh = np.flatnonzero(block & ~is_masked)[:missing]
        is_masked.reshape(-1)[fresh] = True


def draw_text_mask(
    rng: np.random.Generator,
    is_maskable: BoolArray,
    ratio: float,
    words: IntArray | None = None,
) -> IntArray:
    """Choose the masked tokens of one caption.

    Args:
        is_maskable: bool [L], True at ordinary tokens, False at special and padding tokens.
        words: int64 [L], the number of the word of each token, to draw whole words: `mask_count(words, ratio)` words,
            every piece of each. None draws single tokens.

    Returns:
        Ascending int64 positions. Without `words` there are `mask_count(tokens, ratio)` of them. A caption
        without ordinary tokens has none.
    """
    positions = np.flatnonzero(is_maskable)
    if positions.size == 0:
        return positions
    if words is None:
        return np.sort(rng.permutation(positions)[: mask_count(positions.size, ratio)])
    drawable = np.unique(words[positions])
    chosen = rng.permutation(drawable)[: mask_count(drawable.size, ratio)]
    return positions[np.isin(words[positions], chosen)]


def draw_replacements(
    rng: np.random.Generator, hidden_ids: IntArray, mask_token_id: int, ordinary_ids: IntArray
) -> IntArray:
    """Draw the replacements of a caption's chosen tokens, as BERT does (Devlin et al. 2019, section 3.1).

    Each becomes [MASK] with probability 0.8, a random one of `ordinary_ids` (possibly itself) with 0.1, and stays with
    0.1. All are predicted, so that the network cannot rely on any token.

    Args:
        hidden_ids: int64 [K], the chosen tokens.

    Returns:
        int64 [K].
    """
    u = rng.random(hidden_ids.shape)
    random_ids = rng.choice(ordinary_ids, size=hidden_ids.shape)
    replaced: IntArray = np.where(u < 0.8, mask_token_id, np.where(u < 0.9, random_ids, hidden_ids))
    return replaced


def draw_ratios(
    rng: np.random.Generator, image_ratio: float, text_ratio: float, light_ratio: float
) -> tuple[float, float]:
    """Draw the (image, text) mask ratios of one sample under modality-aware masking (MLIM).

    Three modes are equally likely: only the image is masked, only the text, or both lightly. 0 masks nothing.
    """
    modes = ((image_ratio, 0.0), (0.0, text_ratio), (light_ratio, light_ratio))
    return modes[int(rng.integers(len(modes)))]
