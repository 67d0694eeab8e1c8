"""How memory and arithmetic of a training step grow with tokens, vocabulary, width and depth: a model on paper.

Pure functions of sizes, no torch: to plan a run before a GPU is booked. The formulas count what a Llama-shaped decoder
(RMSNorm, rotary positions, grouped keys, gated MLP) with PEFT's LoRA saves for its backward and multiplies.

    step_flop(model, training, batch)      matrix products of reference, policy and backward
    step_memory(model, training, batch)    weights, what is trained, saved activations, the head
    longest_pair(model, training, budget)  tokens of the longest pair that fits

tests/benchmarks/test_scale.py holds the FLOP to torch's own counter within 0.1 %, activations and head to torch's
allocator within 10 %, and the ratio of a tree's time to rows' to the committed records within 10 %. What a library
takes past torch's allocator, and what fragmentation loses, is not in it: leave a tenth of the device free.
"""

from dataclasses import dataclass
from typing import Literal

FP32 = 4
RECOMPUTED_TILE = 4096, 32768
"""Rows and columns of TRL 1.16's tile (`TOKEN_CHUNK_SIZE`, `_CHUNKED_LOGPROB_CHUNK_SIZE`)."""


@dataclass(frozen=True)
class ModelSize:
    """A decoder's sizes, as in its config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int | None = None
    """None: hidden_size / num_heads."""
    tied_embeddings: bool = False

    @property
    def attention_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * (self.head_dim or self.hidden_size // self.num_heads)

    @property
    def kv_size(self) -> int:
        """Width of all key heads together."""
        return self.num_kv_heads * (self.head_dim or self.hidden_size // self.num_heads)

    @property
    def linear_shapes(self) -> tuple[tuple[int, int], ...]:
        """Inputs and outputs of a layer's linear maps: q, k, v, o, gate, up, down."""
        h, a, kv, i = self.hidden_size, self.attention_size, self.kv_size, self.intermediate_size
        return (h, a), (h, kv), (h, kv), (a, h), (h, i), (h, i), (i, h)

    @property
    def layer_weights(self) -> int:
        return sum(inputs * outputs for inputs, outputs in self.linear_shapes)

    @property
    def num_parameters(self) -> int:
        """All weights: layers with their two norms, the last norm, embeddings, and the head if it has its own."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return self.num_layers * (self.layer_weights + 2 * self.hidden_size) + self.hidden_size + embeddings


@dataclass(frozen=True)
class Training:
    """What of the model is trained, and how."""

    lora_rank: int | None = 16
    """LoRA on all linear maps of the layers, in fp32; None trains every weight."""
    weight_bytes: float = 2
    """Per weight that is frozen, and of activations' dtype: 2 for bf16; 0.5 for weights in 4 bits."""
    activation_bytes: int = 2
    checkpointing: bool = True
    """Each layer keeps its input alone and is computed again in the backward."""
    head: Literal["fused", "recomputed", "logits"] = "fused"
    """Log-probs tile by tile; the same with tiles that are made again for the gradient, as TRL 1.16 does; or from
    logits that exist."""
    own_reference: bool = False
    """A reference model of its own; with LoRA the adapter is switched off instead."""
    head_workspace_bytes: int = 64 << 20


@dataclass(frozen=True)
class Batch:
    """What the model computes in one forward."""

    num_rows: int
    row_length: int
    """T, padding included."""
    num_scored: int
    """N, tokens that reach the head."""

    @property
    def num_positions(self) -> int:
        return self.num_rows * self.row_length


@dataclass(frozen=True)
class StepFlop:
    """2 per multiply-add."""

    layers: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        return self.layers + self.attention + self.head


@dataclass(frozen=True)
class StepMemory:
    """Bytes at the worst moment of a step, by what holds them."""

    weights: float
    trained: float
    """Trained weights or adapters in fp32, their gradients, Adam's two moments."""
    activations: float
    head: float

    @property
    def total(self) -> float:
        return self.weights + self.trained + self.activations + self.head


def num_trained(model: ModelSize, training: Training) -> int:
    """Weights with a gradient."""
    if training.lora_rank is None:
        return model.num_parameters
    return model.num_layers * training.lora_rank * sum(map(sum, model.linear_shapes))


def step_flop(
    model: ModelSize, training: Training, batch: Batch, *, reference: bool = True, masked: bool = True
) -> StepFlop:
    """Matrix products of one training step.

    Args:
        model: the sizes.
        training: LoRA needs no gradient of the frozen weights; checkpointing computes the layers' forward once more.
        batch: one micro-batch.
        reference: whether the reference's forward runs as well (not with precomputed log-probs).
        masked: attention multiplies all T² pairs of positions, as under a mask of four dimensions; a causal kernel
            skips half of them.
    """
    positions, length = batch.num_positions, batch.row_length
    forwards = 1 + reference + training.checkpointing
    weight_product = 2.0 * positions * model.num_layers * model.layer_weights
    layers = weight_product * (forwards + (2 if training.lora_rank is None else 1))
    if training.lora_rank is not None:  # the reference runs without its adapter
        adapter_product = 2.0 * positions * num_trained(model, training)
        layers += adapter_product * (forwards - reference + 2)
        layers -= 2.0 * positions * _skipped_by_lora(model, training)
    elif training.checkpointing:  # nothing saves the last product's result, so it is not made again
        layers -= 2.0 * positions * model.num_layers * model.intermediate_size * model.hidden_size
    scores = 4.0 * batch.num_rows * length**2 * model.attention_size * model.num_layers * (1 if masked else 0.5)
    attention = scores * (forwards + 2)  # a flash kernel makes the scores once more: half a forward
    frozen, trainable = {"fused": (2, 4), "recomputed": (3, 4), "logits": (2, 3)}[training.head]
    head_products = reference + (frozen if training.lora_rank is not None else trainable)
    head = 2.0 * batch.num_scored * model.hidden_size * model.vocab_size * head_products
    return StepFlop(layers, attention, head)


def _skipped_by_lora(model: ModelSize, training: Training) -> int:
    """Multiply-adds per position that LoRA's step leaves out.

    Without checkpointing the first layer's input has no gradient: none through q, k, v and their adapters. With it,
    torch stops computing a layer again when all that is saved is there, which is before the last adapter's second half.
    """
    assert training.lora_rank is not None
    if training.checkpointing:
        return model.num_layers * training.lora_rank * model.hidden_size
    return sum(inputs * (outputs + training.lora_rank) for inputs, outputs in model.linear_shapes[:3])


def saved_per_position(model: ModelSize, training: Training) -> float:
    """Bytes that one layer keeps for its backward, per position, without checkpointing.

    Two norms keep their input in fp32 and their output; queries, keys, values and the attention's result; the gate
    before and after its activation, the other half, and their product. LoRA's maps keep their inputs, which are those
    already, and seven vectors of its rank.
    """
    h, a, kv, i = model.hidden_size, model.attention_size, model.kv_size, model.intermediate_size
    norms = 2 * h * FP32
    adapters = 7 * (training.lora_rank or 0) * FP32
    return norms + (2 * h + 3 * a + 2 * kv + 4 * i) * training.activation_bytes + adapters


def head_bytes(model: ModelSize, training: Training, num_scored: int) -> float:
    """What the head holds at its worst moment, forward or backward.

    Fused: two tensors of the scored states' size (the gradient that the forward forms, and what the backward makes of
    it) and a workspace that does not grow. Recomputed: the gradient in fp32 and in the states' dtype, and one tile.
    From logits: three of theirs in fp32, whatever the model's dtype: the log-softmax, its gradient, and the logits'
    gradient.
    """
    if training.head == "recomputed":
        rows, columns = min(num_scored, RECOMPUTED_TILE[0]), min(model.vocab_size, RECOMPUTED_TILE[1])
        states = num_scored * model.hidden_size * (FP32 + training.activation_bytes)
        return float(states + rows * columns * training.activation_bytes)
    if training.head == "logits":
        return 3.0 * num_scored * model.vocab_size * FP32
    states = 2 * num_scored * model.hidden_size * training.activation_bytes
    return states + min(training.head_workspace_bytes, 2 * num_scored * model.vocab_size * FP32)


def step_memory(model: ModelSize, training: Training, batch: Batch) -> StepMemory:
    """Bytes at the worst moment of a step, with attention that keeps no T x T scores (sdpa, flash).

    In flight, while the backward is in a layer, are gradients of its MLP's product, its input and its residual.
    """
    positions = batch.num_positions
    trained = num_trained(model, training)
    copies = 1 + training.own_reference
    if training.lora_rank is None:
        copies = int(training.own_reference)  # the policy's own weights are counted as trained
    one_layer = positions * saved_per_position(model, training)
    kept = positions * model.hidden_size * training.activation_bytes * model.num_layers
    saved = kept + one_layer if training.checkpointing else one_layer * model.num_layers
    in_flight = positions * (model.intermediate_size + 2 * model.hidden_size) * training.activation_bytes
    return StepMemory(
        weights=copies * model.num_parameters * training.weight_bytes,
        trained=trained * 4 * FP32,
        activations=saved + in_flight,
        head=head_bytes(model, training, batch.num_scored),
    )


def longest_pair(
    model: ModelSize, training: Training, budget_bytes: float, *, answer_share: float = 2 / 3, free: float = 0.1
) -> int:
    """Tokens of one answer with its prompt, of the longest pair (two rows) that fits; 0 if not even one token does.

    Args:
        model: the sizes.
        training: how it is trained.
        budget_bytes: the device's memory.
        answer_share: part of a sequence that is the answer, and reaches the head.
        free: part of the memory that is left to fragmentation and libraries.
    """

    def fits(length: int) -> bool:
        batch = Batch(num_rows=2, row_length=length, num_scored=round(2 * length * answer_share))
        return step_memory(model, training, batch).total <= budget_bytes * (1 - free)

    low, high = 0, 1 << 24
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
