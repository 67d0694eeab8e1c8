"""Dtypes by name, and which of them a run computes in."""

from typing import Any, Literal

import torch


def named_dtype(dtype: Any) -> torch.dtype | Literal["auto"]:
    """
    Args:
        dtype: as `from_pretrained` takes it: torch's, its name, or "auto", which is the checkpoint's own.

    Raises:
        ValueError: torch has none of this name.
    """
    found = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if found != "auto" and not isinstance(found, torch.dtype):
        raise ValueError(f"dtype: expected 'float32', 'bfloat16', 'float16' or 'auto', got {dtype!r}.")
    return found


def autocast_dtype(bf16: bool | None, fp16: bool | None) -> torch.dtype | None:
    """None where a run computes in its weights' dtype."""
    return torch.bfloat16 if bf16 else torch.float16 if fp16 else None
