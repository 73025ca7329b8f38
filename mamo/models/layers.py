"""Transformer layers of a network: the unit of compilation, checkpointing, sharding, and of Muon's matrices."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn


class LayeredModule(nn.Module):
    """A module that lists its transformer layers as ``layers``, in the order in which they run.

    ``layers`` is an attribute (an ``nn.ModuleList``) or a property. A layer that is called only through ``forward`` is
    compiled, checkpointed and sharded by itself. A layer whose methods are called directly defines no ``forward``.
    """

    if TYPE_CHECKING:  # declared for the type checker only: a property here would hide a submodule named `layers`

        @property
        def layers(self) -> Iterable[nn.Module]: ...


def transformer_layers(module: nn.Module) -> list[nn.Module]:
    """Collect the layers that ``module`` and its submodules list, each once, in the order of the submodules."""
    found: dict[nn.Module, None] = {}
    for part in module.modules():
        if isinstance(part, LayeredModule):
            found |= dict.fromkeys(part.layers)
    return list(found)


def forward_layers(module: nn.Module) -> list[nn.Module]:
    """Collect the layers as `transformer_layers`, for wrapping their ``forward``.

    Raises:
        ValueError: naming the layer, where one defines no ``forward``: wrapping it would have no effect.
    """
    layers = transformer_layers(module)
    for layer in layers:
        if type(layer).forward is nn.Module.forward:
            name = next(name for name, part in module.named_modules() if part is layer)
            raise ValueError(
                f"{name} ({type(layer).__name__}) has no `forward`, which training.compile, "
                "training.activation_checkpointing and training.parallel: fsdp wrap"
            )
    return layers
