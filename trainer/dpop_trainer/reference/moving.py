"""A reference that follows the policy: TR-DPO (Gorbatovski et al. 2024, arXiv:2404.09656), soft and hard update.

    every `ref_model_sync_steps` optimizer steps:    θ_ref ← α θ + (1 - α) θ_ref

θ are all parameters where the reference is a model of its own, and those that are trained where it is the policy with
an adapter: the mixture is then one of adapters, factor by factor, and (α A + (1 - α) A_ref) makes with the like of B
another product than the mixture of both products, unless α is 1.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from dpop_trainer.reference.weight_files import read_weights, write_weights

logger = logging.getLogger(__name__)

MOVED_FILE = "reference_moved.safetensors"


class MovingReference(TrainerCallback):
    """Moves the reference towards the policy as training goes on; its place is kept in checkpoints.

    Args:
        held: gives the reference's weights by name, which are changed in place.
        followed: gives the policy's, whole or sharded, one for each of `held` in the same order.
        mixup_alpha: α in (0, 1].
        sync_steps: optimizer steps between two moves.
        resumed_from: gives the checkpoint that a run goes on from.
    """

    def __init__(
        self,
        held: Callable[[], Mapping[str, Tensor]],
        followed: Callable[[], Iterable[Tensor]],
        *,
        mixup_alpha: float,
        sync_steps: int,
        resumed_from: Callable[[], Path | None],
    ) -> None:
        self._held, self._followed, self._resumed_from = held, followed, resumed_from
        self._alpha, self._steps = mixup_alpha, sync_steps

    def on_train_begin(self, args, state, control, **kwargs):
        if self._steps > state.max_steps and state.is_world_process_zero:
            logger.warning(
                "sync_ref_model=True has no effect: the reference moves every %d steps, and the run has %d. Lower "
                "ref_model_sync_steps.",
                self._steps,
                state.max_steps,
            )
        checkpoint = self._resumed_from()
        if state.global_step and checkpoint is not None:
            read_weights(self._held(), checkpoint / MOVED_FILE, "the place of the reference that follows the policy")

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self._steps == 0:
            move(self._held().values(), self._followed(), self._alpha)

    def save(self, checkpoint: Path) -> None:
        """Put the reference's weights into a checkpoint."""
        write_weights(self._held(), checkpoint / MOVED_FILE)


@torch.no_grad()
def move(held: Iterable[Tensor], followed: Iterable[Tensor], alpha: float) -> None:
    """held ← alpha · followed + (1 - alpha) · held, in place; equal values stay as they are, to the bit."""
    for reference, policy in zip(held, followed, strict=True):
        if isinstance(policy, DTensor):  # FSDP2's, a part on each rank: one whole parameter at a time
            policy = policy.full_tensor()
        reference.lerp_(policy.to(device=reference.device, dtype=reference.dtype), alpha)


def check_can_follow(reference: nn.Module, policy: Any) -> None:
    """
    Raises:
        ValueError: a second model has other parameters than the policy, or rounded ones, so that nothing can be mixed.
    """
    rounded = next((name for name, p in reference.named_parameters() if not p.is_floating_point()), None)
    if rounded is not None:
        raise ValueError(
            f"ref_model: expected weights of floating point, which sync_ref_model mixes, got quantised ones "
            f"({rounded}). Train an adapter, whose reference is a second set of its weights, or load it in 16 bits."
        )
    theirs, ours = ([(name, p.shape) for name, p in model.named_parameters()] for model in (reference, policy))
    odd = next((name for (name, shape), own in zip(theirs, ours, strict=False) if (name, shape) != own), None)
    if odd is not None or len(theirs) != len(ours):
        more = f" ({odd} is the first that differs)" if odd is not None else ""
        raise ValueError(
            f"ref_model: expected a model with the policy's own parameters, which sync_ref_model mixes into it, got "
            f"other ones{more}. Leave ref_model out: the reference then starts as the policy itself, adapter or not."
        )
