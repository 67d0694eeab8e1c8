"""The load-balancing loss of a mixture of experts, beside a forward that the head scores.

Source: Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6. A model asked for it computes it from its attention mask,
which in trees and flat rows is no mask of padding. So the decoder alone is asked for its routers' logits, and the
function of the model's own module makes the loss of them, with each position counted as often as rows would count it:
once for every answer that goes through it.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers
from torch import Tensor, nn

from dpop_trainer.batches.batch import Batch
from dpop_trainer.batches.sequence_shares import of_all_columns
from dpop_trainer.models.adapters import base_model

_LOSS = "load_balancing_loss_func"


class RouterLoss:
    """Of a model's forwards.

    Args:
        model: a causal LM or a peft model around one, for which `router_coefficient` is not 0.
    """

    def __init__(self, model: nn.Module) -> None:
        base = base_model(model)
        self._decoder: nn.Module = base.get_decoder()
        self._loss = getattr(sys.modules[type(base).__module__], _LOSS)
        self._num_experts, self._num_chosen = base.num_experts, base.num_experts_per_tok
        self._router_logits: tuple[Tensor, ...] = ()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Note what the routers give in the forward inside; the model has no hook of it after."""
        hooks = [
            self._decoder.register_forward_pre_hook(_ask_for_router_logits, with_kwargs=True),
            self._decoder.register_forward_hook(self._note),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def take(self, batch: Batch) -> Tensor:
        """The loss of the batch whose forward was recorded, a scalar with gradient.

        Raises:
            ValueError: the batch does not say how many answers a position belongs to, or the model gave no logits of
                its routers, as some families of older transformers do.
        """
        router_logits, self._router_logits = self._router_logits, ()
        if not router_logits:
            raise ValueError(
                f"router_aux_loss_coef: expected a model that gives its routers' logits, got none from "
                f"{type(self._decoder).__name__} of transformers {transformers.__version__}. Set it to 0, or install a "
                "newer transformers."
            )
        counts = batch.num_sequences
        if counts is None:
            if batch.trie_ends is not None:
                raise ValueError(
                    "data_collator: expected num_sequences beside trie_ends, by which the load-balancing loss counts "
                    "shared tokens, got none. Use PairCollator, or set router_aux_loss_coef to 0."
                )
            counts = batch.attention_mask
        if batch.sequence_group is not None:  # the loss is of all tokens together
            router_logits = of_all_columns(router_logits, batch)
        return self._loss(router_logits, self._num_experts, self._num_chosen, counts)

    def _note(self, module: nn.Module, args: Any, output: Any) -> None:
        self._router_logits = output.router_logits


def router_coefficient(model: nn.Module, asked: float | None) -> float:
    """What the load-balancing loss of a model is multiplied by; 0 where it is not added.

    Args:
        model: a causal LM or a peft model around one.
        asked: of the run's configuration; None is what the model's own says, as in TRL.

    Raises:
        ValueError: one is asked for, and the model has no such loss.
    """
    base = base_model(model)
    config = base.config.get_text_config()
    has_loss = hasattr(config, "output_router_logits") and hasattr(sys.modules[type(base).__module__], _LOSS)
    if asked and not has_loss:
        raise ValueError(
            f"router_aux_loss_coef: expected None or 0 with {type(base).__name__}, which is no mixture of experts with "
            f"a load-balancing loss, got {asked}. Leave it out."
        )
    own = getattr(config, "router_aux_loss_coef", 0.0) or 0.0
    return (own if asked is None else asked) if has_loss else 0.0


def _ask_for_router_logits(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "output_router_logits": True}
