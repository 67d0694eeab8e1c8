"""The models that reference log-probs come from: the policy in a state in which it is the reference, or a second model.

Either gives the log-prob sums of a batch's segments, and leaves every module in the mode and with the weights it had.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn

from dpop_kernels import ScoringHead
from dpop_kernels.losses.pair_loss import segment_sums
from dpop_kernels.losses.weighing import length_desensitised
from dpop_kernels.model_head.layers import take_off_heads
from dpop_trainer.batches import Batch
from dpop_trainer.batches.scoring import ScoredModel


class Reference(Protocol):
    """Where reference log-probs come from."""

    kind: str
    """What it is, in words for a log line."""

    def segment_logps(self, batch: Batch, model_inputs: dict[str, Any]) -> Tensor:
        """The log-prob sums of a collated batch's segments, in nats, without gradient: of pairs [B, 3] (shared, chosen
        tail, rejected tail), of completions [B, 1]."""
        ...


@dataclass
class PolicyAsReference:
    """The policy in a state in which it is the reference.

    Args:
        kind: what it is, in words.
        head: the policy's.
        model: gives the policy as it is now, wrapped for distribution or not.
        state: puts the policy into that state and back, whatever happens in between.
        accelerator: its autocast is the policy's in training.
        backend: of the segment sums.
        ld_alpha: by which tokens count in them, see `length_desensitised`.
    """

    kind: str
    head: ScoringHead
    model: Callable[[], Any]
    state: Callable[[], AbstractContextManager[None]]
    accelerator: Accelerator
    backend: str
    ld_alpha: float | None = None

    def segment_logps(self, batch: Batch, model_inputs: dict[str, Any]) -> Tensor:
        with self.state(), self.accelerator.autocast():
            return reference_segment_logps(
                self.head, self.model(), batch, model_inputs, self.backend, ld_alpha=self.ld_alpha
            )


@dataclass
class FrozenModel:
    """A model of its own, in eval mode and without gradient.

    Args:
        model: a causal LM, on the device where it runs.
        head: its own.
        accelerator: its autocast is the policy's in training.
        backend: of the segment sums.
        ld_alpha: by which tokens count in them, see `length_desensitised`.
    """

    model: Any
    head: ScoringHead
    accelerator: Accelerator
    backend: str
    kind: str = "a frozen model"
    ld_alpha: float | None = None

    def segment_logps(self, batch: Batch, model_inputs: dict[str, Any]) -> Tensor:
        with self.accelerator.autocast():
            return reference_segment_logps(
                self.head, self.model, batch, model_inputs, self.backend, ld_alpha=self.ld_alpha
            )


def frozen_copy(model: Any) -> Any:
    """An independent copy in eval mode whose parameters take no gradient."""
    copied = copy.deepcopy(model)
    take_off_heads(copied)
    return copied.eval().requires_grad_(False)


@contextmanager
def adapter_off(model: PeftModel) -> Iterator[None]:
    """The base model: adapters off and, since a base may have dropout of its own, in eval mode. Restores both."""
    with eval_mode(model), model.disable_adapter():
        yield


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode, then each module in the mode it had: a part that was frozen in eval mode stays so."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


@torch.no_grad()
def reference_segment_logps(
    head: ScoringHead,
    model: nn.Module,
    batch: Batch,
    model_inputs: dict[str, Any],
    backend: str,
    *,
    ld_alpha: float | None = None,
) -> Tensor:
    """A model's log-prob sums of a batch's segments, as the model is -> [B, 3] or [B, 1], see `Reference`."""
    logps = ScoredModel(model, head).token_logps(batch, model_inputs)
    return segments_of(logps, batch, backend, ld_alpha=ld_alpha)


def segments_of(logps: Tensor, batch: Batch, backend: str, *, ld_alpha: float | None = None) -> Tensor:
    """[N] -> [B, 3] or [B, 1], as a reference has them."""
    logps = length_desensitised(logps, batch.cu_seqlens, ld_alpha)
    return segment_sums(logps, batch.cu_seqlens, backend=backend).view(batch.pair_ids.shape[0], -1)
