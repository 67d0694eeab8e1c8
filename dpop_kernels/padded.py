"""DPOP straight from padded model outputs and labels: chosen rows first, then rejected, as TRL stacks them."""

from typing import NamedTuple

import torch
from torch import Tensor

from dpop_kernels.backends import select_backend
from dpop_kernels.logps.head import Head
from dpop_kernels.logps.linear import as_autocast, check_linear, head_token_logps, transform_of
from dpop_kernels.logps.logits import token_logps
from dpop_kernels.logps.pair_tiles import linear_pair_loss, plan_tiles
from dpop_kernels.losses.on_sums import Reduction, dpop_loss, reduce_losses
from dpop_kernels.losses.options import LossOptions, check_hyperparameters
from dpop_kernels.losses.pair_loss import segment_sums
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
    dead_zone: float = 0.0,
    label_smoothing: float = 0.0,
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
        dead_zone, label_smoothing: see `dpop_loss`.
        reduction: "mean", "sum" or "none".
        inplace_backward: write the gradient over the logits' storage (see `token_logps`).
        backend: "auto", or a name of `dpop_kernels.backends.BACKENDS`.

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
        _check_completions(scored.sum(dim=1).tolist())
    logps = token_logps(
        logits.reshape(num_rows * num_positions, vocab_size),
        target_ids.masked_fill(~scored, 0).flatten(),
        inplace_backward=inplace_backward,
        backend=backend,
    )
    sums = torch.where(scored, logps.view(num_rows, num_positions), 0).sum(dim=1)
    chosen_logps, rejected_logps = sums.chunk(2)
    return dpop_loss(
        chosen_logps,
        rejected_logps,
        ref_chosen_logps.to(sums.dtype),
        ref_rejected_logps.to(sums.dtype),
        beta=beta,
        dpop_lambda=dpop_lambda,
        dead_zone=dead_zone,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )


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
    dead_zone: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    backend: str = "auto",
) -> Tensor:
    """DPOP loss of a padded batch of hidden states; the logits exist a tile at a time.

    Only labelled positions reach the head. Finding them on a GPU costs two syncs; a training loop that knows its
    positions on the CPU avoids them with `linear_token_logps` and `pair_loss`, as the trainer does.

    A frozen head takes two matrix products, forward and backward together. A trainable head takes three where the
    loss is one scalar and whole pairs fit the workspace, because the gradient is then formed in the forward; else
    four, with the same numbers to rounding (see docs/kernels.md).

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
        dead_zone, label_smoothing: see `dpop_loss`.
        reduction: "mean", "sum" or "none".
        backend: "auto", or a name of `dpop_kernels.backends.BACKENDS`.

    Returns:
        Scalar, or [B] for reduction="none"; fp32 (fp64 for fp64 input).

    Raises:
        ValueError: shapes, dtypes or devices disagree, a completion is empty, or (on the CPU) a label is out of range.

    Source:
        arXiv:2402.13228, equation 3; see `dpop_loss`.
    """
    check_float("hidden_states", hidden_states, "[2B, T, H]")
    _check_labels(labels, "hidden_states", hidden_states)
    _check_references(ref_chosen_logps, ref_rejected_logps, labels)
    check_hyperparameters(LossOptions(beta, dpop_lambda, dead_zone, label_smoothing))
    transform = transform_of(logit_scale, softcap)
    tokens = _scored_tokens(labels)
    hidden_rows, lm_head_weight, bias = as_autocast(hidden_states[tokens.rows, tokens.positions], lm_head_weight, bias)
    check_linear(hidden_rows, lm_head_weight, tokens.target_ids, bias)
    implementation = select_backend(backend, hidden_rows.device, hidden_rows.dtype)

    def losses_of_sums(sums: Tensor, pairs: slice) -> Tensor:
        chosen_logps, rejected_logps = sums.unbind(dim=-1)
        return dpop_loss(
            chosen_logps,
            rejected_logps,
            ref_chosen_logps[pairs].to(sums.dtype),
            ref_rejected_logps[pairs].to(sums.dtype),
            beta=beta,
            dpop_lambda=dpop_lambda,
            dead_zone=dead_zone,
            label_smoothing=label_smoothing,
            reduction="none",
        )

    tiles = None
    is_one_scalar = reduction in ("mean", "sum") and not _needs_grad(ref_chosen_logps, ref_rejected_logps)
    if _needs_grad(lm_head_weight, bias) and is_one_scalar and implementation.TILES is not None:
        tiles = plan_tiles(implementation.TILES, hidden_rows, lm_head_weight, tokens.pair_lengths)
    head = Head(lm_head_weight, bias, transform)
    if tiles is None:
        logps, _ = head_token_logps(hidden_rows, head, tokens.target_ids, backend=backend)
        sums = segment_sums(logps, tokens.cu_seqlens, backend=backend).view(-1, 2)
        return reduce_losses(losses_of_sums(sums, slice(None)), reduction)
    with torch.autocast(hidden_rows.device.type, enabled=False):
        return linear_pair_loss(
            implementation,
            hidden_rows,
            head,
            tokens.target_ids,
            tokens.cu_seqlens,
            tiles=tiles,
            losses_of_sums=losses_of_sums,
            reduction=reduction,
        )


class _ScoredTokens(NamedTuple):
    """The N labelled tokens, pair by pair: those of the chosen answer, then those of the rejected one."""

    rows: Tensor  # [N] of the 2B rows
    positions: Tensor  # [N] of the T positions, of the states that predict the tokens
    target_ids: Tensor  # [N]
    cu_seqlens: Tensor  # [2B + 1] bounds of the answers
    pair_lengths: list[int]  # [B] tokens of both answers


def _scored_tokens(labels: Tensor) -> _ScoredTokens:
    num_pairs = labels.shape[0] // 2
    target_ids = _shift(labels).unflatten(0, (2, num_pairs)).transpose(0, 1)  # [B, 2, T]
    scored = target_ids != IGNORE_INDEX
    lengths = scored.sum(dim=2)
    lengths_on_host = lengths.tolist()
    _check_completions([chosen for chosen, _ in lengths_on_host] + [rejected for _, rejected in lengths_on_host])
    pairs, sides, positions = scored.nonzero(as_tuple=True)
    return _ScoredTokens(
        rows=sides * num_pairs + pairs,
        positions=positions,
        target_ids=target_ids[pairs, sides, positions],
        cu_seqlens=torch.nn.functional.pad(lengths.flatten().cumsum(dim=0), (1, 0)),
        pair_lengths=[chosen + rejected for chosen, rejected in lengths_on_host],
    )


def _shift(labels: Tensor) -> Tensor:
    """[2B, T] -> [2B, T]: position t holds the label of t + 1, the last position none. Logits need no copy this way."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _check_labels(labels: Tensor, name: str, states: Tensor) -> None:
    if labels.shape != states.shape[:2]:
        raise ValueError(f"labels: expected shape {list(states.shape[:2])} as {name} has, got {list(labels.shape)}.")
    if labels.shape[0] % 2 or labels.shape[0] == 0:
        raise ValueError(f"labels: expected 2B rows, chosen first and then rejected, got {labels.shape[0]} rows.")
    if labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"labels: expected int64 or int32, got {labels.dtype}.")
    check_same_device("labels", labels, name, states)


def _check_references(ref_chosen_logps: Tensor, ref_rejected_logps: Tensor, labels: Tensor) -> None:
    num_pairs = labels.shape[0] // 2
    for name, tensor in (("ref_chosen_logps", ref_chosen_logps), ("ref_rejected_logps", ref_rejected_logps)):
        if tuple(tensor.shape) != (num_pairs,):
            raise ValueError(
                f"{name}: expected shape [{num_pairs}], one sum for each pair of rows, got {list(tensor.shape)}."
            )
        check_same_device(name, tensor, "labels", labels)


def _check_completions(lengths: list[int]) -> None:
    empty = [row for row, length in enumerate(lengths) if length == 0]
    if empty:
        raise ValueError(
            f"labels: expected at least one label in every row (after position 0, which nothing predicts), got none in "
            f"rows {empty[:8]}. Drop pairs with an empty or fully truncated completion."
        )
