"""The head's matrix products in torch: sums in fp32 or better on every device, and the blocks that they are made in."""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from dpop_kernels.logps.head import Head
from dpop_kernels.precision import accumulator_dtype


def product_dtype(tensor: Tensor) -> torch.dtype:
    """What the matrix products take: on a GPU the input's own dtype, with fp32 output; a CPU product of 16-bit
    inputs would round its output to 16 bits, so there they are widened, a block of W at a time."""
    return tensor.dtype if tensor.is_cuda else accumulator_dtype(tensor)


def matmul(left: Tensor, right: Tensor, *, out: Tensor) -> None:
    """out = left @ right, rounded once to out's dtype."""
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    elif out.dtype.itemsize < left.dtype.itemsize:
        out.copy_(torch.mm(left, right))
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


def matmul_add(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right in total's dtype, which is no shorter than the factors'."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif _adds_to_longer(total.device):
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += torch.mm(left, right, out_dtype=total.dtype)


@functools.cache
def _adds_to_longer(device: torch.device) -> bool:
    """Whether this torch adds a 16-bit product to an fp32 total in one call; older ones refuse the mixed dtypes."""
    total = torch.zeros(16, 16, device=device)
    factor = torch.zeros(16, 16, device=device, dtype=torch.bfloat16)
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True


def raw_logits(hidden_rows: Tensor, head: Head, *, out: Tensor) -> None:
    """h Wᵀ + a Bᵀ + bias [R, C], accumulated in out's dtype and never rounded to a shorter one.

    The adapter's product is made in out's dtype: at rank R it costs R / H of the other.
    """
    matmul(hidden_rows, head.weight.T, out=out)
    if head.adapter is not None:
        out.addmm_(head.adapter.states.to(out.dtype), head.adapter.weight.to(out.dtype).T)
    if head.bias is not None:
        out.add_(head.bias)


def chunks(total: int, size: int) -> Iterator[slice]:
    """0 .. total in slices of at most `size`."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def row_blocks(num_rows: int, size: int) -> list[slice]:
    """Blocks of at most `size` rows and about the same number each, so that none is too small to keep W's loads
    hidden; in steps of 128, the height of a product's output block."""
    num_blocks = max(1, -(-num_rows // size))
    even = 128 * -(-num_rows // (128 * num_blocks))
    return list(chunks(num_rows, min(size, max(1, even))))
