"""Order of the training samples. It is a pure function of (seed, epoch), so a run can start at any step."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


def epoch_order(seed: int, epoch: int, n_samples: int, group_size: int = 1, stages: Sequence[int] = ()) -> np.ndarray:
    """Return the permutation of an epoch, int64 [n_samples].

    Args:
        seed: of the run.
        epoch: the first is 0.
        n_samples: size of the data set.
        group_size: number of consecutive samples, from a multiple of it on, that stay together; the last group may be
            smaller.
        stages: sizes of the first stages of a curriculum, multiples of `group_size`. Samples are permuted only within
            their stage; the last stage is the rest of the data.
    """
    generator = np.random.Generator(np.random.PCG64([seed, epoch]))
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
