"""Policy and reference as one: until an update moves the policy, it is its own reference, to the bit.

Log-probs that were computed before training were computed in other batches, which round otherwise. At the start every
pair stands at the corner of DPOP's penalty, so that rounding would decide which pairs pull λ + 1 times as hard. What a
policy that has not moved says of a batch is what its reference would say of it, and costs no forward.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from dpop_trainer.reference.step_zero import active_dropout, embedding_noise

_KEY = "tie/is_moved"


class Tie(TrainerCallback):
    """Whether the policy still is what its reference was computed from.

    Args:
        policy: gives the model that is trained.
    """

    def __init__(self, policy: Callable[[], nn.Module]) -> None:
        self._policy = policy
        self._is_moved = False
        self._is_followed = False  # from its start, here or by what a checkpoint told
        self._is_random: bool | None = None

    def holds(self, global_step: int) -> bool:
        """Not where the policy's forward draws random numbers, which the reference's did not."""
        if self._is_moved or (global_step > 0 and not self._is_followed):
            return False
        if self._is_random is None:
            policy = self._policy()
            self._is_random = active_dropout(policy) is not None or embedding_noise(policy) > 0
        return not self._is_random

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        # a warm-up's first step has a learning rate of 0
        self._is_followed = True
        self._is_moved = self._is_moved or optimizer is None or any(group["lr"] for group in optimizer.param_groups)

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return {_KEY: torch.tensor(float(self._is_moved), dtype=torch.float64)}

    def restore(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The counterpart of `state` -> what else is in there. A checkpoint without it is of a policy that moved."""
        others = dict(state)
        self._is_moved, self._is_followed = bool(others.pop(_KEY, torch.tensor(1.0))), True
        return others
