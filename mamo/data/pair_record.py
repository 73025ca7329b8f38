"""The record of one image with its captions."""

from dataclasses import dataclass

from mamo.data.shard_index import ShardMember


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
