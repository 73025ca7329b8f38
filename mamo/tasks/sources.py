"""Training and evaluation samples as a config's `data.source` says."""

import filecmp
import functools
import glob
import logging
from collections.abc import Iterable, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset
from transformers import PreTrainedTokenizerFast

from mamo.config.images import AugmentationConfig
from mamo.config.schema import DataConfig, RunConfig
from mamo.config.values import Values
from mamo.data.captions import change_caption, named_sides
from mamo.data.cleaning import cleaner
from mamo.data.identity import identity_warnings
from mamo.data.images import BadSamplePolicy
from mamo.data.judge import check_headers, grounding_problems, name_of, raise_problems, row_problems
from mamo.data.pair_record import PairRecord
from mamo.data.pairs import ChangeCaption, PairDataset
from mamo.data.pairs_reader import read_pairs
from mamo.data.processor import cleaning_of, has_sep
from mamo.data.record_dataset import LoadImage, Record, RecordDataset, file_records, image_names
from mamo.data.records import (
    EntailmentRecord,
    GroundingRecord,
    ReasoningRecord,
    TaskRecord,
    VqaRecord,
)
from mamo.data.shards import TarShardDataset
from mamo.data.tokenizer import NEEDED_FILES, TOKENIZER_FILES, add_mask_token, read_tokenizer, use_sep
from mamo.data.transforms import train_transform_from
from mamo.hub import hub_folder
from mamo.models.published_text import text_config_from
from mamo.world.datasets import ScenePairs
from mamo.world.entailment import entailment_items, render_covered
from mamo.world.questions import question
from mamo.world.referring import expressions
from mamo.world.rendering import render
from mamo.world.scene import WORLD_SEED, SceneWorld, Split
from mamo.world.statements import pair_statements
from mamo.world.vocabulary import scenes_tokenizer

logger = logging.getLogger(__name__)

SIDES_SHARE = 0.05
"""Share of a task's texts that say left or right from which on mirrored pictures are refused."""


def load_tokenizer(name: str, has_sep: bool = True) -> PreTrainedTokenizerFast:
    """Load the tokenizer that `data.tokenizer` names: `scenes`, a folder, or a hub name; see `read_tokenizer`."""
    return use_sep(scenes_tokenizer(), has_sep) if name == "scenes" else read_tokenizer(name, has_sep)


def tokenizer_of(config: RunConfig) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a config; compare it with the one of the text encoder whose weights the config takes.

    A run that starts from no checkpoint and masks words adds [MASK] to a tokenizer without it.

    Raises:
        ValueError: there is none, or the encoder's words have other ids.
    """
    tokenizer, text = load_tokenizer(config.data.tokenizer, has_sep(config)), config.model.text
    if config.checkpoint is None and config.masks_words:
        add_mask_token(tokenizer)
    is_file = config.checkpoint is not None and Path(config.checkpoint).is_file()
    source = config.model.text_source
    takes_weights = config.checkpoint is None and (text.weights == "bert" or source != text.bert)
    if source is not None and (is_file or takes_weights):
        check_bert_tokenizer(tokenizer, config.data.tokenizer, source)
    return tokenizer


def check_bert_tokenizer(tokenizer: PreTrainedTokenizerFast, name: str, bert: str) -> None:
    """Raise ValueError unless a tokenizer gives words the ids that they have in a text encoder.

    Args:
        tokenizer: of the run, perhaps with [MASK] added.
        name: `data.tokenizer`, for messages.
        bert: folder or hub name; without a tokenizer in it, the numbers of words are compared.
    """
    folder = Path(bert) if Path(bert).exists() else hub_folder(bert, ("*config.json",), TOKENIZER_FILES)
    advice = "set data.tokenizer to the tokenizer that belongs to it"
    if not any((folder / file).is_file() for file in NEEDED_FILES):
        n_words = text_config_from(str(folder)).vocab_size
        if n_words != len(tokenizer):
            raise ValueError(f"data.tokenizer: {name} has {len(tokenizer)} words, {bert} has {n_words}; {advice}")
        return
    its = read_tokenizer(str(folder))
    own, theirs = tokenizer.get_vocab(), (its if tokenizer.mask_token is None else add_mask_token(its)).get_vocab()
    differing = sorted(word for word in own if own[word] != theirs.get(word))
    if differing or len(own) != len(theirs):
        word = differing[0] if differing else min(theirs.keys() - own.keys())
        raise ValueError(
            f"data.tokenizer: {name} is not the tokenizer of {bert} (model.text.bert): {word!r} has id "
            f"{own.get(word)} here, {theirs.get(word)} there; {advice}"
        )


def record_dataset(records: list[Record], load_image: LoadImage, data: DataConfig) -> RecordDataset[Record]:
    """Return the training records of a config as samples; files are augmented, scenes are not.

    Raises:
        ValueError: pictures are mirrored, and texts of the records name sides.
    """
    if data.source == "scenes":
        return RecordDataset(records, load_image, data.image_size, on_bad=data.bad_samples.policy, name="scenes")
    if data.augmentation.horizontal_flip:
        found, n, first = named_sides(map(_text_of, records))
        if found > SIDES_SHARE * n:
            raise ValueError(
                f"data.augmentation.horizontal_flip: {found:,} of {n:,} texts of data.train_file say left or right, "
                f"which a mirrored picture makes false, the first: {first[:80]!r}; set it to false"
            )
    return RecordDataset(
        records,
        load_image,
        data.image_size,
        transform=train_transform_from(data),
        on_bad=data.bad_samples.policy,
        folder=Path(data.train_files[0]).parent.absolute(),
    )


def _text_of(record: TaskRecord) -> str:
    names = ("expression", "question", "sentence")
    return str(next((getattr(record, name) for name in names if hasattr(record, name)), ""))


def load_records(data: DataConfig, kind: type[Record], split: Split, n_items: int) -> tuple[list[Record], LoadImage]:
    """Return the training (`split` "train") or evaluation records of a config.

    Args:
        data: the config's.
        kind: of record.
        split: of scenes; of files, "train" means `train_file` and anything else `eval_file`.
        n_items: how many of scenes; files are taken whole.
    """
    if data.source == "scenes":
        world = SceneWorld(data.difficulty, WORLD_SEED)
        return scene_records(world, kind, split, n_items, data.image_size), _SceneImages(world, split, data.image_size)
    files = data.train_files if split == "train" else [str(data.eval_path)]
    return file_records(files, kind)


def evaluation_records(data: DataConfig, kind: type[Record], n_items: int) -> tuple[list[Record], LoadImage]:
    """Return `load_records` of the evaluation. Raises ValueError also for rows that cannot be scored."""
    records, load_image = load_records(data, kind, "test", n_items)
    if data.source != "scenes":
        raise_problems(data.eval_path, row_problems(records))
    return records, load_image


def check_records(data: DataConfig, kind: type[Record]) -> list[Record]:
    """Judge the evaluation records and the headers of their images as the evaluation will; nothing of scenes.

    Returns:
        The records; none of scenes.

    Raises:
        ValueError: as `read_task_records`, and for rows and boxes that cannot be scored.
        BadSampleError: an image cannot be opened, and `data.bad_samples` does not skip it.
    """
    if data.source == "scenes":
        return []
    records, _ = evaluation_records(data, kind, 0)
    sizes = check_headers(
        ((name_of(record), name) for record in records for name in image_names(record)), bad_sample_policy(data)
    )
    problems: list[str] = []
    for record in records:
        if isinstance(record, GroundingRecord) and record.image in sizes:
            problems += grounding_problems(record, *sizes[record.image])
    raise_problems(data.eval_path, problems)
    return records


def refuse_training_files(data: DataConfig, trained_on: Iterable[Values]) -> None:
    """Raise ValueError where `data.eval_file` is one of the files that a network was trained on, or a copy of one.

    Other splits of one Karpathy file are held out. Links are followed; shards are compared one by one.

    Args:
        data: of the evaluation.
        trained_on: the `data` sections of the run and its ancestors, as plain values.
    """
    if data.source == "scenes":
        return
    held_out = [file for name in data.eval_files for file in _regular_files(name)]
    for earlier in trained_on:
        listed = earlier.get("train_file") or [entry["file"] for entry in earlier.get("train") or []]
        if not _splits(earlier.get("train_split")) & _splits(data.eval_split):
            continue
        for name in [listed] if isinstance(listed, str) else listed:
            sizes = {file: file.stat().st_size for file in _regular_files(name)}
            for own in held_out:
                for file in (file for file, size in sizes.items() if size == own.stat().st_size > 0):
                    if filecmp.cmp(file, own, shallow=False):
                        raise ValueError(
                            f"data.eval_file: {own} has the content of the training file {file}; name a held-out one"
                        )


def _splits(split: str | None) -> set[str | None]:
    return {"train", "restval"} if split == "train" else {split}


def _regular_files(name: str) -> list[Path]:
    """Return the files that a path of pairs or records names: itself, or the shards of a folder or glob."""
    path = Path(name)
    if path.is_dir():
        found = sorted(path.glob("*.tar"))
    else:
        found = [path] if path.exists() else [Path(file) for file in sorted(glob.glob(name))]
    return [file for file in found if file.is_file()]


def bad_sample_policy(data: DataConfig) -> BadSamplePolicy:
    """Return the policy for the samples of one evaluation that cannot be read."""
    return BadSamplePolicy(data.bad_samples.policy, data.bad_samples.budget)


def require_some(evaluated: Sized) -> None:
    """Raise ValueError where nothing could be evaluated."""
    if not evaluated:
        raise ValueError("evaluation: no image could be loaded; check the evaluation files with `mamo data check`")


@dataclass(frozen=True, slots=True)
class _SceneImages:
    """Draws the scene of a record: `INDEX`, or `INDEX/CELL` with a card over a cell."""

    world: SceneWorld
    split: Split
    size: tuple[int, int]

    def __call__(self, name: str) -> Tensor:
        index, _, covered = name.partition("/")
        scene = self.world.scene(self.split, int(index))
        picture = render_covered(scene, int(covered), self.size) if covered else render(scene, self.size)
        return torch.from_numpy(picture).permute(2, 0, 1).contiguous()


def scene_records(
    world: SceneWorld, kind: type[Record], split: Split, n_items: int, image_size_px: tuple[int, int]
) -> list[Record]:
    """Return the first `n_items` records of `kind` about the scenes of `split`."""
    rows: list[Values] = []
    if kind is VqaRecord:
        for index in range(n_items):
            asked = question(world, split, index)
            types = {"answer_type": asked.answer_type, "question_type": asked.kind}
            rows.append({"image": str(index), "question_id": index, "question": asked.text, **types})
            rows[-1]["answers"] = list(asked.answers)
    elif kind is ReasoningRecord:
        for item in pair_statements(world, split, n_items):
            images = [str(item.left), str(item.right)]
            rows.append({"images": images, "sentence": item.sentence, "label": item.label})
            rows[-1]["identifier"] = item.identifier
    elif kind is EntailmentRecord:
        for about in entailment_items(world, split, n_items):
            rows.append({"image": f"{about.scene_index}/{about.covered}", "pair_id": about.identifier})
            rows[-1] |= {"sentence": about.sentence, "label": about.label}
    else:
        assert kind is GroundingRecord
        for number, phrase in enumerate(expressions(world, n_items, image_size_px, split)):
            boxes = {"box_xywh": phrase.box, "proposals_xywh": list(phrase.proposals)}
            named = {
                "image": str(phrase.scene_index),
                "expression_id": number,
                "expression": phrase.text,
                "foil": phrase.foil,
            }
            rows.append({**named, **boxes})
    return [kind.model_validate(row) for row in rows]


def pair_dataset(config: RunConfig, has_foils: bool = False) -> PairDataset | ScenePairs:
    """Return the training pairs of a config, of scenes with foils where `has_foils`."""
    data = config.data
    if data.source == "scenes":
        has_short = getattr(getattr(config, "masking", None), "text_for_masked_image", "same") == "short"
        kinds = {"has_foils": has_foils, "has_short": has_short}
        return ScenePairs(data, "train", data.train_scenes, cleaning=cleaning_of(config), **kinds)
    parts: list[Any] = []
    for entry in data.train_sources:
        keys = entry.caption_keys or data.caption_keys
        parts.append(read_pairs(Path(entry.file), data.train_split, keys, data.columns))
    for line in identity_warnings(parts):
        logger.warning("data.train_file: %s", line)
    if data.augmentation.horizontal_flip:
        _warn_of_sides(parts)
    repeats = [entry.repeat for entry in data.train_sources]
    sources = [(entry.file, len(part) * n) for entry, part, n in zip(data.train_sources, parts, repeats)]
    repeated = [part for part, n in zip(parts, repeats) for _ in range(n)]
    records: ConcatDataset[PairRecord] = ConcatDataset(repeated)  # no shard is read to be joined
    return PairDataset(
        records,
        data.image_size,
        train_transform_from(data),
        data.bad_samples.policy,
        cleaner(cleaning_of(config)),
        data.sub_caption_sentences,
        sources,
        _caption_change(data.augmentation),
    )


def _caption_change(augmentation: AugmentationConfig) -> ChangeCaption | None:
    """Return the augmentation of captions, None without any."""
    if not (augmentation.word_dropout or augmentation.tag_subsets):
        return None
    keys = {"word_dropout": augmentation.word_dropout, "tag_subsets": augmentation.tag_subsets}
    return functools.partial(change_caption, **keys)  # type: ignore[arg-type]


def _warn_of_sides(parts: Iterable[Any]) -> None:
    """Warn where captions say left or right and pictures are mirrored; captions of shards are not read for it."""
    listed = (record for part in parts if not isinstance(part, TarShardDataset) for record in part)
    found, n, first = named_sides(text for record in listed for text in record.captions)
    if found:
        logger.warning(
            "data.augmentation.horizontal_flip: %s of %s captions say left or right, which a mirrored picture makes "
            "false, the first: %.80r", f"{found:,}", f"{n:,}", first,
        )  # fmt: skip
