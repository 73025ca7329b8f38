"""Select the samples shown in a report: test scenes, or the evaluation file's first pairs or expressions."""

import re
from collections.abc import Iterator
from pathlib import Path

from mamo.config.schema import DataConfig
from mamo.data.cleaning import Clean, cleaner
from mamo.data.collate import sample_rng
from mamo.data.images import BadSampleError
from mamo.data.pairs import load_image
from mamo.data.pairs_reader import read_pairs
from mamo.data.processor import cleaning_of
from mamo.data.records import Box, GroundingRecord
from mamo.data.transforms import eval_transform
from mamo.evaluation.predictor import Predictor
from mamo.reports.pictures import Picture, Samples, network_pictures
from mamo.tasks.pretrain.config import PretrainConfig
from mamo.tasks.sources import load_records
from mamo.world.captions import identifying_caption
from mamo.world.masked_words import MaskedWord, cleaned_items, masked_word_items
from mamo.world.referring import Expression, expressions
from mamo.world.rendering import render
from mamo.world.scene import WORLD_SEED, SceneWorld

GALLERY = 60
_LONG_CHARS = 4  # of a word that is worth asking for: not "a", "of", "the"


def select_samples(config: PretrainConfig, n: int) -> Samples | None:
    """Select `n` samples, or as many as there are, of what the config evaluates; None without any."""
    data = config.data
    if data.source == "scenes":
        world = SceneWorld(data.difficulty, WORLD_SEED)
        scenes = [world.scene("test", index) for index in range(n)]
        return Samples(
            [render(scene, data.image_size) for scene in scenes],
            [identifying_caption(scene).text for scene in scenes],
            [item for item in expressions(world, n, data.image_size) if item.scene_index < n],
            [item for item in cleaned_items(masked_word_items(world, n), cleaning_of(config)) if item.scene_index < n],
        )
    if data.eval_path is None:
        return None
    clean = cleaner(cleaning_of(config))
    if data.source == "records":
        return _of_expressions(data, clean, n) if config.task == "grounding" else None
    found = [pair for _, pair in zip(range(n), _distinct_pairs(data, data.eval_path, clean))]
    captions = [caption for _, caption in found]
    words = [word for index, caption in enumerate(captions) for word in _word_of(index, caption)]
    return Samples([picture for picture, _ in found], captions, [], words) if found else None


def _of_expressions(data: DataConfig, clean: Clean, n: int) -> Samples | None:
    """Return the first `n` images that can be read, each with the first expression that has a box."""
    records, read = load_records(data, GroundingRecord, "test", n)
    pictures: list[Picture] = []
    items: list[Expression] = []
    first: dict[str, tuple[GroundingRecord, Box]] = {}
    for record in records:
        if record.box_xywh is not None:
            first.setdefault(record.image, (record, record.box_xywh))
    for record, gold in first.values():
        try:
            image = read(record.image)
        except BadSampleError:  # already logged by the evaluation
            continue
        height, width = image.shape[1:]
        down, across = data.image_size[0] / height, data.image_size[1] / width
        boxes = [(x * across, y * down, w * across, h * down) for x, y, w, h in (gold, *record.proposals_xywh)]
        pictures.append(eval_transform(image, data.image_size).permute(1, 2, 0).numpy())
        text = clean(record.expression)
        items.append(Expression(len(items), text, record.foil or "", 0, boxes[0], tuple(boxes[1:])))
        if len(items) == n:
            break
    return Samples(pictures, [], [item for item in items if item.proposals], []) if items else None


def _distinct_pairs(data: DataConfig, eval_file: str, clean: Clean) -> Iterator[tuple[Picture, str]]:
    """Return each image once with its first caption, written as the evaluation reads it.

    Left out are images with a caption that is an earlier one's too, of which either would be right, and those that
    cannot be read: the evaluation logs them, or ends there, as `data.bad_samples` says.
    """
    images: set[str] = set()
    said: set[str] = set()
    for record in read_pairs(Path(eval_file), data.eval_split, data.eval_keys, data.columns):
        texts = [text for text in (clean(caption).lower() for caption in record.captions) if text]
        if not texts or record.image_id in images or not said.isdisjoint(texts):
            continue
        try:
            image = eval_transform(load_image(record.image), data.image_size)
        except BadSampleError:
            continue
        images.add(record.image_id)
        said.update(texts)
        yield image.permute(1, 2, 0).numpy(), texts[0]


def _word_of(index: int, caption: str) -> Iterator[MaskedWord]:
    """Draw one word of the caption among the longer ones; yield nothing of a caption without words."""
    words = list(re.finditer(r"\w+", caption))
    words = [word for word in words if len(word[0]) >= _LONG_CHARS] or words
    if words:
        word = words[sample_rng(WORLD_SEED, 0, index, 0).integers(len(words))]
        yield MaskedWord(index, "word", caption, *word.span(), (word[0],))


def sample_pictures(predictor: Predictor, config: PretrainConfig, rows: int) -> list[tuple[str, str]]:
    """Draw what a network with the heads of pre-training makes of test scenes or of the pairs of `data.eval_file`.

    Returns:
        (title, HTML fragment) of each kind of picture, with about `rows` rows.
    """
    samples = select_samples(config, max(GALLERY, rows))
    return (
        []
        if samples is None
        else network_pictures(predictor, config, config.masking, config.losses.mim_target, samples, rows)
    )
