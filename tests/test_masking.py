"""Masks: exact counts, only where allowed, whole words, a pure function of the generator."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mamo.masking import draw_image_mask, draw_replacements, draw_text_mask, mask_count

PATIENT = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])  # for busy machines
SIDES = st.integers(1, 16)
RATIOS = st.floats(0.01, 0.99)
SEEDS = st.integers(0, 2**32)


def rounded_half_up(n: int, ratio: float) -> set[int]:
    """The counts that "ratio * n rounded half up, at least 1, at most n - 1" allows within float rounding."""
    near = {int(np.floor(ratio * n + 0.5 + slip)) for slip in (-1e-9, 1e-9)}
    return {min(max(count, 1), max(n - 1, 1)) for count in near}


@PATIENT
@given(n=st.integers(1, 2000), ratio=RATIOS)
def test_count_is_the_rounded_share(n: int, ratio: float) -> None:
    """Bug: truncation (0.75 of 49 patches gives 36), nothing masked, or nothing left visible."""
    assert mask_count(n, ratio) in rounded_half_up(n, ratio)


@pytest.mark.parametrize(
    ("n", "ratio", "count"), [(196, 0.75, 147), (49, 0.75, 37), (2, 0.9, 1), (3, 0.01, 1), (1, 0.5, 1)]
)
def test_counts_by_hand(n: int, ratio: float, count: int) -> None:
    """Bug: a rounding rule other than the stated one."""
    assert mask_count(n, ratio) == count


@PATIENT
@given(rows=SIDES, columns=SIDES, ratio=RATIOS, seed=SEEDS, style=st.sampled_from(["random", "block"]))
def test_image_mask_splits_the_grid_exactly(rows: int, columns: int, ratio: float, seed: int, style: str) -> None:
    """Bug: a count that varies (ragged batches), a patch both visible and masked, or one in neither."""
    visible, masked = draw_image_mask(np.random.default_rng(seed), (rows, columns), ratio, style)
    assert len(masked) in rounded_half_up(rows * columns, ratio)
    assert sorted([*visible, *masked]) == list(range(rows * columns))
    assert list(visible) == sorted(visible)
    assert list(masked) == sorted(masked)
    assert visible.dtype == masked.dtype == np.int64


def test_random_style_masks_each_patch_equally_often() -> None:
    """Bug: a corner of the grid that is never, or always, masked."""
    rng = np.random.default_rng(0)
    hits = np.zeros(12)
    for _ in range(4000):
        hits[draw_image_mask(rng, (3, 4), 0.5, "random")[1]] += 1
    assert np.abs(hits / 4000 - 0.5).max() < 5 * np.sqrt(0.25 / 4000)


def neighbours(masked: np.ndarray, rows: int, columns: int) -> int:
    """Number of touching pairs of masked patches."""
    grid = np.zeros(rows * columns, dtype=bool)
    grid[masked] = True
    grid = grid.reshape(rows, columns)
    return int((grid[1:] & grid[:-1]).sum() + (grid[:, 1:] & grid[:, :-1]).sum())


def test_block_style_makes_blocks() -> None:
    """Bug: `block` falls back to independent patches, whose masks touch far less often."""
    rng = np.random.default_rng(0)
    counts = {
        style: np.mean([neighbours(draw_image_mask(rng, (14, 14), 0.4, style)[1], 14, 14) for _ in range(50)])
        for style in ("random", "block")
    }
    assert counts["block"] > 1.5 * counts["random"]


@PATIENT
@given(is_maskable=st.lists(st.booleans(), min_size=1, max_size=60), ratio=RATIOS, seed=SEEDS)
def test_text_mask_takes_only_ordinary_tokens(is_maskable: list[bool], ratio: float, seed: int) -> None:
    """Bug: [CLS], [SEP] or padding is masked, a position twice, or the count varies with the draw."""
    flags = np.array(is_maskable)
    positions = draw_text_mask(np.random.default_rng(seed), flags, ratio)
    assert flags[positions].all()
    assert list(positions) == sorted(set(positions))
    if flags.any():
        assert len(positions) in rounded_half_up(int(flags.sum()), ratio)
    else:
        assert len(positions) == 0


@PATIENT
@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=15), ratio=RATIOS, seed=SEEDS, padding=st.integers(0, 4)
)
def test_whole_words_are_masked_with_all_their_pieces(
    lengths: list[int], ratio: float, seed: int, padding: int
) -> None:
    """Bug: a word half masked, so that its visible pieces give it away; or pieces counted as words."""
    words = [word for word, pieces in enumerate(lengths) for _ in range(pieces)]
    is_maskable = np.array([False, *[True] * len(words), False, *[False] * padding])
    numbers = np.array([-1, *words, -1, *[-1] * padding])
    positions = draw_text_mask(np.random.default_rng(seed), is_maskable, ratio, numbers)
    chosen = {words[p - 1] for p in positions}
    assert list(positions) == [i + 1 for i, word in enumerate(words) if word in chosen]
    assert len(chosen) in rounded_half_up(len(lengths), ratio)


def test_a_mask_is_a_function_of_the_generator_alone() -> None:
    """Bug: masks from numpy's or Python's global random state, which a resumed run cannot repeat."""
    drawn = []
    for _ in range(2):
        np.random.seed(len(drawn))  # noqa: NPY002 (the very state that must not matter)
        rng = np.random.default_rng(7)
        drawn.append(
            [
                *draw_image_mask(rng, (5, 6), 0.6, "random")[1],
                *draw_image_mask(rng, (5, 6), 0.6, "block")[1],
                *draw_text_mask(rng, np.ones(20, dtype=bool), 0.25),
            ]
        )
    assert drawn[0] == drawn[1]


def test_replacements_are_eighty_ten_ten() -> None:
    """Bug: 80/10/10 of the wrong things, or special tokens among the random ones."""
    hidden, ordinary = np.full(20_000, 7), np.arange(5, 105)
    found = draw_replacements(np.random.default_rng(0), hidden, 4, ordinary)
    others = found[(found != 4) & (found != 7)]
    for share, expected in ((found == 4, 0.8), (found == 7, 0.1 + 0.1 / 100), (np.isin(found, others), 0.1 * 99 / 100)):
        assert abs(share.mean() - expected) < 4 * np.sqrt(expected * (1 - expected) / len(hidden))
    assert set(others) == set(ordinary) - {7}
    assert np.bincount(others)[5:].max() < 2 * len(others) / 99
