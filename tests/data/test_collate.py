"""Batches: masks that respect the tokens, and depend on nothing but (seed, epoch, sample)."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from mamo.config.objective import MaskingConfig
from mamo.config.schema import DataConfig
from mamo.data.loader import collate_range, make_loader
from mamo.data.pairs import Sample
from mamo.data.sampler import StepSampler
from mamo.tasks.pretrain.batch import PairBatch, PairCollator
from mamo.world.datasets import ScenePairs
from mamo.world.vocabulary import scenes_tokenizer

GRID = (3, 3)
CAPTIONS = ("a red circle", "one", "a zyx qqq circle and a large blue square above the small green zzzz", "two squares")


@cache
def tokenizer() -> Any:
    return scenes_tokenizer()


def collator(seed: int = 0, pool: int = 2, text_max_tokens: int = 48, **masking: Any) -> PairCollator:
    return PairCollator(tokenizer(), text_max_tokens, MaskingConfig(**masking), GRID, pool, seed)


def sample(index: int, caption: str | None = None) -> Sample:
    image = torch.full((3, 24, 24), index, dtype=torch.uint8)
    return Sample(image, caption or CAPTIONS[index % len(CAPTIONS)], 100 + index, 200 + index, index, ())


def batch_of(indices: list[int], epoch: int = 0, **options: Any) -> PairBatch:
    return collator(**options)([(epoch, sample(index)) for index in indices])


def ordinary(batch: PairBatch, row: int) -> list[int]:
    """Positions of one row's tokens that are neither special nor padding, by their strings."""
    tokens = tokenizer().convert_ids_to_tokens(batch.input_ids[row].tolist())
    return [place for place, token in enumerate(tokens) if token not in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")]


def same(first: PairBatch, second: PairBatch) -> bool:
    theirs = second.tensors()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in first.tensors().items())


@pytest.mark.parametrize("unit", ["token", "word"])
def test_text_masks_touch_ordinary_tokens_alone(unit: str) -> None:
    """Bug: [CLS], [SEP], padding or [UNK] becomes [MASK]; the filling of short rows is taken for a mask of [CLS]."""
    for epoch in range(20):
        batch = batch_of([0, 1, 2, 3], epoch, text_ratio=0.4, text_unit=unit)
        for row in range(4):
            slots = batch.text_slots[row][batch.text_slot_is_valid[row]].tolist()
            assert set(slots) <= set(ordinary(batch, row))
            assert slots
            expected = batch.input_ids[row].clone()
            expected[slots] = tokenizer().mask_token_id
            assert torch.equal(batch.masked_input_ids[row], expected)
            assert batch.text_slots[row][~batch.text_slot_is_valid[row]].eq(0).all()


def test_replacements_do_not_move_the_masks() -> None:
    """Bug: `bert` draws other slots, patches or negatives than `mask`, so that the two cannot be compared."""
    plain, replaced = (batch_of([0, 1, 2, 3], 0, text_ratio=0.4, text_replacement=how) for how in ("mask", "bert"))
    theirs = replaced.tensors()
    for name, tensor in plain.tensors().items():
        assert torch.equal(tensor, theirs[name]) == (name != "masked_input_ids"), name
    changed = replaced.masked_input_ids != replaced.input_ids
    rows = torch.arange(4)[:, None].expand_as(replaced.text_slots)[replaced.text_slot_is_valid]
    changed[rows, replaced.text_slots[replaced.text_slot_is_valid]] = False
    assert not changed.any()


def test_token_masks_have_the_exact_count() -> None:
    """Bug: each token drawn for itself, which gives a count that varies from step to step."""
    for epoch in range(10):
        batch = batch_of([0, 1, 2, 3], epoch, text_ratio=0.25)
        for row in range(4):
            n = len(ordinary(batch, row))
            assert int(batch.text_slot_is_valid[row].sum()) == max(1, int(n * 0.25 + 0.5))


def test_whole_words_are_masked_with_all_their_pieces() -> None:
    """Bug: `z ##z ##z` half masked, so that the rest gives it away."""
    halves = 0
    for epoch in range(30):
        batch = batch_of([2], epoch, text_ratio=0.3, text_unit="word")
        masked = set(batch.text_slots[0].tolist())
        tokens = tokenizer().convert_ids_to_tokens(batch.input_ids[0].tolist())
        for place, token in enumerate(tokens):
            if token.startswith("##"):
                assert (place in masked) == (place - 1 in masked)
                halves += place in masked
    assert halves > 0  # the caption does hold words of several pieces, and they were drawn


def test_image_masks_have_the_exact_count() -> None:
    """Bug: visible and masked patches overlap, leave one out, or differ in number between the rows."""
    batch = batch_of([0, 1, 2, 3], image_ratio=0.6)
    assert batch.masked_patches.shape == (4, 5)  # 0.6 of 9, rounded
    for row in range(4):
        assert sorted([*batch.masked_patches[row].tolist(), *batch.visible_patches[row].tolist()]) == list(range(9))


def test_a_sample_gets_the_same_masks_in_any_batch() -> None:
    """Bug: masks from one generator a batch, which change with batch size, position, neighbours and their padding."""
    whole = batch_of([0, 1, 2, 3], epoch=4)
    for indices in ([2], [3, 2], [0, 2, 1]):
        other, row = batch_of(indices, epoch=4), indices.index(2)
        assert torch.equal(whole.masked_patches[2], other.masked_patches[row])
        assert torch.equal(whole.itm_noise[2], other.itm_noise[row])
        slots = [b.text_slots[r][b.text_slot_is_valid[r]] for b, r in ((whole, 2), (other, row))]
        assert torch.equal(*slots)


def test_masks_change_with_epoch_seed_and_sample() -> None:
    """Bug: a sample masked the same way for the whole run, or all samples of a batch alike."""
    drawn = {
        tuple(batch_of([index], epoch, seed=seed).itm_noise[0].flatten().tolist())
        for index in range(3)
        for epoch in range(3)
        for seed in range(3)
    }
    assert len(drawn) == 27
    masks = {tuple(batch_of([0], epoch).masked_patches[0].tolist()) for epoch in range(20)}
    assert len(masks) > 5


def test_noise_is_standard_gumbel() -> None:
    """Bug: normal or uniform noise, with which negatives no longer follow the softmax."""
    noise = batch_of(list(range(40)), pool=100).itm_noise
    assert noise.shape == (40, 2, 100)
    assert noise.dtype == torch.float32
    values = np.sort(noise.flatten().numpy().astype(np.float64))
    distribution = np.exp(-np.exp(-values))
    steps = np.arange(1, values.size + 1) / values.size
    assert np.abs(distribution - steps).max() < 1.95 / np.sqrt(values.size)  # Kolmogorov-Smirnov, p = 0.001


def test_long_captions_are_cut_and_keep_their_separator() -> None:
    """Bug: a long caption exceeds the position embeddings, or loses its [SEP]."""
    batch = collator(text_max_tokens=8)([(0, sample(0, "circle " * 50)), (0, sample(1, "circle"))])
    assert batch.input_ids.shape == (2, 8)
    assert int(batch.input_ids[0, -1]) == tokenizer().sep_token_id
    assert batch.is_valid.tolist() == [[True] * 8, [True] * 3 + [False] * 5]


def test_a_caption_without_ordinary_tokens_has_no_mask() -> None:
    """Bug: a caption of emoji alone crashes the collation or gets its [UNK] masked."""
    batch = collator()([(0, sample(0, "\U0001f600"))])
    assert not batch.text_slot_is_valid.any()
    assert torch.equal(batch.masked_input_ids, batch.input_ids)


def test_part_keeps_rows_together() -> None:
    """Bug: a field left whole when a batch is cut into micro-batches."""
    batch = batch_of([0, 1, 2, 3])
    for name, tensor in batch.part(1, 3).tensors().items():
        assert torch.equal(tensor, batch.tensors()[name][1:3]), name
    assert len(batch.part(1, 3)) == 2


def batches(workers: int, start: int = 0, rank: int = 0, world: int = 1) -> list[PairBatch]:
    source = ScenePairs(DataConfig(image_size_px=24), "train", 5)
    sampler = StepSampler(5, 4, 9, start, 3, rank, world)
    return list(make_loader(source, collator(seed=9, text_unit="word"), sampler, workers, pin_memory=False))


def test_any_number_of_workers_gives_the_same_batches() -> None:
    """Bug: random numbers of the worker process, or an order of arrival, decide captions, images or masks."""
    alone = batches(0)
    assert [b.sample_id.tolist() for b in alone] == [[i for _, i in keys] for keys in StepSampler(5, 4, 9, 0, 3, 0, 1)]
    for workers in (1, 2):
        others = batches(workers)
        assert len(others) == len(alone)
        assert all(same(a, b) for a, b in zip(alone, others)), workers


def test_the_loader_resumes_and_splits_exactly() -> None:
    """Bug: the loader's own random state makes a resumed run, or a process's share, differ from the unbroken one."""
    whole = batches(0)
    assert all(same(a, b) for a, b in zip(whole[1:], batches(0, start=1)))
    for step, shares in enumerate(zip(batches(0, rank=0, world=2), batches(0, rank=1, world=2))):
        for name in ("image", "image_id", "caption_ids", "masked_patches", "itm_noise", "sample_id"):
            joined = torch.cat([share.tensors()[name] for share in shares])
            assert torch.equal(joined, whole[step].tensors()[name]), name


def test_an_evaluation_batch_holds_the_asked_samples() -> None:
    """Bug: evaluation reads other samples than it scores."""
    source = ScenePairs(DataConfig(image_size_px=24), "test", 5, identifying=True)
    batch = collate_range(source, collator(), [3, 1])
    assert batch.sample_id.tolist() == [3, 1]
    expected = source.load(3, np.random.default_rng(0))
    assert torch.equal(batch.image[0], expected.image)
    assert int(batch.caption_id[0]) == expected.caption_id
