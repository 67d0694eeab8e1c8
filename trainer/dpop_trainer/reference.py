"""Where the reference log-probs come from: the adapter switched off, a frozen model, or columns of the data set."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from dpop_kernels import ScoringHead
from dpop_kernels.pair_loss import segment_sums
from dpop_trainer.layout import forward_inputs

if TYPE_CHECKING:
    from dpop_trainer.trainer import DPOPTrainer


def frozen_copy(model: Any) -> Any:
    """An independent copy in eval mode whose parameters take no gradient."""
    return copy.deepcopy(model).eval().requires_grad_(False)


@contextmanager
def adapter_off(model: PeftModel) -> Iterator[None]:
    """The base model: adapters off and, since a base may have dropout of its own, in eval mode. Restores both."""
    was_training = model.training
    model.eval()
    try:
        with model.disable_adapter():
            yield
    finally:
        model.train(was_training)


@torch.no_grad()
def reference_segment_logps(
    head: ScoringHead, model: nn.Module, batch: dict[str, Any], model_inputs: dict[str, Any], backend: str
) -> Tensor:
    """The reference model's log-prob sums of a batch's segments -> [B, 3] (shared, chosen tail, rejected tail)."""
    logps = head.token_logps(model, batch["score_positions"], batch["target_ids"], **model_inputs)
    return segment_sums(logps, batch["cu_seqlens"], backend=backend).view(-1, 3)


def precompute_reference(trainer: "DPOPTrainer", dataset: Dataset, batch_size: int) -> Dataset:
    """The data set with columns ref_chosen_logps and ref_rejected_logps, from one pass of the reference over it."""
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=trainer.data_collator)  # type: ignore[arg-type]
    sums = []
    for batch in tqdm(loader, desc="Reference log-probs", disable=not trainer.is_local_process_zero()):
        batch = trainer._prepare_inputs(batch)
        model_inputs = forward_inputs(batch, trainer.accelerator.unwrap_model(trainer.model))
        with trainer.compute_loss_context_manager():
            sums.append(trainer._reference_logps(batch, model_inputs))
    shared, chosen, rejected = torch.cat(sums).double().cpu().unbind(-1)
    return dataset.add_column("ref_chosen_logps", (shared + chosen).tolist()).add_column(  # type: ignore[call-arg]
        "ref_rejected_logps", (shared + rejected).tolist()
    )
