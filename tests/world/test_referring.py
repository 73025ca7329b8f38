"""Referring expressions: each fits its object alone, and its box is among the proposals."""

import pytest

from mamo.world.grammar import SIZE_WORDS, WORD_CLASSES
from mamo.world.referring import expressions
from mamo.world.scene import Difficulty, SceneObject, SceneWorld


def fits(phrase: str, thing: SceneObject) -> bool:
    """Whether every telling word of a noun phrase is true of an object, read from the text alone."""
    sizes = {word: size for size, words in SIZE_WORDS.items() for word in words}
    facts = {thing.shape, thing.colour, thing.pattern, *SIZE_WORDS[thing.size]}
    telling = {word for words in WORD_CLASSES.values() for word in words} | set(sizes)
    return all(word in facts for word in phrase.split() if word in telling)


@pytest.mark.parametrize("difficulty", ["easy", "full"])
def test_an_expression_fits_one_object(difficulty: Difficulty) -> None:
    """Catches an expression that fits two objects, names a false attribute, or always says everything."""
    world = SceneWorld(difficulty, 0)
    lengths, n_related = set(), 0
    for item in expressions(world, 400, (60, 90)):
        things = world.scene("test", item.scene_index).objects
        relation = next((kind for kind in ("left of", "right of", "above", "below") if kind in item.text), None)
        phrase, _, rest = item.text.partition(f" {relation} ") if relation else (item.text, "", "")
        phrase = phrase.removesuffix(" to the")
        fitting = [i for i, thing in enumerate(things) if fits(phrase, thing)]
        if relation:
            n_related += 1
            (anchor,) = [i for i, thing in enumerate(things) if fits(rest, thing)]
            axis, sign = (
                ("centre_x" if "of" in relation else "centre_y"),
                (1 if relation in ("left of", "above") else -1),
            )
            there = getattr(things[anchor], axis)
            fitting = [i for i in fitting if i != anchor and sign * (there - getattr(things[i], axis)) > 0]
        assert fitting == [item.target], item.text
        lengths.add(len(phrase.split()))
    assert len(lengths) >= 3
    assert n_related > 0


def test_proposals_hold_the_gold_box_within_the_image() -> None:
    """Catches a gold box that no proposal equals, one always at the same place, and boxes that leave the image."""
    world = SceneWorld("full", 0)
    items = list(expressions(world, 200, (60, 90)))
    assert len({item.proposals.index(item.box) for item in items}) > 5
    for item in items:
        scene = world.scene("test", item.scene_index)
        assert item.box == scene.objects[item.target].box_px((60, 90))
        assert len(item.proposals) == 3 * len(scene.objects)
        for x, y, w, h in item.proposals:
            assert min(x, y) >= 0
            assert x + w <= 90 + 1e-9
            assert y + h <= 60 + 1e-9
    assert items == list(expressions(world, 200, (60, 90)))


@pytest.mark.parametrize("difficulty", ["easy", "full"])
def test_a_foil_is_true_of_nothing_and_differs_in_one_word(difficulty: Difficulty) -> None:
    """Catches a negative that is true of the picture after all, or that wording alone gives away."""
    world = SceneWorld(difficulty, 0)
    n_longer = 0
    for item in expressions(world, 400, (60, 90)):
        things = world.scene("test", item.scene_index).objects
        words, foil = item.text.split(), item.foil.split()
        if not any(kind in item.foil for kind in ("left", "right", "above", "below", "higher", "lower")):
            assert not any(fits(item.foil, thing) for thing in things), item
        added = len(foil) - len(words)
        n_longer += added
        assert added in (0, 1)
        if not added:
            assert sum(a != b for a, b in zip(words, foil)) == 1, item
    assert n_longer < 40
