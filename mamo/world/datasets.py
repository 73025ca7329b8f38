"""The embedded world as a data set of image-text pairs."""

import bisect
import itertools
from collections.abc import Iterator

import numpy as np
import torch

from mamo.config.schema import DataConfig
from mamo.data.cleaning import Cleaning, cleaner
from mamo.data.pairs import Sample, hash_id
from mamo.world import captions, grammar, rendering
from mamo.world.minimal_pairs import distinguishing_draft, training_scene
from mamo.world.probes import one_word_foil
from mamo.world.scene import WORLD_SEED, SceneWorld, Split

_FOIL_STREAM = 26  # random stream of a scene

CAPTION_SHARES = {"easy": (0.35, 0.35, 0.1, 0.1, 0.1), "full": (0.3, 0.3, 0.1, 0.2, 0.1)}
"""Probability of each of a scene's five captions. The full descriptions dominate: the others are often true of many
scenes, so they carry little information about this one."""

PAIR_CAPTION_SHARES = {"easy": CAPTION_SHARES["easy"], "full": (0.2, 0.2, 0.05, 0.5, 0.05)}
"""Probability of each caption to be tried first for a scene of a minimal pair. A caption that is also true of the
counterpart, as most counts are, is passed over."""

SHORT = (2, 3, 4)
"""Numbers of a scene's short captions: two objects, a count, a comparison."""


class ScenePairs:
    """Image-text pairs of the embedded world. Each scene has five captions; each load draws one.

    Training scenes come in pairs. Half of these are minimal pairs (`mamo.world.minimal_pairs`). The first scenes have
    few objects, see `data.curriculum_scenes`. With `identifying` the text is `identifying_caption`. Captions need no
    cleaning but ALBEF's. With `has_foils` each sample has a foil of its caption, which differs in one word by the
    rules of the probes; for some captions there is none. With `has_short` it has one of the short captions too.
    """

    group_size = 2
    n_caption_ids = 1
    """Scenes are compared by the captions that are drawn: the short ones are true of many."""

    def __init__(
        self,
        config: DataConfig,
        split: Split,
        n_scenes: int,
        identifying: bool = False,
        cleaning: Cleaning = "plain",
        has_foils: bool = False,
        has_short: bool = False,
    ) -> None:
        self.world = SceneWorld(config.difficulty, WORLD_SEED)
        self.split = split
        self.n_scenes = n_scenes
        self.image_size_px = config.image_size
        self.identifying, self.has_foils, self.has_short = identifying, has_foils, has_short
        self.clean = None if cleaning == "plain" else cleaner(cleaning)
        self.stage_ends = list(itertools.accumulate(config.curriculum_scenes))

    def __len__(self) -> int:
        return self.n_scenes

    def fingerprint_items(self) -> Iterator[str]:
        """Yield the texts of the data fingerprint: the parameters of the world."""
        yield f"scenes {self.world.difficulty} {self.n_scenes} {self.image_size_px}"
        yield from (f"stage to {end}" for end in self.stage_ends)
        if self.world.difficulty == "full" and self.split == "train":
            yield "pairs that differ in a number"  # the training captions of earlier versions had none

    def dataset_names(self) -> list[str]:
        """Return the name of the embedded world."""
        return ["scenes"]

    def load(self, index: int, rng: np.random.Generator) -> Sample:
        """Render scene `index` and choose one of its captions, with `rng`."""
        scene, counterpart = self.world.scene(self.split, index), None
        shares, pair_shares = CAPTION_SHARES[self.world.difficulty], PAIR_CAPTION_SHARES[self.world.difficulty]
        if self.split == "train":
            stage = bisect.bisect_right(self.stage_ends, index)
            most_objects = stage + 1 if stage < len(self.stage_ends) else None
            scene, counterpart = training_scene(self.world, self.split, index, most_objects)
        if self.identifying:
            draft = captions.identifying_draft(scene)
        elif counterpart is None:
            draft = captions.caption_draft(scene, int(rng.choice(captions.N_CAPTIONS, p=shares)))
        else:
            order = rng.choice(captions.N_CAPTIONS, size=captions.N_CAPTIONS, replace=False, p=pair_shares)
            draft = distinguishing_draft(scene, counterpart, order.tolist())
        false = one_word_foil(scene, draft, scene.rng(_FOIL_STREAM)) if self.has_foils else None
        text, foil = ("" if each is None else grammar.write(each, scene.objects).text for each in (draft, false))
        short = captions.caption(scene, SHORT[int(rng.integers(len(SHORT)))]).text if self.has_short else ""
        if self.clean is not None:
            text, foil, short = map(self.clean, (text, foil, short))
        image = rendering.render(scene, self.image_size_px)  # [H, W, 3]
        return Sample(
            image=torch.from_numpy(image).permute(2, 0, 1).contiguous(),
            caption=text,
            image_id=hash_id(f"scenes/{self.world.difficulty}/{self.split}/{index}"),
            caption_id=hash_id(text),
            sample_id=index,
            skipped=(),
            foil=foil,
            short=short,
        )
