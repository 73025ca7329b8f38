"""Builder of NLVR (Suhr, Lewis, Yeh, Artzi; ACL 2017), development split: image-text pairs and statements.

A record is a sentence, its label, and six images (permutations of three boxes) with the same label.
"""

import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from mamo.config.values import Values
from mamo.data.files import JsonError, brief, parse_json
from mamo.data.output import OutputFolder
from mamo.data.pairs_reader import read_lines, write_json_lines
from mamo.data.records import ReasoningRecord, write_task_records
from mamo.data.shard_index import ShardMember, index_shard, read_member

EXPECTED_RECORDS = 989
EXPECTED_IMAGES = 5934
_PERMUTATIONS = 6
Row = Values


@dataclass(frozen=True, slots=True)
class NlvrCounts:
    """Counts of a build: records, images found, pairs (images with a true sentence) and statements."""

    records: int
    images: int
    pairs: int
    statements: int

    def lines(self) -> list[str]:
        """Format the report with expected and found numbers."""
        return [
            f"records: expected {EXPECTED_RECORDS}, found {self.records}",
            f"images: expected {EXPECTED_IMAGES}, found {self.images}",
            f"pairs.jsonl: {self.pairs} pairs; statements.jsonl: {self.statements} statements",
        ]

    @property
    def is_complete(self) -> bool:
        """Return whether the complete published split was found."""
        return (self.records, self.images) == (EXPECTED_RECORDS, EXPECTED_IMAGES)


def build_nlvr(source: Path, to: Path, overwrite: bool = False) -> NlvrCounts:
    """Write `images/`, `pairs.jsonl`, `statements.jsonl` and the six folds `fold-0/` to `fold-5/` into `to`.

    `source` contains `dev.json`, and `dev-images.tar` or the unpacked `images` folder. A sentence with label true is a
    caption of its six images. `statements.jsonl` has every sentence with every image and its label. `image_id` is a
    hash of the image's bytes, because some images have several names in the release. Only the images in `dev.json` are
    copied. A missing image is omitted from both files and reduces the counts.

    Raises:
        ValueError: files of the release are missing, a row does not have NLVR's format, or an output file exists
            while `overwrite` is False.
    """
    with OutputFolder(to, overwrite) as output:
        return _build(source, output)


def _build(source: Path, output: OutputFolder) -> NlvrCounts:
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
            output.path(name).write_bytes(content)
            group: Row = {"image": name, "directory": row["directory"]}
            ids = {"identifier": row["identifier"], "permutation": permutation}
            image_id = hashlib.sha256(content).hexdigest()[:16]
            group["image_id"] = image_id
            statements.append({**group, "sentence": row["sentence"], "label": is_true, **ids})
            if is_true:
                pairs.append({**group, "caption": row["sentence"]})
    write_json_lines(output.path("pairs.jsonl"), pairs)
    write_json_lines(output.path("statements.jsonl"), statements)
    _write_folds(output, pairs, statements)
    return NlvrCounts(len(rows), n_images, len(pairs), len(statements))


def _write_folds(output: OutputFolder, pairs: list[Row], statements: list[Row]) -> None:
    """Write `fold-K/train.jsonl`, `eval.jsonl` and `statements.jsonl`. Fold K holds out the K-th directory.

    `reasoning-train.jsonl` and `reasoning-eval.jsonl` have all sentences, true and false, as `ReasoningRecord`.

    Permutations of one image are in one directory. A few images occur in several directories; they are removed from the
    training data of the folds that hold them out.
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
            write_json_lines(output.path(f"fold-{fold}/{name}.jsonl"), from_fold)
        for name, is_held_out in (("train", False), ("eval", True)):
            chosen = [row for row in statements if (row["directory"] == held_out) == is_held_out]
            records = [_reasoning(row) for row in chosen if is_held_out or row["image_id"] not in seen]
            write_task_records(output.path(f"fold-{fold}/reasoning-{name}.jsonl"), records)


def _reasoning(row: Row) -> ReasoningRecord:
    identifier = f"{row['identifier']}-{row['permutation']}"
    images = [f"../{row['image']}"]
    return ReasoningRecord(images=images, sentence=row["sentence"], label=row["label"], identifier=identifier)


def _read_release(file: Path) -> list[Row]:
    """Read and check the rows of `dev.json`."""
    if not file.is_file():
        raise ValueError(f"{file}: no such file; --from must be a folder with NLVR's dev.json and its images")
    rows = []
    for line, text in enumerate(read_lines(file), 1):
        if not text.strip():
            continue
        try:
            row = parse_json(text)
        except JsonError as error:
            raise ValueError(f"{file}:{line}: {error}; fetch the release again") from None
        # identifier and directory become file names, so only digits are allowed
        for key, pattern in (
            ("identifier", r"\d+-\d+"),
            ("directory", r"\d+"),
            ("label", "true|false"),
            ("sentence", r".*\S.*"),
        ):
            value = row.get(key) if isinstance(row, dict) else None
            if not isinstance(value, str) or not re.fullmatch(pattern, value, re.ASCII | re.DOTALL):
                raise ValueError(
                    f"{file}:{line}: field '{key}' must match {pattern}, got {brief(value)}; fetch the release again"
                )
        rows.append(row)
    repeated = [name for name, count in Counter(row["identifier"] for row in rows).items() if count > 1]
    if repeated:
        raise ValueError(f"{file}: identifier {repeated[0]} occurs more than once; fetch the release again")
    return rows


def _members(source: Path) -> dict[str, ShardMember]:
    """Return the images in the tar by name; empty if they are unpacked."""
    if (source / "images").is_dir():
        return {}
    tar = source / "dev-images.tar"
    if not tar.is_file():
        raise ValueError(f"{source}: contains neither an images folder nor dev-images.tar")
    return {member.name.removeprefix("./"): member for member in index_shard(tar)}


def _content(source: Path, name: str, members: dict[str, ShardMember]) -> bytes | None:
    """Read an image from the tar or from the folder; None if it is missing."""
    if members:
        return read_member(members[name]) if name in members else None
    file = source / name
    return file.read_bytes() if file.is_file() else None
