"""What a model's forward does to its head's output, read from its config and checked against its forward."""

from typing import Any

import torch
from torch import Tensor, nn

from dpop_kernels.logps.head import LogitTransform

# config field -> power of it that multiplies the logits
_SCALES = {
    "logit_scale": 1,  # Cohere
    "logits_scaling": -1,  # Granite
    "lm_head_multiplier": 1,  # Falcon-H1
    "output_multiplier": 1,  # Muse Glimmer
}
# model types that mean something else by such a field
_SCALE_EXCEPTIONS = {
    ("hyperclovax", "logits_scaling"): 1,
    ("minicpm3", "logits_scaling"): 0,  # divides the hidden states, before the head
    ("mpt", "logit_scale"): 0,  # read by the original code, not by transformers
}
_SOFTCAPS = (
    "final_logit_softcapping",  # Gemma, NanoChat
    "logits_soft_cap",  # RecurrentGemma
    "output_logit_soft_cap",  # xLSTM
)


def logit_transform(model: nn.Module) -> LogitTransform:
    """
    Raises:
        ValueError: the config names something between head and loss that is not such a transform.
    """
    config: Any = getattr(model, "config", None)
    if config is None:
        return LogitTransform()
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"model: expected a decoder-only causal LM, got the encoder-decoder {type(model).__name__}. "
            "Score its decoder's logits with token_logps."
        )
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    unpadded_vocab_size = getattr(config, "unpadded_vocab_size", None)
    if unpadded_vocab_size is not None and unpadded_vocab_size < config.vocab_size:
        raise ValueError(
            f"model: expected logits for the whole head, but {type(model).__name__} drops those from "
            f"unpadded_vocab_size = {unpadded_vocab_size} on. Score its logits with token_logps."
        )
    scale = 1.0
    for field, power in _SCALES.items():
        value = getattr(config, field, None)
        if isinstance(value, int | float):
            scale *= float(value) ** _SCALE_EXCEPTIONS.get((config.model_type, field), power)
    caps = (getattr(config, field, None) for field in _SOFTCAPS)
    return LogitTransform(scale, next((float(cap) for cap in caps if cap is not None), None))


def probe_logits(hidden_states: Tensor, layer: Any) -> Tensor:
    """[.., H] -> [.., V]: what a head might return; every value from -40 to 40 nats in every row, in another order."""
    rows = hidden_states.shape[:-1]
    values = torch.linspace(-40, 40, layer.out_features, device=hidden_states.device).to(hidden_states.dtype)
    return torch.stack([values.roll(7 * row) for row in range(rows.numel())]).view(*rows, -1)


def check_transform(
    model: nn.Module, transform: LogitTransform, raw_logits: Tensor, logits: Tensor, *, num_tokens: int
) -> None:
    """Compare what the model made of given head outputs with what `transform` makes of them.

    Args:
        raw_logits: [1, T, V]: what the head returned.
        logits: what the model returned.
        num_tokens: T: how many tokens went in.

    Raises:
        ValueError: their log-probs differ by more than the rounding of the logits' dtype, or their shapes differ.
    """
    name = type(model).__name__
    expected_shape = (1, num_tokens, raw_logits.shape[-1])
    if not raw_logits.shape == logits.shape == expected_shape:
        raise ValueError(
            f"model: expected {name}'s head to make logits of shape {list(expected_shape)} and the model to return "
            f"them, got {list(raw_logits.shape)} and {list(logits.shape)}. It transforms its logits in a way that "
            "is not supported (virtual tokens, several heads, part of the vocabulary); use its logits with token_logps."
        )
    expected = transform(raw_logits.double())
    # a 16-bit model rounds its logits, by half an eps, after each of up to three operations
    rounding = 1e-6 if logits.dtype in (torch.float32, torch.float64) else 1.5 * torch.finfo(logits.dtype).eps
    tolerance = 1e-4 + rounding * float(expected.abs().max())
    error = float((logits.double().log_softmax(-1) - expected.log_softmax(-1)).abs().max())
    if not error <= 2 * tolerance:
        raise ValueError(
            f"model: expected {name}'s logits to be softcap · tanh(scale · (h Wᵀ + bias) / softcap) with "
            f"scale {transform.scale} and softcap {transform.softcap}, but its log-probs differ by {error:.2e} nats. "
            "The model transforms its logits in a way that is not supported; use its logits with token_logps."
        )
