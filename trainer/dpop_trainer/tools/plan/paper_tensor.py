"""Tensors that have a device, a shape and a storage, and no data: what is done with them allocates nothing.

torch's own fake tensors serve any program and any device, at ten times the price of an operator. A step on paper needs
less: all its tensors say that they are on the CPU, so that autocast, attention and checkpointing choose as they do
there, and each carries a tensor of the meta device, whose kernels give shapes, strides and which storage is shared.
"""

from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

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
            device=torch.device("cpu"),
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


class _Form(NamedTuple):
    """All that a kernel of the meta device reads of a tensor."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def empty(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


def on_meta(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What an operator makes of tensors without data.

    Raises:
        ValueError: it reads data, or torch does not know what it makes without.
    """
    try:
        return _made_on_meta(func, args, kwargs)
    except RuntimeError as error:
        if not isinstance(error, NotImplementedError) and func is not torch.ops.aten._local_scalar_dense.default:
            raise
        raise ValueError(
            f"model: expected one whose operators can be followed without data, got one that calls {func}. dpop plan "
            "does not know this architecture."
        ) from error


def _made_on_meta(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if _makes_one_tensor(func):
        form = _form_made(func, *map(_form, args), **{name: _form(value) for name, value in kwargs.items()})
        if form is not None:
            return PaperTensor(form.empty())
    given: dict[int, PaperTensor] = {}
    bare_args = [_bare(value, given) for value in args]
    bare_kwargs = {name: _bare(value, given) for name, value in kwargs.items()}
    return _on_paper(_call(func, bare_args, bare_kwargs), given)


def _call(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return func(*args, **(kwargs | {"device": "meta"} if _takes_device(func) else kwargs))


@lru_cache(maxsize=1 << 14, typed=True)
def _form_made(func: Any, *args: Any, **kwargs: Any) -> _Form | None:
    """Of the new tensor that a layer's operator makes again and again; None where it is no new one.

    Many kernels of the meta device are written in Python, and take half a millisecond.
    """
    given = [_empty(value) for value in args]
    made = _call(func, given, {name: _empty(value) for name, value in kwargs.items()})
    if any(
        isinstance(value, Tensor) and value.untyped_storage()._cdata == made.untyped_storage()._cdata for value in given
    ):
        return None  # a view that its schema does not name
    return _Form(made.shape, made.stride(), made.dtype)


def _form(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Form(value.shape, value.stride(), value.dtype)
    return tuple(map(_form, value)) if isinstance(value, (list, tuple)) else value


def _empty(value: Any) -> Any:
    if isinstance(value, _Form):
        return value.empty()
    return [_empty(one) for one in value] if isinstance(value, tuple) else value


@cache
def _makes_one_tensor(func: Any) -> bool:
    """By its schema, of no storage that it was given."""
    schema = func._schema
    returns = [(str(made.type), made.alias_info) for made in schema.returns]
    return returns == [("Tensor", None)] and not schema.is_mutable


def _bare(value: Any, given: dict[int, PaperTensor]) -> Any:
    if isinstance(value, PaperTensor):
        given[id(value.bare)] = value
        return value.bare
    if isinstance(value, Tensor):  # a constant of the program
        return _form(value).empty()
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
