"""Score fine-grained items by ITM, by ITC, and by their sum. Each image is encoded once, each distinct pair fused once.

| score | of a pair |
|---|---|
| `itm` | match minus mismatch logit, of which the probability is the sigmoid; statements are true above 0 |
| `itc` | cosine of the two encoders |
| `itm+itc` | match logit plus cosine (ARO's wrappers, Yuksekgonul et al. 2023) |
| `text` | cosine of two texts of an item, without the image (SugarCrepe++) |

Legend: N pairs, I images and T texts of an item.
"""

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mamo.config.schema import ItemScore
from mamo.data.cleaning import is_cut
from mamo.data.images import BadSampleError, decode_image
from mamo.data.items import Item, ItemFile, right_and_wrong
from mamo.data.judge import item_box_problems
from mamo.data.records import Box, whole_pixels
from mamo.distributed import map_over_ranks
from mamo.evaluation.metrics.items import (
    Judgement,
    Scores,
    item_chances,
    item_metrics,
    judge,
    n_ties,
    text_text_values,
)
from mamo.evaluation.results import Metrics
from mamo.evaluation.scorer import ImageTokens, Scorer
from mamo.explain import score_of

logger = logging.getLogger(__name__)

ITEM_SCORES: tuple[ItemScore, ...] = ("itm", "itc", "itm+itc", "text")
Crop = tuple[str, Box | None]
"""Path of an image, and the box that is cut out of it."""
_LISTED = 3


def score_pairs(
    scorer: Scorer, images: ImageTokens, image_indices: Tensor, texts: Sequence[str]
) -> dict[ItemScore, Tensor]:
    """Score N pairs by every score that the network has the heads for.

    Args:
        scorer: scores images and texts.
        images: encoded images.
        image_indices: rows int64 [N] in `images`.
        texts: N cleaned texts.

    Returns:
        float32 [N] on the CPU, by name.
    """
    return _score_tokenized(scorer, images, image_indices, *scorer.tokenize(texts))


def _score_tokenized(
    scorer: Scorer, images: ImageTokens, image_indices: Tensor, ids: Tensor, lengths: Tensor
) -> dict[ItemScore, Tensor]:
    """Return `score_pairs` of texts as token ids int64 [N, L] and lengths int64 [N]."""
    encoded, rows = scorer.encode_texts(ids, lengths), torch.arange(len(image_indices))
    found: dict[ItemScore, Tensor] = {}
    if scorer.network.get_head("temperature") is not None:
        found["itc"] = scorer.similarity(images, encoded, image_indices, rows)
    if scorer.network.get_head("itm") is not None:
        logits = scorer.itm_logits(images, encoded, image_indices, rows)
        found["itm"] = score_of(logits, "difference")
        if "itc" in found:
            found["itm+itc"] = score_of(logits, "match") + found["itc"]
    return found


def pairs_of(items: Iterable[Item]) -> list[tuple[int, int, int]]:
    """Return (item, image, text) of all pairs: the first text of every item, then the second of every item, ..."""
    listed = [
        (text, number, image, text)
        for number, item in enumerate(items)
        for text in range(len(item.texts))
        for image in range(len(item.images))
    ]
    return [pair[1:] for pair in sorted(listed, key=lambda pair: pair[0])]


@dataclass(slots=True)
class ScoredItems:
    """The items that could be scored, with scores [I, T] of each by name, and what the numbers depend on."""

    items: list[Item]
    scores: dict[ItemScore, list[Scores]]
    facts: dict[str, float] = field(default_factory=dict)


def check_boxes(file: ItemFile, is_official: bool = False) -> int:
    """Read the headers of the images that have boxes; return the number of boxes outside.

    Those of a published set are cut at the edges of the image. Raises ValueError, with line and field, for others.
    """
    problems = item_box_problems(file)
    if problems and not is_official:
        more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise ValueError(f"{len(problems)} problem(s): {'; '.join(problems[:_LISTED])}{more}")
    return len(problems)


def load_crop(crop: Crop) -> Tensor:
    """Decode an image uint8 [3, H, W] and cut out its box. Raises BadSampleError."""
    image, box = decode_image(Path(crop[0])), crop[1]
    if box is None:
        return image
    edges = whole_pixels(box, image.shape[2], image.shape[1])
    if edges is None:
        raise BadSampleError(f"{crop[0]}: box {list(box)} covers no pixel")
    left, top, right, bottom = edges
    return image[:, top:bottom, left:right]


def score_items(scorer: Scorer, items: Sequence[Item], load: Callable[[Crop], Tensor] = load_crop) -> ScoredItems:
    """Score all pairs of items; processes share the images.

    Images are encoded `scorer.batch_size` at a time, each once, and their tokens are dropped after their pairs are
    scored. A pair of an image and a text, or of two texts that tokenize to the same ids, is scored once: so equal input
    has equal scores, to the last bit. An item with an image that cannot be read is left out and counted.

    Args:
        scorer: its network is in eval mode.
        items: one or more.
        load: decodes an image; raises BadSampleError.

    Raises:
        ValueError: no item can be scored.
    """
    crops = list(dict.fromkeys(item.crop(image) for item in items for image in range(len(item.images))))
    texts_of: dict[Crop, dict[str, None]] = {crop: {} for crop in crops}
    for number, image, text in pairs_of(items):
        texts_of[items[number].crop(image)][items[number].texts[text]] = None
    chunks = [crops[start : start + scorer.batch_size] for start in range(0, len(crops), scorer.batch_size)]
    score_chunk = functools.partial(_score_chunk, scorer, load, texts_of)
    by_pair: dict[tuple[Crop, str], tuple[int, dict[ItemScore, float]]] = {}
    failed: dict[Crop, str] = {}
    full: set[str] = set()
    for number, (found, bad, long) in enumerate(map_over_ranks(score_chunk, chunks)):
        by_pair |= {pair: (offset + (number << 32), scores) for pair, (offset, scores) in found.items()}
        failed |= bad
        full |= long
    for reason in list(failed.values())[:_LISTED]:
        logger.warning("items: image cannot be read, its items are not scored: %s", reason)
    kept = [item for item in items if not any(item.crop(image) in failed for image in range(len(item.images)))]
    if not kept:
        raise ValueError(f"items: none of {len(items)} can be scored; the first: {next(iter(failed.values()))}")
    names: list[ItemScore] = list(next(iter(by_pair.values()))[1])
    scored = ScoredItems(kept, {name: [_matrix(item, by_pair, name) for item in kept] for name in names})
    texts = {text for item in kept for text in item.texts}
    scored.facts = {
        "items": len(items),
        "scored": len(kept),
        "images": len(crops),
        "missing_images": len(failed),
        "same_texts": sum(_has_same_texts(item, by_pair) for item in kept),
        "cut_texts": sum(_is_cut(scorer, text, text in full) for text in texts),
    }
    return scored


def _score_chunk(
    scorer: Scorer, load: Callable[[Crop], Tensor], texts_of: Mapping[Crop, Mapping[str, None]], crops: Sequence[Crop]
) -> tuple[dict[tuple[Crop, str], tuple[int, dict[ItemScore, float]]], dict[Crop, str], set[str]]:
    """Score all texts of some images.

    Returns:
        By pair, (number of the distinct pair, score by name); unreadable images with the reason; texts that fill
        `text_max_tokens`.
    """
    pixels: list[Tensor] = []
    row: dict[Crop, int] = {}
    failed: dict[Crop, str] = {}
    for crop in crops:
        try:
            pixels.append(scorer.processor.resize(load(crop)))
            row[crop] = len(row)
        except BadSampleError as error:
            failed[crop] = str(error)
    if not row:
        return {}, failed, set()
    images = scorer.encode_images([torch.stack(pixels)])
    pairs = [(crop, text) for crop in row for text in texts_of[crop]]
    cleaned = {text: scorer.processor.clean(text) for _, text in pairs}
    ids, lengths = scorer.tokenize(list(cleaned.values()))
    key = {text: tuple(tokens) for text, tokens in zip(cleaned, ids.tolist(), strict=True)}
    text_row = {text: number for number, text in enumerate(cleaned)}
    distinct: dict[tuple[int, tuple[int, ...]], int] = {}
    for crop, text in pairs:
        distinct.setdefault((row[crop], key[text]), text_row[text])
    where = {pair: number for number, pair in enumerate(distinct)}
    rows = torch.tensor(list(distinct.values()))
    found = _score_tokenized(scorer, images, torch.tensor([image for image, _ in distinct]), ids[rows], lengths[rows])
    columns = {name: values.tolist() for name, values in found.items()}
    scores = {}
    for crop, text in pairs:
        number = where[row[crop], key[text]]
        scores[crop, text] = number, {name: values[number] for name, values in columns.items()}
    return scores, failed, {text for text, n in zip(cleaned, lengths.tolist()) if n >= scorer.text_max_tokens}


def _matrix(
    item: Item, by_pair: Mapping[tuple[Crop, str], tuple[int, dict[ItemScore, float]]], name: ItemScore
) -> Scores:
    rows = [[by_pair[item.crop(image), text][1][name] for text in item.texts] for image in range(len(item.images))]
    return np.array(rows, dtype=np.float32)  # [I, T]


def _has_same_texts(item: Item, by_pair: Mapping[tuple[Crop, str], tuple[int, dict[ItemScore, float]]]) -> bool:
    """Say whether two texts of an item have the same token ids, so that no network can tell them apart."""
    return len({by_pair[item.crop(0), text][0] for text in item.texts}) < len(item.texts)


def _is_cut(scorer: Scorer, text: str, is_full: bool) -> bool:
    """Say whether a text loses words to the cleaning or, where it fills them, to `text_max_tokens`."""
    if is_cut(text, scorer.processor.cleaning):
        return True
    if not is_full:
        return False
    return len(scorer.tokenizer(scorer.processor.clean(text))["input_ids"]) > scorer.text_max_tokens


def text_items(items: Iterable[Item]) -> list[Item]:
    """Return the items that the `text` score is defined for: one image, two right texts or more, and a wrong one."""
    return [item for item in items if len(item.images) == 1 and len(set(item.right)) > 1 and right_and_wrong(item, 0)]


def score_texts(scorer: Scorer, items: Sequence[Item]) -> list[float]:
    """Judge the texts of `text_items` by the cosine of their ITC features; see `text_text_values`."""
    texts = list(dict.fromkeys(scorer.processor.clean(text) for item in items for text in item.texts))
    step = 4 * scorer.batch_size
    parts = map_over_ranks(
        lambda start: scorer.encode_texts(*scorer.tokenize(texts[start : start + step])).feature.cpu(),
        range(0, len(texts), step),
    )
    feature = dict(zip(texts, torch.cat(parts), strict=True))
    similarity = []
    for item in items:
        own = torch.stack([feature[scorer.processor.clean(text)] for text in item.texts])
        cosine = (own @ own.T).tolist()
        similarity.append({(a, b): cosine[a][b] for b in range(len(own)) for a in range(b)})
    return text_text_values(items, similarity)


def judged(scored: ScoredItems, name: ItemScore) -> tuple[list[Item], list[Judgement]]:
    """Judge the items by a score. Statements have a threshold by `itm` only, and are left out by the others."""
    pairs = [
        (item, judge(item, score))
        for item, score in zip(scored.items, scored.scores[name], strict=True)
        if name == "itm" or not item.is_statement
    ]
    return [item for item, _ in pairs], [judgement for _, judgement in pairs]


def evaluate_items(
    scorer: Scorer, file: ItemFile, wanted: Sequence[ItemScore] = ITEM_SCORES, least_in_group: int = 1
) -> tuple[Metrics, ScoredItems]:
    """Score the items of a file and compute their metrics.

    Args:
        scorer: its network is in eval mode.
        file: the items.
        wanted: scores to report, as far as the network has the heads.
        least_in_group: smallest group that `macro` counts.

    Returns:
        Percentages `SCORE/METRIC` (`item_metrics`), with facts: `items`, `scored`, `images`, `missing_images`,
        `equal_texts` as written, `same_texts` to the network, `cut_texts`, `ties/SCORE`, `chance/METRIC`.
        The scores of each item.
    """
    scored = score_items(scorer, file.items)
    metrics: dict[str, float] = {}
    facts = {**scored.facts, "equal_texts": file.n_equal_texts}
    facts |= {f"chance/{name}": value for name, value in item_chances(scored.items).items()}
    for name in (name for name in wanted if name in scored.scores):
        items, judgements = judged(scored, name)
        if items:
            found = item_metrics(items, judgements, least_in_group)
            metrics |= {f"{name}/{metric}": value for metric, value in found.items()}
            facts[f"ties/{name}"] = n_ties(judgements)
    compared = text_items(scored.items) if "text" in wanted and "itc" in scored.scores else []
    if compared:
        metrics["text/accuracy"] = 100.0 * float(np.mean(score_texts(scorer, compared)))
    return Metrics(metrics, facts), scored


def metrics_of_set(metrics: Metrics, name: str, score: str) -> Metrics:
    """Return the metrics of one file of items by one score; empty where the score is not defined."""
    own = {key: value for key, value in metrics.items() if key.startswith(f"items/{name}/{score}/")}
    facts = {
        key: value
        for key, value in metrics.facts.items()
        if key.startswith(f"items/{name}/") and ("/ties/" not in key or key.endswith(f"/ties/{score}"))
    }
    return Metrics(own, facts, {name: metrics.files[name]}) if own else Metrics({})


def is_whole(metrics: Metrics) -> bool:
    """Say whether all items of all files were scored."""
    return all(file["scored"] == file["items"] for file in metrics.files.values())
