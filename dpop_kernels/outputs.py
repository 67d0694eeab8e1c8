"""What the operations return beside their main tensor: two tuples of per-token and per-pair values."""

from typing import NamedTuple

from torch import Tensor


class TokenStats(NamedTuple):
    """Per-token diagnostics of the policy's distribution, without gradient. All [N], fp32 (fp64 for fp64 input)."""

    entropy: Tensor
    """Entropy of the softmax over the vocabulary, in nats."""
    mean_logit: Tensor
    """Mean of the logits over the vocabulary (what TRL logs as `logits/chosen`)."""
    is_top1: Tensor
    """Bool: the target's logit is the largest of its row (ties count)."""
    log_sum_sq_probs: Tensor
    """log Σ p² over the vocabulary, in nats: the log of the mean probability of a token that is drawn from the
    distribution. WPO's weights are relative to it."""


class PairLosses(NamedTuple):
    """Per-pair results of a preference loss. All [B]; only `losses` carries gradient."""

    losses: Tensor
    """The loss of each pair."""
    chosen_logps: Tensor
    """log π(y_w|x), summed over the completion, in nats."""
    rejected_logps: Tensor
    """log π(y_l|x), summed over the completion, in nats."""
    chosen_logratios: Tensor
    """Δw = log π(y_w|x) - log π_ref(y_w|x), in nats."""
    rejected_logratios: Tensor
    """Δl = log π(y_l|x) - log π_ref(y_l|x), in nats."""
    margins: Tensor
    """Δw - Δl from the answers' tails alone (the shared tokens cancel exactly), in nats."""
    penalties: Tensor
    """λ · max(0, -Δw): what DPOP subtracts from the margin, in nats. Zero for other losses."""
