"""metric_for_best_model, held against what evaluation will log, before a step is trained.

transformers looks for it after the first evaluation, and ends the run where it is not found.
"""

import difflib
import logging
from collections.abc import Collection, Mapping
from typing import Any

logger = logging.getLogger(__name__)

# what every evaluation logs, whatever the loss
_ALWAYS = ("loss", "runtime", "samples_per_second", "steps_per_second", "num_tokens")


def check_best_metric(args: Any, eval_dataset: Any, names: Collection[str], *, may_have_more: bool) -> None:
    """
    Args:
        args: the configuration.
        eval_dataset: one data set, several by name, or None.
        names: of the metrics of the trainer's own, without "eval_".
        may_have_more: callbacks or a class of the user's own may add metrics; what is not known is then only told.

    Raises:
        ValueError: no evaluation will log this metric; the closest are named.
    """
    wanted = args.metric_for_best_model
    if wanted is None or eval_dataset is None:
        return
    if args.eval_strategy == "no":
        logger.warning("metric_for_best_model=%r has no effect: eval_strategy is 'no'.", wanted)
    wanted = wanted.removeprefix("eval_")
    every = {*_ALWAYS, *names}
    if isinstance(eval_dataset, Mapping):
        every = {f"{part}_{name}" for part in eval_dataset for name in every}
    if wanted in every:
        return
    close = difflib.get_close_matches(wanted, sorted(every), n=3, cutoff=0.5)
    near = f" Near it: {', '.join(close)}." if close else ""
    message = (
        f"metric_for_best_model: expected a metric that evaluation logs, got {args.metric_for_best_model!r}."
        f"{near} All: {', '.join(sorted(every))}."
    )
    if not may_have_more:
        raise ValueError(message)
    logger.warning("%s Unless a callback adds it, the first evaluation ends the run.", message)
