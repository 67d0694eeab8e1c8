"""The head's matrix products in torch: sums in fp32 or better on every device, and the blocks that they are made in."""

from collections.abc import Iterator

import torch
from torch import Tensor

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
    elif out.is_contiguous():
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:
        out.copy_(torch.mm(left, right, out_dtype=out.dtype))


def matmul_add(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right in total's dtype, which is no shorter than the factors'."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += torch.mm(left, right, out_dtype=total.dtype)


def raw_logits(
    hidden_rows: Tensor,  # [R, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    *,
    block_columns: int,
    out: Tensor,  # [R, V]
) -> None:
    """h Wᵀ + bias, accumulated in out's dtype and never rounded to a shorter one."""
    dtype = product_dtype(hidden_rows)
    hidden_rows = hidden_rows.to(dtype)
    for columns in weight_blocks(weight, dtype, block_columns):
        matmul(hidden_rows, weight[columns].to(dtype).T, out=out[:, columns])
    if bias is not None:
        out.add_(bias)


def weight_blocks(weight: Tensor, dtype: torch.dtype, block_columns: int) -> Iterator[slice]:
    """Slices of the vocabulary: one for all where W already has the dtype, else blocks to convert."""
    vocab_size = weight.shape[0]
    return chunks(vocab_size, max(1, vocab_size) if weight.dtype == dtype else block_columns)


def chunks(total: int, size: int) -> Iterator[slice]:
    """0 .. total in slices of at most `size`."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))
