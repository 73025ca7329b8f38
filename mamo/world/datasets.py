"""The embedded world as data sets of samples."""

import bisect
import itertools
from collections.abc import Iterator

import numpy as np
import torch

from mamo.config.schema import DataConfig
from mamo.data.pairs import Sample, hash_id
from mamo.world import captions, rendering
from mamo.world.minimal_pairs import distinguishing_caption, training_scene
from mamo.world.scene import WORLD_SEED, SceneWorld, Split

CAPTION_SHARES = (0.35, 0.35, 0.1, 0.1, 0.1)
"""How often each of a scene's five captions is drawn: mostly one of the two full descriptions, since many of the three
others are true of many scenes and so teach little about this one."""


class ScenePairs:
    """The embedded world as image-text pairs; each scene has five captions, one is drawn.

    Training scenes come in pairs, half of them twins that differ in one thing (`mamo.world.minimal_pairs`). The first ones show
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

    def dataset_names(self) -> list[str]:
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
            text = captions.identifying_caption(scene).text
        elif twin is None:
            text = captions.caption(scene, int(rng.choice(captions.N_CAPTIONS, p=CAPTION_SHARES))).text
        else:
            order = rng.choice(captions.N_CAPTIONS, size=captions.N_CAPTIONS, replace=False, p=CAPTION_SHARES)
            text = distinguishing_caption(scene, twin, order.tolist())
        image = rendering.render(scene, self.image_size_px)  # [H, W, 3]
        return Sample(
            image=torch.from_numpy(image).permute(2, 0, 1).contiguous(),
            caption=text,
            image_id=hash_id(f"scenes/{self.world.difficulty}/{self.split}/{index}"),
            caption_id=hash_id(text),
            sample_id=index,
            skipped=(),
        )
