"""Checks of tensor arguments shared by the public functions. All run on shapes; values are read on the CPU only."""

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_float(name: str, tensor: Tensor, dims: str) -> None:
    """
    Raises:
        ValueError: the tensor's rank is not that of `dims` (such as "[N, V]"), or its dtype is no float.
    """
    rank = dims.count(",") + 1
    if tensor.dim() != rank:
        remedy = " Flatten all but the last dimension." if rank == 2 < tensor.dim() else ""
        raise ValueError(f"{name}: expected shape {dims}, got {list(tensor.shape)}.{remedy}")
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name}: expected float64, float32, bfloat16 or float16, got {tensor.dtype}.")


def check_same(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """
    Raises:
        ValueError: the two tensors differ in dtype or device.
    """
    check_same_device(name, tensor, other_name, other)
    if tensor.dtype != other.dtype:
        raise ValueError(
            f"{name}: expected dtype {other.dtype} as {other_name} has, got {tensor.dtype}. "
            "Cast one of them, or call under torch.autocast."
        )


def check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """
    Raises:
        ValueError: the two tensors are on different devices.
    """
    if tensor.device != other.device:
        raise ValueError(f"{name}: expected device {other.device} as {other_name} has, got {tensor.device}.")


def check_ids(name: str, ids: Tensor, shape: tuple[int, ...], vocab_size: int) -> None:
    """Shape and integer dtype of token ids and, where reading them costs no device sync, their range.

    Raises:
        ValueError: the shape is not `shape`, the dtype is no integer, or (on the CPU) an id is outside [0, V).
    """
    if tuple(ids.shape) != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(ids.shape)}.")
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name}: expected int64 or int32, got {ids.dtype}.")
    if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
        low, high = ids.aminmax()
        if low < 0 or high >= vocab_size:
            bad = int(low) if low < 0 else int(high)
            raise ValueError(
                f"{name}: expected ids in [0, {vocab_size}), got {bad}. "
                "Drop masked positions (-100) before the call, and check that tokenizer and model belong together."
            )


def check_softcap_and_scale(logit_scale: float, softcap: float | None) -> None:
    """
    Raises:
        ValueError: softcap is not positive, or logit_scale is zero or not finite.
    """
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap: expected None or a finite value > 0, got {softcap}.")
    if logit_scale == 0 or not abs(logit_scale) < float("inf"):
        raise ValueError(f"logit_scale: expected a finite value other than 0, got {logit_scale}.")
