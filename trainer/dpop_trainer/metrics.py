"""Training metrics that stay on the device until they are logged: sums and weights, one transfer per log line."""

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor

from dpop_kernels import PairLosses, TokenStats
from dpop_kernels.pair_loss import segment_sums


class MeanMetrics:
    """Weighted means accumulated on the device. The keys are fixed by the first `add`."""

    def __init__(self) -> None:
        self._keys: list[str] = []
        self._totals: Tensor | None = None  # [2, K] fp64: weighted sums, weights

    def add(self, sums: Mapping[str, tuple[Tensor, Tensor | int]]) -> None:
        """Add one micro-batch: for each key the sum of its values (a scalar tensor) and their number. No sync."""
        keys = list(sums)
        device = next(iter(sums.values()))[0].device
        values = torch.stack([value.detach().double() for value, _ in sums.values()])
        weights = torch.stack([torch.as_tensor(w, dtype=torch.float64, device=device) for _, w in sums.values()])
        batch = torch.stack([values, weights])
        if self._totals is None:
            self._keys, self._totals = keys, batch
        else:
            assert keys == self._keys, (keys, self._keys)
            self._totals += batch

    def state(self) -> tuple[list[str], Tensor | None]:
        """What has been added on this process: keys, and [2, K] fp64 sums and weights; None where nothing has."""
        return self._keys, self._totals

    def restore(self, keys: list[str], totals: Tensor | None) -> None:
        """The counterpart of `state`."""
        self._keys, self._totals = keys, totals

    def pop(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over everything added since the last pop, on all processes; then start anew."""
        if self._totals is None:
            return {}
        totals = accelerator.reduce(self._totals, reduction="sum")
        self._totals = None
        values, weights = totals.tolist()  # type: ignore[union-attr]
        return {
            key: value / weight for key, value, weight in zip(self._keys, values, weights, strict=True) if weight > 0
        }


def pair_metrics(pairs: PairLosses, *, beta: float) -> dict[str, tuple[Tensor, int]]:
    """TRL's per-pair metrics (rewards are β · log-ratio, without the penalty) and DPOP's own, as sums over pairs."""
    num_pairs = pairs.losses.shape[0]
    deficits = (-pairs.chosen_logratios).clamp(min=0)
    values = {
        "rewards/chosen": beta * pairs.chosen_logratios,
        "rewards/rejected": beta * pairs.rejected_logratios,
        "rewards/accuracies": (pairs.margins > 0).float(),
        "rewards/margins": beta * pairs.margins,
        "logps/chosen": pairs.chosen_logps,
        "logps/rejected": pairs.rejected_logps,
        "dpop/chosen_logratio": pairs.chosen_logratios,  # Δw, nats
        "dpop/rejected_logratio": pairs.rejected_logratios,  # Δl, nats
        "dpop/penalty": beta * pairs.penalties,  # β λ max(0, -Δw): what the penalty takes from the sigmoid's argument
        "dpop/active_fraction": (pairs.chosen_logratios < 0).float(),  # pairs with Δw < 0
        "dpop/chosen_deficit": deficits,  # max(0, -Δw), nats
    }
    return {key: (value.sum(), num_pairs) for key, value in values.items()}


def token_metrics(stats: TokenStats, cu_seqlens: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """TRL's per-token metrics over the completions, as sums over tokens. Shared tokens count for both answers."""
    counts = cu_seqlens.diff().view(-1, 3).sum(dim=0)  # [3] tokens in shared, chosen, rejected segments
    num_chosen, num_rejected = counts[0] + counts[1], counts[0] + counts[2]

    def per_segment(values: Tensor) -> Tensor:
        return segment_sums(values, cu_seqlens).view(-1, 3).sum(dim=0)

    entropy, logits = per_segment(stats.entropy), per_segment(stats.mean_logit)
    top1 = per_segment(stats.is_top1.to(stats.entropy.dtype))
    return {
        "entropy": (2 * entropy[0] + entropy[1] + entropy[2], num_chosen + num_rejected),
        "logits/chosen": (logits[0] + logits[1], num_chosen),
        "logits/rejected": (logits[0] + logits[2], num_rejected),
        "mean_token_accuracy": (top1[0] + top1[1], num_chosen),
    }


def layout_metrics(batch: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor | int]]:
    """What the layout saves: tokens computed per token of the whole sequences, and the padding among all positions."""
    logical, computed = batch["token_counts"]
    num_positions = batch["input_ids"].numel()
    return {
        "tokens/computed_ratio": (computed, logical),
        "tokens/padding_share": (num_positions - computed, num_positions),
    }
