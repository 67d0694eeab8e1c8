"""Says, while a run goes on, that its chosen answers are losing probability: what DPOP is there to prevent."""

import logging
import math
from collections.abc import Sequence

from transformers import TrainerCallback

from dpop_kernels.losses.formulas import DEFAULT_LOSS
from dpop_kernels.losses.weights import has_penalty
from dpop_trainer.report.signed import minus

logger = logging.getLogger(__name__)

CHOSEN_KEY = "dpop/chosen_logratio"


class ChosenWatch(TrainerCallback):
    """Warns when the mean Δw of a log line falls below a threshold, and again only where it has fallen twice as far.

    Args:
        threshold: nats per answer, > 0; None never warns.
        loss_types: of the run; decide the advice.
        dpop_lambda: of the run.
        reference_moves: it follows the policy, so that what is seen is the fall since it last moved.
    """

    def __init__(
        self, threshold: float | None, *, loss_types: Sequence[str], dpop_lambda: float, reference_moves: bool = False
    ) -> None:
        self._limit = math.inf if threshold is None else threshold
        self._penalised = has_penalty(loss_types) and dpop_lambda > 0
        self._dpop_lambda = dpop_lambda
        self._reference = "a reference that follows, and more against the start" if reference_moves else "the reference"

    def on_log(self, args, state, control, logs=None, **kwargs):
        fall = -(logs or {}).get(CHOSEN_KEY, 0.0)
        if not state.is_world_process_zero or not fall >= self._limit:
            return
        self._limit = 2 * fall
        if self._penalised:
            advice = (
                f"Raise dpop_lambda (now {self._dpop_lambda:g}) or lower learning_rate (now {args.learning_rate:g})."
            )
        else:
            advice = (
                f"Use loss_type {DEFAULT_LOSS} with dpop_lambda 50, which makes this expensive, or lower learning_rate "
                f"(now {args.learning_rate:g})."
            )
        logger.warning(
            "Step %d: your chosen answers are losing probability: %s nats per answer on average against %s, that is "
            "a factor of %.2g. The model is unlearning the answers that it should prefer. %s",
            state.global_step,
            minus(f"{-fall:.3g}"),
            self._reference,
            math.exp(max(-fall, -700.0)),
            advice,
        )
