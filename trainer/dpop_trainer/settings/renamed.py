"""Names that transformers changed within the versions that we support: the new one where the installed version has it.

transformers 5.24 calls activation checkpointing what was gradient checkpointing before, and warns of the old names.
"""

import contextlib
import inspect
import json
import warnings
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel

_NEW, _OLD = "activation_checkpointing", "gradient_checkpointing"
_ENABLE = f"{_NEW}_enable" if hasattr(PreTrainedModel, f"{_NEW}_enable") else f"{_OLD}_enable"
_HAS_NEW_NAMES = _ENABLE.startswith(_NEW)


def resolve_checkpointing(args: Any) -> None:
    """Before transformers reads them: the value that was given under either name, under the name that it takes.

    Args:
        args: training arguments with the fields activation_checkpointing, gradient_checkpointing and their `_kwargs`.

    Raises:
        ValueError: the two names contradict each other.
    """
    new, old = getattr(args, _NEW), getattr(args, _OLD)
    if new and not old:
        raise ValueError(_contradiction(_NEW, new, _OLD, old))
    new_kwargs, old_kwargs = (_parsed(getattr(args, f"{name}_kwargs")) for name in (_NEW, _OLD))
    if new_kwargs is not None and old_kwargs is not None and new_kwargs != old_kwargs:
        raise ValueError(_contradiction(f"{_NEW}_kwargs", new_kwargs, f"{_OLD}_kwargs", old_kwargs))
    set_checkpointing(args, bool(old if new is None else new), old_kwargs if new_kwargs is None else new_kwargs)


def set_checkpointing(args: Any, enabled: bool, kwargs: dict[str, Any] | None) -> None:
    """Under the name that the installed transformers takes; the other one mirrors it after `mirror_checkpointing`."""
    taken, left = (_NEW, _OLD) if _HAS_NEW_NAMES else (_OLD, _NEW)
    for suffix, value in (("", enabled), ("_kwargs", kwargs)):
        setattr(args, taken + suffix, value)
        setattr(args, left + suffix, None)


def mirror_checkpointing(args: Any) -> None:
    """After transformers has read them: both names tell the same, whichever a script reads."""
    taken, left = (_NEW, _OLD) if _HAS_NEW_NAMES else (_OLD, _NEW)
    for suffix in ("", "_kwargs"):
        setattr(args, left + suffix, getattr(args, taken + suffix))


def enable_checkpointing(model: Any) -> None:
    """Recompute a model's blocks in backward, without reentrant autograd."""
    getattr(model, _ENABLE)(**{f"{_ENABLE.removesuffix('_enable')}_kwargs": {"use_reentrant": False}})


def can_offload_activations() -> bool:
    """Whether the installed transformers keeps what checkpointing saves in host memory (5.17 does)."""
    return "offload" in inspect.signature(getattr(PreTrainedModel, _ENABLE)).parameters


@contextlib.contextmanager
def without_renaming_warnings() -> Iterator[None]:
    """Around calls into peft, which reads transformers' old names: nothing that the user could do about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=rf"`(is_)?{_OLD}\w*` is deprecated", category=FutureWarning)
        yield


def _parsed(kwargs: Any) -> Any:
    return json.loads(kwargs) if isinstance(kwargs, str) and kwargs.startswith("{") else kwargs


def _contradiction(new: str, value: Any, old: str, old_value: Any) -> str:
    return (
        f"{new}: expected the same as {old}, of which it is the newer name, got {value!r} and {old_value!r}. "
        "Set one of the two."
    )
