"""Order of the training samples. It is a pure function of (seed, epoch), so a run can start at any step."""

import functools
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


def epoch_order(
    seed: int, epoch: int, n_samples: int, group_size: int = 1, stages: Sequence[int] = (), stream: Sequence[int] = ()
) -> np.ndarray:
    """Return the permutation of an epoch, int64 [n_samples].

    Args:
        seed: of the run.
        epoch: the first is 0.
        n_samples: size of the data set.
        group_size: number of consecutive samples, from a multiple of it on, that stay together; the last group may be
            smaller.
        stages: sizes of the first stages of a curriculum, multiples of `group_size`. Samples are permuted only within
            their stage; the last stage is the rest of the data.
        stream: further numbers of the seed, such as that of a file.
    """
    generator = np.random.Generator(np.random.PCG64([seed, epoch, *stream]))
    bounds = [0, *itertools.accumulate(stages), n_samples]
    parts = []
    for start, end in itertools.pairwise(bounds):
        groups = generator.permutation(-(-(end - start) // group_size))
        parts.append(start + (groups[:, None] * group_size + np.arange(group_size)).ravel())
    order: np.ndarray = np.concatenate(parts)
    return order[order < n_samples]


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Sampler of this process's (epoch, index) pairs, one list for each step from `start_step` on.

    The global batch of step s contains the positions s * batch to (s + 1) * batch of the concatenated epochs, so no
    sample is dropped at the end of an epoch. Process `rank` takes a contiguous part of it.
    """

    def __init__(
        self,
        n_samples: int,
        batch_size_global: int,
        seed: int,
        start_step: int,
        total_steps: int,
        rank: int,
        world: int,
        group_size: int = 1,
        stages: Sequence[int] = (),
    ) -> None:
        assert batch_size_global % world == 0
        self.n_samples = n_samples
        self.batch_size_global = batch_size_global
        self.seed = seed
        self.start_step = start_step
        self.total_steps = total_steps
        self.rank = rank
        self.world = world
        self.group_size = group_size
        self.stages = stages

    def __len__(self) -> int:
        return self.total_steps - self.start_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.batch_size_global // self.world
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(self.start_step, self.total_steps):
            first = step * self.batch_size_global + self.rank * share
            batch = []
            for position in range(first, first + share):
                if position // self.n_samples != epoch:
                    epoch = position // self.n_samples
                    order = epoch_order(self.seed, epoch, self.n_samples, self.group_size, self.stages)
                batch.append((epoch, int(order[position % self.n_samples])))
            yield batch


class OneSourceSampler(StepSampler):
    """Sampler as `StepSampler` whose global batches each have samples of one source only.

    The sources take turns in proportion to their sizes (`turns`). The k-th batch of a source contains the positions
    k * batch to (k + 1) * batch of its own concatenated epochs.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        batch_size_global: int,
        seed: int,
        start_step: int,
        total_steps: int,
        rank: int,
        world: int,
    ) -> None:
        super().__init__(sum(sizes), batch_size_global, seed, start_step, total_steps, rank, world)
        self.sizes = list(sizes)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        offsets = [0, *itertools.accumulate(self.sizes)]
        share = self.batch_size_global // self.world
        n_batches = [0] * len(self.sizes)
        order_of = functools.lru_cache(maxsize=len(self.sizes) + 1)(self._order)
        for step, source in enumerate(itertools.islice(turns(self.sizes), self.total_steps)):
            first = n_batches[source] * self.batch_size_global + self.rank * share
            n_batches[source] += 1
            if step < self.start_step:
                continue
            batch = []
            for position in range(first, first + share):
                epoch, at = divmod(position, self.sizes[source])
                batch.append((epoch, offsets[source] + int(order_of(source, epoch)[at])))
            yield batch

    def _order(self, source: int, epoch: int) -> np.ndarray:
        return epoch_order(self.seed, epoch, self.sizes[source], stream=(source,))


def turns(sizes: Sequence[int]) -> Iterator[int]:
    """Yield the source of each batch without end, in proportion to the sizes.

    Each turn credits every source with its size; the one with the most credit pays the sum of all sizes. After any
    number of turns no source is a whole turn behind its share.
    """
    credit = [0] * len(sizes)
    while True:
        credit = [have + size for have, size in zip(credit, sizes)]
        source = max(range(len(sizes)), key=credit.__getitem__)
        credit[source] -= sum(sizes)
        yield source


def samples_seen(
    sizes: Sequence[int], batch_size_global: int, seed: int, steps: int, is_one_source: bool = False
) -> list[int]:
    """Return the number of samples of each source in the batches of the first `steps` steps.

    Args:
        sizes: numbers of samples of the sources, in the order of the data set.
        batch_size_global: of each step.
        seed: of the run.
        steps: done so far.
        is_one_source: whether the order is `OneSourceSampler`'s, else `StepSampler`'s.
    """
    if is_one_source:
        sources = np.fromiter(itertools.islice(turns(sizes), steps), dtype=np.int64, count=steps)
        return [int(n) * batch_size_global for n in np.bincount(sources, minlength=len(sizes))]
    epochs, rest = divmod(steps * batch_size_global, sum(sizes))
    order = epoch_order(seed, epochs, sum(sizes))[:rest]
    source_of = np.searchsorted(np.cumsum(sizes), order, side="right")
    return [epochs * size + int(n) for size, n in zip(sizes, np.bincount(source_of, minlength=len(sizes)))]
