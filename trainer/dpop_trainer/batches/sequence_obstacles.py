"""Whether a model gives the same numbers when its columns are spread over ranks: what its kind tells, and a trial.

Between attentions a rank knows its own columns alone. Layers that look at neighbours in another way (recurrences,
convolutions), and positions that depend on how long a row is, are known by the model's kind; a trial of short pairs
finds the others.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dpop_trainer.batches.batch import Batch
from dpop_trainer.batches.scoring import ScoredModel
from dpop_trainer.models.adapters import base_model

_ATTENTIONS = {"full_attention", "sliding_attention", "global", "local"}
"""Kinds of layers in a configuration that are attentions under a mask of columns, and nothing else."""

_BY_LENGTH = ("dynamic", "longrope")
"""Rotations that change with the length of the row, of which a rank sees its columns alone."""


def check_shared_model(model: nn.Module, size: int, *, longest: int | None = None) -> None:
    """
    Args:
        model: a causal LM, under an adapter or not.
        size: how many ranks run a batch together.
        longest: columns that a row may have, padding included; None where there is no bound.

    Raises:
        ValueError: its kind does not give the same numbers so, or its heads cannot be dealt out.
    """
    base = base_model(model)
    num_heads = getattr(base.config.get_text_config(), "num_attention_heads", None)
    if isinstance(num_heads, int) and num_heads % size:
        divisors = [str(one) for one in range(1, num_heads + 1) if num_heads % one == 0]
        raise ValueError(
            f"sequence_parallel_size: expected a divisor of the {num_heads} attention heads of {type(base).__name__}, "
            f"got {size}. Use {' or '.join(divisors)}."
        )
    obstacle = next(_obstacles(base, longest), None)
    if obstacle is not None:
        raise ValueError(
            "sequence_parallel_size: expected a model whose tokens meet in attention alone, got "
            f"{type(base).__name__}: {obstacle}. Set it to 1."
        )


def _obstacles(base: Any, longest: int | None) -> Iterator[str]:
    config = base.config.get_text_config()
    kinds = {str(kind) for name in ("layer_types", "attention_layers") for kind in getattr(config, name, None) or ()}
    if kinds - _ATTENTIONS:
        yield f"it has layers of another kind: {', '.join(sorted(kinds - _ATTENTIONS))}"
    if any(isinstance(module, nn.Conv1d) for module in base.modules()):
        yield "it has recurrent or convolutional layers, which go on from the token before"
    if getattr(config, "alibi", False) or "position_ids" not in inspect.signature(base.forward).parameters:
        yield "it takes positions from the columns, not from position_ids"
    for rotation in _rotations(config):
        known = rotation.get("original_max_position_embeddings") or config.max_position_embeddings
        if rotation.get("rope_type") in _BY_LENGTH and (longest is None or longest > known):
            yield (
                f"its positions ({rotation['rope_type']}) depend on a row's length beyond {known} tokens, and "
                f"max_length allows {'any' if longest is None else longest}"
            )


def _rotations(config: Any) -> list[dict[str, Any]]:
    """Of all layers, or one for each kind of them."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return [parameters, *(value for value in parameters.values() if isinstance(value, dict))]


@torch.no_grad()
def shared_difference(scored: ScoredModel, batch: Batch, inputs: dict[str, Any]) -> Tensor:
    """By how much token log-probs differ between a batch that ranks run together and the same run by this one alone.

    Args:
        scored: in eval mode.
        batch: marked to be run together.
        inputs: from `forward_inputs`.

    Returns:
        Scalar, nats per token, the root mean square over tokens that have a finite log-prob alone.
    """
    together = scored.token_logps(batch, inputs).double()
    alone = scored.token_logps(Batch({**batch, "sequence_group": None}), inputs).double()
    squares = (together - alone).square().nan_to_num(nan=torch.inf, posinf=torch.inf)
    is_known = alone.isfinite()
    return (torch.where(is_known, squares, 0).sum() / is_known.sum().clamp(min=1)).sqrt()
