"""Data sets behind one interface, and the loader that feeds the loop."""

import atexit
import bisect
import contextlib
import itertools
import multiprocessing
import re
import signal
from collections.abc import Iterator, Sequence
from pickle import UnpicklingError
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mamo.config import DataConfig
from mamo.data import rendering, scene_captions
from mamo.data.collate import sample_rng
from mamo.data.images import BadSample
from mamo.data.pairs import Sample, hash_id
from mamo.data.sampler import StepSampler
from mamo.data.scenes import SceneWorld, Split
from mamo.data.twins import telling_caption, training_scene

LOAD_STREAM = 0
"""Sub-stream of a sample's random numbers that chooses the caption and augments the image."""
CAPTION_SHARES = (0.35, 0.35, 0.1, 0.1, 0.1)
"""How often each of a scene's five captions is drawn: mostly one of the two full descriptions, since many of the three
others are true of many scenes and so teach little about this one."""
WORLD_SEED = 0
"""The embedded world is one fixed data set; a run's seed changes the run, not the world."""


class Source(Protocol):
    """Random access to the samples of a task."""

    def __len__(self) -> int: ...

    def load(self, index: int, rng: np.random.Generator) -> Any:
        """Sample `index`; `rng` chooses among captions and augments."""
        ...

    @property
    def group_size(self) -> int:
        """Consecutive samples (from a multiple of it on) that stay side by side in the order of an epoch."""
        ...

    def identity(self) -> Iterator[str]:
        """Texts that together change with the data, for its fingerprint."""
        ...

    def data_sets(self) -> list[str]:
        """Names of the data sets that the samples come from, as far as they are known."""
        ...


class ScenePairs:
    """The embedded world as image-text pairs; each scene has five captions, one is drawn.

    Training scenes come in pairs, half of them twins that differ in one thing (`mamo.data.twins`). The first ones show
    few objects, as `data.curriculum_scenes` says.
    """

    group_size = 2

    def __init__(self, config: DataConfig, split: Split, n_scenes: int, identifying: bool = False) -> None:
        self.world = SceneWorld(config.difficulty, WORLD_SEED)
        self.split = split
        self.n_scenes = n_scenes
        self.image_size_px = config.image_size
        self.identifying = identifying
        self.stage_ends = list(itertools.accumulate(config.curriculum_scenes))

    def __len__(self) -> int:
        return self.n_scenes

    def identity(self) -> Iterator[str]:
        """The parameters of the world."""
        yield f"scenes {self.world.difficulty} {self.n_scenes} {self.image_size_px}"
        yield from (f"stage to {end}" for end in self.stage_ends)

    def data_sets(self) -> list[str]:
        """The embedded world."""
        return ["scenes"]

    def load(self, index: int, rng: np.random.Generator) -> Sample:
        """Draw scene `index` and one of its captions (or its identifying caption)."""
        scene, twin = self.world.scene(self.split, index), None
        if self.split == "train":
            stage = bisect.bisect_right(self.stage_ends, index)
            most_objects = stage + 1 if stage < len(self.stage_ends) else None
            scene, twin = training_scene(self.world, self.split, index, most_objects)
        if self.identifying:
            text = scene_captions.identifying_caption(scene).text
        elif twin is None:
            text = scene_captions.caption(scene, int(rng.choice(scene_captions.N_CAPTIONS, p=CAPTION_SHARES))).text
        else:
            order = rng.choice(
                scene_captions.N_CAPTIONS, size=scene_captions.N_CAPTIONS, replace=False, p=CAPTION_SHARES
            )
            text = telling_caption(scene, twin, order.tolist())
        image = rendering.render(scene, self.image_size_px)  # [H, W, 3]
        return Sample(
            image=torch.from_numpy(image).permute(2, 0, 1).contiguous(),
            caption=text,
            image_id=hash_id(f"scenes/{self.world.difficulty}/{self.split}/{index}"),
            caption_id=hash_id(text),
            sample_id=index,
            skipped=(),
        )


class EpochDataset(Dataset[tuple[int, Any]]):
    """Gives the loader sample (epoch, index), its random numbers seeded by (seed, epoch, index)."""

    def __init__(self, source: Source, seed: int) -> None:
        self.source = source
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, Any]:
        epoch, index = key
        return epoch, self.source.load(index, sample_rng(self.seed, epoch, index, LOAD_STREAM))


def _begin_worker(worker_id: int) -> None:
    torch.set_num_threads(1)  # the cores belong to the training step
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a scheduler sends it to all processes; the run ends its workers


def _end_workers() -> None:
    """Python ends daemonic children that are left at exit by SIGTERM, and would wait for ever for workers, which ignore
    it; only an error leaves some."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def make_loader(source: Source, collator: Any, sampler: StepSampler, workers: int, pin_memory: bool) -> DataLoader[Any]:
    """Batches of `source` in the sampler's order; the result does not depend on `workers`."""
    if workers:
        atexit.unregister(_end_workers)  # once, however many loaders
        atexit.register(_end_workers)
    return DataLoader(
        EpochDataset(source, collator.seed),
        batch_sampler=sampler,
        collate_fn=collator,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_begin_worker,
        multiprocessing_context=multiprocessing.get_context("spawn") if workers else None,
        persistent_workers=False,
    )


# what is raised where a process dies; all but the first as it hands a batch over
_LOST = (RuntimeError, ConnectionResetError, ConnectionRefusedError, BrokenPipeError, EOFError, UnpicklingError)


@contextlib.contextmanager
def loader_errors(workers: int) -> Iterator[None]:
    """Errors of the loader, each as one clear line; `workers` is the number of its processes.

    Around all of the training, not only where batches are taken: PyTorch tells the death of a process by a signal,
    whose error is raised wherever the run happens to be.

    Raises:
        BadSample: one that the policy does not forgive, told alike whether or not it was met in a worker process.
        ChildProcessError: a worker process died.
    """
    try:
        yield
    except BadSample as error:  # the loader puts the traceback of a worker into the message
        found = re.findall(r"^[\w.]*BadSample: (.*)", str(error), re.MULTILINE | re.DOTALL)
        error.__traceback__ = None  # its frames hold the workers, which are stopped as soon as it lets go
        raise BadSample(found[-1].strip() if found else str(error)) from None
    except _LOST as error:
        if isinstance(error, RuntimeError) and not re.search("DataLoader worker|ancillary data", str(error)):
            raise
        raise ChildProcessError(
            f"a loader process died, killed perhaps for want of memory ({error}): lower data.workers "
            f"(now {workers}) or data.image_size_px, then continue with --resume"
        ) from None


def collate_range(source: Source, collator: Any, indices: Sequence[int]) -> Any:
    """One evaluation batch of the given samples, outside any epoch."""
    return collator([(0, source.load(i, sample_rng(collator.seed, 0, i, LOAD_STREAM))) for i in indices])
