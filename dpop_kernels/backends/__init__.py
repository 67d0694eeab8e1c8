"""The implementations behind the public functions, and the one place that chooses among them.

`protocol` says what a backend is. Arguments arrive validated; a backend knows no loss, and never moves data between
devices. To add one: a module with those names and its row in `BACKENDS`. The flag `--kernel_backend` offers it then,
and the tests that hold every backend to fp64 take their lists from here (tests/helpers/backends.py).
"""

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from dpop_kernels.backends.protocol import Backend


class Registration(NamedTuple):
    """A backend by name, imported when it is asked for."""

    module: str
    """Relative to this package if it begins with a dot."""
    why_not: Callable[[torch.device, torch.dtype], str | None]
    """Why it cannot run on a device and a dtype, or None."""


def _everywhere(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def _where_triton_runs(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the Triton kernels take float32, bfloat16 and float16, got {dtype}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if device.type != "cuda" and not interpreted:
        return f"the Triton kernels run on CUDA and ROCm devices, got {device.type!r}"
    return None


BACKENDS = {
    "reference": Registration(".reference", _everywhere),
    "chunked": Registration(".chunked", _everywhere),
    "fused": Registration(".fused", _where_triton_runs),
}


def select_backend(backend: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The module that implements `backend` for tensors of this device and dtype.

    "auto" takes the Triton kernels on a GPU that has them and the chunked torch code everywhere else. A backend
    asked for by name is used or refused, never replaced; "fused" runs on a CPU under TRITON_INTERPRET=1, for tests.

    Raises:
        ValueError: the name is unknown, or the backend cannot run on this device or dtype.
    """
    if backend == "auto":
        backend = "fused" if device.type == "cuda" and _where_triton_runs(device, dtype) is None else "chunked"
    elif backend not in BACKENDS:
        raise ValueError(f"backend: expected 'auto' or one of {tuple(BACKENDS)}, got {backend!r}.")
    elif reason := BACKENDS[backend].why_not(device, dtype):
        raise ValueError(f"backend: {backend!r} cannot run here: {reason}. Use backend='auto'.")
    module: Any = importlib.import_module(BACKENDS[backend].module, __name__)
    return module
