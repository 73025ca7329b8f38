"""Statements about two pictures of the embedded world, in the way of NLVR2.

A sentence is always given twice: of a pair of pictures of which it is true, and of one of which it is false. Words
alone therefore tell nothing, and consistency (both right) is asked of every sentence.

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
from mamo.world.referring import ATTRIBUTES, one_or_two
from mamo.world.scene import Scene, SceneObject, SceneRng, SceneWorld, Split

KINDS = ("total", "both", "one", "more", "sides")
_STREAM = 21  # of the randomness of a set's first scene; everything else uses lower ones
_SCENES_PER_SET = 4
_TRIES = 200
Objects = tuple[SceneObject, ...]


@dataclass(frozen=True, slots=True)
class PairStatement:
    """`sentence` about the scenes `left` and `right`; `identifier` is NLVR2's: split-set-pair-sentence."""

    left: int
    right: int
    sentence: str
    label: bool
    identifier: str


@dataclass(frozen=True, slots=True)
class _Claim:
    kind: str
    what: Description
    other: Description
    number: int

    def holds(self, left: Objects, right: Objects) -> bool:
        """Whether it is true of two pictures."""
        n_left, n_right = (sum(self.what.fits(thing) for thing in side) for side in (left, right))
        if self.kind == "total":
            return n_left + n_right == self.number
        if self.kind == "both":
            return n_left > 0 and n_right > 0
        if self.kind == "one":
            return (n_left > 0) != (n_right > 0)
        if self.kind == "more":
            return n_left > n_right
        return n_left > 0 and any(self.other.fits(thing) for thing in right)

    def write(self) -> str:
        """The sentence."""
        what = noun_phrase(self.what)
        if self.kind == "total":
            verb, noun = ("is", what) if self.number == 1 else ("are", noun_phrase(self.what, many=True))
            return f"there {verb} {NUMBERS[self.number]} {noun} in total"
        if self.kind == "both":
            return f"both images show a {what}"
        if self.kind == "one":
            return f"exactly one image shows a {what}"
        if self.kind == "more":
            return f"the left image shows more {noun_phrase(self.what, many=True)} than the right image"
        return f"the left image shows a {what} and the right image shows a {noun_phrase(self.other)}"


def pair_statements(world: SceneWorld, split: Split, n_items: int) -> Iterator[PairStatement]:
    """The first `n_items` statements of `split`, a true and a false one of each sentence; a pure function.

    Set s uses scenes 4 s to 4 s + 3 (left and right of its two pairs); which pair is the true one is random.
    """
    for number in range((n_items + 1) // 2):
        scenes = [world.scene(split, _SCENES_PER_SET * number + k) for k in range(_SCENES_PER_SET)]
        claim = _telling(scenes, KINDS[number % len(KINDS)], scenes[0].draws(_STREAM))
        for pair in range(min(2, n_items - 2 * number)):
            left, right = scenes[2 * pair], scenes[2 * pair + 1]
            label = claim.holds(left.objects, right.objects)
            yield PairStatement(left.index, right.index, claim.write(), label, f"{split}-{number}-{pair}-0")


def _telling(scenes: list[Scene], kind: str, draws: SceneRng) -> _Claim:
    """A claim of this kind that is true of one pair and false of the other; of another kind where none is found."""
    first_is_true = draws.uniform() < 0.5
    for turn in range(len(KINDS)):
        for _ in range(_TRIES):
            sides = scenes[:2] if first_is_true else scenes[2:]
            what, other = (one_or_two(side, draws.pick(side.objects), ATTRIBUTES, draws) for side in sides)
            n = sum(what.fits(thing) for side in sides for thing in side.objects)
            claim = _Claim(KINDS[(KINDS.index(kind) + turn) % len(KINDS)], what, other, min(n, len(NUMBERS) - 1))
            truths = [claim.holds(scenes[k].objects, scenes[k + 1].objects) for k in (0, 2)]
            if truths == [first_is_true, not first_is_true]:
                return claim
    raise AssertionError("no claim tells two pairs of scenes apart")
