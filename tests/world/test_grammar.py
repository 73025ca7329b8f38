"""Captions against the truth, by a reader of its own that knows English words, not how captions are made."""

import itertools
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from mamo.config.schema import DataConfig
from mamo.world.captions import all_captions, caption, identifying_caption
from mamo.world.datasets import ScenePairs
from mamo.world.grammar import WORD_CLASSES, Caption
from mamo.world.minimal_pairs import training_scene
from mamo.world.probes import PROBES, probe_items
from mamo.world.questions import question
from mamo.world.scene import Difficulty, Scene, SceneObject, SceneWorld
from mamo.world.statements import pair_statements
from mamo.world.vocabulary import VOCABULARY
from tests.world.masks import coverage

DIFFICULTIES: tuple[Difficulty, ...] = ("easy", "full")
SINGULAR = {w: w for w in ["circle", "square", "triangle", "cross", "ring", "star", "bar", "shape", "object"]}
SINGULAR |= {f"{w}s": w for w in SINGULAR if w != "cross"} | {"crosses": "cross"}
ADJECTIVES = {
    **{w: ("colour", w) for w in ["red", "green", "blue", "yellow", "purple", "cyan", "pink", "white"]},
    **{w: ("pattern", w) for w in ["solid", "striped", "checked"]},
    **{"small": ("size", "small"), "little": ("size", "small"), "medium": ("size", "medium")},
    **{"large": ("size", "large"), "big": ("size", "large")},
}
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5}
RELATIONS = {
    **{"to the left of": "left", "left of": "left", "to the right of": "right", "right of": "right"},
    **{"above": "above", "higher than": "above", "below": "below", "lower than": "below"},
    **{"larger than": "larger", "bigger than": "larger", "smaller than": "smaller"},
    **{f"{of}the same {a} as": f"same {a}" for of in ("of ", "") for a in ("colour", "shape", "size")},
    "as large as": "same size",
}
ROWS = {"north": 0, "south": 2}  # thirds of the picture from the top; a place that names no row is in the middle one
COLUMNS = {"west": 0, "east": 2}
HALVES = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}  # of the centre: the axis and the way
FILLERS = {"is", "and", "there", "are", "we", "see", "exactly", "with"}
SIZE_ORDER = ("small", "medium", "large")

Attributes = dict[str, str]


@dataclass
class Reading:
    """What a text claims: objects, (subject, relation, object) between them, and (attributes, exact number)."""

    mentions: list[Attributes] = field(default_factory=list)
    relations: list[tuple[int, str, int]] = field(default_factory=list)
    counts: list[tuple[Attributes, int]] = field(default_factory=list)


def read_noun_phrase(words: list[str]) -> Attributes:
    """Takes adjectives and a noun from the front of `words`."""
    said: Attributes = {}
    while words[0] in ADJECTIVES:
        attribute, value = ADJECTIVES[words.pop(0)]
        assert attribute not in said
        said[attribute] = value
    noun = SINGULAR[words.pop(0)]
    if noun not in ("shape", "object"):
        said["shape"] = noun
    if words[:2] == ["in", "the"]:
        said["place"] = words[2]
        del words[:3]
    ahead = list(words)
    side = read_relation(ahead)
    if side and ahead[:2] == ["the", "centre"]:
        said["place"] = side
        words[:] = ahead[2:]
    return said


def read_relation(words: list[str]) -> str | None:
    for length in (5, 4, 3, 2, 1):
        kind = RELATIONS.get(" ".join(words[:length]))
        if kind:
            del words[:length]
            return kind
    return None


def read(text: str) -> Reading:
    """Reads a caption; an unknown word or construction raises."""
    reading = Reading()
    for clause in re.split("[,:]", text):
        words = clause.split()
        subject: int | None = None
        waiting: list[str] = []  # relations whose second object has not come yet
        inverted = False
        while words:
            relation = read_relation(words)
            if relation:
                inverted = inverted or subject is None
                waiting.append(relation)
            elif words[:3] == ["the", "number", "of"]:
                del words[:3]
                said = read_noun_phrase(words)
                assert words.pop(0) == "is"
                reading.counts.append((said, NUMBERS[words.pop(0)]))
            elif words[0] in NUMBERS:
                number = NUMBERS[words.pop(0)]
                if words[:2] == ["of", "them"]:
                    reading.counts.append((dict([ADJECTIVES[words[2]]]), number))
                    del words[:3]
                else:
                    reading.counts.append((read_noun_phrase(words), number))
            elif words[0] == "a":
                words.pop(0)
                reading.mentions.append(read_noun_phrase(words))
                new = len(reading.mentions) - 1
                if subject is None:
                    subject = new
                else:
                    assert waiting, text
                    pair = (new, subject) if inverted else (subject, new)
                    reading.relations += [(pair[0], kind, pair[1]) for kind in waiting]
                    waiting = []
            else:
                assert words.pop(0) in FILLERS, text
        assert not waiting, text
    return reading


def fits(said: Attributes, thing: SceneObject) -> bool:
    looks = {attribute: value for attribute, value in said.items() if attribute != "place"}
    stands = "place" not in said or stands_in(said["place"], thing.centre_x, thing.centre_y)
    return stands and all(getattr(thing, attribute) == value for attribute, value in looks.items())


def stands_in(place: str, x: float, y: float) -> bool:
    if place in HALVES:
        along, way = HALVES[place]
        return way * ((x, y)[along] - 0.5) > 1 / 6
    row = next((third for word, third in ROWS.items() if place.startswith(word)), 1)
    column = next((third for word, third in COLUMNS.items() if place.endswith(word)), 1)
    assert place == "centre" or (row, column) != (1, 1), place
    return row / 3 < y < (row + 1) / 3 and column / 3 < x < (column + 1) / 3


def related(kind: str, a: SceneObject, b: SceneObject, margin: float) -> bool:
    if kind.startswith("same "):
        return bool(getattr(a, kind[5:]) == getattr(b, kind[5:]))
    if kind in ("larger", "smaller"):
        ranks = SIZE_ORDER.index(a.size), SIZE_ORDER.index(b.size)
        return ranks[0] > ranks[1] if kind == "larger" else ranks[0] < ranks[1]
    rightwards, downwards = b.centre_x - a.centre_x, b.centre_y - a.centre_y
    return {"left": rightwards, "right": -rightwards, "above": downwards, "below": -downwards}[kind] > margin


def is_true(reading: Reading, scene: Scene, margin: float = 0.1) -> bool:
    """Tries every way to assign the scene's objects to the mentions."""
    if any(sum(fits(said, thing) for thing in scene.objects) != number for said, number in reading.counts):
        return False
    return any(
        all(fits(said, thing) for said, thing in zip(reading.mentions, chosen))
        and all(related(kind, chosen[a], chosen[b], margin) for a, kind, b in reading.relations)
        for chosen in itertools.permutations(scene.objects, len(reading.mentions))
    )


def six_captions(scene: Scene) -> list[Caption]:
    return [*all_captions(scene), identifying_caption(scene)]


def test_the_reader_tells_true_from_false_on_a_hand_made_scene() -> None:
    """Catches a reader that accepts everything, which would make the tests below pass for any captions."""
    things = (
        SceneObject("circle", "red", "small", "solid", 0.2, 0.2, 0.1, 0.0),
        SceneObject("square", "blue", "large", "solid", 0.8, 0.5, 0.18, 0.0),
    )
    scene = SceneWorld("easy", 0).scene("train", 0)
    scene = type(scene)(0, "easy", "train", 0, things, scene.background)
    true = ["a red circle left of and above a large blue square", "right of a circle is a square", "two shapes: a ring"]
    assert [is_true(read(text), scene) for text in true] == [True, True, False]
    false = [
        "a blue circle above a red square",
        "a circle below a square",
        "three objects",
        "the number of rings is one",
    ]
    assert not any(is_true(read(text), scene) for text in false)
    assert is_true(read("a circle is smaller than a square, and there is a large square"), scene) is False


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_every_statement_of_every_caption_is_true(difficulty: Difficulty) -> None:
    """Catches any caption that says something false, or that is worded so that it cannot be understood."""
    world = SceneWorld(difficulty, 0)
    for index in range(800):
        scene = world.scene("train", index)
        for one in six_captions(scene):
            reading = read(one.text)
            assert reading.mentions or reading.counts
            assert is_true(reading, scene), (one.text, scene)


def test_left_and_above_are_left_and_above_in_the_picture() -> None:
    """Catches swapped axes or an upward y axis, which truth by coordinates alone would not show."""
    n_seen = 0
    for index in range(300):
        scene = SceneWorld("full", 0).scene("train", index)
        one = caption(scene, 2)
        (first, kind, second) = read(one.text).relations[0]
        centres = []
        for phrase in (one.phrases[first], one.phrases[second]):
            mask = coverage(scene.objects[phrase.objects[0]], (96, 96))
            centres.append(np.array(np.nonzero(mask)).mean(axis=1) / 96)  # (row, column)
        down, right = centres[1] - centres[0]
        assert {"left": right, "right": -right, "above": down, "below": -down}[kind] > 0.08
        n_seen += 1
    assert n_seen == 300


def test_sides_of_the_centre_are_said_in_the_words_of_relations() -> None:
    """Catches sides that are no longer said, without which relations are not learned, or in words of their own."""
    scenes = [SceneWorld("full", 0).scene("train", index) for index in range(400)]
    texts = [caption(scene, 1).text for scene in scenes]
    texts += [caption(replace(scene, objects=scene.objects[:1]), 0).text for scene in scenes]
    spatial = {words for words, kind in RELATIONS.items() if kind in HALVES}
    side = re.compile(f"({'|'.join(sorted(spatial, key=len, reverse=True))}) the centre")
    said = Counter(words for text in texts for words in side.findall(text))
    assert set(said) == spatial
    assert sum(said.values()) > 0.4 * len(texts)


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_phrases_point_to_the_objects_they_mean(difficulty: Difficulty) -> None:
    """Catches spans that are off by a character, and phrases of one object given to another."""
    world = SceneWorld(difficulty, 0)
    n_plural = 0
    for index in range(400):
        scene = world.scene("val", index)
        for one in six_captions(scene):
            reading = read(one.text)
            singles = []
            for phrase in one.phrases:
                text = one.text[phrase.start : phrase.end]
                words = text.split()
                assert text == text.strip(" ,:")
                assert phrase.objects
                if words[0] == "a":
                    said, chosen = read_noun_phrase(words[1:]), phrase.objects
                    assert len(chosen) == 1
                    assert said.get("shape", "") in (*text.split(), "")
                    singles.append(scene.objects[chosen[0]])
                else:
                    n_plural += 1
                    words = [word for word in words if word not in {*NUMBERS, "of", "them"}]
                    said = read_noun_phrase(words if words[-1] in SINGULAR else [*words, "shapes"])
                    assert phrase.objects == tuple(i for i, t in enumerate(scene.objects) if fits(said, t))
                assert all(fits(said, scene.objects[i]) for i in phrase.objects)
            assert len(singles) == len(reading.mentions)
            # The objects meant stand in the relations said, where other objects might fit the same words.
            assert all(related(kind, singles[a], singles[b], 0.1) for a, kind, b in reading.relations)
            assert [p.start for p in one.phrases] == sorted(p.start for p in one.phrases)
    assert n_plural > 200


@pytest.mark.parametrize(("difficulty", "limit", "identifying_limit"), [("easy", 24, 24), ("full", 40, 40)])
def test_captions_are_short_lower_case_and_of_known_words(
    difficulty: Difficulty, limit: int, identifying_limit: int
) -> None:
    """Catches capital letters, doubled spaces, words missing from the vocabulary, and captions that outgrow a model."""
    world = SceneWorld(difficulty, 1)
    for index in range(600):
        for one in six_captions(world.scene("train", index)):
            assert re.fullmatch(r"[a-z]+[,:]?( [a-z]+[,:]?)*", one.text), one.text
            assert set(re.findall(r"[a-z]+|[,:]", one.text)) <= set(VOCABULARY)
            assert len(one.text.split()) <= limit


def test_the_vocabulary_is_exactly_what_the_grammar_says() -> None:
    """Catches vocabulary entries that never occur, and word classes that masked-word accuracy would miss."""
    said: set[str] = set()
    asked: set[str] = set()
    for difficulty in DIFFICULTIES:
        world = SceneWorld(difficulty, 0)
        for index in range(1500):
            for one in all_captions(world.scene("train", index)):
                said.update(re.findall(r"[a-z]+|[,:]", one.text))
            asked.update(re.findall(r"[a-z]+|[,:?]", question(world, "train", index).text))
        asked.update(word for item in pair_statements(world, "train", 1500) for word in item.sentence.split())
    assert tuple(sorted(said | asked)) == VOCABULARY
    # `large` is a size also in "as large as"; no word has two classes.
    assert all(not a & b for a, b in itertools.combinations(WORD_CLASSES.values(), 2))
    words = {word for group in WORD_CLASSES.values() for word in group}
    assert words == said & words
    assert set(ADJECTIVES) | set(SINGULAR) | set(NUMBERS) <= words | {"shape", "shapes", "object", "objects"}


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_captions_vary(difficulty: Difficulty) -> None:
    """Catches a style that is never drawn: five captions of a scene differ, and so do the wordings of one meaning."""
    world = SceneWorld(difficulty, 0)
    scenes = [world.scene("train", i) for i in range(300)]
    assert np.mean([len({one.text for one in all_captions(scene)}) == 5 for scene in scenes]) > 0.9
    kinds = re.compile("|".join(sorted({*ADJECTIVES, *SINGULAR, *NUMBERS}, key=len, reverse=True)))
    for which in range(5):
        wordings = {kinds.sub("_", caption(scene, which).text) for scene in scenes}
        assert len(wordings) >= 12, (which, wordings)
    with pytest.raises(ValueError, match="caption 5 does not exist"):
        caption(scenes[0], 5)


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_perfect_reader_finds_the_scene_by_its_identifying_caption(difficulty: Difficulty, seed: int) -> None:
    """Catches captions too poor to identify: R@1 of an oracle on 1,000 test scenes, ties counted as misses."""
    scenes = [SceneWorld(difficulty, seed).scene("test", i) for i in range(1000)]
    holding = defaultdict(set)  # attributes of one object -> the scenes that have it
    for i, scene in enumerate(scenes):
        for thing in scene.objects:
            holding[thing.shape, thing.colour, thing.size].add(i)
    true_scenes = []  # of each caption
    for i, scene in enumerate(scenes):
        reading = read(identifying_caption(scene).text)
        assert len(reading.mentions) == len(scene.objects)
        near = set.intersection(*(holding[said["shape"], said["colour"], said["size"]] for said in reading.mentions))
        true_scenes.append({j for j in near if is_true(reading, scenes[j])})
        assert i in true_scenes[-1]
    text_to_image = np.mean([len(found) == 1 for found in true_scenes])
    n_true_captions = np.bincount([j for found in true_scenes for j in found])
    assert text_to_image >= 0.99
    assert (n_true_captions == 1).mean() >= 0.99


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
@pytest.mark.parametrize("probe", PROBES)
def test_probe_captions_are_true_and_foils_are_false(difficulty: Difficulty, probe: str) -> None:
    """Catches a foil that is true by another object, and one that only a margin makes false."""
    world = SceneWorld(difficulty, 0)
    for item in probe_items(world, probe, n_items=400):
        scene = world.scene("test", item.scene_index)
        assert is_true(read(item.caption), scene), item
        assert not is_true(read(item.foil), scene, margin=0.0), item


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_foils_of_training_are_false_and_differ_in_one_word(difficulty: Difficulty) -> None:
    """Bug: a foil that is true of its picture, or one whose length or second word reveals it."""
    plain = ScenePairs(DataConfig(difficulty=difficulty), "train", 400)
    source = ScenePairs(DataConfig(difficulty=difficulty), "train", 400, has_foils=True)
    n_foils, classes = 0, set()
    for index in range(400):
        sample, other = (each.load(index, np.random.default_rng(index)) for each in (source, plain))
        assert (sample.caption, other.foil) == (other.caption, "")
        if not sample.foil:
            continue
        n_foils += 1
        scene, _ = training_scene(source.world, "train", index)
        assert is_true(read(sample.caption), scene)
        assert not is_true(read(sample.foil), scene, 0.0)
        words = [re.findall(r"[a-z]+", text) for text in (sample.caption, sample.foil)]
        assert len(words[0]) == len(words[1])
        (pair,) = [pair for pair in zip(*words, strict=True) if pair[0] != pair[1]]
        classes |= {name for name, known in WORD_CLASSES.items() if known & set(pair)}
    assert n_foils > 350
    assert classes >= {"colour", "shape", "size", "relation", "number"}
