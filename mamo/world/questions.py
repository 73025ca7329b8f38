"""Questions about the embedded world in the way of VQA v2: one a scene, ten answers each.

| kind | wording | answers |
|---|---|---|
| colour, shape, size, pattern | "what colour is the small circle?" where the words tell one object apart | the word |
| count | "how many red circles are there?" | 0 to 5 |
| existence | "is there a large blue square?" | yes, no |
| relation | "is the red circle left of the blue square?" of objects that the words tell apart | yes, no |
| comparison | "are there more circles than squares?" | yes, no |

Yes and no are drawn before the scene is looked at, so that neither a kind nor a wording gives the answer away. Of ten
people up to two slip and give another answer of the same kind; a size has two words ("small", "little"), both given.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from mamo.world.grammar import OPPOSITE, RELATION_WORDINGS, SIZE_WORDS, Description, noun_phrase, relation_holds
from mamo.world.referring import distinguishing_description, one_or_two, values_of
from mamo.world.scene import Scene, SceneRng, SceneWorld, Split

_STREAM = 20  # of the scene's randomness; everything else uses lower ones
N_ANSWERS = 10
_MAX_SLIPS = 2
_MAX_COUNT = 5
_TRIES = 20
_ATTRIBUTES = ("colour", "shape", "size", "pattern")
ANSWER_TYPES = {"count": "number", "existence": "yes/no", "relation": "yes/no", "comparison": "yes/no"}  # else: other


@dataclass(frozen=True, slots=True)
class Question:
    """`text` about scene `scene_index`; `answer` is the truth, `answers` what ten people said."""

    scene_index: int
    kind: str
    text: str
    answer: str
    answers: tuple[str, ...]

    @property
    def answer_type(self) -> str:
        """As VQA v2 calls it: yes/no, number or other."""
        return ANSWER_TYPES.get(self.kind, "other")


def question(world: SceneWorld, split: Split, index: int) -> Question:
    """The question about scene `index` of `split`: a pure function. The kinds take turns; one that the scene does not
    allow ("what colour is the circle?" of two circles) leaves its turn to the next.
    """
    scene = world.scene(split, index)
    draws = scene.draws(_STREAM)
    kinds = [kind for kind in _MAKERS if kind != "pattern" or world.difficulty == "full"]
    for turn in range(len(kinds)):
        kind = kinds[(index + turn) % len(kinds)]
        made = _MAKERS[kind](scene, draws)
        if made is not None:
            text, answer = made
            return Question(index, kind, text, answer, _annotator_answers(answer, _alternatives(kind, scene), draws))
    raise AssertionError("counting is always possible")


def _annotator_answers(answer: str, others: list[str], draws: SceneRng) -> tuple[str, ...]:
    """Ten answers: up to two slips, the two words of a size about equally often."""
    words = next((pair for pair in SIZE_WORDS.values() if answer in pair), (answer,))
    given = [draws.pick(words) for _ in range(N_ANSWERS)]
    for k in range(int(draws.uniform() * (_MAX_SLIPS + 1))):
        given[k] = draws.pick(others)
    return tuple(given[k] for k in draws.shuffled(N_ANSWERS))


def _alternatives(kind: str, scene: Scene) -> list[str]:
    if kind in _ATTRIBUTES:
        return list(values_of(kind, scene))
    return [str(n) for n in range(_MAX_COUNT + 1)] if kind == "count" else ["yes", "no"]


def _attribute(attribute: str) -> Callable[[Scene, SceneRng], tuple[str, str] | None]:
    def make(scene: Scene, draws: SceneRng) -> tuple[str, str] | None:
        names = [name for name in _ATTRIBUTES if name != attribute]
        for k in draws.shuffled(len(scene.objects)):
            what = distinguishing_description(scene, k, names, draws)
            if what is not None:
                return f"what {attribute} is the {noun_phrase(what)}?", getattr(scene.objects[k], attribute)
        return None

    return make


def _count(scene: Scene, draws: SceneRng) -> tuple[str, str] | None:
    what = one_or_two(scene, draws.pick(scene.objects), _ATTRIBUTES, draws)
    if draws.uniform() < 0.3:  # of something that may not be there
        attribute = draws.pick([name for name in _ATTRIBUTES if getattr(what, name)])
        what = replace(what, **{attribute: draws.pick(values_of(attribute, scene))})
    n = sum(what.fits(thing) for thing in scene.objects)
    return f"how many {noun_phrase(what, many=True)} are there?", str(n)


def _existence(scene: Scene, draws: SceneRng) -> tuple[str, str] | None:
    is_yes = draws.uniform() < 0.5
    for _ in range(_TRIES):
        thing = draws.pick(scene.objects)
        what = replace(one_or_two(scene, thing, _ATTRIBUTES, draws), shape=thing.shape)
        if not is_yes:  # one word of something that is there is exchanged
            attribute = draws.pick([name for name in _ATTRIBUTES if getattr(what, name)])
            what = replace(what, **{attribute: draws.pick(values_of(attribute, scene))})
        if any(what.fits(other) for other in scene.objects) == is_yes:
            return f"is there a {noun_phrase(what)}?", "yes" if is_yes else "no"
    return None


def _relation(scene: Scene, draws: SceneRng) -> tuple[str, str] | None:
    is_yes = draws.uniform() < 0.5
    for _ in range(_TRIES):
        a, b = draws.shuffled(len(scene.objects))[:2]
        kind = draws.pick(tuple(OPPOSITE))
        holding = kind if is_yes else OPPOSITE[kind]  # a clear no: the opposite is clearly true
        if not relation_holds(holding, scene.objects[a], scene.objects[b]):
            continue
        first, second = (distinguishing_description(scene, k, list(_ATTRIBUTES), draws) for k in (a, b))
        if first is not None and second is not None:
            wording = draws.pick(RELATION_WORDINGS[kind])
            return f"is the {noun_phrase(first)} {wording} the {noun_phrase(second)}?", "yes" if is_yes else "no"
    return None


def _comparison(scene: Scene, draws: SceneRng) -> tuple[str, str] | None:
    is_yes = draws.uniform() < 0.5
    for _ in range(_TRIES):
        attribute = draws.pick(("colour", "shape"))
        values = values_of(attribute, scene)
        first, second = (Description(**{attribute: values[k]}) for k in draws.shuffled(len(values))[:2])
        more, fewer = (sum(what.fits(thing) for thing in scene.objects) for what in (first, second))
        # equal numbers are a no too, but mostly of things that are not there; one must be
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
