"""Per-token log-probs straight from hidden states and the head's weight: the logits never exist as a whole."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from dpop_kernels.backends import select_backend
from dpop_kernels.backends.protocol import TrainsEntropy
from dpop_kernels.logps.head import Head, LogitTransform
from dpop_kernels.logps.tiling import tiled_token_logps
from dpop_kernels.outputs import TokenStats
from dpop_kernels.validate import check_float, check_ids, check_same, check_same_device, check_softcap_and_scale


@overload
def linear_token_logps(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    target_ids: Tensor,
    *,
    bias: Tensor | None = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    return_stats: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def linear_token_logps(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    target_ids: Tensor,
    *,
    bias: Tensor | None = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    return_stats: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, TokenStats]: ...
def linear_token_logps(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    target_ids: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    return_stats: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, TokenStats | None]:
    """log softmax(z)[n, target_ids[n]] with z = softcap · tanh(logit_scale · (h Wᵀ + bias) / softcap).

    Logits exist one tile at a time, in fp32 straight from the accumulator. With a frozen head (weight and bias
    without gradient) the whole of forward and backward is two matrix products; with a trainable head, four.

    Args:
        hidden_states: [N, H] float64, float32, bfloat16 or float16: the states that predict the scored tokens.
        lm_head_weight: [V, H], same dtype and device. Under torch.autocast both are cast to the autocast dtype, as
            torch's own linear layer does.
        target_ids: [N] int64 or int32 in [0, V). Checked on the CPU; on a GPU the check would cost a sync.
        bias: [V] or None.
        logit_scale: multiplies h Wᵀ + bias (Cohere's logit_scale; 1 / Granite's logits_scaling).
        softcap: Gemma's final_logit_softcapping, in logit units, or None.
        return_stats: also return `TokenStats` (entropy, mean logit, top-1 hit, log Σ p²), without
            gradient.
        backend: "auto", or a name of `dpop_kernels.backends.BACKENDS`.

    Returns:
        [N] log-probs in nats, fp32 (fp64 for fp64 input); with return_stats a tuple (log-probs, TokenStats).

    Raises:
        ValueError: shapes, dtypes or devices disagree, an id is out of range, or the backend cannot run here.
    """
    hidden_states, lm_head_weight, bias = as_autocast(hidden_states, lm_head_weight, bias)
    check_linear(hidden_states, lm_head_weight, target_ids, bias)
    head = Head(lm_head_weight, bias, transform_of(logit_scale, softcap))
    logps, stats = head_token_logps(hidden_states, head, target_ids, with_stats=return_stats, backend=backend)
    return (logps, stats) if return_stats else logps


def head_token_logps(
    hidden_states: Tensor,
    head: Head,
    target_ids: Tensor,
    *,
    with_stats: bool = False,
    trains_entropy: TrainsEntropy = "never",
    backend: str = "auto",
) -> tuple[Tensor, TokenStats | None]:
    """The way that all public functions on a head take, with what they have checked: tiles, where the backend has them.

    Raises:
        ValueError: the backend cannot run here, or has no tiles and the head is sliced.
    """
    implementation: Any = select_backend(backend, hidden_states.device, hidden_states.dtype)
    if implementation.TILES is None and head.shard is not None:
        raise ValueError(
            f"backend: expected 'auto' or one with tiles for a sliced head, got {backend!r}. "
            "Name another, or call linear_token_logps on the slices put together."
        )
    stats: Any = {"with_stats": with_stats, "trains_entropy": trains_entropy}
    with torch.autocast(hidden_states.device.type, enabled=False):
        if implementation.TILES is None:
            return implementation.head_token_logps(hidden_states, head, target_ids.long(), **stats)
        return tiled_token_logps(implementation.TILES, hidden_states, head, target_ids, **stats)


def transform_of(logit_scale: float, softcap: float | None) -> LogitTransform:
    """
    Raises:
        ValueError: see `check_softcap_and_scale`.
    """
    check_softcap_and_scale(logit_scale, softcap)
    return LogitTransform(float(logit_scale), None if softcap is None else float(softcap))


def as_autocast(hidden_states: Tensor, *others: Any) -> tuple[Any, ...]:
    """The tensors (or None) in the dtype that torch.autocast gives a linear layer; as they are outside of it."""
    device_type = hidden_states.device.type
    if not torch.is_autocast_enabled(device_type) or hidden_states.dtype == torch.float64:
        return hidden_states, *others
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in (hidden_states, *others))


def check_linear(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    target_ids: Tensor,
    bias: Tensor | None,
    *,
    whole_vocabulary: bool = True,
) -> None:
    """
    Raises:
        ValueError: shapes, dtypes or devices disagree, or an id is not in [0, V); with `whole_vocabulary` off, ids may
            lie beyond the V rows that are here.
    """
    check_float("hidden_states", hidden_states, "[N, H]")
    check_float("lm_head_weight", lm_head_weight, "[V, H]")
    if lm_head_weight.shape[1] != hidden_states.shape[1]:
        raise ValueError(
            f"lm_head_weight: expected shape [V, {hidden_states.shape[1]}] to match hidden_states, "
            f"got {list(lm_head_weight.shape)}. The weight is stored as nn.Linear stores it, [V, H]."
        )
    check_same("lm_head_weight", lm_head_weight, "hidden_states", hidden_states)
    check_same_device("target_ids", target_ids, "hidden_states", hidden_states)
    vocab_size = lm_head_weight.shape[0] if whole_vocabulary else 1 << 31
    check_ids("target_ids", target_ids, (hidden_states.shape[0],), vocab_size)
    if bias is not None:
        check_float("bias", bias, "[V]")
        check_same("bias", bias, "lm_head_weight", lm_head_weight)
        if bias.shape[0] != lm_head_weight.shape[0]:
            raise ValueError(f"bias: expected shape [{lm_head_weight.shape[0]}], got {list(bias.shape)}.")
