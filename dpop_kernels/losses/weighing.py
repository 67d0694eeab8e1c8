"""What weighs pairs, beside the losses that are weighed: a number of the pair's own, or how likely it is (WPO).

weighted loss[b] = w[b] · loss[b]
WPO              w = exp(mean over y_w of log p - log Σ p²) · exp(the same over y_l)
"""

import torch
from torch import Tensor

from dpop_kernels.outputs import PairLosses
from dpop_kernels.validate import check_float, check_same_device


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
