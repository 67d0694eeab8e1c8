"""From token log-probs and segment bounds to per-pair losses: the right side of the narrow waist.

One pair is three segments of scored tokens: *shared* (completion tokens that both answers begin with), *chosen tail*,
*rejected tail*. Their log-prob sums s, c, r give log π(y_w) = s + c and log π(y_l) = s + r; the margin is of c - r.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dpop_kernels.backends import select_backend
from dpop_kernels.losses.divergences import is_reverse_kl
from dpop_kernels.losses.formulas import DEFAULT_LOSS, LOSSES
from dpop_kernels.losses.on_sums import terms_of_segments
from dpop_kernels.losses.options import LossOptions
from dpop_kernels.losses.weighing import check_ld_alpha, check_pair_weights, length_desensitised, weighted_pairs
from dpop_kernels.losses.weights import check_options, losses_of_batch, resolve_losses
from dpop_kernels.outputs import PairLosses
from dpop_kernels.validate import check_float, check_same_device


def pair_loss(
    token_logps: Tensor,
    cu_seqlens: Tensor,
    ref_segment_logps: Tensor | None,
    *,
    loss_type: str | Sequence[str] = DEFAULT_LOSS,
    loss_weights: Sequence[float] | None = None,
    ld_alpha: float | None = None,
    pair_weights: Tensor | None = None,
    backend: str = "auto",
    **options: Any,
) -> PairLosses:
    """Loss and metrics of every pair from packed token log-probs.

    On a GPU, a loss that has a kernel ("dpop" and "dpo"), alone, is one launch forward and one backward; other losses
    and sums of several are one launch for the segments' sums and torch operations on [B] from there. Sums run in a
    fixed order, so the same input gives the same bits.

    Args:
        token_logps: [N] log-probs of the scored tokens, in nats, float32 or float64: segment after segment in the
            order shared, chosen tail, rejected tail, pair by pair.
        cu_seqlens: [3B + 1] int32 or int64, non-decreasing: segment i holds tokens cu_seqlens[i] to
            cu_seqlens[i + 1]. Segments may be empty. Checked on the CPU; on a GPU the check would cost a sync.
        ref_segment_logps: [B, 3] the reference model's sums of the same segments. Where only whole answers are known,
            [0, ref_chosen_logps, ref_rejected_logps] gives the same losses. None where no loss needs a reference
            ("sft" alone): log-ratios and margins of the result are then those of the log-probs themselves.
        loss_type: a name of `formulas.LOSSES` or TRL's name for it, or several: their weighted sum.
        loss_weights: one weight ≥ 0 for each loss; 1 each by default.
        ld_alpha: α in [0, 1], by which tokens count in log-ratios from where an answer is longer than the other one;
            `ref_segment_logps` are then sums of the reference's `weighing.length_desensitised`. None: 1.
        pair_weights: [B] finite numbers >= 0 that multiply the pairs' losses, without gradient: the mean over a batch
            is then losses.sum() / pair_weights.sum(). None: 1 each. Checked on the CPU; on a GPU it would cost a sync.
        backend: "auto", or a name of `dpop_kernels.backends.BACKENDS`.
        options: the hyper-parameters, by the names and with the defaults of `losses.options.LossOptions`: beta,
            dpop_lambda, dead_zone, label_smoothing, f_divergence_type, ... One that no chosen loss reads is refused.

    Returns:
        `PairLosses`, all [B]; only `losses` carries gradient (to token_logps), and only it is weighted.

    Raises:
        ValueError: shapes, dtypes or devices disagree, the bounds do not fit, a hyper-parameter is out of range, a
            loss is unknown, weights do not fit, or a loss needs the reference that is None.
        TypeError: a hyper-parameter that there is not.
    """
    if pair_weights is not None:
        check_pair_weights(pair_weights, (cu_seqlens.shape[0] - 1) // 3, token_logps)
    return pair_loss_terms(
        token_logps,
        cu_seqlens,
        ref_segment_logps,
        loss_weights=resolve_losses(loss_type, loss_weights),
        options=LossOptions(**options),
        ld_alpha=ld_alpha,
        pair_weights=pair_weights,
        backend=backend,
    )[0]


def pair_loss_terms(
    token_logps: Tensor,
    cu_seqlens: Tensor,
    ref_segment_logps: Tensor | None,
    *,
    loss_weights: Mapping[str, float],
    options: LossOptions,
    ld_alpha: float | None = None,
    pair_weights: Tensor | None = None,
    backend: str = "auto",
) -> tuple[PairLosses, dict[str, Tensor]]:
    """`pair_loss` with its terms: what a training loop logs of each.

    Args:
        token_logps, cu_seqlens, ref_segment_logps, ld_alpha, pair_weights, backend: see `pair_loss`.
        loss_weights: the weight of each loss by our name for it, as `resolve_losses` gives them.
        options: the hyper-parameters.

    Returns:
        `PairLosses` of the weighted sum, and each loss [B] by its name, without gradient: times the pair's weight and
        not its own.

    Raises:
        ValueError: as `pair_loss`.
    """
    check_options(options, list(loss_weights))
    check_ld_alpha(ld_alpha, loss_weights)
    if pair_weights is not None and (of_batch := losses_of_batch(list(loss_weights))):
        raise ValueError(
            f"pair_weights: expected None with {of_batch[0]!r}, whose values belong to no single pair, got "
            "some. Choose a loss of single pairs."
        )
    if ref_segment_logps is None:
        needing = [name for name in loss_weights if LOSSES[name].needs_reference]
        if needing:
            raise ValueError(f"ref_segment_logps: expected shape [B, 3], got None. {needing} need a reference.")
        num_pairs = (cu_seqlens.shape[0] - 1) // 3
        ref_segment_logps = token_logps.new_zeros(num_pairs, 3)
    _check(token_logps, cu_seqlens, ref_segment_logps)
    pairs, terms = _terms(
        token_logps, cu_seqlens, ref_segment_logps.to(token_logps.dtype), loss_weights, options, ld_alpha, backend
    )
    return (pairs, terms) if pair_weights is None else weighted_pairs(pairs, terms, pair_weights)


def segment_sums(token_logps: Tensor, cu_seqlens: Tensor, *, backend: str = "auto") -> Tensor:
    """Sums of token_logps [N] over the segments of cu_seqlens [S + 1] -> [S], differentiable, in a fixed order.

    Raises:
        ValueError: shapes or devices disagree, or (on the CPU) the bounds do not fit.
    """
    check_float("token_logps", token_logps, "[N]")
    _check_bounds(token_logps, cu_seqlens)
    return select_backend(backend, token_logps.device, token_logps.dtype).segment_sums(token_logps, cu_seqlens)


def _terms(
    token_logps: Tensor,
    cu_seqlens: Tensor,
    ref_segment_logps: Tensor,
    loss_weights: Mapping[str, float],
    options: LossOptions,
    ld_alpha: float | None,
    backend: str,
) -> tuple[PairLosses, dict[str, Tensor]]:
    implementation = select_backend(backend, token_logps.device, token_logps.dtype)
    weighted_logps = length_desensitised(token_logps, cu_seqlens, ld_alpha)
    has_kernels = is_reverse_kl(options.f_divergence_type, options.f_alpha_divergence_coef)
    if len(loss_weights) == 1 and implementation.RUNS_TRITON and has_kernels:
        ((name, weight),) = loss_weights.items()
        if (kernel := LOSSES[name].kernel) is not None:
            pairs = kernel(weighted_logps, cu_seqlens, ref_segment_logps, options)
            terms = {name: pairs.losses.detach()}
            return (pairs if weight == 1 else pairs._replace(losses=weight * pairs.losses)), terms
    segment_logps = implementation.segment_sums(weighted_logps, cu_seqlens).view(-1, 3)
    unweighted_logps = None
    if weighted_logps is not token_logps:
        unweighted_logps = implementation.segment_sums(token_logps, cu_seqlens).view(-1, 3)
    segment_lengths = torch.full_like(segment_logps, torch.nan)
    if any(LOSSES[name].reads_lengths for name in loss_weights):
        segment_lengths = cu_seqlens.diff().view(-1, 3)
    return terms_of_segments(
        loss_weights, segment_logps, ref_segment_logps, segment_lengths, options, unweighted_logps=unweighted_logps
    )


def _check(token_logps: Tensor, cu_seqlens: Tensor, ref_segment_logps: Tensor) -> None:
    check_float("token_logps", token_logps, "[N]")
    if token_logps.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"token_logps: expected float32 or float64, got {token_logps.dtype}. "
            "Sums of log-probs in 16 bits are off by nats."
        )
    _check_bounds(token_logps, cu_seqlens)
    check_float("ref_segment_logps", ref_segment_logps, "[B, 3]")
    check_same_device("ref_segment_logps", ref_segment_logps, "token_logps", token_logps)
    if cu_seqlens.shape[0] != 3 * ref_segment_logps.shape[0] + 1 or ref_segment_logps.shape[1] != 3:
        raise ValueError(
            f"ref_segment_logps: expected shape [B, 3] with cu_seqlens [3B + 1], got {list(ref_segment_logps.shape)} "
            f"with {list(cu_seqlens.shape)}."
        )


def _check_bounds(token_logps: Tensor, cu_seqlens: Tensor) -> None:
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens: expected int32 or int64 of shape [S + 1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}."
        )
    check_same_device("cu_seqlens", cu_seqlens, "token_logps", token_logps)
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        if first < 0 or last > token_logps.shape[0] or bool((cu_seqlens.diff() < 0).any()):
            raise ValueError(
                f"cu_seqlens: expected non-decreasing bounds within [0, {token_logps.shape[0]}], "
                f"got {first} to {last}, smallest step {int(cu_seqlens.diff().min()) if len(cu_seqlens) > 1 else 0}."
            )
