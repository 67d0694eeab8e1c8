"""Token log-probs behind a head whose vocabulary is spread over the ranks of a process group."""

from typing import Any, Literal, overload

from torch import Tensor
from torch import distributed as dist

from dpop_kernels.logps.head import Head, Shard
from dpop_kernels.logps.linear import as_autocast, check_linear, head_token_logps, transform_of
from dpop_kernels.outputs import TokenStats


@overload
def vocab_parallel_token_logps(
    hidden_states: Tensor,
    weight_shard: Tensor,
    target_ids: Tensor,
    *,
    vocab_start: int,
    process_group: Any = ...,
    bias_shard: Tensor | None = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    sum_grad_hidden: bool = ...,
    return_stats: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def vocab_parallel_token_logps(
    hidden_states: Tensor,
    weight_shard: Tensor,
    target_ids: Tensor,
    *,
    vocab_start: int,
    process_group: Any = ...,
    bias_shard: Tensor | None = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    sum_grad_hidden: bool = ...,
    return_stats: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, TokenStats]: ...
def vocab_parallel_token_logps(
    hidden_states: Tensor,
    weight_shard: Tensor,
    target_ids: Tensor,
    *,
    vocab_start: int,
    process_group: Any = None,
    bias_shard: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    sum_grad_hidden: bool = True,
    return_stats: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, TokenStats | None]:
    """`linear_token_logps` of a head of which every rank holds some rows. Called by all ranks of the group together.

    The ranks exchange three fp64 values per token in forward (nine with statistics) and the gradient of the hidden
    states in backward; no logits and no weights travel. Every rank gets the same log-probs, to the bit. Forward and
    backward are two products of the slice's size with a frozen weight, four with a trainable one.

    Args:
        hidden_states: [N, H] float64, float32, bfloat16 or float16, the same on all ranks.
        weight_shard: [V_rank, H], this rank's rows of the head, same dtype and device. Slices may differ in size.
        target_ids: [N] int64 or int32, counted in the whole vocabulary, the same on all ranks.
        vocab_start: the vocabulary id of weight_shard's first row.
        process_group: the ranks that hold the head between them; None for all ranks.
        bias_shard: [V_rank] or None.
        logit_scale, softcap: as in `linear_token_logps`.
        sum_grad_hidden: sum the gradient of the hidden states over the ranks. Switch it off where the layer before
            does it (a tensor-parallel region whose entry all-reduces gradients): then each rank gets its own part.
        return_stats: as in `linear_token_logps`; of the whole vocabulary, the same on every rank.
        backend: "auto", or a name of `dpop_kernels.backends.BACKENDS` that has tiles.

    Returns:
        [N] log-probs in nats, fp32 (fp64 for fp64 input); with return_stats a tuple (log-probs, TokenStats). The
        gradients hold if every rank computes the same loss from them; that of weight_shard and bias_shard is complete
        on its own rank.

    Raises:
        ValueError: shapes, dtypes or devices disagree, the backend has no tiles or cannot run here, or (on the CPU) an
            id belongs to no slice or to several.
    """
    hidden_states, weight_shard, bias_shard = as_autocast(hidden_states, weight_shard, bias_shard)
    check_linear(hidden_states, weight_shard, target_ids, bias_shard, whole_vocabulary=False)
    if weight_shard.shape[0] == 0:
        raise ValueError("weight_shard: expected at least one row, got none. Spread the head over fewer ranks.")
    shard = Shard(vocab_start, dist.group.WORLD if process_group is None else process_group, sum_grad_hidden)
    head = Head(weight_shard, bias_shard, transform_of(logit_scale, softcap), shard=shard)
    logps, stats = head_token_logps(hidden_states, head, target_ids, with_stats=return_stats, backend=backend)
    return (logps, stats) if return_stats else logps
