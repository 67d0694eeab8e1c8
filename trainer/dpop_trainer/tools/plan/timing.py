"""Seconds of a step: products at the rate that a device is taken to reach, and what is bound by its memory."""

from dataclasses import dataclass

from dpop_trainer.tools.plan.devices import Device
from dpop_trainer.tools.plan.paper_model import ModelSetting, Sizes
from dpop_trainer.tools.plan.step import StepCost

HOST_LINK = 25e9
"""Bytes per second between a GPU and pinned memory of its host, PCIe 4.0 x16: assumed."""


@dataclass(frozen=True)
class StepTime:
    """Of one micro-batch on one device, in seconds."""

    products: float
    weights: float
    """Widening packed weights, and updating trained ones: memory traffic that no product hides."""
    moves: float = 0.0
    """Activations to the host and back, in the stream of the products, as transformers copies them."""

    @property
    def total(self) -> float:
        return self.products + self.weights + self.moves


def step_time(
    sizes: Sizes,
    model: ModelSetting,
    cost: StepCost,
    device: Device,
    *,
    scale: float,
    checkpointing: bool,
    has_reference: bool,
    accumulation: int,
) -> StepTime:
    """
    Args:
        sizes: of the model.
        model: how it is loaded.
        cost: of the typical batch.
        device: where.
        scale: mean batch over typical batch, by positions.
        checkpointing: the layers' forward runs once more.
        has_reference: and once for the reference.
        accumulation: micro-batches per update.
    """
    bandwidth = device.bandwidth_gb * 1e9
    passes = 2 + checkpointing + has_reference  # forward, backward
    streamed = passes * sizes.layer_bytes / bandwidth
    # however short the batch, a product reads its weights
    rates = {"head": device.head_tflops or device.tflops}
    at_peak = sum(flop / (rates.get(kind, device.tflops) * 1e12) for kind, flop in cost.flop.items())
    products = max(scale * at_peak / device.utilisation, streamed)
    widened = 0.0
    if model.bits is not None:
        # read packed, written widened; the product's own reading is in its rate
        widened = passes * sizes.num_packed * (model.bits / 8 + 2) / bandwidth
    # read weight, gradient and two moments, write all but the gradient
    update = 7 * 4 * sizes.num_trained / bandwidth / accumulation
    return StepTime(products, widened + update, cost.moved_bytes * scale / HOST_LINK)
