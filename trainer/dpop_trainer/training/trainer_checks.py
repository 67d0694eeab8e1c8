"""What a DPOPTrainer is given, checked before anything is loaded or computed."""

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from dpop_trainer.data.stream import is_stream
from dpop_trainer.data.vision import refuse_vision
from dpop_trainer.models.adapters import base_model
from dpop_trainer.settings.config import DPOPConfig
from dpop_trainer.training.split_preparation import check_streams

logger = logging.getLogger(__name__)


def check_arguments(
    model: Any,
    args: Any,
    train_dataset: Any,
    eval_dataset: Any,
    processing_class: Any,
    data_collator: Any,
    compute_metrics: Any,
) -> None:
    """
    Raises:
        ValueError: an argument is of another kind than it should be, or two do not go together.
    """
    if not isinstance(model, str | nn.Module):
        raise ValueError(f"model: expected a causal LM, or a name or path to load one, got {type(model).__name__}.")
    if not isinstance(args, DPOPConfig):
        raise ValueError(f"args: expected a DPOPConfig, got {type(args).__name__}. Its fields have TRL's names.")
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
    if compute_metrics is not None:
        raise ValueError(
            "compute_metrics: expected None, got a function. It would be given logits, which this trainer never "
            "computes; read the logged metrics instead, or use a callback."
        )
    check_form("train_dataset", train_dataset)
    check_form("eval_dataset", eval_dataset)


def check_form(name: str, dataset: Any) -> None:
    """
    Raises:
        ValueError: a data set has images.
    """
    parts = dataset.values() if isinstance(dataset, Mapping) else [dataset]
    for part in parts:
        refuse_vision(getattr(part, "column_names", None) or (), name)


def check_reference(reference: Any, policy: Any, *, num_tokens: int) -> None:
    """
    Args:
        reference: the second model.
        policy: the model that is trained, with its adapter.
        num_tokens: of the tokenizer.

    Raises:
        ValueError: training would change the reference too, or it does not know all tokens.
    """
    if reference is policy:
        raise ValueError(
            "ref_model: expected a model of its own, got the policy itself, which would train the reference too. "
            "Pass None for a frozen copy."
        )
    if reference is base_model(policy):
        raise ValueError(
            "ref_model: expected a model of its own, got the base under the policy's adapter, in whose layers the "
            "adapter is: it would be trained too. Pass None: the reference is then this base, with the adapter off; or "
            "load the model a second time."
        )
    ours = {id(module): name for name, module in policy.named_modules() if _has_own_weights(module)}
    shared = [ours[id(module)] for module in reference.modules() if id(module) in ours]
    trained = {id(parameter): name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    shared = shared or [trained[id(parameter)] for parameter in reference.parameters() if id(parameter) in trained]
    if shared:
        raise ValueError(
            f"ref_model: expected a model of its own, got one that has {len(shared)} parts in common with the policy "
            f"({shared[0]} is the first): what training does to the one reaches the other. Load it a second time, or "
            "pass a copy.deepcopy of it."
        )
    rows, needed = (int(model.get_input_embeddings().weight.shape[0]) for model in (reference, policy))
    needed = min(needed, num_tokens)
    if 0 < rows < needed:
        raise ValueError(
            f"ref_model: expected an embedding for all {needed} tokens, got one of {rows} rows: a model with another "
            "tokenizer, or from before tokens were added. Pass the model that the policy started from, resized alike."
        )


def _has_own_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def warn_of_router_loss(model: Any) -> None:
    """TRL adds a mixture of experts' load-balancing loss where the model's config gives it a weight; here it is not."""
    config = model.config.get_text_config()
    coefficient = getattr(config, "router_aux_loss_coef", 0.0) if hasattr(config, "output_router_logits") else 0.0
    router_is_trained = any("router" in name or ".gate." in name for name in _trained_names(model))
    if coefficient and router_is_trained:
        logger.warning(
            "%s: its load-balancing loss (router_aux_loss_coef %g) is not added, and its router is trained. Leave the "
            "router out of the training, as LoRA on the attention's projections does.",
            config.model_type,
            coefficient,
        )


def _trained_names(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
