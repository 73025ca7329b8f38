"""The order of samples: every epoch a permutation, reachable at any step, shared between processes."""

import itertools
from typing import Any

import numpy as np
import pytest

from mamo.data.loader import count_workers
from mamo.data.sampler import StepSampler, epoch_order

N, BATCH, STEPS = 10, 6, 12


def drawn(start: int = 0, rank: int = 0, world: int = 1, seed: int = 3, n: int = N) -> list[list[tuple[int, int]]]:
    sampler = StepSampler(n, BATCH, seed, start, STEPS, rank, world)
    batches = list(sampler)
    assert len(batches) == len(sampler) == STEPS - start
    return batches


def test_each_epoch_visits_every_sample_once() -> None:
    """Bug: the last, incomplete batch of an epoch is dropped, or a sample repeats before the others were seen."""
    flat = list(itertools.chain(*drawn()))
    for epoch in range(STEPS * BATCH // N):
        visited = flat[epoch * N : (epoch + 1) * N]
        assert {e for e, _ in visited} == {epoch}
        assert sorted(index for _, index in visited) == list(range(N))
    assert any(len({epoch for epoch, _ in batch}) == 2 for batch in drawn())  # batches do straddle epochs


def test_a_batch_may_be_larger_than_the_data() -> None:
    """Bug: four samples and a batch of six crash, or loop for ever."""
    flat = list(itertools.chain(*drawn(n=4)))
    assert [epoch for epoch, _ in flat] == [i // 4 for i in range(STEPS * BATCH)]
    assert all(sorted(i for _, i in flat[k : k + 4]) == [0, 1, 2, 3] for k in range(0, len(flat), 4))


def test_orders_differ_between_epochs_and_seeds_and_repeat_for_the_same() -> None:
    """Bug: every epoch in the same order, or an order from global random state."""
    orders = {tuple(epoch_order(seed, epoch, 50)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    np.random.seed(1)  # noqa: NPY002 (the very state that must not matter)
    assert tuple(epoch_order(2, 2, 50)) in orders


@pytest.mark.parametrize("start", [1, 5, STEPS - 1, STEPS])
def test_resuming_gives_the_rest_of_the_run(start: int) -> None:
    """Bug: a resumed run starts its epoch anew, or repeats or skips a batch."""
    assert drawn(start) == drawn()[start:]


@pytest.mark.parametrize("world", [2, 3, 6])
@pytest.mark.parametrize("start", [0, 4])
def test_shares_of_the_processes_make_up_the_global_batch(world: int, start: int) -> None:
    """Bug: N processes see other batches than one, so that no run can be compared across machines."""
    shares = [drawn(start, rank, world) for rank in range(world)]
    joined = [list(itertools.chain(*step)) for step in zip(*shares)]
    assert joined == drawn(start)


@pytest.mark.parametrize("n", [9, 10])
def test_groups_stay_side_by_side(n: int) -> None:
    """Bug: minimal pairs are separated, a group is permuted inside, the odd last sample is lost or doubled."""
    order = epoch_order(0, 0, n, group_size=2).tolist()
    assert sorted(order) == list(range(n))
    assert order != list(range(n))
    for first in range(0, n - 1, 2):
        assert order[order.index(first) + 1] == first + 1


def test_stages_come_one_after_the_other_each_in_random_order() -> None:
    """Bug: a later stage's samples come too early, a stage is not shuffled, loses its pairs or its last sample."""
    order = epoch_order(0, 1, 31, group_size=2, stages=(8, 12)).tolist()
    for start, end in ((0, 8), (8, 20), (20, 31)):
        part = order[start:end]
        assert sorted(part) == list(range(start, end))
        assert part != sorted(part)
        assert all(part[part.index(first) + 1] == first + 1 for first in range(start, end - 1, 2))
    assert epoch_order(0, 1, 31, group_size=2).tolist() != order


def test_the_sampler_keeps_the_stages_at_a_resume() -> None:
    """Bug: the stages reach one epoch's order and not the sampler, or a resume begins with them anew."""
    whole = list(StepSampler(30, 4, 0, 0, 10, 0, 1, stages=(8, 8)))
    assert {index for batch in whole[:2] for _, index in batch} == set(range(8))
    assert {index for batch in whole[2:4] for _, index in batch} == set(range(8, 16))
    assert list(StepSampler(30, 4, 0, 3, 10, 0, 1, stages=(8, 8))) == whole[3:]


@pytest.mark.parametrize(
    ("setting", "device", "processes", "expected"),
    [(3, "cuda", 1, 3), (0, "cpu", 1, 0), ("auto", "cpu", 1, 1), ("auto", "cuda", 1, 15), ("auto", "cuda", 8, 1),
     ("auto", "cuda", 32, 1)],
)  # fmt: skip
def test_workers_share_the_cores(
    setting: Any, device: str, processes: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: eight processes of one machine start eight times as many loaders as it has cores, or none."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert count_workers(setting, device) == expected
