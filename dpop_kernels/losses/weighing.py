"""What weighs tokens before a loss, and pairs after it.

log p[t] -> α · log p[t]     of the tokens from where an answer is longer than its pair's other one (LD-DPO)
loss[b]  -> w[b] · loss[b]   w a number of the pair's own, or exp(mean over y_w of log p - log Σ p²) times the same of
                             y_l: how likely its answers are to the policy (WPO)
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from dpop_kernels.losses.formulas import LOSSES
from dpop_kernels.outputs import PairLosses
from dpop_kernels.validate import check_float, check_same_device


def length_desensitised(token_logps: Tensor, cu_seqlens: Tensor, ld_alpha: float | None) -> Tensor:
    """Log-probs of tokens that count by α from where an answer is longer than the other one of its pair.

    Args:
        token_logps: [N], segment after segment as `pair_loss` has them; of the policy or the reference.
        cu_seqlens: [3B + 1] the bounds of the segments.
        ld_alpha: α in [0, 1]; None or 1 leaves all as they are.

    Returns:
        [N] differentiable: of either answer as many tokens as the shorter one has as they are, α · log p of the others.

    Source:
        Liu et al. 2024, "Length Desensitization in Direct Preference Optimization", arXiv:2409.06411; as TRL 1.16.
    """
    if ld_alpha is None or ld_alpha == 1 or cu_seqlens.shape[0] == 1:
        return token_logps
    lengths = cu_seqlens.diff().view(-1, 3)
    # what both begin with stands in front of either tail, so that the shorter tail is the shorter answer's
    common = torch.minimum(lengths[:, 1], lengths[:, 2])
    ends = cu_seqlens[:-1] + torch.stack([lengths[:, 0], common, common], dim=1).flatten()
    positions = torch.arange(token_logps.shape[0], device=token_logps.device)
    segments = torch.searchsorted(cu_seqlens.long(), positions, right=True) - 1
    is_beyond = positions >= ends[segments.clamp(0, ends.shape[0] - 1)]
    # not multiplied by 0: a token that does not count may be impossible
    weighted = ld_alpha * token_logps if ld_alpha else torch.zeros_like(token_logps)
    return torch.where(is_beyond, weighted, token_logps)


def check_ld_alpha(ld_alpha: float | None, loss_types: Iterable[str]) -> None:
    """
    Raises:
        ValueError: α is outside [0, 1], or no loss is of log-ratios, which alone it weighs.
    """
    if ld_alpha is None or ld_alpha == 1:
        return
    if not 0 <= ld_alpha <= 1:
        raise ValueError(
            f"ld_alpha: expected None or a number in [0, 1], got {ld_alpha}. 1 is the loss as it is; 0 leaves out the "
            "tokens beyond the shorter answer's length."
        )
    names = list(loss_types)
    if not any(LOSSES[name].needs_reference for name in names):
        raise ValueError(
            f"ld_alpha: expected None with loss_type {names}, which has no log-ratios for it to weigh, got {ld_alpha}. "
            "Leave it out, or add a loss with a reference."
        )


def wpo_weights(aligned_sums: Tensor, cu_seqlens: Tensor) -> Tensor:
    """What WPO multiplies the losses of pairs by.

    Args:
        aligned_sums: [B, 3] sums over a pair's segments (`segment_sums`) of log p - log Σ p²: each token's log-prob
            under the policy, relative to what one that it draws itself has (`TokenStats.log_sum_sq_probs`).
        cu_seqlens: [3B + 1] the bounds of the segments.

    Returns:
        [B], without gradient: about 1 where the policy might have written both answers, less where it would not.

    Source:
        Zhou et al. 2024, "WPO: Enhancing RLHF with Weighted Preference Optimization", arXiv:2406.11827, equation 2 and
        the alignment by samples of the policy; as TRL 1.16 has it.
    """
    sums, lengths = aligned_sums.detach(), cu_seqlens.diff().view(-1, 3)

    def mean(tail: int) -> Tensor:
        return (sums[:, 0] + sums[:, tail]) / (lengths[:, 0] + lengths[:, tail]).clamp(min=1)

    return torch.exp(mean(1) + mean(2))


def weighted_pairs(
    pairs: PairLosses, terms: dict[str, Tensor], pair_weights: Tensor
) -> tuple[PairLosses, dict[str, Tensor]]:
    """The losses, and each of their terms, times the pairs' weights [B]; a weight of 1 changes no bit."""
    weights = pair_weights.detach().to(pairs.losses.dtype)
    weighted_terms = {name: weights * term for name, term in terms.items()}
    return pairs._replace(losses=weights * pairs.losses), weighted_terms


def check_pair_weights(pair_weights: Tensor, num_pairs: int, token_logps: Tensor) -> None:
    """
    Raises:
        ValueError: the weights are not [B] or on another device, or (on the CPU) one is negative or not finite.
    """
    check_float("pair_weights", pair_weights, "[B]")
    check_same_device("pair_weights", pair_weights, "token_logps", token_logps)
    if pair_weights.shape[0] != num_pairs:
        raise ValueError(f"pair_weights: expected one for each of {num_pairs} pairs, got {pair_weights.shape[0]}.")
    if pair_weights.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = ~((pair_weights >= 0) & pair_weights.isfinite())
        if bad.any():
            raise ValueError(
                f"pair_weights: expected finite numbers >= 0, got {pair_weights[bad][0].item()}. Swap the answers of a "
                "pair that is the wrong way round."
            )
