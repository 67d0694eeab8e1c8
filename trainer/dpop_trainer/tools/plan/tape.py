"""Every allocation of a step and every matrix product, written down as it happens, on tensors without data."""

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_OPEN: list["Tape"] = []
"""Tapes that are entered; one at most."""


class Moment(NamedTuple):
    """The worst moment of a phase."""

    total: float
    """Bytes, over what was there before the step."""
    parts: dict[str, float]
    """By what holds them."""


class Tape(TorchDispatchMode):
    """Records while it is entered.

    Args:
        known: tensors that exist already and are counted elsewhere: weights, optimizer states.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.flop: dict[str, float] = defaultdict(float)
        """By kind: layers, attention, head."""
        self._known = [tensor.untyped_storage() for tensor in known]
        self._storages = {storage._cdata for storage in self._known}
        self._events: list[tuple[str, int, int]] = []  # phase, serial number, bytes: freed where negative
        self._parts: dict[int, str] = {}  # by serial number
        self._serials: dict[int, int] = {}  # by storage
        self._phase = "forward"
        self._part = "activations"

    def enter(self, phase: str) -> None:
        """What happens from now on belongs to this phase."""
        self._phase = phase

    def __enter__(self):
        _OPEN.append(self)
        return super().__enter__()

    def __exit__(self, *exception):
        _OPEN.pop()
        return super().__exit__(*exception)

    def assign(self, tensors: Iterable[Tensor], part: str) -> None:
        """Say afterwards of what part tensors are that are still there."""
        for tensor in tensors:
            serial = self._serials.get(tensor.untyped_storage()._cdata)
            if serial is not None:
                self._parts[serial] = part

    def moments(self) -> dict[str, Moment]:
        """The worst moment of every phase, in the order of the phases."""
        now: dict[str, float] = defaultdict(float)
        total = 0
        worst: dict[str, Moment] = {}
        for phase, serial, num_bytes in self._events:
            total += num_bytes
            now[self._parts[serial]] += num_bytes
            if phase not in worst or total > worst[phase].total:
                worst[phase] = Moment(total, dict(now))
        return worst

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _ATTENTION:
            self.flop["attention"] += _ATTENTION[func](*args, **kwargs)
        else:
            count: Any = flop_registry.get(getattr(func, "_overloadpacket", None))
            self.flop["layers"] += 0 if count is None else count(*args, **kwargs, out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._storages or not num_bytes:
            return
        serial = len(self._parts)
        self._parts[serial] = self._part
        self._storages.add(key)
        self._serials[key] = serial
        self._events.append((self._phase, serial, num_bytes))
        weakref.finalize(storage, self._free, key, serial, num_bytes)

    def _free(self, key: int, serial: int, num_bytes: int) -> None:
        self._storages.discard(key)
        self._serials.pop(key, None)
        self._events.append((self._phase, serial, -num_bytes))


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
        _OPEN[-1].flop[kind] += flop


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
