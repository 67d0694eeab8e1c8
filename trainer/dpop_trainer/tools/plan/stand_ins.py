"""What a step on paper cannot run as it is, as functions that allocate and multiply the same: nothing is computed.

PaperHead           the scoring head of a device: unit gradients, workspace, products
QuantisedLinear     bitsandbytes' 4-bit and 8-bit layers: packed weights, widened for each product
grouped_experts     a mixture's experts, whichever tokens they get
offload_on_paper    what checkpointing keeps, on its way to the host and back
rows_of_one         that a row without padding is one sequence, which transformers reads from its positions
exchanges_on_paper  what the ranks of a batch send each other around attention
known_as_paper      that there are no values to read
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import masking_utils
from transformers.integrations import moe
from transformers.utils import import_utils

from dpop_kernels.backends import bounds
from dpop_kernels.logps.linear import as_autocast
from dpop_kernels.model_head.layers import StandIn, is_lora, output_layers
from dpop_kernels.model_head.transforms import logit_transform
from dpop_trainer.batches import sequence_group
from dpop_trainer.tools.plan.paper_tensor import PaperTensor
from dpop_trainer.tools.plan.tape import add_flop, add_moved, part

FP32, FP64 = 4, 8
QUANTISED_BLOCK = 64
"""Weights that share a scale in 4 bits (bitsandbytes' default)."""
NESTED_BLOCK = 256
"""Scales that share a scale where they are quantised too."""


class PaperHead:
    """Stands in a model's head and allocates what the scoring head of a device would.

    Args:
        model: a causal LM, or a peft model around one.
        on_gpu: the Triton kernels' tiles; else the chunked CPU backend's.
        num_scored: N, of the batch that is run.
    """

    def __init__(self, model: nn.Module, *, on_gpu: bool, num_scored: int) -> None:
        self._bounds = bounds.triton_bounds() if on_gpu else bounds.CPU
        self._num_scored = num_scored
        self._transform = logit_transform(model)
        self._logps: Tensor | None = None
        self._stand_ins = [StandIn(layer, self._in_place_of_logits) for layer in output_layers(model)]

    def token_logps(self, model: Any, **model_inputs: Any) -> Tensor:
        """One forward -> [N], as `ScoringHead.token_logps`."""
        model(**model_inputs, use_cache=False)
        assert self._logps is not None, "the forward did not call its head"
        logps, self._logps = self._logps, None
        return logps

    def _in_place_of_logits(self, stand_in: StandIn, hidden_states: Tensor) -> Tensor:
        layer: Any = stand_in.module
        if is_lora(layer):
            layer = layer.base_layer
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        rows = rows.index_select(0, torch.empty(self._num_scored, dtype=torch.int64))
        rows, weight = as_autocast(rows, layer.weight)
        with torch.autocast(rows.device.type, enabled=False):
            self._logps = _HeadProduct.apply(rows, weight, self, torch.is_grad_enabled())
        assert self._logps is not None
        return self._logps.unsqueeze(0).unsqueeze(-1).clone()

    def forward_bytes(
        self, num_scored: int, weight: Tensor, itemsize: int, *, with_gradient: bool, with_stats: bool
    ) -> int:
        """Workspace of a forward, freed at its end."""
        vocab_size, hidden_size = weight.shape
        return self._bounds.forward_bytes(
            num_scored,
            vocab_size,
            hidden_size,
            itemsize,
            with_gradient=with_gradient,
            with_stats=with_stats,
            transform=self._transform,
        )

    def backward_bytes(self, num_scored: int, weight: Tensor, itemsize: int) -> int:
        """Workspace of a trainable head's backward, beside the gradients it returns."""
        vocab_size, hidden_size = weight.shape
        return self._bounds.backward_bytes(num_scored, vocab_size, hidden_size, itemsize, transform=self._transform)


class _HeadProduct(torch.autograd.Function):
    """[N, H] and [V, H] -> [N]: two products where the weight is frozen, four where it is not, one without gradient."""

    @staticmethod
    def forward(ctx, rows, weight, head, grad_enabled):
        needs_rows, needs_weight = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        num_scored, itemsize = rows.shape[0], rows.dtype.itemsize
        is_frozen = needs_rows and not needs_weight
        ctx.head, ctx.is_frozen = head, is_frozen
        with part("head"):
            # the policy's forward makes statistics, the reference's none
            num_bytes = head.forward_bytes(
                num_scored, weight, itemsize, with_gradient=is_frozen, with_stats=grad_enabled
            )
            workspace = _bytes(num_bytes)
            logps = rows.new_empty(num_scored, dtype=torch.float32)
            # statistics and log-normalisers
            stats = _bytes(num_scored * (3 * FP32 + 1 + FP64 + FP32))
            if is_frozen:
                ctx.save_for_backward(torch.empty_like(rows), stats)
            elif needs_weight:
                ctx.save_for_backward(rows, weight, stats)
            del workspace
        add_flop("head", (2 if is_frozen else 1) * 2.0 * num_scored * weight.numel())
        return logps

    @staticmethod
    def backward(ctx, *grads):
        head = ctx.head
        with part("head"):
            if ctx.is_frozen:
                unit_grad, _ = ctx.saved_tensors
                return torch.empty_like(unit_grad), None, None, None
            rows, weight, _ = ctx.saved_tensors
            grad_weight = torch.empty_like(weight)
            workspace = _bytes(head.backward_bytes(rows.shape[0], weight, rows.dtype.itemsize))
            grad_rows = torch.empty_like(rows)
            del workspace
        add_flop("head", 3 * 2.0 * rows.shape[0] * weight.numel())
        return grad_rows, grad_weight, None, None


class QuantisedLinear(nn.Linear):
    """A frozen linear layer whose weight is packed.

    Args:
        linear: what it stands for.
        bits: 4 or 8.
        nested: the scales of 4 bits are quantised as well.
        compute_dtype: what the weight is widened to for a product.
    """

    def __init__(self, linear: nn.Linear, *, bits: int, nested: bool, compute_dtype: torch.dtype) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.bits, self.compute_dtype = bits, compute_dtype
        num_bytes = packed_bytes(linear.out_features, linear.in_features, bits=bits, nested=nested)
        self.weight = nn.Parameter(torch.empty(num_bytes, dtype=torch.uint8, device="meta"), requires_grad=False)
        self.bias = linear.bias

    def forward(self, input: Tensor) -> Tensor:
        rows = input.to(self.compute_dtype)
        shape = (self.out_features, self.in_features)
        # no autocast inside, as in the library's own product
        with torch.autocast(input.device.type, enabled=False):
            output = _PackedProduct.apply(rows, self.weight, shape)
            if self.bias is not None:
                output = output + self.bias.to(self.compute_dtype)
        output = output.to(input.dtype)
        # peft copies the output before it adds its own
        return output.clone() if self.bits == 4 and torch.is_grad_enabled() else output


class _PackedProduct(torch.autograd.Function):
    """Rows times a packed weight; keeps the packed weight alone, and widens it anew for the backward."""

    @staticmethod
    def forward(ctx, rows, packed, shape):
        ctx.shape, ctx.dtype = shape, rows.dtype
        with part("dequantised"):
            weight = torch.empty(shape, dtype=rows.dtype)
        return rows @ weight.T

    @staticmethod
    def backward(ctx, *grads):
        (grad_output,) = grads
        with part("dequantised"):
            weight = torch.empty(ctx.shape, dtype=ctx.dtype)
        return grad_output @ weight, None, None


def packed_bytes(num_outputs: int, num_inputs: int, *, bits: int, nested: bool) -> int:
    """Of a quantised weight and its scales.

    4 bits: two weights a byte, and an fp32 scale for 64 of them; nested: a byte for that, and an fp32 scale for 256.
    8 bits: a byte each, and an fp32 scale for every output.
    """
    num_weights = num_outputs * num_inputs
    if bits == 8:
        return num_weights + num_outputs * FP32
    num_scales = -(-num_weights // QUANTISED_BLOCK)
    scales = num_scales + -(-num_scales // NESTED_BLOCK) * FP32 if nested else num_scales * FP32
    return -(-num_weights // 2) + scales


def quantise(model: nn.Module, *, bits: int, nested: bool, compute_dtype: torch.dtype) -> None:
    """Put packed layers in the place of a model's linear layers, in all places but the head, as transformers does."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not head:
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(
                parent,
                name.rpartition(".")[2],
                QuantisedLinear(module, bits=bits, nested=nested, compute_dtype=compute_dtype),
            )


class _GroupedProduct(torch.autograd.Function):
    """[S, I] with each row's own weight of [E, I, O] -> [S, O], whoever has which."""

    @staticmethod
    def forward(ctx, rows, weight, offsets):
        needs_weight = ctx.needs_input_grad[1]
        ctx.save_for_backward(rows if needs_weight else None, weight)
        return rows @ weight[0]

    @staticmethod
    def backward(ctx, *grads):
        (grad_output,) = grads
        rows, weight = ctx.saved_tensors
        grad_weight = None
        if rows is not None:
            grad_weight = torch.empty_like(weight)
            torch.mm(rows.T, grad_output)  # to be counted; each expert's is a part of it
        return grad_output @ weight[0].T, grad_weight, None


def grouped_experts() -> AbstractContextManager[None]:
    """Let mixtures of experts run without knowing who gets which token."""
    return _in_place_of(
        moe, "_grouped_mm", lambda input, weight, offs: _GroupedProduct.apply(input.to(weight.dtype), weight, offs)
    )


def rows_of_one() -> AbstractContextManager[None]:
    """Let no mask be made of rows without padding: a row of several sequences comes with a mask of its own."""
    return _in_place_of(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)


def exchanges_on_paper() -> AbstractContextManager[None]:
    """Let one process stand for all that run a batch together: it sends, and gets as much."""
    return _in_place_of(sequence_group, "exchanged", lambda parts, process_group: torch.empty_like(parts.contiguous()))


def known_as_paper() -> AbstractContextManager[None]:
    """Let transformers read no values, as it reads none of torch's own fake tensors."""
    return _in_place_of(import_utils, "is_fake_tensor", lambda tensor: isinstance(tensor, PaperTensor))


@contextmanager
def _in_place_of(module: ModuleType, name: str, stand_in: Callable[..., Any]) -> Iterator[None]:
    own = getattr(module, name)
    setattr(module, name, stand_in)
    try:
        yield
    finally:
        setattr(module, name, own)


def offload_on_paper(model: nn.Module) -> None:
    """Let the checkpoints of a model, which has been told to make some, lie where they take none of the memory that is
    counted: with transformers' own offloading they are copied off the device as they are made, and back one by one."""
    for module in model.modules():
        checkpoint = vars(module).get("_gradient_checkpointing_func")
        if checkpoint is not None:
            vars(module)["_gradient_checkpointing_func"] = partial(_offloaded, checkpoint)


def _offloaded(checkpoint: Any, *args: Any) -> Any:
    with torch.autograd.graph.saved_tensors_hooks(_sent, _fetched):
        return checkpoint(*args)


def _sent(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    add_moved(tensor.nbytes)
    return tensor.shape, tensor.dtype


def _fetched(sent: tuple[torch.Size, torch.dtype]) -> Tensor:
    shape, dtype = sent
    tensor = torch.empty(shape, dtype=dtype)
    add_moved(tensor.nbytes)
    return tensor


def _bytes(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8)
