"""The embedded world as a data set of image-text pairs."""

import bisect
import itertools
from collections.abc import Iterator

import numpy as np
import torch

from mamo.config.schema import DataConfig
from mamo.data.cleaning import Cleaning, cleaner
from mamo.data.pairs import Sample, hash_id
from mamo.world import captions, rendering
from mamo.world.minimal_pairs import distinguishing_caption, training_scene
from mamo.world.scene import WORLD_SEED, SceneWorld, Split

CAPTION_SHARES = (0.35, 0.35, 0.1, 0.1, 0.1)
"""Probability of each of a scene's five captions. The two full descriptions dominate: the others are often true of many
scenes, so they carry little information about this one."""


class ScenePairs:
    """Image-text pairs of the embedded world. Each scene has five captions; each load draws one.

    Training scenes come in pairs. Half of these are minimal pairs (`mamo.world.minimal_pairs`). The first scenes have
    few objects, see `data.curriculum_scenes`. With `identifying` the text is `identifying_caption`. Captions need no
    cleaning but ALBEF's.
    """

    group_size = 2

    def __init__(
        self,
        config: DataConfig,
        split: Split,
        n_scenes: int,
        identifying: bool = False,
        cleaning: Cleaning = "plain",
    ) -> None:
        self.world = SceneWorld(config.difficulty, WORLD_SEED)
        self.split = split
        self.n_scenes = n_scenes
        self.image_size_px = config.image_size
        self.identifying = identifying
        self.clean = None if cleaning == "plain" else cleaner(cleaning)
        self.stage_ends = list(itertools.accumulate(config.curriculum_scenes))

    def __len__(self) -> int:
        return self.n_scenes

    def fingerprint_items(self) -> Iterator[str]:
        """Yield the texts of the data fingerprint: the parameters of the world."""
        yield f"scenes {self.world.difficulty} {self.n_scenes} {self.image_size_px}"
        yield from (f"stage to {end}" for end in self.stage_ends)

    def dataset_names(self) -> list[str]:
        """Return the name of the embedded world."""
        return ["scenes"]

    def load(self, index: int, rng: np.random.Generator) -> Sample:
        """Render scene `index` and choose one of its captions, with `rng`."""
        scene, counterpart = self.world.scene(self.split, index), None
        if self.split == "train":
            stage = bisect.bisect_right(self.stage_ends, index)
            most_objects = stage + 1 if stage < len(self.stage_ends) else None
            scene, counterpart = training_scene(self.world, self.split, index, most_objects)
        if self.identifying:
            text = captions.identifying_caption(scene).text
        elif counterpart is None:
            text = captions.caption(scene, int(rng.choice(captions.N_CAPTIONS, p=CAPTION_SHARES))).text
        else:
            order = rng.choice(captions.N_CAPTIONS, size=captions.N_CAPTIONS, replace=False, p=CAPTION_SHARES)
            text = distinguishing_caption(scene, counterpart, order.tolist())
        if self.clean is not None:
            text = self.clean(text)
        image = rendering.render(scene, self.image_size_px)  # [H, W, 3]
        return Sample(
            image=torch.from_numpy(image).permute(2, 0, 1).contiguous(),
            caption=text,
            image_id=hash_id(f"scenes/{self.world.difficulty}/{self.split}/{index}"),
            caption_id=hash_id(text),
            sample_id=index,
            skipped=(),
        )
