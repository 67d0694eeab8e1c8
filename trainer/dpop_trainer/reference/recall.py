"""The reference that a run computed once and let go of, loaded anew from where it came: for pairs that come after."""

from dataclasses import dataclass
from typing import Any

import torch

from dpop_trainer.batches.flat_attention import FLAT_ATTENTION, use_flat_attention
from dpop_trainer.batches.scoring import attention_of
from dpop_trainer.models.adapters import base_model
from dpop_trainer.models.quantised import make_trainable
from dpop_trainer.reference.keys import weights_digest
from dpop_trainer.reference.second_model import load_reference


@dataclass(frozen=True)
class Origin:
    """Where a reference came from, and what it is known by."""

    name: str
    """Folder or hub id; empty where the model does not say."""
    dtype: torch.dtype
    attention: str
    fingerprint: str | None
    """Of its weights; None where they cannot be read."""

    @classmethod
    def of(cls, model: Any, weights: str | None) -> "Origin":
        """
        Args:
            model: the reference, or the policy in whose place it is.
            weights: their `fingerprint`.
        """
        base = base_model(model)
        name = getattr(base.config, "_name_or_path", "") or ""
        return cls(name, base.dtype, attention_of(model), weights)

    def load(self, policy: Any, init_kwargs: dict[str, Any]) -> Any:
        """The model again, frozen.

        Args:
            policy: the model that is trained.
            init_kwargs: for from_pretrained, as it was loaded with.

        Raises:
            ValueError: there is nothing to be had under its name, or another model.
        """
        if not self.name or self.fingerprint is None:
            raise ValueError("where it came from is not known")
        is_flat = self.attention == FLAT_ATTENTION
        own = {"dtype": self.dtype, "attn_implementation": "sdpa" if is_flat else self.attention}
        model = load_reference(self.name, policy, {**own, **init_kwargs})
        if fingerprint(model, True) != self.fingerprint:
            raise ValueError(f"{self.name!r} has other weights")
        if is_flat:
            use_flat_attention(model)
        make_trainable(model)
        return model


def fingerprint(model: Any, with_adapter: bool) -> str | None:
    """Of weights; None where they cannot be read."""
    try:
        return weights_digest(model, with_adapter=with_adapter)
    except ValueError:
        return None
