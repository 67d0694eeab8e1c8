"""What `compute_metrics` is given: the log-probs of every pair that was evaluated, where transformers gives logits."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from torch import Tensor
from transformers import EvalPrediction
from transformers.trainer_utils import denumpify_detensorize

from dpop_trainer.batches import Batch

# in this order in `EvalPrediction.predictions`, each [pairs], in nats
PREDICTIONS = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")


class PairPredictions:
    """Collects the pairs of an evaluation, on all processes."""

    def __init__(self) -> None:
        self._ids: list[Tensor] = []
        self._values: list[list[Tensor]] = []

    def add(self, batch: Batch, values: Mapping[str, Tensor]) -> None:
        """Take a batch's pairs in, with [B] values by name. A filler's count elsewhere."""
        if not batch.is_filler:
            self._ids.append(batch.pair_ids)
            self._values.append([values[name].detach() for name in (*PREDICTIONS, "loss")])

    def metrics(self, compute_metrics: Callable[..., dict[str, Any]], args: Any) -> dict[str, Any]:
        """What the function makes of them, in the order of the data set. All processes call it together.

        Args:
            compute_metrics: of an `EvalPrediction`: predictions as in `PREDICTIONS`, label_ids the pairs' ids.
            args: the configuration; with "loss" in include_for_metrics losses are given, and with batch_eval_metrics,
                for which nothing has to be done batch by batch, compute_result=True.
        """
        ids = [pair for part in self._ids for pair in part.tolist()]
        values = [row for part in self._values for row in zip(*(value.tolist() for value in part), strict=True)]
        gathered = sorted(gather_object(list(zip(ids, values, strict=True))))
        columns = np.array([row for _, row in gathered], dtype=np.float64).reshape(-1, len(PREDICTIONS) + 1).T
        given = EvalPrediction(
            predictions=tuple(columns[:-1]),  # type: ignore[arg-type]
            label_ids=np.array([pair for pair, _ in gathered], dtype=np.int64),
            losses=columns[-1] if "loss" in args.include_for_metrics else None,  # type: ignore[arg-type]
        )
        more = {"compute_result": True} if args.batch_eval_metrics else {}
        return denumpify_detensorize(compute_metrics(given, **more))
