"""Per-token log-probs from logits that already exist."""

from typing import Literal, overload

from torch import Tensor

from dpop_kernels.backends import select_backend
from dpop_kernels.outputs import TokenStats
from dpop_kernels.validate import check_float, check_ids, check_same_device


@overload
def token_logps(
    logits: Tensor,
    target_ids: Tensor,
    *,
    inplace_backward: bool = ...,
    return_stats: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def token_logps(
    logits: Tensor,
    target_ids: Tensor,
    *,
    inplace_backward: bool = ...,
    return_stats: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, TokenStats]: ...
def token_logps(
    logits: Tensor,
    target_ids: Tensor,
    *,
    inplace_backward: bool = False,
    return_stats: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, TokenStats | None]:
    """log softmax(logits)[n, target_ids[n]] for every row, without an [N, V] softmax.

    The logits are read once forward; the gradient reads them once more and is written once. Arithmetic is in fp32
    whatever the logits' dtype, and confident tokens keep their relative accuracy (1 - p is never computed as a
    difference).

    Args:
        logits: [N, V] float64, float32, bfloat16 or float16. -inf entries (a masked vocabulary) are fine.
        target_ids: [N] int64 or int32 in [0, V). Checked on the CPU; on a GPU the check would cost a sync.
        inplace_backward: write the gradient over the logits' own storage, which saves [N, V]. The logits hold the
            gradient after backward and must not be used by anything else.
        return_stats: also return `TokenStats` (entropy, mean logit, top-1 hit, log Σ p²), without
            gradient.
        backend: "auto", or a name of `dpop_kernels.backends.BACKENDS`.

    Returns:
        [N] log-probs in nats, fp32 (fp64 for fp64 logits); with return_stats a tuple (log-probs, TokenStats).

    Raises:
        ValueError: shapes, dtypes or devices disagree, an id is out of range, or the backend cannot run here.
    """
    check_float("logits", logits, "[N, V]")
    check_same_device("target_ids", target_ids, "logits", logits)
    check_ids("target_ids", target_ids, (logits.shape[0],), logits.shape[1])
    implementation = select_backend(backend, logits.device, logits.dtype)
    logps, stats = implementation.token_logps(
        logits, target_ids, inplace_backward=inplace_backward, with_stats=return_stats
    )
    return (logps, stats) if return_stats else logps
