"""Metrics of fine-grained items from the scores of their (image, text) pairs; pure functions.

| metric | an item is right where |
|---|---|
| text score | of each image, every right text scores above every wrong one |
| image score | of each text, every right image scores above every wrong one |
| group score | both hold (Winoground, Thrush et al. 2022) |
| statement | the score of its one pair is above a threshold exactly if the pair is right |
| accuracy | all that the item compares is right |
| set score | all items of a set are right |

Comparisons are strict: a tie is wrong, and NaN is. `tie` gives a tied comparison another value.

Legend: N items, I images and T texts of one item.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mamo.data.items import Item, right_and_wrong
from mamo.evaluation.metrics.statements import clustered_interval

Scores = NDArray[np.floating]
"""[I, T], higher for a better match."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """The value of each comparison of one item: 1 right, 0 wrong; None where nothing is compared.

    `is_tied` tells whether a right and a wrong pair that are compared have one score.
    """

    text: float | None
    image: float | None
    statement: float | None
    is_tied: bool = False

    @property
    def accuracy(self) -> float:
        """Return the least of the values."""
        return min(value for value in (self.text, self.image, self.statement) if value is not None)

    @property
    def group(self) -> float | None:
        """Return the least of text and image score; None unless both are asked."""
        return None if self.text is None or self.image is None else min(self.text, self.image)


def judge(item: Item, scores: Scores, threshold: float = 0.0, tie: float = 0.0) -> Judgement:
    """Judge one item.

    Args:
        item: which pairs are right.
        scores: [I, T].
        threshold: above it, a statement is called true.
        tie: value of a comparison whose best wrong score equals the worst right one.
    """
    if item.is_statement:
        score = float(scores[0, 0])
        is_tied = score == threshold
        called_true = score > threshold
        is_right = not math.isnan(score) and called_true == bool(item.right)
        return Judgement(None, None, tie if is_tied else float(is_right), is_tied)
    values: list[float | None] = []
    is_tied = False
    for axis in (0, 1):
        found = []
        for right, wrong in right_and_wrong(item, axis):
            least, most = min(scores[pair] for pair in right), max(scores[pair] for pair in wrong)
            tied = bool(least == most)
            is_tied |= tied
            has_nan = any(math.isnan(scores[pair]) for pair in (*right, *wrong))
            found.append(0.0 if has_nan else tie if tied else float(least > most))
        values.append(min(found) if found else None)
    return Judgement(values[0], values[1], None, is_tied)


def item_metrics(items: Sequence[Item], judgements: Sequence[Judgement], least_in_group: int = 1) -> dict[str, float]:
    """Compute all metrics of N judged items, in percent.

    Args:
        items: N, at least one.
        judgements: N, of the same items.
        least_in_group: smallest group that `macro` counts.

    Returns:
        `accuracy` (micro: of all items), `macro` (mean over groups), `text`, `image`, `group` where items ask for
        them, `set/KIND`, `by/GROUP`, and `accuracy_low` and `accuracy_high`, also of text, image and group: the 95 %
        interval by bootstrap over images, as items of one image are not independent.
    """
    values = np.array([judgement.accuracy for judgement in judgements])
    _, cluster = np.unique([item.images[0] for item in items], return_inverse=True)
    metrics = {"accuracy": 100.0 * float(values.mean()), **_interval("accuracy", values, cluster)}
    groups: dict[str, list[float]] = defaultdict(list)
    for item, value in zip(items, values.tolist(), strict=True):
        groups[item.group].append(value)
    large = [np.mean(found) for found in groups.values() if len(found) >= least_in_group]
    if large:
        metrics["macro"] = 100.0 * float(np.mean(large))
    for name in ("text", "image", "group"):
        asked = [k for k, judgement in enumerate(judgements) if getattr(judgement, name) is not None]
        if asked and any(judgements[k].group is not None for k in asked):
            found = np.array([getattr(judgements[k], name) for k in asked])
            metrics[name] = 100.0 * float(found.mean())
            metrics |= _interval(name, found, cluster[asked])
    for kind, score in set_scores(items, values.tolist()).items():
        metrics[f"set/{kind}"] = 100.0 * score
    return metrics | {f"by/{name}": 100.0 * float(np.mean(found)) for name, found in groups.items()}


def _interval(name: str, values: NDArray[np.float64], cluster: NDArray[np.int64]) -> dict[str, float]:
    low, high = clustered_interval(values, np.unique(cluster, return_inverse=True)[1])
    return {f"{name}_low": 100.0 * low, f"{name}_high": 100.0 * high}


def set_scores(items: Sequence[Item], values: Sequence[float]) -> dict[str, float]:
    """Return, by kind of set, the share of sets all of whose items are right; values are [N], of 0 to 1."""
    sets: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for item, value in zip(items, values, strict=True):
        for kind, name in item.set.items():
            sets[kind][name].append(value)
    return {kind: float(np.mean([min(found) for found in own.values()])) for kind, own in sets.items()}


def item_chances(items: Sequence[Item]) -> dict[str, float]:
    """Return the expected metrics of random scores without ties, in percent: accuracy, text, image, group, set/KIND.

    A set's items count as independent.
    """
    found: dict[str, list[float]] = defaultdict(list)
    own = []
    for item in items:
        shape = len(item.images), len(item.texts), tuple(sorted(set(item.right)))
        by_axis = [bool(right_and_wrong(item, axis)) for axis in (0, 1)]
        chance = 0.5 if item.is_statement else _chance(*shape, by_axis[0], by_axis[1])
        own.append(chance)
        found["accuracy"].append(chance)
        if all(by_axis):
            found["text"].append(_chance(*shape, True, False))
            found["image"].append(_chance(*shape, False, True))
            found["group"].append(chance)
    sets: dict[str, dict[str, float]] = defaultdict(dict)
    for item, chance in zip(items, own):
        for kind, name in item.set.items():
            sets[kind][name] = sets[kind].get(name, 1.0) * chance
    chances = {name: 100.0 * float(np.mean(values)) for name, values in found.items()}
    return chances | {f"set/{kind}": 100.0 * float(np.mean(list(by.values()))) for kind, by in sets.items()}


@functools.cache
def _chance(n_images: int, n_texts: int, right: tuple[tuple[int, int], ...], by_text: bool, by_image: bool) -> float:
    """Return the share of the orders of an item's pairs that fulfil its comparisons."""
    item = Item.model_construct(images=[""] * n_images, texts=[""] * n_texts, right=list(right))
    pairs = [(image, text) for image in range(n_images) for text in range(n_texts)]
    above: dict[tuple[int, int], set[tuple[int, int]]] = {pair: set() for pair in pairs}
    for axis, is_asked in ((0, by_text), (1, by_image)):
        for better, worse in right_and_wrong(item, axis) if is_asked else ():
            for pair in worse:
                above[pair].update(better)

    @functools.cache
    def n_orders(placed: frozenset[tuple[int, int]]) -> int:
        """Count the orders, from the best pair down, that begin with the placed ones."""
        if len(placed) == len(pairs):
            return 1
        return sum(n_orders(placed | {p}) for p in pairs if p not in placed and above[p] <= placed)

    return n_orders(frozenset()) / math.factorial(len(pairs))


def text_text_values(items: Sequence[Item], similarity: Sequence[Mapping[tuple[int, int], float]]) -> list[float]:
    """Judge the texts of items without their images (SugarCrepe++, text only).

    An item is right where any two of its right texts are more similar than each right text and each wrong one.

    Args:
        items: of one image, with two right texts or more and a wrong one.
        similarity: of each item, of texts (a, b) with a < b.

    Returns:
        1 or 0 of each item.
    """
    found = []
    for item, score in zip(items, similarity, strict=True):
        right = sorted({text for _, text in item.right})
        wrong = [text for text in range(len(item.texts)) if text not in right]
        same = [score[a, b] for a in right for b in right if a < b]
        other = [score[min(a, b), max(a, b)] for a in right for b in wrong]
        found.append(float(min(same) > max(other)))
    return found


def n_ties(judgements: Iterable[Judgement]) -> int:
    """Count the items with a tie."""
    return sum(judgement.is_tied for judgement in judgements)
