"""Every allocation of a step and every matrix product, written down as it happens, on tensors without data."""

import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dpop_trainer.tools.plan.paper_tensor import on_meta, storage_of

_OPEN: list["Tape"] = []
"""Tapes that are entered; one at most."""


class Moment(NamedTuple):
    """The worst moment of a phase."""

    total: float
    """Bytes, over what was there before the step."""
    parts: dict[str, float]
    """By what holds them."""


class _Event(NamedTuple):
    """Bytes that are allocated, or freed where negative."""

    phase: str
    layer: int
    serial: int
    num_bytes: int


class Tape(TorchDispatchMode):
    """Records while it is entered.

    Args:
        known: tensors that exist already and are counted elsewhere: weights, optimizer states.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self._known = [storage_of(tensor) for tensor in known]
        self._storages = {storage._cdata for storage in self._known}
        self._events: list[_Event] = []
        self._flop: dict[tuple[str, int], float] = defaultdict(float)  # by kind and layer
        self._moved: dict[int, int] = defaultdict(int)  # bytes by layer
        self._parts: dict[int, str] = {}  # by serial number
        self._serials: dict[int, int] = {}  # by storage
        self._phase = "forward"
        self._part = "activations"
        self._layer = 0

    def enter(self, phase: str) -> None:
        """What happens from now on belongs to this phase."""
        self._phase = phase

    def enter_layer(self, index: int) -> None:
        """What happens from now on, until another layer is entered, belongs to this layer."""
        self._layer = index

    def __enter__(self):
        _OPEN.append(self)
        return super().__enter__()

    def __exit__(self, *exception):
        _OPEN.pop()
        return super().__exit__(*exception)

    def assign(self, tensors: Iterable[Tensor], part: str) -> None:
        """Say afterwards of what part tensors are that are still there."""
        for tensor in tensors:
            serial = self._serials.get(storage_of(tensor)._cdata)
            if serial is not None:
                self._parts[serial] = part

    def moments(self, *, without: Collection[int] = ()) -> dict[str, Moment]:
        """The worst moment of every phase, in the order of the phases.

        Args:
            without: layers that are left out, as if the model had none in their place: all that happened while they
                were under way, and the end of what they made, but for what stands in place of what they were handed.
        """
        now: dict[str, float] = defaultdict(float)
        total = 0
        worst: dict[str, Moment] = {}
        for event in self._without(without):
            total += event.num_bytes
            now[self._parts[event.serial]] += event.num_bytes
            if event.phase not in worst or total > worst[event.phase].total:
                worst[event.phase] = Moment(total, dict(now))
        return worst

    def _without(self, layers: Collection[int]) -> Iterator[_Event]:
        if not layers:
            yield from self._events
            return
        made_in = {event.serial: event.layer for event in self._events if event.num_bytes > 0}
        # hidden states and their gradients: a layer hands on as much as it was handed
        handed = Counter(
            -event.num_bytes
            for event in self._events
            if event.num_bytes < 0 and event.layer in layers and made_in[event.serial] not in layers
        )
        for event in self._events:
            if event.layer in layers:
                continue
            if event.num_bytes < 0 and made_in[event.serial] in layers:
                if not handed[-event.num_bytes]:
                    continue
                handed[-event.num_bytes] -= 1
            yield event

    def flop(self, *, without: Collection[int] = ()) -> dict[str, float]:
        """By kind: layers, attention, head."""
        sums: dict[str, float] = defaultdict(float)
        for (kind, layer), flop in self._flop.items():
            sums[kind] += 0.0 if layer in without else flop
        return dict(sums)

    def moved_bytes(self, *, without: Collection[int] = ()) -> int:
        """To the host and back."""
        return sum(num_bytes for layer, num_bytes in self._moved.items() if layer not in without)

    def add_moved(self, num_bytes: int) -> None:
        """Sent to the host, or fetched from there, at the layer that is under way."""
        self._moved[self._layer] += num_bytes

    def add_flop(self, kind: str, flop: float) -> None:
        """Products of a kind, at the layer that is under way."""
        self._flop[kind, self._layer] += flop

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = on_meta(func, args, kwargs)
        if func in _ATTENTION:
            self.add_flop("attention", _ATTENTION[func](*args, **kwargs))
        else:
            count: Any = flop_registry.get(getattr(func, "_overloadpacket", None))
            self.add_flop("layers", 0 if count is None else count(*args, **kwargs, out_val=result))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = storage_of(tensor)
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._storages or not num_bytes:
            return
        serial = len(self._parts)
        self._parts[serial] = self._part
        self._storages.add(key)
        self._serials[key] = serial
        self._events.append(_Event(self._phase, self._layer, serial, num_bytes))
        weakref.finalize(storage, self._free, key, serial, num_bytes)

    def _free(self, key: int, serial: int, num_bytes: int) -> None:
        self._storages.discard(key)
        self._serials.pop(key, None)
        self._events.append(_Event(self._phase, self._layer, serial, -num_bytes))


@contextmanager
def part(name: str) -> Iterator[None]:
    """What is allocated inside is of this part, if a tape is running."""
    if not _OPEN:
        yield
        return
    tape = _OPEN[-1]
    before, tape._part = tape._part, name
    try:
        yield
    finally:
        tape._part = before


def add_flop(kind: str, flop: float) -> None:
    """Products that no operator shows, if a tape is running."""
    if _OPEN:
        _OPEN[-1].add_flop(kind, flop)


def add_moved(num_bytes: int) -> None:
    """Bytes between device and host, if a tape is running."""
    if _OPEN:
        _OPEN[-1].add_moved(num_bytes)


def attention_flop(query: Tensor, key: Tensor, *, is_causal: bool) -> float:
    """Two products of the scores' size; a causal kernel leaves half of them out.

    Args:
        query: [..., heads, T, D].
        key: [..., key heads, S, D].
        is_causal: whether nothing above the diagonal is computed.
    """
    return 4.0 * query.numel() * key.shape[-2] * (0.5 if is_causal else 1.0)


def _sdpa_forward(query, key, value, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    return attention_flop(query, key, is_causal=is_causal)


def _sdpa_backward(grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, *, attn_mask=None, scale=None):
    # the scores once more, and two products for each of the two that the forward had
    return 2.5 * attention_flop(query, key, is_causal=is_causal)


_ATTENTION: dict[Any, Callable[..., float]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default: _sdpa_forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _sdpa_backward,
}
