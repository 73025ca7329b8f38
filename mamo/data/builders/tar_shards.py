"""Builder of tar shards from parquet, Arrow or CSV files, in one pass; the bytes of images are copied."""

import array
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from typing_extensions import Buffer

from mamo.data.builders.columns import (
    CAPTION_NAMES,
    IMAGE_NAMES,
    ArrowFile,
    ColumnPath,
    Row,
    TableFile,
    choose,
    dataset_files,
    find_files,
    hugging_face_image,
)
from mamo.data.builders.report import BuildReport, Count
from mamo.data.captions import CAPTION
from mamo.data.files import brief
from mamo.data.output import OutputFolder
from mamo.data.shard_writer import ShardWriter, image_suffix

Kind = Literal["parquet", "csv", "huggingface"]
SHARD_MIB = 1024


@dataclass(frozen=True, slots=True)
class Recipe:
    """Columns that become pairs; see `build_shards`."""

    image: str | None = None
    captions: tuple[str, ...] = ()
    image_id: str | None = None
    where: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """A recipe that fits a file."""

    image: str
    captions: dict[str, ColumnPath]
    image_id: ColumnPath | None
    where: tuple[tuple[ColumnPath, str], ...]
    has_status: bool

    @property
    def columns(self) -> list[str]:
        """Return the columns to read, without the image."""
        paths = [
            *self.captions.values(),
            *([self.image_id] if self.image_id else []),
            *(path for path, _ in self.where),
        ]
        return list(dict.fromkeys([*(path.column for path in paths), *(["status"] if self.has_status else [])]))


@dataclass(slots=True)
class Pair:
    """The pair that is being put together from consecutive rows of one image."""

    image: Buffer
    suffix: str
    texts: dict[str, list[str]]
    image_id: str | None


def build_shards(
    kind: Kind, places: Sequence[Path], to: Path, recipe: Recipe, shard_mib: int = SHARD_MIB, overwrite: bool = False
) -> BuildReport:
    """Write `00000.tar`, ... and their index from the rows of files.

    `recipe.image` names the image column, by default that of the metadata of Hugging Face's `datasets`, or the first of
    `IMAGE_NAMES`. `recipe.captions` are paths `PATH` or `KEY=PATH`; one caption column is stored as `caption`, several
    under their keys, by default the last name of the path. `recipe.image_id` is the path of an id: consecutive rows of
    one id become one pair. `recipe.where` are conditions `PATH=VALUE`, all of which a row must fulfil.
    `recipe.columns` are the names of the columns of a table without a header.

    Args:
        kind: of the files.
        places: files, folders or globs; of `huggingface` one folder.
        to: folder of the shards.
        recipe: columns to read.
        shard_mib: largest size of a shard, in MiB, unless one pair is larger.
        overwrite: whether existing files may be replaced.

    Raises:
        ValueError: a file cannot be read, a column or path is not in it, no row gives a pair, or shards exist while
            `overwrite` is False.
    """
    files, file_kind, n_sidecars = _files(kind, places)
    counts, ids, last_missing = Counter[str](), array.array("Q"), ""
    with OutputFolder(to, overwrite) as output, ShardWriter(output.temporary, shard_mib * 2**20) as writer:
        pending: Pair | None = None
        for row, plan in _rows(files, file_kind, recipe, writer.flush):
            last_missing = row.missing or last_missing
            pair = _pair(row, plan, counts)
            if pair is None:
                continue
            if pair.image_id is not None and pending is not None and pending.image_id == pair.image_id:
                counts["rows joined to the one before, which has the same image id"] += 1
                for key, texts in pair.texts.items():
                    own = pending.texts.setdefault(key, [])
                    own += [text for text in texts if text not in own]
                continue
            if pending is not None:
                writer.add(pending.image, pending.suffix, pending.texts, pending.image_id)
            if pair.image_id is not None:
                digest = hashlib.blake2b(pair.image_id.encode("utf-8", "replace"), digest_size=8).digest()
                ids.append(int.from_bytes(digest))
            pending = pair
        if pending is None:
            reason = f": {last_missing}" if last_missing else f"; {_listed(counts)}"
            raise ValueError(f"--from: {places[0]}: no row gives a pair{reason}")
        writer.add(pending.image, pending.suffix, pending.texts, pending.image_id)
    n_twice = len(ids) - len(np.unique(np.frombuffer(ids, dtype=np.uint64)))
    found = [Count("pairs", writer.n_pairs), Count("shards", len(writer.shards))]
    found += [Count(name, n) for name, n in counts.items()]
    found += [Count("pairs with the image id of an earlier one", n_twice)] if n_twice else []
    found += [Count("parquet files of img2dataset next to their tars, not read", n_sidecars)] if n_sidecars else []
    return BuildReport(tuple(found))


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name}: {n}" for name, n in counts.items()) or "the files have no rows"


def _files(kind: Kind, places: Sequence[Path]) -> tuple[list[Path], str, int]:
    """Return the files to read, their kind, and the number of img2dataset's sidecar files, which are left out."""
    found_kind: str = kind
    if kind == "huggingface":
        if len(places) != 1 or not places[0].is_dir():
            raise ValueError("--from: give the folder of one Hugging Face data set")
        files, found_kind = dataset_files(places[0])
    else:
        files = find_files(places, "*.parquet" if kind == "parquet" else "*.[ct]sv")
    if found_kind != "parquet":
        return files, found_kind, 0
    kept = [file for file in files if not file.with_suffix(".tar").is_file()]
    if not kept:
        raise ValueError(
            f"--from: {files[0]} lists the pairs of {files[0].with_suffix('.tar').name}, as img2dataset writes it; the "
            f"tars are read as they are: data.train_file={files[0].parent}"
        )
    return kept, found_kind, len(files) - len(kept)


def _rows(
    files: Sequence[Path], kind: str, recipe: Recipe, before_reading: Callable[[], None]
) -> Iterator[tuple[Row, Plan]]:
    """Yield the rows of all files, each with the plan of its file; call `before_reading` before more are read."""
    for file in files:
        opened: Any = TableFile(file, recipe.columns) if kind == "csv" else ArrowFile(file)
        names = opened.names if kind == "csv" else opened.schema.names
        plan = _plan(file, names, None if kind == "csv" else opened.schema, recipe)
        for rows in opened.batches(plan.image, plan.columns):
            for row in rows:
                yield row, plan
            before_reading()


def _plan(file: Path, names: Sequence[str], schema: Any, recipe: Recipe) -> Plan:
    """Fit a recipe to the columns of a file. Raises ValueError naming what it does not have."""
    image = recipe.image or (hugging_face_image(schema) if schema else None)
    image = image or choose(names, IMAGE_NAMES, "--image", file)
    paths: dict[str, ColumnPath] = {}
    for text in recipe.captions or (choose(names, CAPTION_NAMES, "--caption", file),):
        key, _, path = text.rpartition("=")
        found = ColumnPath(path, "--caption")
        last = next(step for step in reversed(found.steps) if isinstance(step, str))
        key = key or (CAPTION if len(recipe.captions) < 2 else last)
        if key in paths:
            raise ValueError(f"--caption: two columns have the key {key!r}; give them keys as KEY=PATH")
        paths[key] = found
    image_id = None if recipe.image_id is None else ColumnPath(recipe.image_id, "--image-id")
    where = []
    for condition in recipe.where:
        path, is_one, value = condition.partition("=")
        if not is_one:
            raise ValueError(f"--where: {condition!r} is no condition, such as split=train")
        where.append((ColumnPath(path, "--where"), value))
    plan = Plan(image, paths, image_id, tuple(where), "status" in names)
    used = [
        ColumnPath(image, "--image"),
        *paths.values(),
        *([image_id] if image_id else []),
        *(path for path, _ in where),
    ]
    for column in used:
        if schema is not None:
            column.check(file, schema)
        elif column.text not in names:
            raise ValueError(f"{file}: {column.option}: has no column {column.text!r}; its columns: {', '.join(names)}")
    return plan


def _pair(row: Row, plan: Plan, counts: Counter[str]) -> Pair | None:
    """Return the pair of a row, or count why it gives none."""
    if plan.where and any(str(path.value(row.values)) != value for path, value in plan.where):
        counts["rows left out by --where"] += 1
        return None
    status = row.values.get("status")
    if isinstance(status, str) and status not in ("success", ""):
        counts["failed rows"] += 1
        return None
    if row.image is None:
        counts["images that are not there" if row.missing else "null images"] += 1
        return None
    texts = {key: path.texts(row.values, row.place) for key, path in plan.captions.items()}
    texts = {key: kept for key, found in texts.items() if (kept := [text for text in found if text.strip()])}
    if not texts:
        counts["rows without a caption"] += 1
        return None
    suffix = image_suffix(row.image)
    if not suffix:
        counts["images of an unknown format"] += 1
        return None
    image_id = None
    if plan.image_id is not None:
        found_id = plan.image_id.value(row.values)
        if not isinstance(found_id, str | int) or found_id == "":
            raise ValueError(f"{row.place}: --image-id: must be a text or an integer, got {brief(found_id)}")
        image_id = str(found_id)
    return Pair(row.image, suffix, texts, image_id)
