"""One training step of each side on a batch of pairs, with its own collator, loss and head, as it runs on a GPU.

Where a side asks for its device, it is told what a GPU would tell it: this package takes the tiles of its Triton
kernels, TRL scores the answers' tokens alone and folds its tiles in place. What Triton kernels do within a tile they do
without allocating, so their stand-ins do nothing.
"""

import contextlib
import functools
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, get_args
from unittest import mock

import torch
from datasets import Dataset
from dpop_trainer.batches import Batch, PairCollator
from dpop_trainer.batches.flat_attention import BLOCK_SIZE
from dpop_trainer.batches.layouts import Layout
from dpop_trainer.batches.scoring import ScoredModel, forward_inputs
from dpop_trainer.models.adapters import base_model
from dpop_trainer.reference.source import adapter_off, reference_segment_logps
from dpop_trainer.settings.renamed import enable_checkpointing
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.counted.attention import ATTENTION, use_counted_attention
from benchmarks.counted.shapes_only import BODY, ShapesOnly, phase_of
from benchmarks.cpu_step import word_tokenizer
from dpop_kernels import ScoringHead
from dpop_kernels.backends import BACKENDS, Registration, products
from dpop_kernels.logps import pair_tiles, tiling
from dpop_kernels.losses.options import LossOptions
from dpop_kernels.losses.pair_loss import pair_loss_terms

HEAD = "head"
"""The phase of log-probs from hidden states."""
TRL = "trl"
GPU_TILES = "gpu_tiles"
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


@dataclass(frozen=True)
class Count:
    """What one step took."""

    body_flop: float
    """Products of the layers, in forward, recomputation and backward, of policy and reference."""
    attention_flop: float
    head_flop: float
    body_traffic: float
    """Bytes that the layers' other operations read and write, each by itself."""
    peak_bytes: int
    """The most that was held, weights and gradients included; optimizer states are not."""
    weight_bytes: int
    body_tokens: int
    """Positions that the layers computed, padding too, in one forward."""
    head_tokens: int
    """Scored ones, in one forward."""

    @property
    def flop(self) -> float:
        return self.body_flop + self.attention_flop + self.head_flop

    def carried_on(self, more: "Count", times: int) -> "Count":
        """This with `times` of what `more` adds to it."""
        sizes = {"body_tokens", "head_tokens"}
        return Count(
            **{
                name: value if name in sizes else value + times * (getattr(more, name) - value)
                for name, value in asdict(self).items()
            }
        )


def count_step(side: str, model: Any, ref_model: Any, records: list[dict[str, Any]], *, checkpointing: bool) -> Count:
    """One micro-batch: reference, policy, loss, backward.

    Args:
        side: a layout of this package, or "trl".
        model: of the meta device, with an adapter or without.
        ref_model: another; None for the model without its adapter.
        records: tokenised pairs.
        checkpointing: each layer keeps its input alone.
    """
    counter = ShapesOnly()
    models = [base_model(model)] if ref_model is None else [model, ref_model]
    for each in models:
        use_counted_attention(each, counter)
    if checkpointing:
        enable_checkpointing(model)
        if isinstance(model, PeftModel):
            model.enable_input_require_grads()
    model.train()
    for tensor in (tensor for each in models for tensor in (*each.parameters(), *each.buffers())):
        counter.hold(tensor)
    weight_bytes = counter.held
    step = _trl_loss if side == TRL else _our_loss
    with (
        _without_autocast(),
        step(side, model, ref_model, records, counter) as (loss_of, body_tokens, head_tokens),
        counter,
    ):
        loss_of().backward()
    for parameter in model.parameters():
        parameter.grad = None
    return Count(
        body_flop=counter.flop[BODY],
        attention_flop=counter.flop[ATTENTION],
        head_flop=counter.flop[HEAD],
        body_traffic=counter.traffic[BODY],
        peak_bytes=counter.peak,
        weight_bytes=weight_bytes,
        body_tokens=body_tokens,
        head_tokens=head_tokens,
    )


@contextlib.contextmanager
def _without_autocast() -> Iterator[None]:
    """Tensors without data know none: all is in one dtype."""
    own = torch.autocast

    def autocast(device_type: str, *arguments: Any, **options: Any) -> Any:
        return contextlib.nullcontext() if device_type == "meta" else own(device_type, *arguments, **options)

    with (
        mock.patch.object(torch, "is_autocast_enabled", return_value=False),
        mock.patch.object(torch, "autocast", autocast),
    ):
        yield


@contextlib.contextmanager
def _our_loss(
    layout: Any, model: Any, ref_model: Any, records: list[dict[str, Any]], counter: ShapesOnly
) -> Iterator[Any]:
    """As `DPOPTrainer` does it: the reference first, so that none of the policy's activations lie beside it."""
    # a flat row comes in whole blocks of FlexAttention's mask
    multiple = BLOCK_SIZE if layout == "flat" else None
    hidden_size = model.config.get_text_config().hidden_size
    batch = PairCollator(pad_token_id=0, layout=layout, pad_to_multiple_of=multiple, hidden_size=hidden_size)(records)
    # what no shape depends on, where the weights are
    batch = Batch(
        {**batch, **{name: batch[name].to("meta") for name in ("score_positions", "target_ids", "cu_seqlens")}}
    )
    registration = Registration("benchmarks.counted.gpu_tiles", lambda device, dtype: None)
    with (
        mock.patch.dict(BACKENDS, {GPU_TILES: registration}),
        mock.patch.object(tiling, "product_dtype", _own_dtype),
        mock.patch.object(pair_tiles, "product_dtype", _own_dtype),
        mock.patch.object(products, "_adds_to_longer", return_value=True),
        phase_of(counter, HEAD, tiling._TiledTokenLogps),
    ):
        heads = [ScoringHead(each, backend=GPU_TILES) for each in (model, ref_model) if each is not None]

        def loss_of() -> Tensor:
            inputs = forward_inputs(batch, model)
            with adapter_off(model) if ref_model is None else contextlib.nullcontext():
                ref_logps = reference_segment_logps(heads[-1], ref_model or model, batch, inputs, GPU_TILES)
            logps, _ = ScoredModel(model, heads[0]).token_logps(batch, inputs, return_stats=True)
            pairs, _ = pair_loss_terms(
                logps,
                batch.cu_seqlens,
                ref_logps,
                loss_weights={"dpop": 1.0},
                options=LossOptions(),
                backend=GPU_TILES,
            )
            return pairs.losses.mean()

        yield loss_of, batch.input_ids.numel(), batch.target_ids.numel()
        for head in heads:
            head.remove()


def _own_dtype(tensor: Tensor) -> torch.dtype:
    """What products take on a GPU."""
    return tensor.dtype


@contextlib.contextmanager
def _trl_loss(
    side: str, model: Any, ref_model: Any, records: list[dict[str, Any]], counter: ShapesOnly
) -> Iterator[Any]:
    """As TRL's `DPOTrainer` does it: the policy, then the reference, in two rows per pair padded to the longest."""
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    trainer = _trl_trainer()
    with (
        mock.patch.object(utils, "_use_triton", return_value=True),
        mock.patch.object(chunked_logprob, "_forward_tile", _in_place),
        mock.patch.object(chunked_logprob, "_backward_tile", _in_place),
        mock.patch.object(chunked_logprob, "_addmm_fp32", _add_to_longer),
        phase_of(counter, HEAD, chunked_logprob.ChunkedLogProbFunction),
    ):
        base = base_model(model)
        utils.add_fused_lm_head(base, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
        if ref_model is not None:
            utils.add_fused_lm_head(ref_model)
        trainer.model, trainer.ref_model = model, ref_model
        inputs = trainer.data_collator(records)

        def loss_of() -> Tensor:
            return trainer._compute_loss(model, inputs, return_outputs=False)

        yield loss_of, inputs["input_ids"].numel(), int(inputs["completion_mask"][:, 1:].sum())
        for each in (base, ref_model):
            if each is not None:
                del each.forward


def _in_place(*arguments: Any, **options: Any) -> None:
    """A Triton kernel on a tile."""


def _add_to_longer(total: Tensor, left: Tensor, right: Tensor) -> None:
    torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


@functools.cache
def _trl_trainer() -> Any:
    """A `DPOTrainer` as its constructor makes it, of a model that is then replaced."""
    from trl import DPOConfig, DPOTrainer

    tokenizer = word_tokenizer(64)
    config = LlamaConfig(
        vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, pad_token_id=0
    )
    with tempfile.TemporaryDirectory() as folder:
        return DPOTrainer(
            LlamaForCausalLM(config),
            args=DPOConfig(folder, report_to="none", bf16=False, use_cpu=True, beta=0.3, disable_tqdm=True),
            train_dataset=Dataset.from_list([{"prompt": "w2", "chosen": " w3", "rejected": " w4"}]),
            processing_class=tokenizer,
            peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
        )
