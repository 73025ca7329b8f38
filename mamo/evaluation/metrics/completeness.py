"""Check that predictions cover exactly the items of a split."""

from collections.abc import Mapping
from typing import TypeVar

Key = TypeVar("Key", int, str)


def check_predictions(
    task: str, item: str, predictions: Mapping[Key, object], truth: Mapping[Key, object], key_prefix: str = ""
) -> None:
    """Raise ValueError, naming the first, for an item without prediction, a prediction without item, or no items.

    `task` and `item` ("question") are words of the message, `key_prefix` goes before the key in it.
    """
    for problem, keys in (
        (f"{item}s have no prediction", truth.keys() - predictions.keys()),
        (f"predictions are of no {item} of the split", predictions.keys() - truth.keys()),
    ):
        if keys:
            raise ValueError(f"{task}: {len(keys)} {problem}, the first is {key_prefix}{min(keys)}")
    if not truth:
        raise ValueError(f"{task}: there is no {item}")
