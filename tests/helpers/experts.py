"""Tiny mixtures of experts, for the tests' word-level tokenizer."""

import tiny
import torch
import transformers
from tiny import VOCAB_SIZE

SIZES = {
    "vocab_size": VOCAB_SIZE,
    **tiny.SIZES,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
    "router_aux_loss_coef": 0.25,
}
EXPERT_FAMILIES = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8},
    "Olmoe": {"num_experts": 4},
    "GraniteMoe": {"num_local_experts": 4},
}


def experts(family="Mixtral", **more):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **EXPERT_FAMILIES[family], **more)
    return getattr(transformers, f"{family}ForCausalLM")(config)
