"""Transformer layers of a network: the unit of compilation, checkpointing, sharding, freezing and Muon's matrices."""

from collections.abc import Callable, Iterable, Sequence
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

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Return the function from a parameter's name to its level, which timm's parameter groups take.

        Level 0 precedes the layers, level k is the k-th layer with what lies between it and the one before. What
        follows the layers has the level of the last. ``coarse`` is timm's argument; there are no other levels here.
        """
        layers, found = list(self.layers), dict[str, int]()
        for level, items in enumerate(split_around(self, layers)):
            found |= {name: min(level, len(layers)) for item in items for name in _parameter_names(*item)}
        return found.__getitem__


Item = tuple[str, nn.Module | nn.Parameter]
"""A module or a parameter with its name."""


def split_around(module: nn.Module, inner: Sequence[nn.Module]) -> list[list[Item]]:
    """Split the content of ``module`` around some modules inside it, in the order of registration.

    Modules that hold an inner one are entered; all others are taken whole.

    Returns:
        Of n inner modules n + 2 lists: what precedes the first; each inner module with what lies between it and the
        one before; what follows the last.
    """
    index = {part: number for number, part in enumerate(inner, start=1)}
    found: list[list[Item]] = [[] for _ in range(len(inner) + 2)]
    passed = 0

    def visit(name: str, part: nn.Module) -> None:
        nonlocal passed
        if part in index:
            passed = max(passed, index[part])
            found[index[part]].append((name, part))
            return
        items = found[passed + 1 if passed else 0]
        if not any(other in index for other in part.modules()):
            items.append((name, part))
            return
        items += [(f"{name}.{key}".lstrip("."), value) for key, value in part.named_parameters(recurse=False)]
        for key, child in part.named_children():
            visit(f"{name}.{key}".lstrip("."), child)

    visit("", module)
    return found


def _parameter_names(name: str, item: nn.Module | nn.Parameter) -> list[str]:
    return [name] if isinstance(item, nn.Parameter) else [key for key, _ in item.named_parameters(prefix=name)]


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
