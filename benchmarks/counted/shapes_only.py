"""Tensors without data under a counter: a whole training step of a 72B model in seconds and no memory.

Weights and activations are on torch's "meta" device. Token ids, masks and positions stay what they are, on the CPU, so
that code whose shapes depend on them (`hidden_states[mask]`) runs as it is. `ShapesOnly` brings the two together, and
counts what torch is asked for: the FLOP of matrix products (2 per multiply-add), the bytes that all other operations
read and write, and the bytes that are held, by the life of each storage.
"""

import contextlib
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

BODY = "body"
"""The phase outside of all others: the model's layers."""

_TO_LONGER = (aten.mm.dtype, aten.mm.dtype_out, aten.addmm.dtype, aten.addmm.dtype_out)
"""Products of 16-bit factors into fp32, which CUDA alone computes."""


IN_PLACE = {aten.addmm_: aten.addmm, aten.baddbmm_: aten.baddbmm}
"""Products that torch's registry of FLOP leaves out."""


class ShapesOnly(TorchDispatchMode):
    """Counts by phase. `phases` are set from outside with `phase_of`; all else is of the phase `BODY`."""

    def __init__(self) -> None:
        super().__init__()
        self.flop: dict[str, float] = defaultdict(float)
        """Of matrix products, and of attention as `attend` reports it."""
        self.products: dict[str, int] = defaultdict(int)
        """Matrix products that were asked for."""
        self.traffic: dict[str, int] = defaultdict(int)
        """Bytes that operations other than products read and write, each by itself, views and new memory aside."""
        self.held = self.peak = 0
        """Bytes of storages that are alive; the most of it since `reset_peak`."""
        self._phase = BODY
        self._storages: dict[int, int] = {}

    def reset_peak(self) -> None:
        self.peak = self.held

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    def add_flop(self, phase: str, flop: float) -> None:
        """What no operation of torch stands for here."""
        self.flop[phase] += flop

    def hold(self, tensor: Tensor) -> None:
        """Count a tensor's storage as held as long as it lives; one that is counted already, once."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if not tensor.is_meta or key in self._storages:
            return
        self._storages[key] = storage.nbytes()
        self.held += storage.nbytes()
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self.held -= self._storages.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors((args, kwargs))
        if func is aten._to_copy.default and not tensors[0].is_meta:
            kwargs = {**kwargs, "device": tensors[0].device}  # what has data keeps it, wherever the weights are
        elif any(tensor.is_meta for tensor in tensors):
            if func is aten._local_scalar_dense.default:  # a figure for a log
                return 1.0 if tensors[0].is_floating_point() else 1
            args, kwargs = _without_data(func, args, kwargs)
        device = kwargs.get("device")
        if not tensors and device is not None and torch.device(device).type == "meta":
            output = func(*args, **kwargs)
            if not output.is_floating_point():
                output = func(*args, **{**kwargs, "device": "cpu"})
        elif func in _TO_LONGER:
            output = kwargs["out"] if "out" in kwargs else _longer(func, args)
        else:
            output = func(*args, **kwargs)
        self._count(func, args, kwargs, output)
        return output

    def _count(self, func: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        outputs = [tensor for tensor in _tensors(output) if tensor.is_meta]
        if not outputs:
            return
        for tensor in outputs:
            self.hold(tensor)
        packet = IN_PLACE.get(func._overloadpacket, func._overloadpacket)
        if packet in flop_registry and not _is_outer(packet, args):
            shapes = {key: value for key, value in kwargs.items() if key not in ("out", "out_dtype")}
            positions = [value for value in args if not isinstance(value, torch.dtype)]
            self.flop[self._phase] += flop_registry[packet](*positions, **shapes, out_val=output)
            self.products[self._phase] += 1
        elif not func.is_view and not _makes_memory(func):
            moved = [tensor for tensor in _tensors((args, kwargs)) if tensor.is_meta] + outputs
            self.traffic[self._phase] += sum(tensor.numel() * tensor.itemsize for tensor in moved)


@contextlib.contextmanager
def phase_of(counter: ShapesOnly, name: str, function: type[torch.autograd.Function]) -> Iterator[None]:
    """Count a differentiable function's forward and backward as a phase of their own."""

    def within(method: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            with counter.phase(name):
                return method(*args, **kwargs)

        return counted

    with (
        mock.patch.object(function, "forward", staticmethod(within(function.forward))),
        mock.patch.object(function, "backward", staticmethod(within(function.backward))),
    ):
        yield


def _tensors(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map_only(Tensor, found.append, tree)
    return found


def _without_data(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments, all on the device of those without data; a mask that selects becomes as many indices."""
    if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
        indices: list[Tensor | None] = []
        for index in args[1]:
            if index is not None and index.dtype == torch.bool:
                assert not index.is_meta, "how many a mask selects is in its data"
                indices += index.nonzero(as_tuple=True)
            else:
                indices.append(index)
        args = (args[0], indices, *args[2:])
    return tree_map_only(Tensor, lambda tensor: tensor if tensor.is_meta else tensor.to("meta"), (args, kwargs))


def _longer(func: Any, args: Any) -> Tensor:
    left, right, dtype = args if func is aten.mm.dtype else args[1:4]
    return left.new_empty(left.shape[0], right.shape[1], dtype=dtype)


def _is_outer(packet: Any, args: Any) -> bool:
    """Whether a product multiplies each entry once and adds nothing, as older rotary embeddings make their angles."""
    left = args[1] if packet in (aten.addmm, aten.baddbmm) else args[0]
    return left.shape[-1] == 1


def _makes_memory(func: Any) -> bool:
    return func._overloadpacket in (aten.empty, aten.empty_strided, aten.new_empty, aten.empty_like, aten.detach)
