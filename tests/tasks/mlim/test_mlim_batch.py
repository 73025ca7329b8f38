"""Modality-aware masks and modality dropout: modes, frequencies and ratios; a function of seed, epoch and sample."""

import numpy as np
import pytest
import torch

from mamo.config.schema import DataConfig
from mamo.masking import draw_ratios, mask_count
from mamo.tasks.mlim.batch import MlimBatch, MlimCollator
from mamo.tasks.mlim.config import MlimMaskingConfig
from mamo.tasks.mlim.matching_batch import CataloguePairs, ListingCollator
from mamo.world.datasets import ScenePairs
from mamo.world.vocabulary import scenes_tokenizer

DATA = DataConfig(image_size_px=16)
MASKING = MlimMaskingConfig(mode="modality_aware", image_ratio=0.8, text_ratio=0.7, light_ratio=0.2)
N = 240


def batch(order: list[int], epoch: int = 0, seed: int = 0, masking: MlimMaskingConfig = MASKING) -> MlimBatch:
    source = ScenePairs(DATA, "test", N)
    collator = MlimCollator(scenes_tokenizer(), 48, masking, (4, 5), itm_pool_size=2, seed=seed)
    return collator([(epoch, source.load(index, np.random.default_rng(index))) for index in order])


def test_three_modes_a_third_each_with_their_ratios() -> None:
    """Bug: both heavily masked (nothing to learn from), a mode that never comes, a ratio of the wrong modality."""
    masked = batch(list(range(N)))
    tokenizer = scenes_tokenizer()
    special = torch.isin(masked.input_ids, torch.tensor(tokenizer.all_special_ids))
    assert not (masked.is_masked_word & (special | ~masked.is_valid)).any()
    n_words = (masked.is_valid & ~special).sum(dim=1).tolist()
    seen = {"image": 0, "text": 0, "both": 0}
    for words, patches, n in zip(masked.is_masked_word.sum(dim=1), masked.is_masked_patch.sum(dim=1), n_words):
        counts = (int(patches), int(words))
        modes = {"image": (16, 0), "text": (0, mask_count(n, 0.7)), "both": (4, mask_count(n, 0.2))}
        (mode,) = (name for name, wanted in modes.items() if wanted == counts)
        seen[mode] += 1
    deviation = (N * (1 / 3) * (2 / 3)) ** 0.5
    assert all(count == pytest.approx(N / 3, abs=4 * deviation) for count in seen.values()), seen


def test_modes_are_drawn_equally_often() -> None:
    """Bug: shares that are nearly a third: tested on many draws against the binomial's four sigmas."""
    rng = np.random.default_rng(0)
    drawn = [draw_ratios(rng, 0.8, 0.7, 0.15) for _ in range(6000)]
    for mode in ((0.8, 0.0), (0.0, 0.7), (0.15, 0.15)):
        assert drawn.count(mode) == pytest.approx(2000, abs=4 * (6000 * 2 / 9) ** 0.5)


def test_masks_depend_on_seed_epoch_and_sample_alone() -> None:
    """Bug: masks drawn from a worker's own state: a resumed run or another number of workers sees others."""
    one, other = batch([3, 7, 5, 9]), batch([9, 5, 7, 3])
    assert torch.equal(one.is_masked_patch, other.is_masked_patch.flip(0))
    assert torch.equal(one.itm_noise, other.itm_noise.flip(0))
    for changed in (batch([3, 7, 5, 9], epoch=1), batch([3, 7, 5, 9], seed=1)):
        assert not torch.equal(one.itm_noise, changed.itm_noise)


def listings(dropout: float, epoch: int = 0, n: int = 40):
    pairs = CataloguePairs(DATA, "train", n)
    return ListingCollator(scenes_tokenizer(), 48, dropout, seed=0)([(epoch, pairs.load(i)) for i in range(n)])


def test_missing_modalities_are_marked_and_only_they() -> None:
    """Bug: a black image or an empty text passes for a given one."""
    whole = listings(0.0)
    is_black = ~whole.image.flatten(2).any(dim=2)
    assert torch.equal(whole.has_image, ~is_black)
    assert is_black.any()
    n_tokens = whole.is_valid.sum(dim=2)  # [CLS] and [SEP] alone where the text is empty
    assert torch.equal(whole.has_text, n_tokens > 2)
    assert (n_tokens == 2).any()


def test_modality_dropout_has_its_shares() -> None:
    """Bug: both modalities dropped at once, one listing of a pair alone, or one modality more often."""
    whole = listings(0.0)
    n_image = n_text = 0
    for epoch in range(6):
        dropped = listings(0.6, epoch)
        lost_image, lost_text = whole.has_image & ~dropped.has_image, whole.has_text & ~dropped.has_text
        assert not (lost_image.any(dim=1) & lost_text.any(dim=1)).any()
        assert not (dropped.has_image & ~whole.has_image).any()
        gone_image = ~dropped.has_image.any(dim=1) & whole.has_image.any(dim=1)
        assert torch.equal(lost_image.any(dim=1), gone_image)
        n_image += int(lost_image.any(dim=1).sum())
        n_text += int(lost_text.any(dim=1).sum())
    n_with_image, n_with_text = (6 * int(has.any(dim=1).sum()) for has in (whole.has_image, whole.has_text))
    assert n_image == pytest.approx(0.3 * n_with_image, abs=4 * (0.21 * n_with_image) ** 0.5)
    assert n_text == pytest.approx(0.3 * n_with_text, abs=4 * (0.21 * n_with_text) ** 0.5)
