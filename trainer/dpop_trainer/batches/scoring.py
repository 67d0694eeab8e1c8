"""A model's forward on a batch: what it is given, and the log-probs of the scored tokens that come out."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from dpop_kernels import ScoringHead
from dpop_trainer.batches.batch import Batch
from dpop_trainer.batches.collate import PairCollator
from dpop_trainer.batches.flat_attention import FLAT_ATTENTION, flat_mask
from dpop_trainer.batches.layouts import trie_mask
from dpop_trainer.batches.sequence_shares import shared_token_logps
from dpop_trainer.batches.shared_attention import inner_attention
from dpop_trainer.models.adapters import base_model

if TYPE_CHECKING:
    from datasets import Dataset


class ScoredModel(NamedTuple):
    """A causal LM, wrapped or not, and the head on it."""

    model: Any
    head: ScoringHead

    def token_logps(self, batch: Batch, inputs: dict[str, Any] | None = None, *, return_stats: bool = False) -> Any:
        """One forward -> log-probs of the scored tokens [N], and with return_stats `TokenStats`; of a batch that
        several ranks run together all of it on each.

        Args:
            batch: on the model's device.
            inputs: from `forward_inputs`, where they are at hand, or the model is a wrapper.
            return_stats: see `ScoringHead.token_logps`.
        """
        inputs = forward_inputs(batch, self.model) if inputs is None else inputs
        if batch.sequence_group is not None:
            return shared_token_logps(self.head, self.model, batch, inputs, return_stats=return_stats)
        return self.head.token_logps(
            self.model, batch.score_positions, batch.target_ids, return_stats=return_stats, **inputs
        )


def forward_inputs(batch: Batch, model: nn.Module) -> dict[str, Any]:
    """What the model's forward takes of a collated batch. The mask of tree rows is made here, on the batch's device.

    Args:
        batch: from `PairCollator`.
        model: tells by its configuration in which form its attention takes a mask.
    """
    ends = batch.trie_ends
    if ends is None:
        inputs = batch.model_inputs()
    else:
        # a single row is flat wherever the attention can leave out what is not seen, which is never dearer
        is_flat = attention_of(model) == FLAT_ATTENTION and ends.shape[0] == 1
        inputs = batch.model_inputs(flat_mask(ends) if is_flat else trie_mask(ends, mask_dtype(model)))
    if getattr(base_model(model).config.get_text_config(), "output_router_logits", False):
        inputs["output_router_logits"] = False  # of which the model would make a loss by its mask; `RouterLoss` does
    return inputs


@contextmanager
def scoring(model: Any) -> Iterator[ScoredModel]:
    """A model with a head, in eval mode and without gradient; after, as it was and without."""
    was_training = model.training
    model.eval()
    head = ScoringHead(model)
    try:
        with torch.no_grad():
            yield ScoredModel(model, head)
    finally:
        head.remove()
        model.train(was_training)


def answer_batches(
    dataset: "Dataset", *, pad_token_id: int, batch_size: int, device: torch.device, desc: str | None
) -> Iterator[Batch]:
    """A data set's pairs in its order, each answer in a row of its own and scored whole: no segment is shared.

    Args:
        dataset: from `tokenise_pairs`.
        pad_token_id: any token; padding is masked.
        batch_size: pairs per batch.
        device: where the batches are to be.
        desc: of the progress bar; None shows none.
    """
    collator = PairCollator(pad_token_id=pad_token_id, prefix_sharing=False)
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=collator)  # type: ignore[arg-type]
    for batch in tqdm(loader, desc=desc, disable=desc is None, leave=False):
        yield batch.to(device)


def attention_of(model: Any) -> str:
    """The attention implementation of a model, under an adapter or not, shared with other ranks or not."""
    return inner_attention(base_model(model).config.get_text_config()._attn_implementation)


def mask_dtype(model: Any) -> torch.dtype:
    """bool for sdpa; eager adds its mask to the scores, in the model's own dtype."""
    if attention_of(model) != "eager":
        return torch.bool
    dtype = base_model(model).dtype
    # weights of 8 bits are computed with in more
    return dtype if dtype.is_floating_point and dtype.itemsize > 1 else torch.float32
