"""Fields of transformers' TrainingArguments that this trainer does not act on: refused, or said to have no effect.

Refused is what would train something else than was asked for; what changes no number is told in a line.
"""

import logging
from dataclasses import MISSING, fields
from typing import Any

logger = logging.getLogger(__name__)

# what asks for another loss -> what to do instead
_REFUSED = {
    "label_smoothing_factor": (
        "It smooths the labels of tokens, for which logits are needed that are never computed. The share of pairs "
        "labelled the wrong way round is label_smoothing, of DPOPConfig."
    ),
}

_NOTHING_TO_GATHER = "no predictions are kept: evaluation computes log-probs and their means"
_NOTHING_MOVES = "it belongs to sync_ref_model, which is off"
# what changes nothing here -> why
_WITHOUT_EFFECT = {
    "include_for_metrics": "compute_metrics is given log-probs of pairs, with 'loss' their losses, and no inputs",
    "prediction_loss_only": _NOTHING_TO_GATHER,
    "eval_accumulation_steps": _NOTHING_TO_GATHER,
    "eval_do_concat_batches": _NOTHING_TO_GATHER,
    "eval_use_gather_object": _NOTHING_TO_GATHER,
    "label_names": "labels are made of the pairs themselves",
    "average_tokens_across_devices": "the mean is always over all items of the global batch, on all processes",
    "ref_model_mixup_alpha": _NOTHING_MOVES,
    "ref_model_sync_steps": _NOTHING_MOVES,
    "do_predict": "training does not predict; `dpop eval` and `dpop mtbench answer` let a model write",
}


def check_refused(args: Any) -> None:
    """
    Raises:
        ValueError: a field asks for another loss than the trainer's, named with what to do instead.
    """
    refused = [
        f"{name}: expected {default!r}, got {getattr(args, name)!r}. {_REFUSED[name]}"
        for name, default in _defaults(args, _REFUSED).items()
        if getattr(args, name) != default
    ]
    if refused:
        raise ValueError("\n".join(refused))


def tell_of_no_effect(args: Any) -> None:
    """One line for each field that is set and changes nothing here."""
    for name, default in _defaults(args, _WITHOUT_EFFECT).items():
        value = getattr(args, name)
        if _WITHOUT_EFFECT[name] is _NOTHING_MOVES and args.sync_ref_model:
            continue
        if value != default and value not in (None, [], ["loss"]):
            logger.warning("%s=%r has no effect: %s.", name, value, _WITHOUT_EFFECT[name])
    if getattr(args, "dataloader_drop_last", False) and getattr(args, "max_tokens_per_batch", None) is not None:
        logger.warning("dataloader_drop_last=True has no effect: with max_tokens_per_batch no pair is left over.")


def _defaults(args: Any, names: dict[str, str]) -> dict[str, Any]:
    found = {}
    for item in fields(args):
        if item.name in names:
            found[item.name] = item.default if item.default is not MISSING else item.default_factory()  # type: ignore[misc]
    return found
