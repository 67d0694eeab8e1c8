"""What a DPOPTrainer is given, checked before anything is loaded or computed."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from dpop_kernels.losses.weights import losses_of_batch
from dpop_trainer.data.pair_weights import WEIGHT_COLUMN
from dpop_trainer.data.stream import is_stream
from dpop_trainer.data.vision import refuse_vision
from dpop_trainer.settings.config import DPOPConfig
from dpop_trainer.settings.model_paths import check_model_path
from dpop_trainer.training.split_preparation import check_streams


def check_arguments(
    model: Any,
    args: Any,
    train_dataset: Any,
    eval_dataset: Any,
    processing_class: Any,
    data_collator: Any,
    compute_metrics: Any,
    ref_model: Any,
) -> None:
    """
    Raises:
        ValueError: an argument is of another kind than it should be, or two do not go together.
    """
    if not isinstance(model, str | nn.Module):
        raise ValueError(f"model: expected a causal LM, or a name or path to load one, got {type(model).__name__}.")
    if not isinstance(args, DPOPConfig):
        raise ValueError(
            f"args: expected a DPOPConfig, got {type(args).__name__} of {type(args).__module__.partition('.')[0]}. Its "
            "fields have TRL's names: from dpop_trainer import DPOPConfig as DPOConfig."
        )
    if train_dataset is None and eval_dataset is None:
        raise ValueError("train_dataset: expected a data set (or at least an eval_dataset), got None.")
    eval_parts = list(eval_dataset.values()) if isinstance(eval_dataset, Mapping) else [eval_dataset]
    check_streams(args, train_dataset, *eval_parts)
    if args.precompute_ref_log_probs and any(map(is_stream, (train_dataset, *eval_parts))):
        raise ValueError(
            "precompute_ref_log_probs: expected False with a streamed data set, got True. Load the data set whole, or "
            "let the reference run beside the policy."
        )
    if isinstance(train_dataset, Mapping):
        raise ValueError(
            f"train_dataset: expected one data set, got several: {sorted(map(str, train_dataset))}. Pass one split."
        )
    if hasattr(processing_class, "tokenizer"):
        raise ValueError(
            f"processing_class: expected a tokenizer, got {type(processing_class).__name__}. Pass its .tokenizer; "
            "images are not trained on."
        )
    if data_collator is not None and args.max_tokens_per_batch is not None:
        raise ValueError(
            "data_collator: expected None with max_tokens_per_batch, which counts the positions of this trainer's own "
            "layouts, got one. Leave one of the two out."
        )
    for name, function in (("data_collator", data_collator), ("compute_metrics", compute_metrics)):
        if function is not None and not callable(function):
            raise ValueError(f"{name}: expected a function or None, got {type(function).__name__}.")
    check_form("train_dataset", train_dataset)
    check_form("eval_dataset", eval_dataset)
    if isinstance(ref_model, str):  # which is loaded last
        check_model_path(ref_model)


def check_weights(args: DPOPConfig, parts: list[Any]) -> None:
    """Before a model runs; of a stream whose columns are unknown the first loss tells.

    Args:
        args: of the run.
        parts: its prepared data sets.

    Raises:
        ValueError: pairs have weights, and a loss compares them with each other.
    """
    compared = losses_of_batch(args.loss_type)
    if compared and any(WEIGHT_COLUMN in (part.column_names or ()) for part in parts):
        raise ValueError(
            f"pair_weight: expected 'none' with loss_type {compared[0]!r}, which compares the pairs of a batch, got "
            "pairs with weights. Set pair_weight='none', or choose a loss of single pairs."
        )


def check_form(name: str, dataset: Any) -> None:
    """
    Raises:
        ValueError: a data set has images.
    """
    parts = dataset.values() if isinstance(dataset, Mapping) else [dataset]
    for part in parts:
        refuse_vision(getattr(part, "column_names", None) or (), name)
