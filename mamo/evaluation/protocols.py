"""Named evaluation protocols: what is fixed, so that two numbers of one name can be compared.

A protocol replaces `data` and `evaluation` of the checkpoint's config but for the picture size, the text length, the
tokenizer and the batch size, which belong to the model and the machine.
"""

from dataclasses import dataclass
from typing import Any

from mamo.config import Config
from mamo.values import merge

_KEPT = ("image_size_px", "text_max_tokens", "tokenizer", "bad_samples", "workers")
SCENES_RERANK_K = 32


@dataclass(frozen=True, slots=True)
class Protocol:
    """`values` go over the config; `split` is what is evaluated; `states` says the rest in one sentence."""

    values: dict[str, Any]
    split: str
    states: str


def _scenes(difficulty: str, near_duplicates: bool) -> Protocol:
    evaluation = {"retrieval_items": 1000, "probe_items": 1000, "rerank_k": SCENES_RERANK_K}
    gallery = "500 held-out scenes and a near duplicate of each" if near_duplicates else "1,000 held-out scenes"
    return Protocol(
        {
            "data": {"source": "scenes", "difficulty": difficulty},
            "evaluation": {**evaluation, "near_duplicates": near_duplicates},
        },
        "test",
        f"{gallery} ({difficulty}), one identifying caption each, ITM re-ranks ITC's {SCENES_RERANK_K} best; probes",
    )


PROTOCOLS: dict[str, Protocol] = {
    "scenes-easy-zeroshot": _scenes("easy", near_duplicates=False),
    "scenes-full-zeroshot": _scenes("full", near_duplicates=False),
    "scenes-easy-retrieval": _scenes("easy", near_duplicates=True),
    "scenes-full-retrieval": _scenes("full", near_duplicates=True),
    "pairs-zeroshot": Protocol(
        {"data": {"source": "pairs"}},
        "all of data.eval_file",
        "all images and captions of data.eval_file, and the statements of data.statements_file",
    ),
}


def under(protocol: str, values: dict[str, Any]) -> dict[str, Any]:
    """The plain config `values` of a checkpoint, changed to what `protocol` fixes.

    Raises ValueError for an unknown name, listing the known ones.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol!r} is unknown; use one of: {', '.join(PROTOCOLS)}")
    data = {key: value for key, value in values["data"].items() if key in _KEPT}
    evaluation = {"enabled": True, "batch_size": values["evaluation"]["batch_size"]}
    return merge({**values, "data": data, "evaluation": evaluation}, PROTOCOLS[protocol].values)


def protocol_of(config: Config) -> str:
    """The protocol that an evaluation agrees with; `NAME-custom` where it changes what the protocol fixes."""
    data, evaluation = config.data, config.evaluation
    if data.source == "pairs":
        return "pairs-zeroshot"
    name = f"scenes-{data.difficulty}-{'retrieval' if evaluation.near_duplicates else 'zeroshot'}"
    fixed = PROTOCOLS[name].values["evaluation"]
    return name if all(getattr(evaluation, key) == value for key, value in fixed.items()) else f"{name}-custom"
