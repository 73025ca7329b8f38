"""Probes: a foil is one word or one swap away, in the words of training, and its text alone does not betray it.

That captions are true and foils false of their scenes is tested with the reader in `test_grammar.py`.
"""

import re
from collections import Counter
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import scipy.sparse
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from mamo.world.captions import all_captions, caption
from mamo.world.grammar import WORD_CLASSES
from mamo.world.probes import PROBES, ProbeItem, probe_items
from mamo.world.scene import Difficulty, SceneWorld, Split

DIFFICULTIES: tuple[Difficulty, ...] = ("easy", "full")
CELLS = [(difficulty, probe) for difficulty in DIFFICULTIES for probe in PROBES]
CHANGED_CLASSES = {
    "attribute_swap": {"colour", "size", "pattern"},
    "relation_swap": {"relation"},
    "count_change": {"number"},
    "attribute_replacement": {"colour", "size", "pattern"},
    "object_replacement": {"shape"},
}


@cache
def items_of(difficulty: Difficulty, probe: str, n_items: int, split: Split) -> list[ProbeItem]:
    return probe_items(SceneWorld(difficulty, 0), probe, n_items, split)


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+|[,:]", text)


@pytest.mark.parametrize(("difficulty", "probe"), CELLS)
def test_foils_differ_by_one_word_or_one_swap(difficulty: Difficulty, probe: str) -> None:
    """Catches a foil that changes anything else, which a model could use instead of what the probe is named after."""
    items = items_of(difficulty, probe, 2000, "test")[:1000]
    assert len(items) == len({item.scene_index for item in items}) == 1000
    classes = set()
    for item in items:
        true, foil = words_of(item.caption), words_of(item.foil)
        assert len(true) == len(foil)
        changes = [(a, b) for a, b in zip(true, foil) if a != b]
        assert len(changes) == (2 if probe == "attribute_swap" else 1), item
        if probe == "attribute_swap":
            assert changes[0] == changes[1][::-1]
        if probe == "relation_swap":
            assert set(changes[0]) in ({"left", "right"}, {"above", "below"}, {"higher", "lower"})
        changed = {name for name, group in WORD_CLASSES.items() for word in changes[0] if word in group}
        assert len(changed) == 1
        classes |= changed
    assert classes == CHANGED_CLASSES[probe] - ({"pattern"} if difficulty == "easy" else set())


@pytest.mark.parametrize(("difficulty", "probe"), CELLS)
def test_probes_use_captions_of_training(difficulty: Difficulty, probe: str) -> None:
    """Catches probe captions in wordings that a model has never seen."""
    world = SceneWorld(difficulty, 0)
    for item in items_of(difficulty, probe, 2000, "test")[:1000][:200]:
        assert item.caption in {one.text for one in all_captions(world.scene("test", item.scene_index))}


def test_items_are_a_pure_function_and_follow_the_split() -> None:
    """Catches items that depend on what was asked for before, and test items taken from the training split."""
    world = SceneWorld("full", 5)
    assert probe_items(world, "count_change", 20) == probe_items(SceneWorld("full", 5), "count_change", 50)[:20]
    (item,) = probe_items(world, "object_replacement", 1, split="val")
    assert item.caption in {one.text for one in all_captions(world.scene("val", item.scene_index))}
    with pytest.raises(ValueError, match="'negation' is unknown; use one of attribute_swap, relation_swap"):
        probe_items(world, "negation")


def repetitions(texts: list[str]) -> np.ndarray:
    """How varied each text is: distinct words of each class and distinct object phrases, [texts, features]."""
    rows = []
    for text in texts:
        words = words_of(text)
        kinds = re.findall(r"([a-z]+ [a-z]+)(?=[,:]| (?:is|and|to|left|right|above|below|higher|lower|we)\b|$)", text)
        rows.append(
            [len({w for w in words if w in group}) for group in WORD_CLASSES.values()] + [len(kinds) - len(set(kinds))]
        )
    return np.array(rows, float)


@cache
def bigrams(difficulty: Difficulty) -> tuple[Counter[tuple[str, str]], Counter[str]]:
    """How often training captions have each word after each other, and each word."""
    world = SceneWorld(difficulty, 0)
    pairs: Counter[tuple[str, str]] = Counter()
    singles: Counter[str] = Counter()
    for index in range(1500):
        for which in range(4):
            words = ["<", *words_of(caption(world.scene("train", index), which).text), ">"]
            singles.update(words)
            pairs.update(pairwise(words))
    return pairs, singles


def log_likelihoods(difficulty: Difficulty, texts: list[str]) -> np.ndarray:
    pairs, singles = bigrams(difficulty)
    steps = [pairwise(["<", *words_of(text), ">"]) for text in texts]
    return np.array([sum(np.log((pairs[step] + 0.1) / (singles[step[0]] + 8.0)) for step in one) for one in steps])


def accuracies(difficulty: Difficulty, train: list[ProbeItem], test: list[ProbeItem]) -> list[float]:
    """How often each reader without eyes prefers the true caption: a classifier trained on items, a language model."""
    texts = [[item.caption for item in part] + [item.foil for item in part] for part in (train, test)]
    vectorizer = CountVectorizer(ngram_range=(1, 3), token_pattern=r"[a-z]+|[,:]", binary=True, min_df=4)
    words = [vectorizer.fit_transform(texts[0]), vectorizer.transform(texts[1])]
    features = [scipy.sparse.hstack([w, repetitions(t)]).tocsr() for w, t in zip(words, texts)]
    classifier = LogisticRegression(C=0.05, max_iter=60).fit(features[0], np.repeat([1, 0], len(train)))
    found = []
    for scores in (classifier.decision_function(features[1]), log_likelihoods(difficulty, texts[1])):
        difference = np.round(scores[: len(test)] - scores[len(test) :], 9)
        found.append(float(((difference > 0) + 0.5 * (difference == 0)).mean()))
    return found


@pytest.mark.filterwarnings("ignore:lbfgs failed to converge")
@pytest.mark.parametrize(("difficulty", "probe"), CELLS)
def test_the_text_alone_does_not_tell_true_from_false(difficulty: Difficulty, probe: str) -> None:
    """Catches foils that are rarer, or less or more varied, than the truth: readers without eyes stay at chance."""
    train, test = items_of(difficulty, probe, 1000, "val"), items_of(difficulty, probe, 2000, "test")
    assert all(abs(found - 0.5) <= 0.03 for found in accuracies(difficulty, train, test))


@pytest.mark.filterwarnings("ignore:lbfgs failed to converge")
def test_readers_without_eyes_find_a_bias_that_is_there() -> None:
    """Catches readers that see nothing, which would pass the test above for any foils: here counts only ever shrink."""
    order = ["one", "two", "three", "four", "five"]

    def total(text: str) -> int:
        return sum(order.index(word) for word in words_of(text) if word in order)

    train, test = items_of("easy", "count_change", 1000, "val"), items_of("easy", "count_change", 2000, "test")
    biased = [[item for item in part if total(item.caption) > total(item.foil)] for part in (train, test)]
    assert accuracies("easy", *biased)[0] > 0.9
