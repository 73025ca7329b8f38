"""NLVR (Suhr, Lewis, Yeh, Artzi; ACL 2017), development split: from its release to image-text pairs and statements.

A record is a sentence, its truth, and six pictures (permutations of three boxes) of which the truth holds alike.
"""

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mamo.data.pairs_reader import lines_of, write_json_lines
from mamo.data.records import ReasoningRecord, write_task_records
from mamo.data.shard_index import ShardMember, index_shard, read_member

EXPECTED_RECORDS = 989
EXPECTED_IMAGES = 5934
_PERMUTATIONS = 6
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class NlvrCounts:
    """What the release held: images found, pairs (images with a true sentence) and statements written."""

    records: int
    images: int
    pairs: int
    statements: int

    def lines(self) -> list[str]:
        """The report, expected beside found."""
        return [
            f"records: expected {EXPECTED_RECORDS}, found {self.records}",
            f"images: expected {EXPECTED_IMAGES}, found {self.images}",
            f"pairs.jsonl: {self.pairs} pairs; statements.jsonl: {self.statements} statements",
        ]

    @property
    def is_complete(self) -> bool:
        """Whether the whole published split was found."""
        return (self.records, self.images) == (EXPECTED_RECORDS, EXPECTED_IMAGES)


def build_nlvr(source: Path, to: Path) -> NlvrCounts:
    """Writes `images/`, `pairs.jsonl`, `statements.jsonl` and the six folds `fold-0/` to `fold-5/` into `to`.

    `source` holds `dev.json` and either `dev-images.tar` or the unpacked `images` folder. A sentence labelled true is a
    caption of its six pictures; `statements.jsonl` holds every sentence of every picture with its label. `image_id` is
    a hash of the picture's bytes, because the release shows some pictures under several names. Only the pictures that
    `dev.json` names are copied. A picture that is not there is left out of both files, and shows in the counts.

    Raises ValueError for a release that lacks its files or has a row that is not NLVR's.
    """
    rows = _read_release(source / "dev.json")
    members = _members(source)
    pairs, statements = [], []
    n_images = 0
    for row in rows:
        is_true = row["label"] == "true"
        for permutation in range(_PERMUTATIONS):
            name = f"images/{row['directory']}/dev-{row['identifier']}-{permutation}.png"
            content = _content(source, name, members)
            if content is None:
                continue
            n_images += 1
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            (to / name).write_bytes(content)
            group: Row = {"image": name, "directory": row["directory"]}
            identity = {"identifier": row["identifier"], "permutation": permutation}
            image_id = hashlib.sha256(content).hexdigest()[:16]
            group["image_id"] = image_id
            statements.append({**group, "sentence": row["sentence"], "label": is_true, **identity})
            if is_true:
                pairs.append({**group, "caption": row["sentence"]})
    write_json_lines(to / "pairs.jsonl", pairs)
    write_json_lines(to / "statements.jsonl", statements)
    _write_folds(to, pairs, statements)
    return NlvrCounts(len(rows), n_images, len(pairs), len(statements))


def _write_folds(to: Path, pairs: list[Row], statements: list[Row]) -> None:
    """Writes `fold-K/train.jsonl`, `eval.jsonl` and `statements.jsonl`: fold K holds out the K-th directory.

    `reasoning-train.jsonl` and `reasoning-eval.jsonl` hold all sentences, true and false, as `ReasoningRecord`s.

    Permutations of one picture lie in one directory; the few pictures that occur in several directories are kept out
    of training wherever they are held out.
    """
    for fold, held_out in enumerate(sorted({row["directory"] for row in statements}, key=int)):
        seen = {row["image_id"] for row in statements if row["directory"] == held_out}
        train = [row for row in pairs if row["directory"] != held_out and row["image_id"] not in seen]
        for name, rows in (
            ("train", train),
            ("eval", [row for row in pairs if row["directory"] == held_out]),
            ("statements", [row for row in statements if row["directory"] == held_out]),
        ):
            from_fold = [{**row, "image": f"../{row['image']}"} for row in rows]
            write_json_lines(to / f"fold-{fold}" / f"{name}.jsonl", from_fold)
        for name, is_held_out in (("train", False), ("eval", True)):
            chosen = [row for row in statements if (row["directory"] == held_out) == is_held_out]
            records = [_reasoning(row) for row in chosen if is_held_out or row["image_id"] not in seen]
            write_task_records(to / f"fold-{fold}" / f"reasoning-{name}.jsonl", records)


def _reasoning(row: Row) -> ReasoningRecord:
    identifier = f"{row['identifier']}-{row['permutation']}"
    images = [f"../{row['image']}"]
    return ReasoningRecord(images=images, sentence=row["sentence"], label=row["label"], identifier=identifier)


def _read_release(file: Path) -> list[Row]:
    if not file.is_file():
        raise ValueError(f"{file}: no such file; --from must be a folder with NLVR's dev.json and its pictures")
    rows = []
    for line, text in enumerate(lines_of(file), 1):
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}:{line}: not valid JSON ({error.msg}); fetch the release again") from None
        # These two become file names, so nothing but digits may pass.
        for key, pattern in (
            ("identifier", r"\d+-\d+"),
            ("directory", r"\d+"),
            ("label", "true|false"),
            ("sentence", ".+"),
        ):
            value = row.get(key) if isinstance(row, dict) else None
            if not isinstance(value, str) or not re.fullmatch(pattern, value, re.ASCII | re.DOTALL):
                raise ValueError(
                    f"{file}:{line}: field '{key}' must match {pattern}, got {value!r}; fetch the release again"
                )
        rows.append(row)
    repeated = [name for name, count in Counter(row["identifier"] for row in rows).items() if count > 1]
    if repeated:
        raise ValueError(f"{file}: identifier {repeated[0]} occurs more than once; fetch the release again")
    return rows


def _members(source: Path) -> dict[str, ShardMember]:
    """The pictures in the tar by name; empty where they are unpacked."""
    if (source / "images").is_dir():
        return {}
    tar = source / "dev-images.tar"
    if not tar.is_file():
        raise ValueError(f"{source}: holds neither an images folder nor dev-images.tar")
    return {member.name.removeprefix("./"): member for member in index_shard(tar)}


def _content(source: Path, name: str, members: dict[str, ShardMember]) -> bytes | None:
    if members:
        return read_member(members[name]) if name in members else None
    file = source / name
    return file.read_bytes() if file.is_file() else None
