"""Questions about the embedded world in the style of VQA v2: one question a scene, ten answers a question.

| kind | wording | answers |
|---|---|---|
| colour, shape, size, pattern | "what colour is the small circle?" if the words match one object | the word |
| count | "how many red circles are there?" | 0 to 5 |
| existence | "is there a large blue square?" | yes, no |
| relation | "is the red circle left of the blue square?" if the words match one object each | yes, no |
| comparison | "are there more circles than squares?" | yes, no |

The answer yes or no is drawn before the question, so neither kind nor wording reveals it. Up to two of the ten answers
are wrong answers of the same kind. A size has two synonyms ("small", "little"); both occur.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from mamo.world.grammar import OPPOSITE, RELATION_WORDINGS, SIZE_WORDS, Description, noun_phrase, relation_holds
from mamo.world.referring import distinguishing_description, partial_description
from mamo.world.scene import Scene, SceneRng, SceneWorld, Split, attribute_values

_STREAM = 20  # random stream of the scene
N_ANSWERS = 10
_MAX_WRONG_ANSWERS = 2
_MAX_COUNT = 5
_TRIES = 20
_ATTRIBUTES = ("colour", "shape", "size", "pattern")
ANSWER_TYPES = {
    "count": "number",
    "existence": "yes/no",
    "relation": "yes/no",
    "comparison": "yes/no",
}  # all others: other


@dataclass(frozen=True, slots=True)
class Question:
    """A question about scene `scene_index`: the true `answer` and the ten `answers` of simulated annotators."""

    scene_index: int
    kind: str
    text: str
    answer: str
    answers: tuple[str, ...]

    @property
    def answer_type(self) -> str:
        """Return the answer type of VQA v2: yes/no, number or other."""
        return ANSWER_TYPES.get(self.kind, "other")


def question(world: SceneWorld, split: Split, index: int) -> Question:
    """Return the question about scene `index` of `split`; a pure function.

    The kind is `index` modulo the number of kinds. If the scene does not allow this kind ("what colour is the circle?"
    with two circles), the next one is tried.
    """
    scene = world.scene(split, index)
    rng = scene.rng(_STREAM)
    kinds = [kind for kind in _MAKERS if kind != "pattern" or world.difficulty == "full"]
    for turn in range(len(kinds)):
        kind = kinds[(index + turn) % len(kinds)]
        made = _MAKERS[kind](scene, rng)
        if made is not None:
            text, answer = made
            return Question(index, kind, text, answer, _annotator_answers(answer, _alternatives(kind, scene), rng))
    raise AssertionError("counting is always possible")


def _annotator_answers(answer: str, others: list[str], rng: SceneRng) -> tuple[str, ...]:
    """Draw ten answers: up to two wrong ones; the two synonyms of a size are equally probable."""
    words = next((pair for pair in SIZE_WORDS.values() if answer in pair), (answer,))
    answers = [rng.choice(words) for _ in range(N_ANSWERS)]
    for k in range(int(rng.uniform() * (_MAX_WRONG_ANSWERS + 1))):
        answers[k] = rng.choice(others)
    return tuple(answers[k] for k in rng.permutation(N_ANSWERS))


def _alternatives(kind: str, scene: Scene) -> list[str]:
    """Return all answers of a kind of question."""
    if kind in _ATTRIBUTES:
        return list(attribute_values(kind, scene.difficulty))
    return [str(n) for n in range(_MAX_COUNT + 1)] if kind == "count" else ["yes", "no"]


def _attribute(attribute: str) -> Callable[[Scene, SceneRng], tuple[str, str] | None]:
    """Return the maker of questions about an attribute. A maker returns (question, answer), or None if not possible."""

    def make(scene: Scene, rng: SceneRng) -> tuple[str, str] | None:
        names = [name for name in _ATTRIBUTES if name != attribute]
        for k in rng.permutation(len(scene.objects)):
            description = distinguishing_description(scene, k, names, rng)
            if description is not None:
                return f"what {attribute} is the {noun_phrase(description)}?", getattr(scene.objects[k], attribute)
        return None

    return make


def _count(scene: Scene, rng: SceneRng) -> tuple[str, str] | None:
    """Ask for the number of objects that match a description."""
    description = partial_description(scene, rng.choice(scene.objects), _ATTRIBUTES, rng)
    if rng.uniform() < 0.3:  # of a kind that may be absent
        attribute = rng.choice([name for name in _ATTRIBUTES if getattr(description, name)])
        description = replace(description, **{attribute: rng.choice(attribute_values(attribute, scene.difficulty))})
    n = sum(description.matches(obj) for obj in scene.objects)
    return f"how many {noun_phrase(description, many=True)} are there?", str(n)


def _existence(scene: Scene, rng: SceneRng) -> tuple[str, str] | None:
    """Ask whether an object that matches a description exists."""
    is_yes = rng.uniform() < 0.5
    for _ in range(_TRIES):
        obj = rng.choice(scene.objects)
        description = replace(partial_description(scene, obj, _ATTRIBUTES, rng), shape=obj.shape)
        if not is_yes:  # change one word of a description that matches
            attribute = rng.choice([name for name in _ATTRIBUTES if getattr(description, name)])
            description = replace(description, **{attribute: rng.choice(attribute_values(attribute, scene.difficulty))})
        if any(description.matches(other) for other in scene.objects) == is_yes:
            return f"is there a {noun_phrase(description)}?", "yes" if is_yes else "no"
    return None


def _relation(scene: Scene, rng: SceneRng) -> tuple[str, str] | None:
    """Ask whether a spatial relation holds between two objects."""
    is_yes = rng.uniform() < 0.5
    for _ in range(_TRIES):
        a, b = rng.permutation(len(scene.objects))[:2]
        kind = rng.choice(tuple(OPPOSITE))
        true_kind = kind if is_yes else OPPOSITE[kind]  # for a no, the opposite relation holds with its margin
        if not relation_holds(true_kind, scene.objects[a], scene.objects[b]):
            continue
        first, second = (distinguishing_description(scene, k, list(_ATTRIBUTES), rng) for k in (a, b))
        if first is not None and second is not None:
            wording = rng.choice(RELATION_WORDINGS[kind])
            return f"is the {noun_phrase(first)} {wording} the {noun_phrase(second)}?", "yes" if is_yes else "no"
    return None


def _comparison(scene: Scene, rng: SceneRng) -> tuple[str, str] | None:
    """Ask whether one kind of object is more frequent than another."""
    is_yes = rng.uniform() < 0.5
    for _ in range(_TRIES):
        attribute = rng.choice(("colour", "shape"))
        values = attribute_values(attribute, scene.difficulty)
        first, second = (Description(**{attribute: values[k]}) for k in rng.permutation(len(values))[:2])
        more, fewer = (sum(description.matches(obj) for obj in scene.objects) for description in (first, second))
        # equal numbers are also a no, but at least one of the two kinds must be present
        if (more > fewer) == is_yes and max(more, fewer) > 0:
            answer = "yes" if is_yes else "no"
            return f"are there more {noun_phrase(first, many=True)} than {noun_phrase(second, many=True)}?", answer
    return None


_MAKERS: dict[str, Callable[[Scene, SceneRng], tuple[str, str] | None]] = {
    **{attribute: _attribute(attribute) for attribute in _ATTRIBUTES},
    "count": _count,
    "existence": _existence,
    "relation": _relation,
    "comparison": _comparison,
}
KINDS = tuple(_MAKERS)
