"""Warnings about identities and units that pairs do not bear out: image ids, captions."""

import os
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from mamo.data.pair_record import PairRecord
from mamo.data.shards import TarShardDataset

_LISTED = 3
_MANY_CAPTIONS = 2
"""A row with fewer captions says nothing about the unit of the list."""


def identity_warnings(parts: Iterable[Sequence[PairRecord] | Any]) -> list[str]:
    """Return a warning for ids that several pictures share, and for pictures that have several ids.

    The id says which picture a row shows: rows of one id are one item of the gallery, and never negatives of each
    other. Pictures are compared by their path. Shards name their own ids.

    Args:
        parts: the records of each file.
    """
    path_of: dict[str, str] = {}
    id_of: dict[str, str] = {}
    shared: dict[str, str] = {}
    several: dict[str, str] = {}
    for records in parts:
        if isinstance(records, TarShardDataset):
            continue
        for record in records:
            path = os.path.normpath(str(record.image))
            first = path_of.setdefault(record.image_id, path)
            if first != path:
                shared.setdefault(record.image_id, f"{record.image_id!r} of {first} and {path} ({_place(record)})")
            own = id_of.setdefault(path, record.image_id)
            if own != record.image_id:
                several.setdefault(path, f"{path} is {own!r} and {record.image_id!r} ({_place(record)})")
    found = []
    if shared:
        found.append(
            f"{len(shared)} of {len(path_of)} image_ids belong to several pictures, which count as one: "
            f"{_listed(shared)}; give each picture an image_id of its own, or leave image_id out"
        )
    if several:
        found.append(
            f"{len(several)} pictures have several image_ids and count as several, each wrong for the others: "
            f"{_listed(several)}; give all rows of a picture one image_id"
        )
    return found


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


def _listed(found: dict[str, str]) -> str:
    return "; ".join([*found.values()][:_LISTED]) + ("; ..." if len(found) > _LISTED else "")
