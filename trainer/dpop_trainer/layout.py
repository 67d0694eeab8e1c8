"""Which layout a run uses: what a model's attention can run, found out by its kind and then by a probe.

A tree row is right only for a model whose attention takes any mask and whose positions come from `position_ids`. What
is known to be otherwise is refused by name; everything else is run once in both layouts, and their log-probs compared.
"""

import inspect
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn

from dpop_kernels import ScoringHead
from dpop_trainer.base import MODEL_INPUTS
from dpop_trainer.data import Layout, PairCollator, tree_mask

logger = logging.getLogger(__name__)

# Nats per token, root mean square. Rounding alone stays a decade below; a mask or a position that is not heeded changes
# a language model's log-probs by tenths of a nat and more.
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
# fp32 whose products are rounded to 10 bits of mantissa
_TF32_TOLERANCE = 0.02


class ScoredModel(NamedTuple):
    """A causal LM and the head on it."""

    model: Any
    head: ScoringHead


def forward_inputs(batch: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """What the model's forward takes of a collated batch. A tree's 4-D mask is made here, on the batch's device.

    Args:
        batch: from `PairCollator`.
        model: tells by its configuration in which form its attention takes a mask.
    """
    inputs = {key: batch[key] for key in MODEL_INPUTS if key in batch}
    if "branches" in batch:
        inputs["attention_mask"] = tree_mask(batch["branches"], batch["input_ids"].shape[1], _mask_dtype(model))
    return inputs


def choose_layout(
    asked: str,
    policy: ScoredModel,
    reference: ScoredModel | None,
    collator: PairCollator,
    records: list[dict[str, Any]],
    *,
    max_length: int | None = None,
) -> Layout:
    """The layout of a run, from what is asked for and what its models can run; logs in one line which and why.

    Args:
        asked: "auto", "rows" or "tree".
        policy: the model that is trained.
        reference: the reference model, where it is another than the policy or its copy.
        collator: as the run uses it, whatever its layout.
        records: a few tokenised pairs for the probe.
        max_length: of prompt + answer, in tokens, in all of the run's data; None where there is no bound.

    Returns:
        "rows"; "tree"; or "auto": the cheaper for each batch, where trees are right.

    Raises:
        ValueError: "tree" is asked for, and a model cannot run it or gives other log-probs.
    """
    if asked == "rows":
        return "rows"
    models = [policy] if reference is None else [policy, reference]
    obstacle = _obstacle_of_kind(models, max_length)
    is_absent = any(p.is_meta or not p.numel() for model, _ in models for p in model.parameters())
    if obstacle is None and is_absent:
        if asked == "tree":
            logger.warning("Layout: trees, one row per pair; not compared with rows, the weights not being loaded yet.")
            return "tree"
        obstacle = "the weights are not loaded yet, so that its log-probs cannot be compared with those of rows"
    obstacle = obstacle or _obstacle_of_probe(models, collator, records)
    if obstacle is None:
        logger.warning(
            "Layout: %s; their log-probs are those of two rows.",
            "trees, one row per pair" if asked == "tree" else "trees, one row per pair, wherever they are cheaper",
        )
        return "tree" if asked == "tree" else "auto"
    if asked == "tree":
        raise ValueError(
            f"layout: expected models that can run 'tree', got one that cannot: {obstacle}. Use 'rows' or 'auto'."
        )
    logger.warning("Layout: two rows per pair, not a tree: %s.", obstacle)
    return "rows"


def tree_obstacle(model: nn.Module, *, max_length: int | None = None) -> str | None:
    """Why a model cannot run trees, as far as its kind tells; None where nothing speaks against it.

    Args:
        model: a causal LM, or a peft model around one.
        max_length: of prompt + answer in tokens. A sliding window no shorter than this hides nothing.
    """
    base = _base_model(model)
    config = base.config.get_text_config()
    attention = config._attn_implementation
    if attention not in ("sdpa", "eager"):
        return f"attn_implementation {attention!r} takes no mask of its own (sdpa and eager do)"
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = {str(kind) for name in ("layer_types", "attention_layers") for kind in getattr(config, name, None) or ()}
    plain = {"full_attention", "global"}
    if window is not None and max_length is not None and window >= max_length:
        window, plain = None, plain | {"sliding_attention"}
    if kinds - plain:
        others = ", ".join(sorted(kinds - plain))
        return f"{config.model_type} has layers of another kind than full attention: {others}"
    if window is not None:
        return f"{config.model_type} attends within a sliding window of {window}, which a tree's columns would shift"
    if any(isinstance(module, nn.Conv1d) for module in base.modules()):
        return f"{config.model_type} has recurrent or convolutional layers, which take no mask"
    if getattr(config, "alibi", False) or "position_ids" not in inspect.signature(base.forward).parameters:
        return f"{config.model_type} takes its positions from the columns, not from position_ids"
    return None


@torch.no_grad()
def layout_difference(scored: ScoredModel, collator: PairCollator, records: list[dict[str, Any]]) -> float:
    """By how much a model's token log-probs differ between tree and rows, in nats per token.

    Returns:
        The root mean square over the tokens of the rejected tails or over all others, whichever is larger. Tokens that
        have no finite log-prob in rows are left out; one that has none in the tree alone gives infinity.
    """
    model, head = scored
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        logps = []
        for layout in ("rows", "tree"):
            batch = {key: value.to(device) for key, value in replace(collator, layout=layout)(records).items()}
            inputs: dict[str, Any] = forward_inputs(batch, model)
            logps.append(head.token_logps(model, batch["score_positions"], batch["target_ids"], **inputs).double())
    finally:
        model.train(was_training)
    rows, tree = (values.cpu() for values in logps)
    bounds = batch["cu_seqlens"].cpu()
    segment = torch.searchsorted(bounds[1:].contiguous(), torch.arange(len(rows), dtype=bounds.dtype), right=True)
    is_rejected, is_known = segment % 3 == 2, rows.isfinite()
    squares = (tree - rows).square().nan_to_num(nan=torch.inf, posinf=torch.inf)
    parts = [squares[is_known & is_rejected], squares[is_known & ~is_rejected]]
    return max((float(part.mean().sqrt()) for part in parts if len(part)), default=0.0)


def _obstacle_of_kind(models: list[ScoredModel], max_length: int | None) -> str | None:
    for model, _ in models:
        obstacle = tree_obstacle(model, max_length=max_length)
        if obstacle:
            return obstacle
    if len({_mask_dtype(model) == torch.bool for model, _ in models}) > 1:
        return "the reference's attn_implementation is another than the policy's, and takes another mask"
    return None


def _obstacle_of_probe(models: list[ScoredModel], collator: PairCollator, records: list[dict[str, Any]]) -> str | None:
    for scored in models:
        tolerance = _tolerance(scored.model)
        try:
            difference = layout_difference(scored, collator, records)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            return f"the model's forward does not take one ({type(error).__name__}: {error})"
        if not difference <= tolerance:
            return (
                f"the model's log-probs in one differ from those in rows by {difference:.2g} nats per token, where "
                f"rounding explains {tolerance:g}"
            )
    return None


def _base_model(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _mask_dtype(model: Any) -> torch.dtype:
    """bool for sdpa; eager adds its mask to the scores, in the model's own dtype."""
    base = _base_model(model)
    if base.config.get_text_config()._attn_implementation != "eager":
        return torch.bool
    return base.dtype if base.dtype in _TOLERANCES else torch.float32  # weights of 8 bits are computed with in more


def _tolerance(model: Any) -> float:
    base = _base_model(model)
    if base.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return _TF32_TOLERANCE
    return _TOLERANCES.get(base.dtype, max(_TOLERANCES.values()))
