"""Checks of this package's own fields that need no torch: the command line makes them before anything is imported."""

import math
from typing import TYPE_CHECKING

from dpop_trainer.data.pair_weights import check_pair_weight
from dpop_trainer.settings.row_options import check_row_options

if TYPE_CHECKING:
    from dpop_trainer.settings.config import DPOPConfig, HeadConfig


def check_data_fields(args: "HeadConfig") -> None:
    """
    Raises:
        ValueError: a value outside its range, named with the remedy.
    """
    if args.truncation_mode not in ("keep_start", "keep_end"):
        raise ValueError(
            f"truncation_mode: expected 'keep_start' or 'keep_end', got {args.truncation_mode!r}. keep_start cuts "
            "the answers' ends, keep_end the prompt's start."
        )
    if args.max_length is not None and args.max_length < 2:
        raise ValueError(
            f"max_length: expected None or at least 2 tokens, got {args.max_length}. One is a prompt's, one "
            "an answer's."
        )
    check_best_of(args)
    if args.sequence_parallel_size < 1:
        raise ValueError(
            f"sequence_parallel_size: expected at least 1, got {args.sequence_parallel_size}. 1 is none: each GPU runs "
            "batches of its own."
        )
    if args.on_bad_record not in ("error", "skip"):
        raise ValueError(f"on_bad_record: expected 'error' or 'skip', got {args.on_bad_record!r}.")


def check_best_of(args: "HeadConfig") -> None:
    """
    Raises:
        ValueError: the best model is to be told by what is the better the smaller, and nothing says so: without it
            transformers takes the largest of whatever is not called a loss.
    """
    metric = args.metric_for_best_model or ""
    if args.greater_is_better is None and metric.endswith(("penalty", "active_fraction", "deficit", "entropy")):
        raise ValueError(
            f"greater_is_better: expected True or False with metric_for_best_model {metric!r}, got None, which would "
            "take the largest for the best. Set greater_is_better to false."
        )


def tile_setting(args: "HeadConfig") -> int | str | None:
    """The value of `tiled_mlp`: tokens of a tile, "auto", or None for no tiles; the command line spells them out.

    Raises:
        ValueError: another value, or a field beside it that does not go with tiles.
    """
    value = args.tiled_mlp
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null", "false")):
        return None
    if isinstance(value, str) and value.lower() == "auto":
        value = "auto"
    else:
        try:
            value = int(value) if not isinstance(value, bool) else 0
        except ValueError:
            value = 0
        if value < 1:
            raise ValueError(
                f"tiled_mlp: expected 'auto', 'none' or the tokens of a tile, at least 1, got {args.tiled_mlp!r}. auto "
                "fills 2 GiB of a GPU."
            )
    for name, why in (
        ("torch_compile", "makes one graph of a layer"),
        ("ref_model_offload", "would fetch a layer's weights for each tile anew"),
    ):
        if getattr(args, name, False):
            raise ValueError(f"tiled_mlp: expected 'none' with {name}, which {why}, got {value!r}. Leave one out.")
    return value


def check_preference_fields(args: "DPOPConfig") -> None:
    """
    Raises:
        ValueError: a value outside its range, or two that do not go together, named with the remedy.
    """
    if args.chosen_logratio_warning is not None and not args.chosen_logratio_warning > 0:
        raise ValueError(
            f"chosen_logratio_warning: expected nats > 0, or None to switch it off, got {args.chosen_logratio_warning}."
        )
    if not 0 <= args.dpop_dead_zone < math.inf:
        raise ValueError(
            f"dpop_dead_zone: expected a finite value >= 0, in nats, got {args.dpop_dead_zone}. 0 is the paper's loss."
        )
    warmup = args.dpop_lambda_warmup_steps
    if not 0 <= warmup < math.inf or (warmup > 1 and warmup != int(warmup)):
        raise ValueError(
            f"dpop_lambda_warmup_steps: expected a whole number of steps, or a fraction below 1, got {warmup}."
        )
    check_pair_weight(args.pair_weight)
    _check_budget(args)
    check_row_options(args)
    if args.precompute_ref_batch_size is not None and args.precompute_ref_batch_size < 1:
        raise ValueError(
            f"precompute_ref_batch_size: expected None or at least 1 pair, got {args.precompute_ref_batch_size}."
        )
    if args.router_aux_loss_coef is not None and not 0 <= args.router_aux_loss_coef < math.inf:
        raise ValueError(
            f"router_aux_loss_coef: expected None or a finite number >= 0, got {args.router_aux_loss_coef}. None takes "
            "the model's own."
        )
    _check_moving_reference(args)


def _check_moving_reference(args: "DPOPConfig") -> None:
    if not 0 < args.ref_model_mixup_alpha <= 1:
        raise ValueError(
            f"ref_model_mixup_alpha: expected the policy's share of the new reference, in (0, 1], got "
            f"{args.ref_model_mixup_alpha}. 1 makes it the policy."
        )
    if args.ref_model_sync_steps < 1:
        raise ValueError(
            f"ref_model_sync_steps: expected at least 1 optimizer step, got {args.ref_model_sync_steps}. 512 is TRL's."
        )
    if not args.sync_ref_model:
        return
    for name, why in (
        ("precompute_ref_log_probs", "computes the log-probs of a reference that stays"),
        ("ref_model_offload", "keeps its weights where they are not mixed"),
    ):
        if getattr(args, name):
            raise ValueError(
                f"sync_ref_model: expected False with {name}, which {why}, got True. Leave one of the two out."
            )


def _check_budget(args: "DPOPConfig") -> None:
    if args.max_tokens_per_batch is None:
        if args.group_by_prompt:
            raise ValueError("group_by_prompt: expected max_tokens_per_batch beside it, got None. Set both.")
        return
    if args.max_tokens_per_batch < 2:
        raise ValueError(
            f"max_tokens_per_batch: expected None or at least 2 positions, got {args.max_tokens_per_batch}."
        )
    if args.train_sampling_strategy != "random":
        raise ValueError(
            "train_sampling_strategy: expected 'random' with max_tokens_per_batch, which plans its own batches, "
            f"got {args.train_sampling_strategy!r}. Leave one of the two out."
        )
    if args.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size: expected False with max_tokens_per_batch, which no number of pairs changes, "
            "got True. Lower max_tokens_per_batch instead."
        )
    if args.group_by_prompt and args.layout in ("rows", "tree"):
        raise ValueError(
            f"group_by_prompt: expected layout 'auto', 'packed' or 'flat', got {args.layout!r}, which computes the "
            "prompt for each pair anew."
        )
