"""DPOP straight from padded model outputs and labels: chosen rows first, then rejected, as TRL stacks them."""

import torch
from torch import Tensor

from dpop_kernels.linear_logps import linear_token_logps
from dpop_kernels.losses import Reduction, dpop_loss
from dpop_kernels.pair_loss import segment_sums
from dpop_kernels.token_logps import token_logps
from dpop_kernels.validate import check_float, check_same_device

IGNORE_INDEX = -100


def logits_dpop_loss(
    logits: Tensor,
    labels: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.3,
    dpop_lambda: float = 50.0,
    reduction: Reduction = "mean",
    inplace_backward: bool = False,
    backend: str = "auto",
) -> Tensor:
    """DPOP loss of a padded batch of logits; no softmax over the vocabulary is materialised, and nothing syncs.

    Args:
        logits: [2B, T, V], the model's output: rows 0..B-1 the chosen answers, rows B..2B-1 the rejected ones.
            logits[:, t] predicts labels[:, t + 1], as in transformers (nothing is to be shifted by the caller).
        labels: [2B, T] int64, aligned with input_ids; -100 on prompt and padding.
        ref_chosen_logps: [B] reference log-probs of the chosen answers, summed over the same tokens, in nats.
        ref_rejected_logps: [B] the same for the rejected answers.
        beta: β > 0.
        dpop_lambda: λ ≥ 0.
        reduction: "mean", "sum" or "none".
        inplace_backward: write the gradient over the logits' storage (see `token_logps`).
        backend: "auto", "reference", "chunked" or "fused".

    Returns:
        Scalar, or [B] for reduction="none"; fp32 (fp64 for fp64 logits).

    Raises:
        ValueError: shapes, dtypes or devices disagree, or (on the CPU) a label is out of range or a completion empty.

    Source:
        arXiv:2402.13228, equation 3; see `dpop_loss`.
    """
    check_float("logits", logits, "[2B, T, V]")
    _check_labels(labels, "logits", logits)
    num_rows, num_positions, vocab_size = logits.shape
    target_ids = _shift(labels)
    scored = target_ids != IGNORE_INDEX
    if labels.device.type == "cpu":
        _check_completions(scored)
    logps = token_logps(
        logits.reshape(num_rows * num_positions, vocab_size),
        target_ids.masked_fill(~scored, 0).flatten(),
        inplace_backward=inplace_backward,
        backend=backend,
    )
    sums = torch.where(scored, logps.view(num_rows, num_positions), 0).sum(dim=1)
    return _loss_of_rows(sums, ref_chosen_logps, ref_rejected_logps, beta, dpop_lambda, reduction)


def linear_dpop_loss(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    beta: float = 0.3,
    dpop_lambda: float = 50.0,
    reduction: Reduction = "mean",
    backend: str = "auto",
) -> Tensor:
    """DPOP loss of a padded batch of hidden states; the logits are never materialised.

    Only labelled positions reach the head. Finding them on a GPU costs one sync; a training loop that knows its
    positions on the CPU avoids it with `linear_token_logps` and `pair_loss`, as the trainer does.

    Args:
        hidden_states: [2B, T, H], the states before the head: rows 0..B-1 chosen, rows B..2B-1 rejected.
            hidden_states[:, t] predicts labels[:, t + 1].
        lm_head_weight: [V, H].
        labels: [2B, T] int64, aligned with input_ids; -100 on prompt and padding.
        ref_chosen_logps: [B] reference log-probs of the chosen answers, summed over the same tokens, in nats.
        ref_rejected_logps: [B] the same for the rejected answers.
        bias, logit_scale, softcap: see `linear_token_logps`.
        beta: β > 0.
        dpop_lambda: λ ≥ 0.
        reduction: "mean", "sum" or "none".
        backend: "auto", "reference", "chunked" or "fused".

    Returns:
        Scalar, or [B] for reduction="none"; fp32 (fp64 for fp64 input).

    Raises:
        ValueError: shapes, dtypes or devices disagree, a completion is empty, or (on the CPU) a label is out of range.

    Source:
        arXiv:2402.13228, equation 3; see `dpop_loss`.
    """
    check_float("hidden_states", hidden_states, "[2B, T, H]")
    _check_labels(labels, "hidden_states", hidden_states)
    target_ids = _shift(labels)
    scored = target_ids != IGNORE_INDEX
    _check_completions(scored)
    score_positions = scored.flatten().nonzero().squeeze(-1)
    logps = linear_token_logps(
        hidden_states.flatten(0, 1)[score_positions],
        lm_head_weight,
        target_ids.flatten()[score_positions],
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        backend=backend,
    )
    cu_seqlens = torch.nn.functional.pad(scored.sum(dim=1).cumsum(dim=0), (1, 0))
    sums = segment_sums(logps, cu_seqlens, backend=backend)
    return _loss_of_rows(sums, ref_chosen_logps, ref_rejected_logps, beta, dpop_lambda, reduction)


def _shift(labels: Tensor) -> Tensor:
    """[2B, T] -> [2B, T]: position t holds the label of t + 1, the last position none. Logits need no copy this way."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def _loss_of_rows(
    sums: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
    dpop_lambda: float,
    reduction: Reduction,
) -> Tensor:
    chosen_logps, rejected_logps = sums.chunk(2)
    return dpop_loss(
        chosen_logps,
        rejected_logps,
        ref_chosen_logps.to(sums.dtype),
        ref_rejected_logps.to(sums.dtype),
        beta=beta,
        dpop_lambda=dpop_lambda,
        reduction=reduction,
    )


def _check_labels(labels: Tensor, name: str, states: Tensor) -> None:
    if labels.shape != states.shape[:2]:
        raise ValueError(f"labels: expected shape {list(states.shape[:2])} as {name} has, got {list(labels.shape)}.")
    if labels.shape[0] % 2 or labels.shape[0] == 0:
        raise ValueError(f"labels: expected 2B rows, chosen first and then rejected, got {labels.shape[0]} rows.")
    if labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"labels: expected int64 or int32, got {labels.dtype}.")
    check_same_device("labels", labels, name, states)


def _check_completions(scored: Tensor) -> None:
    empty = (~scored.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"labels: expected at least one label in every row (after position 0, which nothing predicts), got none in "
            f"rows {empty[:8]}. Drop pairs with an empty or fully truncated completion."
        )
