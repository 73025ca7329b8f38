"""Look up timm models by name."""

import difflib
import functools
from typing import Any

import timm
import torch


@functools.cache
def meta_model(name: str) -> Any:
    """Build a timm model that holds no memory, of which kind and sizes are read. Building one takes half a second.

    Raises:
        ValueError: timm has no such model, or no such tag of it.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else "; use a name of timm.list_models(), or module:Class"
        if "/" in name:
            hint = "; give timm's name of it, and as its weights the folder of the repository's files"
        raise ValueError(f"image encoder {name!r} is not a timm model{hint}")
    try:
        with torch.device("meta"):
            return timm.create_model(name, num_classes=0)
    except RuntimeError:  # timm's, for a tag that there is not
        tags = timm.list_pretrained(f"{name.partition('.')[0]}.*")
        raise ValueError(
            f"image encoder {name!r} has a tag that timm does not know; use {', '.join(tags[:6]) or 'none'}"
        ) from None


def published_model(name: str) -> Any:
    """Return a timm model with its published weights; needs a network.

    Raises:
        ValueError: timm has none of this name, or they are not in the cache and cannot be fetched.
    """
    try:
        return timm.create_model(name, pretrained=True)
    except OSError as error:  # the hub's client, without a network
        raise ValueError(
            f"timm's weights of {name} are not in the cache, and cannot be fetched from the hub "
            f"({type(error).__name__}): name a file or folder of them as its weights, or use random"
        ) from None
    except RuntimeError:  # timm's, for a model without published weights
        raise ValueError(f"timm has no published weights of {name}: name a file, or use random") from None
