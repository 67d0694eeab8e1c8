"""One training step on paper: bytes at its worst moments, by part, and its matrix products; carried on to all layers.

A model of a few layers is run, and counted twice: as it is, and without what happened in one period of its layers. In
each phase of the step what a layer adds is the same, so both its bytes and its FLOP are straight lines in the number of
layers; the step's peak is the highest of the lines:

    reference        a forward of which nothing stays
    forward          activations stay, or the layers' inputs alone; the head at its end
    backward begins  all activations, no gradient yet
    backward ends    no activations, all gradients
    optimizer        gradients, and what the optimizer needs beside its states
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedConfig

from dpop_trainer.batches import Batch
from dpop_trainer.batches.flat_attention import runs
from dpop_trainer.batches.scoring import forward_inputs
from dpop_trainer.batches.sequence_group import SequenceGroup
from dpop_trainer.batches.sequence_shares import of_columns, share_out
from dpop_trainer.batches.shared_attention import SharedForward, run_together, share_attention
from dpop_trainer.models.adapters import base_model
from dpop_trainer.models.tiled_mlp import tile_mlps
from dpop_trainer.settings.renamed import enable_checkpointing
from dpop_trainer.tools.plan.flat_on_paper import PAPER_ATTENTION, flat_row_on_paper
from dpop_trainer.tools.plan.paper_model import ModelSetting, Sizes, build, decoder_layers, on_paper
from dpop_trainer.tools.plan.paper_tensor import paper
from dpop_trainer.tools.plan.stand_ins import (
    PaperHead,
    exchanges_on_paper,
    grouped_experts,
    known_as_paper,
    offload_on_paper,
    rows_of_one,
)
from dpop_trainer.tools.plan.tape import Moment, Tape

BEGINS, BETWEEN, ENDS = "backward begins", "backward", "backward ends"


@dataclass(frozen=True)
class StepSetting:
    """How a run makes a step, as far as a device's memory and time depend on it."""

    on_gpu: bool
    """Triton's head and FlexAttention; else the CPU's."""
    checkpointing: bool
    autocast: torch.dtype | None
    """Of mixed precision; None computes in the weights' dtype."""
    reference: Literal["adapter off", "copy", "none"]
    """What is run beside the policy: itself without its adapter, a second model, or nothing (log-probs are precomputed,
    or no loss needs any)."""
    accumulates: bool
    """Gradients of earlier micro-batches are there when a step begins."""
    optimizer_temporaries: bool
    """The optimizer works on all weights at once (torch's foreach), with temporaries of their size."""
    in_compute_dtype: bool = False
    """Weights arrive in autocast's dtype, as FSDP2 and DeepSpeed gather them."""
    tiled_mlp: int | str | None = None
    """As in DPOPConfig."""
    offloading: bool = False
    """What checkpointing keeps lies in the host's memory."""
    ranks_per_batch: int = 1
    """Each has its part of the columns of a batch."""


@dataclass(frozen=True)
class StepCost:
    """What a step of the whole model takes on one device, over weights and optimizer states."""

    moments: Mapping[str, Moment]
    """The worst of each phase."""
    flop: Mapping[str, float]
    """Of matrix products, 2 per multiply-add: layers, attention, head."""
    moved_bytes: float = 0.0
    """To the host and back."""

    @property
    def phase(self) -> str:
        """The phase of the peak."""
        return max(self.moments, key=lambda phase: self.moments[phase].total)

    @property
    def peak(self) -> Moment:
        return self.moments[self.phase]

    @property
    def total_flop(self) -> float:
        return sum(self.flop.values())

    def without(self, *names: str) -> "StepCost":
        """The same, where these parts are held in another way."""
        moments = {}
        for phase, moment in self.moments.items():
            parts = {name: size for name, size in moment.parts.items() if name not in names}
            moments[phase] = Moment(sum(parts.values()), parts)
        return StepCost(moments, self.flop, self.moved_bytes)


def step_cost(
    config: PreTrainedConfig,
    sizes: Sizes,
    model: ModelSetting,
    setting: StepSetting,
    batch: Batch,
    *,
    is_flat: bool,
) -> StepCost:
    """One micro-batch: reference, policy, backward, optimizer.

    Args:
        config: of the whole model.
        sizes: of it, from `count`.
        model: how it is loaded.
        setting: how it is trained.
        batch: from `PairCollator`.
        is_flat: the layout is "flat".
    """
    few = sizes.num_leading + 3 * sizes.period
    if sizes.num_layers <= few:
        tape = _run(build(config, model), setting, batch, is_flat=is_flat, sizes=sizes)
        return StepCost(tape.moments(), tape.flop(), tape.moved_bytes())
    tape = _run(build(config, model, num_layers=few), setting, batch, is_flat=is_flat, sizes=sizes)
    middle = range(sizes.num_leading + sizes.period, sizes.num_leading + 2 * sizes.period)
    share = (sizes.num_layers - few) / sizes.period

    def carry_on(low: float, high: float) -> float:
        return max(0.0, high + share * (high - low))

    moments = {}
    shorter, longer = tape.moments(without=middle), tape.moments()
    for phase, high in longer.items():
        if phase == BETWEEN:
            continue
        low = shorter[phase]
        names = {**low.parts, **high.parts}
        parts = {name: carry_on(low.parts.get(name, 0), high.parts.get(name, 0)) for name in names}
        moments[phase] = Moment(sum(parts.values()), parts)
    shorter_flop, longer_flop = tape.flop(without=middle), tape.flop()
    flop = {kind: carry_on(shorter_flop[kind], flop) for kind, flop in longer_flop.items()}
    return StepCost(moments, flop, carry_on(tape.moved_bytes(without=middle), tape.moved_bytes()))


def _run(model: Any, setting: StepSetting, batch: Batch, *, is_flat: bool, sizes: Sizes) -> Tape:
    """A model of the meta device through one step, written down."""
    if setting.in_compute_dtype and setting.autocast is not None:
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(setting.autocast)
    on_paper(model)
    base: Any = base_model(model)
    if is_flat:
        base.set_attn_implementation(PAPER_ATTENTION)
    if setting.checkpointing:
        enable_checkpointing(model)
        if isinstance(model, PeftModel):
            model.enable_input_require_grads()
        if setting.offloading:
            offload_on_paper(base)
    tile_mlps(model, setting.tiled_mlp, on_gpu=setting.on_gpu)  # type: ignore[arg-type]
    model.train()
    share = None
    if setting.ranks_per_batch > 1:
        share_attention(base)
        share = _largest_share(batch, setting.ranks_per_batch)
    has_padding = not bool(batch.attention_mask.all())
    row = contextlib.nullcontext()
    if is_flat:  # the backward of a checkpoint attends again
        row = flat_row_on_paper(runs(batch["trie_ends"].flatten().tolist()), on_gpu=setting.on_gpu)
    with known_as_paper(), grouped_experts(), rows_of_one(), exchanges_on_paper(), row:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        head = PaperHead(
            base, on_gpu=setting.on_gpu, num_scored=batch.target_ids.shape[0] if share is None else share.num_scored
        )
        inputs = Batch({key: paper(value.shape, value.dtype) for key, value in batch.items()})
        known: list[Tensor] = [*model.parameters(), *model.buffers(), *inputs.values()]
        if setting.accumulates:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
            known += [parameter.grad for parameter in trained if parameter.grad is not None]
        tape = Tape(known)
        layers = decoder_layers(model)
        layer_of = {id(parameter): index for index, layer in enumerate(layers) for parameter in layer.parameters()}
        _name_phases(layers, tape, sizes)
        step = _Step(model, head, setting, has_padding=has_padding, is_flat=is_flat, share=share)
        with tape:
            loss = step.forward(tape, inputs)
            tape.enter(BEGINS)
            loss.backward()
            del loss
            tape.assign((p.grad for p in trained if p.grad is not None), "gradients")
            tape.enter("optimizer")
            if setting.optimizer_temporaries:
                temporaries = []
                for parameter in trained:
                    tape.enter_layer(layer_of.get(id(parameter), 0))
                    temporaries.append(torch.empty_like(parameter))
                tape.assign(temporaries, "optimizer's temporaries")
                del temporaries
    return tape


class _Share(NamedTuple):
    """One rank's of a batch that several run together."""

    group: SequenceGroup
    num_scored: int
    pads_right: bool


def _largest_share(batch: Batch, ranks_per_batch: int) -> _Share:
    """Of the rank that scores the most tokens; all have as many columns."""
    groups = [SequenceGroup(None, rank, ranks_per_batch) for rank in range(ranks_per_batch)]
    shared = [share_out(batch, group) for group in groups]
    num_scored = [0 if one.own_tokens is None else one.own_tokens.shape[0] for one in shared]
    most = max(groups, key=lambda group: num_scored[group.rank])
    return _Share(most, num_scored[most.rank], shared[most.rank].pads_right)


@dataclass
class _Step:
    model: Any
    head: PaperHead
    setting: StepSetting
    has_padding: bool
    is_flat: bool
    share: _Share | None

    def forward(self, tape: Tape, batch: Batch) -> Tensor:
        """Reference and policy, in the trainer's order -> the loss."""
        setting = self.setting
        autocast = contextlib.nullcontext()
        if setting.autocast is not None:
            autocast = torch.autocast("cpu", setting.autocast)
        inputs = self._inputs(batch)
        together = contextlib.nullcontext()
        if self.share is not None:
            group, mask = self.share.group, None if batch.trie_ends is None else inputs["attention_mask"]
            together = run_together(
                SharedForward(group, batch.attention_mask, pads_right=self.share.pads_right, mask=mask)
            )
            inputs |= of_columns(batch, group.columns(batch.input_ids.shape[1]))
        with autocast, together:
            if setting.reference != "none":
                tape.enter("reference")
                with torch.no_grad(), self._as_reference():
                    self.head.token_logps(self.model, **inputs)
            tape.enter("forward")
            return self.head.token_logps(self.model, **inputs).sum()

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        if self.is_flat:
            assert batch.trie_ends is not None
            return batch.model_inputs(batch.trie_ends[:, None, None, :])
        inputs = forward_inputs(batch, self.model)
        if batch.trie_ends is None and not self.has_padding:  # which transformers sees, and makes no mask
            del inputs["attention_mask"]
        return inputs

    def _as_reference(self) -> Any:
        if isinstance(self.model, PeftModel):
            return self.model.disable_adapter()
        return _frozen(self.model)


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Any:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    yield
    for parameter in trained:
        parameter.requires_grad_(True)


def _name_phases(layers: list[nn.Module], tape: Tape, sizes: Sizes) -> None:
    """Let the step say where it is: in the backward, a layer begins when the gradient of its output arrives."""

    def watch(index: int, layer: nn.Module) -> None:
        phase = BETWEEN
        if index < sizes.num_leading + sizes.period:
            phase = ENDS
        elif index >= len(layers) - sizes.period:
            phase = BEGINS

        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            if states.requires_grad:
                states.register_hook(enter)

        def enter(gradient: Tensor) -> None:
            tape.enter(phase)
            tape.enter_layer(index)

        layer.register_forward_pre_hook(lambda module, arguments: tape.enter_layer(index))
        layer.register_forward_hook(hook)

    for index, layer in enumerate(layers):
        watch(index, layer)
