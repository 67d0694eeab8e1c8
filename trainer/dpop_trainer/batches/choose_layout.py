"""Which layout a run uses: what a model's attention can run, found out by its kind and then by a probe.

Rows of trees are right only for a model whose attention takes any mask and whose positions come from `position_ids`;
a flat row needs an attention function that can be replaced, too. What is known to be otherwise is refused by name;
everything else is run once in both layouts, and their log-probs compared.
"""

import inspect
import logging
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dpop_trainer.batches import Layout, PairCollator
from dpop_trainer.batches.flat_attention import (
    BLOCK_SIZE,
    FLAT_ATTENTION,
    AttentionCall,
    first_call,
    gradient_difference,
    use_flat_attention,
)
from dpop_trainer.batches.scoring import ScoredModel, attention_of, mask_dtype
from dpop_trainer.batches.tolerance import tolerance_of
from dpop_trainer.models.adapters import base_model

logger = logging.getLogger(__name__)


def laid_out(collator: PairCollator, layout: Layout, model: nn.Module) -> PairCollator:
    """The collator of a layout for a model where it is now. FlexAttention wants its rows in whole blocks."""
    if layout == "flat" and _device(model).type == "cuda" and collator.pad_to_multiple_of is None:
        return replace(collator, layout=layout, pad_to_multiple_of=BLOCK_SIZE)
    return replace(collator, layout=layout)


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
        asked: "auto", or the layout that it must be.
        policy: the model that is trained.
        reference: the reference model, where it is another than the policy or its copy.
        collator: as the run uses it, whatever its layout.
        records: a few tokenised pairs for the probe.
        max_length: of prompt + answer, in tokens, in all of the run's data; None where there is no bound.

    Returns:
        What was asked for; for "auto" the first of these that is right: "flat", whereupon the models' attention is
        `FLAT_ATTENTION`; "auto", for each batch the cheapest under a mask; "rows".

    Raises:
        ValueError: a layout is asked for that a model cannot run, or in which it gives other log-probs.
    """
    models = [policy] if reference is None else [policy, reference]
    for model, _ in models:
        # of an earlier run; what this one needs is set anew, and in all models
        if attention_of(model) == FLAT_ATTENTION:
            base_model(model).set_attn_implementation("sdpa")
    if asked == "rows":
        return "rows"
    is_absent = any(p.is_meta or not p.numel() for model, _ in models for p in model.parameters())
    candidates: tuple[Layout, ...] = ("flat", "auto") if asked == "auto" else (asked,)  # type: ignore[assignment]
    obstacles: list[str] = []
    for layout in candidates:
        obstacle = _obstacle_of_kind(layout, models, max_length)
        if obstacle is None and is_absent and asked != "auto":
            if layout == "flat":
                _switch_attention(models)
            logger.warning("Layout: %s; not compared with rows, the weights not being loaded yet.", _IN_WORDS[layout])
            return layout
        if obstacle is None and is_absent:
            obstacle = "the weights are not loaded yet, so that its log-probs cannot be compared with those of rows"
        obstacle = obstacle or _obstacle_of_probe(layout, models, collator, records)
        if obstacle is None:
            why = f" Not flat: {obstacles[0]}." if obstacles else ""
            logger.warning("Layout: %s; their log-probs are those of two rows.%s", _IN_WORDS[layout], why)
            return layout
        obstacles.append(obstacle)
    if asked != "auto":
        raise ValueError(
            f"layout: expected models that can run {asked!r}, got one that cannot: {obstacles[-1]}. "
            "Use 'rows' or 'auto'."
        )
    logger.warning("Layout: two rows per pair, not a tree: %s.", obstacles[-1])
    return "rows"


_IN_WORDS = {
    "tree": "trees, one row per pair",
    "packed": "trees, packed into rows of several",
    "flat": "trees, all of a batch in one flat row",
    "auto": "trees, one row per pair or packed into rows of several, wherever they are cheaper",
}


def tree_obstacle(model: nn.Module, *, max_length: int | None = None) -> str | None:
    """Why a model cannot run trees, as far as its kind tells; None where nothing speaks against it.

    Args:
        model: a causal LM, or a peft model around one.
        max_length: of prompt + answer in tokens. A sliding window no shorter than this hides nothing.
    """
    base = base_model(model)
    config, attention = base.config.get_text_config(), attention_of(model)
    if attention not in ("sdpa", "eager", FLAT_ATTENTION):
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


def flat_obstacle(model: nn.Module, *, max_length: int | None = None) -> str | None:
    """Why a model cannot run flat rows, as far as its kind and its device tell; None where nothing speaks against it.

    Args:
        model, max_length: as for `tree_obstacle`.
    """
    device = _device(model).type
    if device not in ("cuda", "cpu", "meta"):
        return f"flat rows need an attention that was written for CUDA and CPU, and the model is on {device}"
    if attention_of(model) not in ("sdpa", FLAT_ATTENTION):
        return f"attn_implementation {attention_of(model)!r} is not replaced (sdpa is)"
    dropout = _attention_dropout(model) if device == "cuda" else None  # FlexAttention has none
    if dropout is not None:
        return f"flat rows' attention drops nothing, and {dropout}; set disable_dropout"
    return tree_obstacle(model, max_length=max_length)


@torch.no_grad()
def layout_difference(
    scored: ScoredModel, collator: PairCollator, records: list[dict[str, Any]], *, layout: Layout = "tree"
) -> float:
    """By how much a model's token log-probs differ between a layout and rows, in nats per token.

    Returns:
        The root mean square over the tokens of the rejected tails or over all others, whichever is larger. Tokens that
        have no finite log-prob in rows are left out; one that has none in the layout alone gives infinity.
    """
    model = scored.model
    was_training = model.training
    model.eval()
    try:
        logps = []
        for compared in (laid_out(collator, "rows", model), laid_out(collator, layout, model)):
            batch = compared(records).to(_device(model))
            logps.append(scored.token_logps(batch).double())
    finally:
        model.train(was_training)
    rows, other = (values.cpu() for values in logps)
    bounds = batch.cu_seqlens.cpu()
    segment = torch.searchsorted(bounds[1:].contiguous(), torch.arange(len(rows), dtype=bounds.dtype), right=True)
    is_rejected, is_known = segment % 3 == 2, rows.isfinite()
    squares = (other - rows).square().nan_to_num(nan=torch.inf, posinf=torch.inf)
    parts = [squares[is_known & is_rejected], squares[is_known & ~is_rejected]]
    return max((float(part.mean().sqrt()) for part in parts if len(part)), default=0.0)


def _obstacle_of_kind(layout: Layout, models: list[ScoredModel], max_length: int | None) -> str | None:
    find_obstacle = flat_obstacle if layout == "flat" else tree_obstacle
    for model, _ in models:
        obstacle = find_obstacle(model, max_length=max_length)
        if obstacle:
            return obstacle
    if len({mask_dtype(model) == torch.bool for model, _ in models}) > 1:
        return "the reference's attn_implementation is another than the policy's, and takes another mask"
    return None


def _obstacle_of_probe(
    layout: Layout, models: list[ScoredModel], collator: PairCollator, records: list[dict[str, Any]]
) -> str | None:
    """Compares log-probs. Leaves the models with the attention that the layout needs, or as they were if it fails."""
    before = [attention_of(model) for model, _ in models]
    obstacle = _found_by_probe(layout, models, collator, records)
    if obstacle is not None:
        for (model, _), attention in zip(models, before, strict=True):
            if attention_of(model) != attention:
                base_model(model).set_attn_implementation(attention)
    return obstacle


def _found_by_probe(
    layout: Layout, models: list[ScoredModel], collator: PairCollator, records: list[dict[str, Any]]
) -> str | None:
    # of the layouts under a mask, packed rows hold all that the others do
    probed: Layout = "packed" if layout == "auto" else layout
    collator = replace(collator, hidden_size=None)  # all in one row
    for scored in models:
        tolerance = tolerance_of(scored.model)
        try:
            if layout == "flat":
                _switch_attention([scored])
            with first_call() as calls:
                difference = layout_difference(scored, collator, records, layout=probed)
            backward = _backward_obstacle(calls, tolerance) if layout == "flat" and difference <= tolerance else None
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ImportError) as error:
            return f"the model's forward does not take one ({type(error).__name__}: {error})"
        if not difference <= tolerance:
            return (
                f"the model's log-probs in one differ from those in rows by {difference:.2g} nats per token, where "
                f"rounding explains {tolerance:g}"
            )
        if backward is not None:
            return backward
    return None


def _backward_obstacle(calls: list[AttentionCall], tolerance: float) -> str | None:
    """The log-probs are compared without gradient; of the backward, which is another kernel, one layer's is tried."""
    assert calls, "the model ran no flat row"
    try:
        difference = gradient_difference(calls[0])
    except Exception as error:  # a compiler may raise anything
        return f"its attention has no backward here ({type(error).__name__}: {str(error)[:300]})"
    if not difference <= tolerance:
        return f"the gradients of its attention differ by {difference:.2g} of theirs from those under a mask"
    return None


def _switch_attention(models: list[ScoredModel]) -> None:
    for model, _ in models:
        use_flat_attention(base_model(model))


def _attention_dropout(model: nn.Module) -> str | None:
    """The first attention that drops probabilities in training, and how many; None where none does."""
    for path, module in model.named_modules():
        if "attention" in type(module).__name__.lower():
            for name, value in vars(module).items():
                if "dropout" in name and isinstance(value, float) and value > 0:
                    return f"{path}.{name} is {value:g}"
    return None


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
