"""Warnings about identities and units that pairs do not bear out: image ids, captions."""

import os
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mamo.data.pair_lines import LinePairs
from mamo.data.pair_record import Identities, PairRecord
from mamo.data.shards import TarShardDataset

_LISTED = 3
_ODD = np.int64(-7046029254386353131)
"""Multiplier that spreads the bits of a hash."""
_MANY_CAPTIONS = 2
"""A row with fewer captions says nothing about the unit of the list."""


def identity_warnings(parts: Iterable[Sequence[PairRecord] | Any]) -> list[str]:
    """Return a warning for ids that several pictures share, and for pictures that have several ids.

    The id says which picture a row shows: rows of one id are one item of the gallery, and never negatives of each
    other. Pictures are compared by their path. Shards name their own ids.

    Args:
        parts: the records of each file.
    """
    compared = [part for part in parts if not isinstance(part, TarShardDataset)]
    hashes = [_identities_of(part) for part in compared]
    if not compared:
        return []
    ids, paths = hashes.pop() if len(hashes) == 1 else (np.concatenate(arrays) for arrays in zip(*hashes))
    n_ids, n_paths, n_both = (_n_different(keys) for keys in (ids, paths, ids * _ODD ^ paths))
    if n_ids == n_paths == n_both:
        return []
    offsets = np.cumsum([0, *map(len, compared)])

    def record(index: int) -> tuple[str, str, str]:
        """Return image id, path and place of a pair."""
        part = int(np.searchsorted(offsets, index, side="right")) - 1
        found = compared[part][index - int(offsets[part])]
        return found.image_id, os.path.normpath(str(found.image)), f"{found.source}:{found.line}"

    found = []
    shared = _several(ids, paths)
    if shared:
        listed = []
        for first, other in shared[:_LISTED]:
            (image_id, path, _), (_, second, place) = record(first), record(other)
            listed.append(f"{image_id!r} of {path} and {second} ({place})")
        found.append(
            f"{len(shared)} of {n_ids} image_ids belong to several pictures, which count as one: "
            f"{_listed(listed, len(shared))}; give each picture an image_id of its own, or leave image_id out"
        )
    several = _several(paths, ids)
    if several:
        listed = []
        for first, other in several[:_LISTED]:
            (image_id, path, _), (second, _, place) = record(first), record(other)
            listed.append(f"{path} is {image_id!r} and {second!r} ({place})")
        found.append(
            f"{len(several)} pictures have several image_ids and count as several, each wrong for the others: "
            f"{_listed(listed, len(several))}; give all rows of a picture one image_id"
        )
    return found


def _identities_of(records: Iterable[PairRecord]) -> Identities:
    """Return the identities of pairs; those of an index are freed."""
    if isinstance(records, LinePairs) and records.identities is not None:
        own, records.identities = records.identities, None
        return own
    found = [(hash(record.image_id), hash(os.path.normpath(str(record.image)))) for record in records]
    both = np.asarray(found, np.int64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def _n_different(keys: NDArray[np.int64]) -> int:
    found = np.sort(keys)
    return int(np.count_nonzero(found[1:] != found[:-1])) + min(1, len(found))


def _several(keys: NDArray[np.int64], values: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return (first place, first place with another value) of each key with several values, by the second place."""
    order = np.argsort(keys, kind="stable")
    is_first = np.ones(len(keys), bool)
    is_first[1:] = np.diff(keys[order]) != 0
    starts = np.flatnonzero(is_first)
    group = np.cumsum(is_first) - 1
    differs = np.flatnonzero(values[order] != values[order[starts]][group])
    _, first_of_group = np.unique(group[differs], return_index=True)
    places = differs[first_of_group]
    pairs = zip(order[starts[group[places]]].tolist(), order[places].tolist())
    return sorted(pairs, key=lambda pair: pair[1])


def caption_warnings(records: Iterable[PairRecord]) -> list[str]:
    """Return a warning for lists of single words: a sentence that was split into words, or a word into letters.

    Each makes a caption of its own. Words of scripts without spaces are not counted.
    """
    n_lists, split = 0, list[str]()
    for record in records:
        if len(record.captions) > _MANY_CAPTIONS:
            n_lists += 1
            if all(map(_is_one_word, record.captions)):
                split.append(f"{_place(record)} {' '.join(record.captions)[:40]!r}")
    if 2 * len(split) <= n_lists:
        return []
    return [
        f"{len(split)} of {n_lists} lists of captions have only single words: {', '.join(split[:_LISTED])}; each "
        "word counts as a caption; join the words of a sentence"
    ]


def _is_one_word(text: str) -> bool:
    return len(text.split()) == 1 and not any(unicodedata.category(char) == "Lo" for char in text)


def _place(record: PairRecord) -> str:
    return f"{record.source}:{record.line}"


def _listed(first: list[str], n_found: int) -> str:
    return "; ".join(first) + ("; ..." if n_found > len(first) else "")
