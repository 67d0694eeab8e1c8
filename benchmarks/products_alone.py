"""The matrix products of a training step, and the time that they take by themselves."""

import time
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_MORE = (
    torch.ops.aten.addmm_,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
)
"""Products that torch's own counter of FLOP does not know."""
_ROUNDS = 3


class _Form(NamedTuple):
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def random(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype).normal_()


class Products(TorchDispatchMode):
    """Writes down, while it is entered, every product by its operands' shapes, strides and dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = getattr(func, "_overloadpacket", None)
        if packet in flop_registry or packet in _MORE:
            self.calls[func, tuple(map(_form, args)), tuple((name, _form(kwargs[name])) for name in kwargs)] += 1
        return func(*args, **kwargs)

    def seconds_alone(self) -> float:
        """Of all that were written down: each kind's quickest of three, as often as it was called."""
        return sum(count * _seconds(*call) for call, count in self.calls.items())


def _seconds(func: Any, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]) -> float:
    given, named = [_random(value) for value in args], {name: _random(value) for name, value in kwargs}
    seconds = []
    for _ in range(_ROUNDS + 1):  # the first warms up
        start = time.perf_counter()
        func(*given, **named)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _form(value: Any) -> Any:
    return _Form(tuple(value.shape), value.stride(), value.dtype) if isinstance(value, Tensor) else value


def _random(value: Any) -> Any:
    return value.random() if isinstance(value, _Form) else value
