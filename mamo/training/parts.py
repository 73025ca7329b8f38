"""Freeze parts of a network, wholly or up to a layer, and give parts and layers learning rates of their own."""

import types
from typing import TYPE_CHECKING

from timm.optim import param_groups_layer_decay  # type: ignore[attr-defined]
from torch import Tensor, nn

from mamo.config.training import PartConfig, PartsConfig
from mamo.models.layers import LayeredModule, split_around

if TYPE_CHECKING:
    from mamo.tasks.base import Task  # below the tasks: for annotations

HEADS = "heads"
"""Name of everything outside the parts that a task lists."""


def freeze_parts(task: "Task", settings: PartsConfig) -> frozenset[str]:
    """Freeze what `settings` say: no gradient, and eval mode for good, in which dropout and running statistics rest.

    Args:
        task: its network is in its final place, and not yet compiled, wrapped or split.
        settings: `training.parts`.

    Returns:
        The names of the parts that are frozen wholly.

    Raises:
        ValueError: naming the key: the network has no such part, or the part too few layers.
    """
    for name, (part, config) in _configured(task, settings).items():
        if config.freeze == "all":
            part.requires_grad_(False)
            stay_in_eval(part)
        elif config.freeze != "none":
            layers = _layers(name, "freeze", part)
            if config.freeze > len(layers):
                raise ValueError(
                    f"training.parts.{name}.freeze: {config.freeze} layers, {type(part).__name__} has {len(layers)}; "
                    "use at most as many, or all"
                )
            for items in split_around(part, layers)[: config.freeze + 1]:
                for _, item in items:
                    item.requires_grad_(False)
                    if isinstance(item, nn.Module):
                        stay_in_eval(item)
    if settings.heads.freeze == "all":
        _freeze_heads(task)
    return frozenset(name for name, config in settings if config.freeze == "all")


def learning_rate_scales(task: "Task", settings: PartsConfig) -> dict[Tensor, float]:
    """Compute the factor of `training.learning_rate` for each parameter of the parts that have one.

    A part's layers decay by timm's `param_groups_layer_decay`, from the last, which has the part's own factor.

    Raises:
        ValueError: naming the key: the network has no such part, or the part no layers.
    """
    found: dict[Tensor, float] = {}
    for name, (part, config) in _configured(task, settings).items():
        found |= dict.fromkeys(part.parameters(), config.learning_rate_factor)
        if config.layer_decay != 1.0:
            _layers(name, "layer_decay", part)
            for group in param_groups_layer_decay(part, layer_decay=config.layer_decay):
                found |= dict.fromkeys(group["params"], config.learning_rate_factor * group["lr_scale"])
    if settings.heads.learning_rate_factor != 1.0:
        found |= dict.fromkeys(_head_parameters(task), settings.heads.learning_rate_factor)
    return found


def stay_in_eval(module: nn.Module) -> None:
    """Put a module into eval mode, and keep it there when its parent is put into training mode."""
    module.train = types.MethodType(_eval, module)  # type: ignore[method-assign]
    module.eval()


def _eval(module: nn.Module, mode: bool = True) -> nn.Module:
    return type(module).train(module, False)


def _configured(task: "Task", settings: PartsConfig) -> dict[str, tuple[nn.Module, PartConfig]]:
    """Return the parts with settings of their own, and these. Raises ValueError where the network lacks one."""
    parts = task.parts()
    found = {name: config for name, config in settings if name != HEADS and config != PartConfig()}
    for name in found.keys() - parts.keys():
        raise ValueError(f"training.parts.{name}: the network of task {task.config.task} has no such part; remove it")
    return {name: (parts[name], config) for name, config in found.items()}


def _layers(name: str, key: str, part: nn.Module) -> list[nn.Module]:
    """Return the layers of a part. Raises ValueError where it has none."""
    layers = list(part.layers) if isinstance(part, LayeredModule) else []
    if not layers:
        raise ValueError(f"training.parts.{name}.{key}: {type(part).__name__} has no layers; remove it")
    return layers


def _head_parameters(task: "Task") -> list[nn.Parameter]:
    """Return the parameters outside the parts; a shared one belongs to its part."""
    own = {parameter for part in task.parts().values() for parameter in part.parameters()}
    return [parameter for parameter in task.network.parameters() if parameter not in own]


def _freeze_heads(task: "Task") -> None:
    for parameter in _head_parameters(task):
        parameter.requires_grad_(False)
    parts = list(task.parts().values())
    for items in split_around(task.network, parts):
        for _, item in items:
            if isinstance(item, nn.Module) and item not in parts:
                stay_in_eval(item)
