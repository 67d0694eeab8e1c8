"""The implementations behind the public functions, and the one place that chooses among them.

Every backend is a module with the same four differentiable functions:

    token_logps(logits, target_ids, *, inplace_backward, with_stats)           -> ([N], TokenStats | None)
    linear_token_logps(hidden_states, lm_head_weight, target_ids,
                       *, bias, logit_scale, softcap, with_stats)              -> ([N], TokenStats | None)
    segment_sums(token_logps, cu_seqlens)                                      -> [S]
    pair_dpop_loss(token_logps, cu_seqlens, ref_segment_logps,
                   *, beta, dpop_lambda, dead_zone, label_smoothing)           -> PairLosses

Arguments arrive validated. A backend knows no hyper-parameter that it is not given, and never moves data
between devices.
"""

import importlib
import importlib.util
import os
from types import ModuleType

import torch

BACKENDS = ("reference", "chunked", "fused")


def select_backend(backend: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The module that implements `backend` for tensors of this device and dtype.

    "auto" takes the Triton kernels on a GPU that has them and the chunked torch code everywhere else. A backend
    asked for by name is used or refused, never replaced; "fused" runs on a CPU under TRITON_INTERPRET=1, for tests.

    Raises:
        ValueError: the name is unknown, or the backend cannot run on this device or dtype.
    """
    if backend == "auto":
        backend = "fused" if device.type == "cuda" and _why_not_fused(device, dtype) is None else "chunked"
    elif backend not in BACKENDS:
        raise ValueError(f"backend: expected 'auto' or one of {BACKENDS}, got {backend!r}.")
    elif backend == "fused" and (reason := _why_not_fused(device, dtype)):
        raise ValueError(f"backend: 'fused' cannot run here: {reason}. Use backend='auto' or 'chunked'.")
    return importlib.import_module(f"{__name__}.{backend}")


def _why_not_fused(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the Triton kernels take float32, bfloat16 and float16, got {dtype}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if device.type != "cuda" and not interpreted:
        return f"the Triton kernels run on CUDA and ROCm devices, got {device.type!r}"
    return None
