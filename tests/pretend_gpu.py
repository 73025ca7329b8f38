"""A GPU pretended on the CPU: errors where tensors of host and GPU meet, and a list of the waits for the GPU.

Within `PretendGpu` a tensor belongs to the host if it is made without a `device` argument, or from such tensors only,
and to the GPU otherwise. `to(device)` moves it. Real numbers are computed, so that every branch is taken as in a real
step. The GPU is `torch.device("cpu")`; the host is the string "cpu" and `torch.device("cpu", 0)`, which is the `device`
of its tensors.
"""

import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

HOST = torch.device("cpu", 0)
ROOT = Path(__file__).parents[1]
FACTORIES = frozenset({
    "tensor", "as_tensor", "arange", "zeros", "ones", "empty", "full", "eye", "linspace", "rand", "randn",
    "randint", "randperm",
})  # fmt: skip
READS = frozenset(
    {"tolist", "item", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu", "__array__", "__contains__"}
)
COPIES = frozenset({"copy_", "__set__", "__setitem__"})
"""Operations that take a value from the other side."""
SHAPES = frozenset({
    "nonzero", "masked_select", "unique", "unique_consecutive", "argwhere", "bincount", "equal",
    "allclose", "is_nonzero",
})  # fmt: skip
"""Operations whose result has as many elements as its input's values say, or that read these values."""


class MixedDevicesError(AssertionError):
    """A tensor of the host meets one of the GPU."""


class PretendGpu(TorchFunctionMode):
    """Tags tensors of the host; see the module.

    Attributes:
        waits: (file, line, operation) of each read of a GPU tensor by the host, of each shape that follows values, and
            of each copy to the GPU for which the host waits: of numbers, of a list of indices, by `to` with
            `non_blocking` left out. A copy to the host with `non_blocking` is none; its reader waits for an event.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[tuple[str, int, str]] = []
        self._host: dict[int, weakref.ref[Tensor]] = {}

    def __enter__(self) -> "PretendGpu":
        """Begin; `from_numpy` and `Tensor.device`, which a mode does not see, are replaced."""
        self._from_numpy, device_of = torch.from_numpy, Tensor.device.__get__
        torch.from_numpy = lambda array: self._tag(self._from_numpy(array))
        Tensor.device = property(lambda tensor: HOST if self.is_host(tensor) else device_of(tensor))  # type: ignore[assignment, method-assign]
        super().__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        """End."""
        super().__exit__(*raised)
        torch.from_numpy = self._from_numpy
        del Tensor.device  # that of its base class is left

    def _tag(self, tensor: Tensor) -> Tensor:
        self._host[id(tensor)] = weakref.ref(tensor)
        return tensor

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, check where its arguments lie, and tag its result."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        given = list(tensors_in(args[0] if name == "__deepcopy__" else [args, kwargs]))
        devices = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, torch.device | str)]
        on_host = [self.is_host(tensor) for tensor in given]
        to_host = name == "cpu" or any(value == "cpu" or value == HOST for value in devices)
        is_move = name == "cpu" or (name == "to" and bool(devices))
        if not is_move and any(on_host) and not all(on_host) and name not in COPIES:
            mixed = [tensor for tensor, is_host in zip(given, on_host) if is_host and tensor.ndim > 0]
            if mixed:
                file, line = place()
                raise MixedDevicesError(f"{file}:{line}: {name} of a host tensor {list(mixed[0].shape)} and the GPU's")
        is_async = bool(kwargs.get("non_blocking"))
        is_upload = name in ("tensor", "as_tensor") and bool(devices) and not to_host and not given
        if is_upload or (is_move and given and on_host[0] and not to_host and not is_async):
            self.waits.append((*place(), name))
        if given and not on_host[0]:
            has_mask = name in ("__getitem__", "__setitem__") and any(
                tensor.dtype == torch.bool and tensor.ndim > 0 for tensor in tensors_in(args[1])
            )
            has_list = name in ("__getitem__", "__setitem__") and any(
                isinstance(index, list | range) for index in (args[1] if isinstance(args[1], tuple) else (args[1],))
            )
            is_search = name == "where" and len(args) == 1
            if name in READS | SHAPES or is_search or has_mask or has_list or (is_move and to_host and not is_async):
                self.waits.append((*place(), name))
        result = func(*args, **kwargs)
        if is_move and result is args[0] and not isinstance(result, torch.nn.Parameter):
            result = result.view(result.shape)  # an object of its own, as a copy on the other side is
        is_new = name in FACTORIES and not given and (to_host or not devices)
        for tensor in tensors_in(result):
            if is_new or (to_host if is_move else bool(given) and all(on_host)):
                self._tag(tensor)
            else:
                self._host.pop(id(tensor), None)
        return result

    def is_host(self, tensor: Tensor) -> bool:
        """Whether the tensor belongs to the host."""
        found = self._host.get(id(tensor))
        return found is not None and found() is tensor


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)


def place() -> tuple[str, int]:
    """File and line of the innermost frame of the package."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT / "mamo"):
            return path.relative_to(ROOT).as_posix(), frame.f_lineno
        frame = frame.f_back
    return "outside", 0
