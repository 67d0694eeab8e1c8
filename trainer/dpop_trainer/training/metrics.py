"""Training metrics that stay on the device until they are logged: sums and weights, one transfer per log line."""

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor

from dpop_kernels import PairLosses, TokenStats, needs_reference
from dpop_kernels.losses.options import LossOptions
from dpop_kernels.losses.pair_loss import pair_loss_terms, segment_sums
from dpop_kernels.losses.weights import has_penalty
from dpop_trainer.batches import Batch
from dpop_trainer.settings.config import DPOPConfig


class MeanMetrics:
    """Weighted means accumulated on the device. The keys are fixed by the first `add`."""

    def __init__(self) -> None:
        self._keys: list[str] = []
        self._totals: Tensor | None = None  # [2, K] fp64: weighted sums, weights

    def add(self, sums: Mapping[str, tuple[Tensor, Tensor | float]]) -> None:
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


def metrics_of(
    pairs: PairLosses,
    terms: Mapping[str, Tensor],
    stats: TokenStats,
    batch: Batch,
    *,
    options: LossOptions,
    has_reference: bool,
    wpo: Tensor | None = None,
    max_positions: int | None = None,
) -> dict[str, tuple[Tensor, Tensor | float]]:
    """All that is logged of a batch of pairs; `wpo` are its weights [B], where that is asked for."""
    return {
        **pair_metrics(
            pairs,
            beta=options.beta,
            dead_zone=options.dead_zone,
            has_reference=has_reference,
            weights=batch.pair_weights,
        ),
        **loss_metrics(terms, options, batch.pair_weights),
        **({} if wpo is None else {"wpo/weight": (wpo.sum(), wpo.shape[0])}),
        **token_metrics(stats, batch.cu_seqlens),
        **layout_metrics(batch, max_positions=max_positions),
    }


def evaluation_names(args: DPOPConfig) -> set[str]:
    """The names of what an evaluation of pairs logs, without "eval_": those of a batch of one pair, made up."""
    one = torch.ones(1, dtype=torch.int64)
    batch = Batch(
        input_ids=one[None], pair_ids=one, token_counts=torch.ones(2), cu_seqlens=torch.arange(4, dtype=torch.int32)
    )
    logps = torch.zeros(3)
    pairs, terms = pair_loss_terms(
        logps,
        batch.cu_seqlens,
        logps[None],
        loss_weights=args.weights_by_loss(),
        options=args.loss_options(),
        backend="reference",
    )
    stats = TokenStats(entropy=logps, mean_logit=logps, is_top1=logps.bool(), log_sum_sq_probs=logps)
    has_reference = needs_reference(args.loss_type)
    found = metrics_of(
        pairs,
        terms,
        stats,
        batch,
        options=args.loss_options(),
        has_reference=has_reference,
        wpo=pairs.losses if args.use_weighting else None,
    )
    return {*found, "num_computed_tokens"}


def pair_metrics(
    pairs: PairLosses,
    *,
    beta: float,
    dead_zone: float = 0.0,
    has_reference: bool = True,
    weights: Tensor | None = None,
) -> dict[str, tuple[Tensor, Tensor | float]]:
    """TRL's per-pair metrics (rewards are β · log-ratio, without the penalty) and DPOP's own, as sums over pairs, each
    by its weight in the loss where pairs have one.

    Without a reference only the log-probs: there is nothing that a log-ratio could be of.
    """
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
        "dpop/penalty": beta * pairs.penalties,  # β λ max(0, -Δw - τ): what it takes from the sigmoid's argument
        "dpop/active_fraction": (pairs.chosen_logratios < -dead_zone).float(),  # pairs with Δw < -τ
        "dpop/chosen_deficit": deficits,  # max(0, -Δw), nats
    }
    if not has_reference:
        values = {key: value for key, value in values.items() if key.startswith("logps/")}
    if weights is None:
        return {key: (value.sum(), value.shape[0]) for key, value in values.items()}
    return {key: ((weights * value).sum(), weights.sum()) for key, value in values.items()}


def loss_metrics(
    terms: Mapping[str, Tensor], options: LossOptions, weights: Tensor | None = None
) -> dict[str, tuple[Tensor, Tensor | float]]:
    """Where the loss is a sum of several, each of them without its own weight; and the λ in effect, where it matters.

    Args:
        terms: from `pair_loss_terms`, times the pairs' weights.
        options: the hyper-parameters.
        weights: [B] of the pairs, where they have some.
    """
    metrics: dict[str, tuple[Tensor, Tensor | float]] = {}
    for name, losses in terms.items() if len(terms) > 1 else ():
        metrics[f"loss/{name}"] = losses.sum(), losses.shape[0] if weights is None else weights.sum()
    if has_penalty(list(terms)):
        some = next(iter(terms.values()))
        metrics["dpop/lambda"] = torch.full_like(some, options.dpop_lambda, dtype=torch.float64).sum(), some.shape[0]
    return metrics


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


def layout_metrics(batch: Batch, *, max_positions: int | None = None) -> dict[str, tuple[Tensor, Tensor | float]]:
    """What the layout saves: tokens computed per token of the whole sequences, and the padding among all positions.

    With a budget of positions also the pairs per batch, and how much of the budget batches fill.
    """
    logical, computed = batch.token_counts
    num_positions = batch.input_ids.numel()
    metrics: dict[str, tuple[Tensor, Tensor | float]] = {
        "tokens/computed_ratio": (computed, logical),
        "tokens/padding_share": (num_positions - computed, num_positions),
    }
    if max_positions is not None:
        device = computed.device
        metrics["batch/pairs"] = (torch.tensor(batch.pair_ids.shape[0], device=device), 1)
        metrics["batch/fill"] = (torch.tensor(num_positions, device=device), max_positions)
    return metrics
