"""Measure the floor of a computation: the seconds of its matrix products run one after the other.

Every product, convolution and attention of a computation is recorded with the sizes and strides of its operands; then
each distinct one is timed by itself. The rest of a step's time is norms, activations, copies, the optimizer and the
interpreter.
"""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mamo.benchmark.timing import seconds
from mamo.config.values import Values

SHORTEST_S = 5e-4
"""A product is repeated for at least this time, so that clock resolution does not matter."""
MOST_REPEATS = 200


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the products by operation, sizes, strides and precision."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[tuple[torch._ops.OpOverload, tuple[object, ...]]] = Counter()
        self.operations = 0

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: object, args: tuple[object, ...] = (), kwargs: Values | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func._overloadpacket not in flop_registry:
            with self:
                decomposed = func.decompose(*args, **kwargs)  # composite operations arrive whole in inference
            if decomposed is not NotImplemented:
                return decomposed
        out = func(*args, **kwargs)
        if func._overloadpacket in flop_registry:
            self.calls[func, tuple(map(_described, args))] += 1
            self.operations += flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        return out


class Products:
    """Matrix products of one call of `work`.

    `operations` counts a multiplication and an addition as two. Attention is recorded as two plain products around a
    softmax on every device.
    """

    def __init__(self, work: Callable[[], object], device: torch.device) -> None:
        self.device = device
        recorder = _Recorder()
        with recorder, sdpa_kernel(SDPBackend.MATH):
            work()
        self.operations = recorder.operations
        self.calls = recorder.calls
        self._repeats: dict[object, int] = {}

    def seconds(self) -> float:
        """Measure the seconds of each recorded product by itself, now, and return the sum."""
        total = 0.0
        for call, count in self.calls.items():
            func, arguments = call
            made = [_made(argument, self.device) for argument in arguments]
            if call not in self._repeats:
                seconds(lambda: func(*made), self.device)  # noqa: B023 (called at once)
                once = seconds(lambda: func(*made), self.device)  # noqa: B023
                self._repeats[call] = min(MOST_REPEATS, 1 + int(SHORTEST_S / once))
            total += count * seconds(lambda: func(*made), self.device, self._repeats[call])  # noqa: B023
        return total


def _described(argument: object) -> object:
    """Describe an argument as a hashable value from which `_made` makes an equal one; contents do not matter."""
    if isinstance(argument, Tensor):
        return Tensor, tuple(argument.shape), argument.stride(), argument.dtype
    return (list, *argument) if isinstance(argument, list) else argument


def _made(described: object, device: torch.device) -> object:
    if not isinstance(described, tuple):
        return described
    if described[0] is list:
        return list(described[1:])
    _, shape, stride, dtype = described
    n_elements = 1 + sum((size - 1) * step for size, step in zip(shape, stride))
    return torch.rand(n_elements, device=device).to(dtype).as_strided(shape, stride)
