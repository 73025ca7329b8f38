"""Statements about two images of the embedded world, in the style of NLVR2.

Each sentence occurs twice: with a pair of images for which it is true, and with a pair for which it is false. The text
therefore does not reveal the label, and consistency (both predictions right) is defined for every sentence.

| kind | wording |
|---|---|
| total | "there are three red circles in total" |
| both | "both images show a small square" |
| one | "exactly one image shows a blue ring" |
| more | "the left image shows more circles than the right image" |
| sides | "the left image shows a red circle and the right image shows a large cross" |
"""

from collections.abc import Iterator
from dataclasses import dataclass

from mamo.world.grammar import NUMBERS, Description, noun_phrase
from mamo.world.referring import ATTRIBUTES, partial_description
from mamo.world.scene import Scene, SceneObject, SceneRng, SceneWorld, Split

KINDS = ("total", "both", "one", "more", "sides")
_STREAM = 21  # random stream of a set's first scene
_SCENES_PER_SET = 4
_TRIES = 200
Objects = tuple[SceneObject, ...]


@dataclass(frozen=True, slots=True)
class PairStatement:
    """A sentence about the scenes `left` and `right`. `identifier` has NLVR2's form: split-set-pair-sentence."""

    left: int
    right: int
    sentence: str
    label: bool
    identifier: str


@dataclass(frozen=True, slots=True)
class _Claim:
    """Meaning of a sentence about two images; `kind` decides the use of the other fields."""

    kind: str
    description: Description
    other: Description
    number: int

    def is_true(self, left: Objects, right: Objects) -> bool:
        """Return whether the claim is true of two images."""
        n_left, n_right = (sum(self.description.matches(obj) for obj in side) for side in (left, right))
        if self.kind == "total":
            return n_left + n_right == self.number
        if self.kind == "both":
            return n_left > 0 and n_right > 0
        if self.kind == "one":
            return (n_left > 0) != (n_right > 0)
        if self.kind == "more":
            return n_left > n_right
        return n_left > 0 and any(self.other.matches(obj) for obj in right)

    def write(self) -> str:
        """Write the claim as a sentence."""
        phrase = noun_phrase(self.description)
        if self.kind == "total":
            verb, noun = ("is", phrase) if self.number == 1 else ("are", noun_phrase(self.description, many=True))
            return f"there {verb} {NUMBERS[self.number]} {noun} in total"
        if self.kind == "both":
            return f"both images show a {phrase}"
        if self.kind == "one":
            return f"exactly one image shows a {phrase}"
        if self.kind == "more":
            return f"the left image shows more {noun_phrase(self.description, many=True)} than the right image"
        return f"the left image shows a {phrase} and the right image shows a {noun_phrase(self.other)}"


def pair_statements(world: SceneWorld, split: Split, n_items: int) -> Iterator[PairStatement]:
    """Yield the first `n_items` statements of `split`, a true and a false one of each sentence; a pure function.

    Set s uses scenes 4 s to 4 s + 3: left and right of its two pairs. The pair with the true label is random.
    """
    for number in range((n_items + 1) // 2):
        scenes = [world.scene(split, _SCENES_PER_SET * number + k) for k in range(_SCENES_PER_SET)]
        claim = _distinguishing_claim(scenes, KINDS[number % len(KINDS)], scenes[0].rng(_STREAM))
        for pair in range(min(2, n_items - 2 * number)):
            left, right = scenes[2 * pair], scenes[2 * pair + 1]
            label = claim.is_true(left.objects, right.objects)
            yield PairStatement(left.index, right.index, claim.write(), label, f"{split}-{number}-{pair}-0")


def _distinguishing_claim(scenes: list[Scene], kind: str, rng: SceneRng) -> _Claim:
    """Draw a claim that is true of one pair and false of the other; of the next kind if `kind` yields none."""
    first_is_true = rng.uniform() < 0.5
    for turn in range(len(KINDS)):
        for _ in range(_TRIES):
            sides = scenes[:2] if first_is_true else scenes[2:]
            left, right = (partial_description(side, rng.choice(side.objects), ATTRIBUTES, rng) for side in sides)
            n = sum(left.matches(obj) for side in sides for obj in side.objects)
            claim = _Claim(KINDS[(KINDS.index(kind) + turn) % len(KINDS)], left, right, min(n, len(NUMBERS) - 1))
            truths = [claim.is_true(scenes[k].objects, scenes[k + 1].objects) for k in (0, 2)]
            if truths == [first_is_true, not first_is_true]:
                return claim
    raise AssertionError("no claim is true of one pair of scenes and false of the other")
