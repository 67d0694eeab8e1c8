"""Tensors that have a device, a shape and a storage, and no data: what is done with them allocates nothing and is quick.

torch's own fake tensors serve any program and any device, at ten times the price of an operator. A step on paper needs
less: all its tensors say that they are on the CPU, so that autocast, attention and checkpointing choose as they do
there, and each carries a tensor of the meta device, whose kernels give shapes, strides and which storage is shared.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor


class PaperTensor(Tensor):
    """On the CPU by its own word; `bare` is on the meta device and has its shape, strides and storage."""

    bare: Tensor

    @staticmethod
    def __new__(cls, bare: Tensor) -> "PaperTensor":
        made = Tensor._make_wrapper_subclass(
            cls,
            bare.shape,
            strides=bare.stride(),
            storage_offset=bare.storage_offset(),
            dtype=bare.dtype,
            layout=bare.layout,
            device="cpu",
        )
        made.bare = bare
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return on_meta(func, args, kwargs or {})

    def __repr__(self, **kwargs: Any) -> str:
        return f"PaperTensor({list(self.shape)}, {self.dtype})"


def paper(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A new one, contiguous."""
    return PaperTensor(torch.empty(shape, dtype=dtype, device="meta"))


def storage_of(tensor: Tensor) -> torch.UntypedStorage:
    """Which stands for the bytes that a tensor with data would hold, or share with others."""
    return (tensor.bare if isinstance(tensor, PaperTensor) else tensor).untyped_storage()


def on_meta(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What an operator makes of tensors without data.

    Raises:
        NotImplementedError: torch has no kernel of the meta device for it, or it reads data.
    """
    given: dict[int, PaperTensor] = {}
    bare_args = [_bare(value, given) for value in args]
    bare_kwargs = {name: _bare(value, given) for name, value in kwargs.items()}
    if _takes_device(func):
        bare_kwargs["device"] = "meta"
    return _on_paper(func(*bare_args, **bare_kwargs), given)


def _bare(value: Any, given: dict[int, PaperTensor]) -> Any:
    if isinstance(value, PaperTensor):
        given[id(value.bare)] = value
        return value.bare
    if isinstance(value, Tensor):  # a constant of the program
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, (list, tuple)):
        return type(value)(_bare(one, given) for one in value)
    return value


def _on_paper(result: Any, given: dict[int, PaperTensor]) -> Any:
    if isinstance(result, Tensor):
        was = given.get(id(result))  # an operator that works in place returns what it was given
        return PaperTensor(result) if was is None else was
    if isinstance(result, (list, tuple)):
        return type(result)(_on_paper(one, given) for one in result)
    return result


@cache
def _takes_device(func: Any) -> bool:
    return any(argument.name == "device" for argument in func._schema.arguments)

