"""Statements about two scenes: true as labelled by an independent reading, and blind without the pictures."""

import re
from collections import Counter, defaultdict

import pytest

from mamo.evaluation.metrics.reasoning import reasoning_metrics
from mamo.world.grammar import NUMBERS
from mamo.world.scene import Difficulty, SceneObject, SceneWorld
from mamo.world.statements import KINDS, pair_statements


def count(words: str, things: tuple[SceneObject, ...]) -> int:
    """Objects of which every word is true, plural nouns as singular ones."""
    found = 0
    for thing in things:
        facts = {thing.shape, thing.colour, thing.pattern, thing.size, "object"}
        facts |= {f"{fact}s" for fact in facts} | {f"{fact}es" for fact in facts}
        found += all(word in facts for word in words.split())
    return found


def is_true(sentence: str, left: tuple[SceneObject, ...], right: tuple[SceneObject, ...]) -> bool:
    if match := re.fullmatch(r"there (?:is|are) (\w+) (.+) in total", sentence):
        return count(match[2], left) + count(match[2], right) == NUMBERS.index(match[1])
    if match := re.fullmatch(r"both images show a (.+)", sentence):
        return min(count(match[1], left), count(match[1], right)) > 0
    if match := re.fullmatch(r"exactly one image shows a (.+)", sentence):
        return [count(match[1], side) > 0 for side in (left, right)].count(True) == 1
    if match := re.fullmatch(r"the left image shows more (.+) than the right image", sentence):
        return count(match[1], left) > count(match[1], right)
    match = re.fullmatch(r"the left image shows a (.+) and the right image shows a (.+)", sentence)
    assert match, sentence
    return count(match[1], left) > 0 and count(match[2], right) > 0


@pytest.mark.parametrize("difficulty", ["easy", "full"])
def test_statements_are_true_as_labelled_and_blind_without_pictures(difficulty: Difficulty) -> None:
    """Bug: a wrong label, left for right, a sentence that tells its label, the first pair always being the true one."""
    world = SceneWorld(difficulty, 0)
    items = list(pair_statements(world, "val", 2000))
    labels: defaultdict[str, list[bool]] = defaultdict(list)
    for item in items:
        left, right = (world.scene("val", index).objects for index in (item.left, item.right))
        assert is_true(item.sentence, left, right) == item.label, item
        labels[item.identifier.split("-")[1]].append(item.label)
    assert all(sorted(pair) == [False, True] for pair in labels.values())
    assert 0.45 < sum(pair[0] for pair in labels.values()) / len(labels) < 0.55
    truth = {item.identifier: item.label for item in items}
    constant = reasoning_metrics(dict.fromkeys(truth, True), truth)
    assert constant == {"accuracy": 50, "consistency": 0, "majority": 50}
    openings = Counter(item.sentence.split()[0] for item in items)
    assert len(KINDS) == 5
    assert min(openings[word] for word in ("there", "both", "exactly", "the")) > 300


def test_statements_are_a_pure_function_and_splits_differ() -> None:
    """Bug: an item that changes with the number of items asked for."""
    world = SceneWorld("full", 0)
    assert list(pair_statements(world, "train", 9)) == list(pair_statements(world, "train", 30))[:9]
    assert {i.sentence for i in pair_statements(world, "test", 30)} != {
        i.sentence for i in pair_statements(world, "train", 30)
    }
