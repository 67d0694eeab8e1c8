"""A run as it is configured, and what any setting of it takes: memory of a device, time and cost of an epoch."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedConfig

from dpop_trainer.batches import Batch
from dpop_trainer.batches.choose_layout import flat_obstacle, tree_obstacle
from dpop_trainer.batches.flat_attention import BLOCK_SIZE
from dpop_trainer.models.tiled_mlp import can_tile
from dpop_trainer.tools.plan.batches import Batches, BatchSetting, Pairs, make_batches
from dpop_trainer.tools.plan.devices import Device, Sharding
from dpop_trainer.tools.plan.memory import Memory, device_memory, optimizer_named
from dpop_trainer.tools.plan.paper_model import LONGEST_PERIOD, ModelSetting, Sizes, build, count, layer_kinds, sizes_of
from dpop_trainer.tools.plan.step import StepCost, StepSetting, step_cost
from dpop_trainer.tools.plan.tape import Moment
from dpop_trainer.tools.plan.timing import StepTime, step_time


@dataclass(frozen=True)
class Choice:
    """What may be chosen without changing what is trained on, but for `bits`."""

    layout: str
    """As in DPOPConfig."""
    num_pairs: int
    """per_device_train_batch_size."""
    accumulation: int
    checkpointing: bool
    bits: int | None
    """4 or 8 for a quantised base."""
    sharding: Sharding
    num_devices: int
    tiled_mlp: int | str | None = None
    """As in DPOPConfig."""
    offloading: bool = False
    """Of activations, with checkpointing."""
    ranks_per_batch: int = 1
    """sequence_parallel_size."""

    @property
    def num_batches(self) -> int:
        """That run at a time, each on a device or on several."""
        return self.num_devices // self.ranks_per_batch

    @property
    def global_pairs(self) -> int:
        """Per optimizer step."""
        return self.num_pairs * self.accumulation * self.num_batches


@dataclass(frozen=True)
class Run:
    """What is given: the model, its data, the training, the device."""

    config: PreTrainedConfig
    model: ModelSetting
    pairs: Pairs
    device: Device
    autocast: torch.dtype | None
    optimizer: str
    reference: Any
    """As in `StepSetting`."""
    reference_config: PreTrainedConfig | None
    """Of a second model, where it is another than the policy."""
    max_length: int | None
    prefix_sharing: bool = True
    budget: int | None = None
    group_by_prompt: bool = False
    pad_to_multiple_of: int | None = None
    seed: int = 0
    price: float | None = None
    """Per device and hour."""
    num_epochs: float = 1.0
    max_steps: int = -1


@dataclass(frozen=True)
class Outcome:
    """What a choice takes."""

    choice: Choice
    layout: str
    """That it comes to: what "auto" is for this model and device."""
    batches: Batches
    memory: Memory
    cost: StepCost
    """Of the largest batch."""
    time: StepTime
    """Of a micro-batch, on average."""
    fits: bool
    spare: float
    """Bytes that are left on the device; what is short where negative."""

    @property
    def seconds_per_pair(self) -> float:
        """Of all devices together."""
        return self.time.total / self.batches.pairs_per_batch / self.choice.num_batches

    @property
    def device_seconds_per_pair(self) -> float:
        return self.time.total / self.batches.pairs_per_batch * self.choice.ranks_per_batch

    def logits_bytes(self, vocab_size: int) -> float:
        """What logits would add: three tensors of theirs in fp32, as in a trainer that makes them of whole rows."""
        return 3.0 * 4 * self.batches.largest.input_ids.numel() * vocab_size


@dataclass
class Planner:
    """Works outcomes out, each step on paper once.

    Args:
        run: what is given.
        show: told what is worked out, each time that it takes a second or two.
    """

    run: Run
    show: Callable[[str], object] = str
    _costs: dict[Any, StepCost] = field(default_factory=dict)
    _sizes: dict[int | None, Sizes] = field(default_factory=dict)
    _batches: dict[BatchSetting, Batches] = field(default_factory=dict)

    def sizes(self, bits: int | None) -> Sizes:
        """Of the whole model with its adapter."""
        if bits not in self._sizes:
            self._sizes[bits] = sizes_of(self.run.config, self._model(bits), self._kinds)
        return self._sizes[bits]

    @cached_property
    def _kinds(self) -> list[Any]:
        return layer_kinds(build(self.run.config, replace(self.run.model, bits=None, lora=None)))

    @cached_property
    def best_layout(self) -> str:
        """What `auto` comes to, as far as the model's kind tells: a probe at the start of a run has the last word."""
        if flat_obstacle(self.bare, max_length=self.run.max_length) is None:
            return "flat"
        return "auto" if tree_obstacle(self.bare, max_length=self.run.max_length) is None else "rows"

    def obstacle(self, layout: str) -> str | None:
        """Why the model cannot run a layout that is asked for by name."""
        if layout in ("auto", "rows"):
            return None
        find = flat_obstacle if layout == "flat" else tree_obstacle
        return find(self.bare, max_length=self.run.max_length)

    @cached_property
    def bare(self) -> Any:
        """The model without its adapter, deep enough to show its kinds of layers."""
        num_layers = min(self.run.config.get_text_config().num_hidden_layers, 2 * LONGEST_PERIOD)
        return build(self.run.config, replace(self.run.model, bits=None, lora=None), num_layers=num_layers)

    @cached_property
    def can_tile(self) -> bool:
        """Whether the model's MLPs can be computed over tiles."""
        return can_tile(self.bare)

    def outcome(self, choice: Choice, *, pairs: Pairs | None = None, exact_time: bool = True) -> Outcome:
        """
        Args:
            choice: the setting.
            pairs: others than the run's.
            exact_time: run the typical batch on paper too; else its time is taken from the largest batch's, by
                positions.

        Raises:
            ValueError: a pair exceeds the run's budget of positions.
        """
        run, sizes, model = self.run, self.sizes(choice.bits), self._model(choice.bits)
        layout = self.best_layout if choice.layout == "auto" else choice.layout
        batches = self._batches_of(choice, layout, pairs)
        optimizer = optimizer_named(run.optimizer, on_gpu=run.device.is_gpu)
        setting = StepSetting(
            on_gpu=run.device.is_gpu,
            checkpointing=choice.checkpointing,
            autocast=run.autocast,
            reference=run.reference,
            accumulates=_accumulates(choice),
            optimizer_temporaries=optimizer.whole_temporaries,
            in_compute_dtype=_is_split(choice),
            tiled_mlp=choice.tiled_mlp,
            offloading=choice.offloading,
            ranks_per_batch=choice.ranks_per_batch,
        )
        cost = self._cost(choice.bits, setting, batches.largest, is_flat=layout == "flat")
        typical, scale = cost, batches.positions / batches.largest.input_ids.numel()
        if exact_time:
            typical = self._cost(choice.bits, setting, batches.typical, is_flat=layout == "flat")
            scale = batches.scale
        memory = self._memory(choice, cost)
        time = step_time(
            sizes,
            model,
            typical,
            run.device,
            scale=scale,
            checkpointing=choice.checkpointing,
            has_reference=run.reference != "none",
            accumulation=choice.accumulation,
        )
        spare = run.device.memory_bytes - memory.total
        return Outcome(choice, layout, batches, memory, cost, time, spare >= 0, spare)

    def may_fit(self, choice: Choice) -> bool:
        """Whether what the run holds before any step fits, which no step on paper needs to tell."""
        return self._memory(choice, _NO_STEP).total <= self.run.device.memory_bytes

    def _memory(self, choice: Choice, cost: StepCost) -> Memory:
        return device_memory(
            self.sizes(choice.bits),
            self._model(choice.bits),
            cost,
            self.run.device,
            sharding=choice.sharding,
            num_devices=choice.num_devices,
            optimizer=optimizer_named(self.run.optimizer, on_gpu=self.run.device.is_gpu),
            accumulates=_accumulates(choice),
            reference_bytes=self._reference_bytes(choice.bits),
        )

    def _model(self, bits: int | None) -> ModelSetting:
        return replace(self.run.model, bits=bits)

    def _batches_of(self, choice: Choice, layout: str, pairs: Pairs | None) -> Batches:
        run = self.run
        multiple = run.pad_to_multiple_of
        if layout == "flat" and run.device.is_gpu and multiple is None:
            multiple = BLOCK_SIZE
        if choice.ranks_per_batch > 1:
            multiple = math.lcm(multiple or 1, choice.ranks_per_batch)
        setting = BatchSetting(
            layout=layout,  # type: ignore[arg-type]
            num_pairs=choice.num_pairs,
            budget=run.budget,
            group_by_prompt=run.group_by_prompt,
            prefix_sharing=run.prefix_sharing,
            pad_to_multiple_of=multiple,
            hidden_size=getattr(run.config.get_text_config(), "hidden_size", None),
        )
        if pairs is not None:
            return make_batches(pairs, setting, seed=run.seed)
        if setting not in self._batches:
            self._batches[setting] = make_batches(run.pairs, setting, seed=run.seed)
        return self._batches[setting]

    def _cost(self, bits: int | None, setting: StepSetting, batch: Batch, *, is_flat: bool) -> StepCost:
        shapes = tuple((name, tuple(value.shape)) for name, value in batch.items() if name != "cu_seqlens")
        ends = batch["trie_ends"].numpy().tobytes() if is_flat else bool(batch.attention_mask.all())
        key = bits, setting, shapes, ends
        if key not in self._costs:
            packed = "" if bits is None else f", {bits}-bit base"
            kept = ", gradient checkpointing" if setting.checkpointing else ""
            kept += ", tiled MLPs" if setting.tiled_mlp is not None else ""
            kept += ", offloading" if setting.offloading else ""
            kept += f", {setting.ranks_per_batch} devices to a batch" if setting.ranks_per_batch > 1 else ""
            self.show(f"A step of {batch.input_ids.numel():,} positions on paper{packed}{kept}")
            self._costs[key] = step_cost(
                self.run.config, self.sizes(bits), self._model(bits), setting, batch, is_flat=is_flat
            )
        return self._costs[key]

    def _reference_bytes(self, bits: int | None) -> float:
        if self.run.reference != "copy":
            return 0.0
        if self.run.reference_config is None:
            sizes = self.sizes(bits)
            return sizes.weight_bytes - sizes.adapter_bytes
        other = count(build(self.run.reference_config, ModelSetting(self.run.model.dtype)))
        return other.weight_bytes


_NO_STEP = StepCost({"": Moment(0.0, {})}, {})


def _is_split(choice: Choice) -> bool:
    return choice.sharding not in ("none", "ddp")


def _accumulates(choice: Choice) -> bool:
    return choice.accumulation > 1 and not _is_split(choice)
