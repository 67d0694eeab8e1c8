"""Memory of one device: what a model holds and what a step needs, divided and gathered as the run is distributed."""

from dataclasses import dataclass

from dpop_trainer.tools.plan.devices import GIB, Device, Sharding
from dpop_trainer.tools.plan.paper_model import ModelSetting, Sizes
from dpop_trainer.tools.plan.step import StepCost

FP32, BF16 = 4, 2
CONTEXT_BYTES = 1.0 * GIB
"""CUDA's context, cuBLAS's workspace, compiled kernels: assumed."""
FRAGMENTATION = 0.05
"""Of what the allocator hands out during a step, lost between blocks on a GPU: assumed."""
PROCESS_BYTES = 0.67 * GIB
"""Python, torch, transformers and datasets in a CPU process: the resident set before training, less the weights."""
CPU_FRAGMENTATION = 0.2
"""Of what a step allocates, kept by the C library between blocks: benchmarks/results/planned_cpu.json."""
DEEPSPEED_BUCKET = 5e8
"""DeepSpeed's reduce_bucket_size, in elements."""


@dataclass(frozen=True)
class Part:
    """Bytes of one kind."""

    name: str
    num_bytes: float
    is_assumed: bool = False


@dataclass(frozen=True)
class Memory:
    """Of one device, at the worst moment of a step."""

    parts: tuple[Part, ...]
    phase: str
    """When that is."""

    @property
    def total(self) -> float:
        return sum(part.num_bytes for part in self.parts)


@dataclass(frozen=True)
class Optimizer:
    """What an optimizer keeps, by the name that `optim` has."""

    state_bytes: float
    """Per trained parameter of 4 bytes."""
    whole_temporaries: bool
    """Works on all parameters at once, with temporaries of their size."""
    is_known: bool = True


def optimizer_named(name: str, *, on_gpu: bool) -> Optimizer:
    """By transformers' name; one that is not known is taken for AdamW."""
    if name.startswith("paged_"):
        name = name.removeprefix("paged_")
    scales = 2 * FP32 / 256  # of the two moments, in blocks of 256
    kept = {
        "adamw_torch": 8.0,
        "adamw_torch_fused": 8.0,
        "adamw_hf": 8.0,
        "adamw_apex_fused": 8.0,
        "adamw_32bit": 8.0,
        "adamw_8bit": 2.0 + scales,
        "adamw_bnb_8bit": 2.0 + scales,
        "lion_32bit": 4.0,
        "lion_8bit": 1.0 + scales / 2,
        "sgd": 0.0,
        "adafactor": 0.0,
        "adagrad": 4.0,
        "rmsprop": 4.0,
    }
    return Optimizer(kept.get(name, 8.0), on_gpu and name == "adamw_torch", name in kept)


def device_memory(
    sizes: Sizes,
    model: ModelSetting,
    cost: StepCost,
    device: Device,
    *,
    sharding: Sharding,
    num_devices: int,
    optimizer: Optimizer,
    accumulates: bool,
    reference_bytes: float,
) -> Memory:
    """By part.

    Args:
        sizes: of the model.
        model: how it is loaded.
        cost: of a step on the largest batch.
        device: where.
        sharding: how the run is distributed.
        num_devices: over how many.
        optimizer: what it keeps.
        accumulates: gradients are there when a micro-batch begins.
        reference_bytes: of a second model; 0 where the policy is its own reference.
    """
    if sharding not in ("none", "ddp"):  # counted below, in parts
        cost = cost.without("gradients", "optimizer's temporaries")
    moment = cost.peak
    step = {name: size for name, size in moment.parts.items() if size >= 1}
    is_split = sharding in ("fsdp2", "zero3")
    share = num_devices if is_split else 1
    weights = (sizes.frozen_bytes + sizes.buffer_bytes) / share
    trained, states = float(sizes.trained_bytes), sizes.trained_bytes / FP32 * optimizer.state_bytes
    if sizes.trained_bytes == BF16 * sizes.num_trained:  # moments have their parameter's dtype
        states = sizes.num_trained * optimizer.state_bytes / 2
    parts = []
    if sharding in ("none", "ddp"):
        gradients = float(sizes.trained_bytes) if accumulates else step.pop("gradients", 0.0)
        if sharding == "ddp":
            parts.append(Part("gradient buckets", sizes.trained_bytes))
    else:
        trained, states, gradients = _split_training(sizes, sharding, num_devices, optimizer)
        parts += _gathered(sizes, model, sharding)
    parts = [
        Part("weights", weights),
        Part("trained weights", trained),
        Part("optimizer", states),
        Part("gradients", gradients),
        *parts,
        Part("reference model", reference_bytes / share),
        *(Part(name, size) for name, size in sorted(step.items())),
    ]
    temporary = sum(part.num_bytes for part in parts) - weights - trained - states - reference_bytes / share
    lost = FRAGMENTATION if device.is_gpu else CPU_FRAGMENTATION
    parts.append(Part("fragmentation", lost * temporary, is_assumed=True))
    if device.is_gpu:
        parts.append(Part("CUDA context, libraries", CONTEXT_BYTES, is_assumed=True))
    else:
        parts.append(Part("Python, libraries", PROCESS_BYTES, is_assumed=True))
    return Memory(tuple(part for part in parts if part.num_bytes >= 1), cost.phase)


def _split_training(
    sizes: Sizes, sharding: Sharding, num_devices: int, optimizer: Optimizer
) -> tuple[float, float, float]:
    """-> bytes of trained weights, optimizer and gradients on one device."""
    trained = sizes.num_trained
    if sharding == "fsdp2":  # accelerate keeps what is trained in fp32
        return FP32 * trained / num_devices, optimizer.state_bytes * trained / num_devices, FP32 * trained / num_devices
    # DeepSpeed: what is trained is a 16-bit copy; the optimizer has the fp32 one
    held = BF16 * trained / (num_devices if sharding == "zero3" else 1)
    return held, (FP32 + optimizer.state_bytes) * trained / num_devices, BF16 * trained / num_devices


def _gathered(sizes: Sizes, model: ModelSetting, sharding: Sharding) -> list[Part]:
    """What a device holds whole for a moment."""
    in_flight = BF16 / model.dtype.itemsize
    layer = sizes.largest_layer_bytes if model.bits is not None else sizes.largest_layer_bytes * in_flight
    layer += BF16 * sizes.largest_layer_trained if model.lora is not None else 0
    bucket = min(DEEPSPEED_BUCKET, sizes.num_trained) * BF16
    if sharding == "zero2":
        return [Part("gradient buckets", 2 * bucket, is_assumed=True)]
    outside = sizes.embedding_bytes * in_flight
    # the layer that runs, the one that is fetched meanwhile; the gradients of two; what is no layer stays whole
    parts = [Part("gathered layers", 2 * layer), Part("gathered embeddings and head", outside)]
    gradients = 2.0 * BF16 * sizes.largest_layer_trained
    if model.lora is None:
        gradients += outside
    parts.append(Part("whole gradients", 2 * bucket if sharding == "zero3" else gradients, is_assumed=True))
    return parts
