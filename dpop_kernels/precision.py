"""In what precision sums are kept: fp32, or fp64 for fp64."""

import torch
from torch import Tensor


def accumulator_dtype(tensor: Tensor) -> torch.dtype:
    """What sums over the tensor's entries, and products with it, are kept in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def at_least_fp32(tensor: Tensor) -> Tensor:
    """The tensor in that precision."""
    return tensor.to(accumulator_dtype(tensor))
