"""The record of one image with its captions, and the names of published data sets in ids and paths."""

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mamo.data.shard_index import ShardMember

Identities = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Hashes of the image ids and of the normalised paths of pairs, each int64 [pairs]; of this process only."""
_FOREIGN_IDS = re.compile(r"(?:dataset_)?(coco|flickr30k)_.")
_OFFICIAL_IMAGES = {
    "coco": re.compile(r"COCO_(train|val)2014_\d{12}\.jpg$|(^|/)(train|val)2017/\d{12}\.jpg$"),
    "flickr30k": re.compile(r"(^|/)flickr30k[-_]images/"),
}


@dataclass(frozen=True, slots=True)
class PairRecord:
    """An image and its captions (one or more; the bad-sample policy handles empty ones).

    `image` is an absolute path or a member of a tar. `line` is the 1-based number of the line, list entry or pair in
    the file `source`. Folds do not split records with the same `directory`. `foils` are texts that are false of the
    image. `caption_ids`, where the file has them, are those of the captions, in order (COCO's). `weights` are
    proportional to the probabilities of the captions; without any they are equal.
    """

    image: str | ShardMember
    captions: tuple[str, ...]
    image_id: str
    line: int
    source: str
    directory: str | None = None
    foils: tuple[str, ...] = ()
    caption_ids: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()


def data_set_of(image_id: str, image: str) -> str:
    """Return the data set of a pair by its id and the path of its image, "other" where neither names one."""
    foreign = _FOREIGN_IDS.match(image_id)
    if foreign:
        return foreign.group(1)
    name, _, rest = image_id.partition("/")
    if name and rest:
        return name
    return next((name for name, form in _OFFICIAL_IMAGES.items() if form.search(image)), "other")
