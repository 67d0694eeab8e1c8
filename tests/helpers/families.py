"""Small models of the families of Hugging Face, whose heads differ."""

import torch
import transformers
from tiny import IDS, SIZES
from transformers import AutoModelForCausalLM

VOCAB_SIZE = 97
SMALL = {"vocab_size": VOCAB_SIZE, **SIZES}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
SLIM = {key: value for key, value in SMALL.items() if key not in ("intermediate_size", "num_key_value_heads")}


# name -> (config class, its arguments, (scale, softcap) that its forward applies: read in the modelling code by hand)
MODELS = {
    "llama": ("LlamaConfig", SMALL, (1, None)),
    "llama_tied": ("LlamaConfig", {**SMALL, "tie_word_embeddings": True}, (1, None)),
    "qwen2": ("Qwen2Config", SMALL, (1, None)),
    "qwen3": ("Qwen3Config", {**SMALL, "head_dim": 8}, (1, None)),
    "mistral": ("MistralConfig", SMALL, (1, None)),
    "mixtral": ("MixtralConfig", {**SMALL, **EXPERTS}, (1, None)),
    "gemma": ("GemmaConfig", {**SMALL, "head_dim": 8}, (1, None)),
    "gemma2": ("Gemma2Config", {**SMALL, "head_dim": 8, "final_logit_softcapping": 3.0}, (1, 3.0)),
    "gemma3": ("Gemma3TextConfig", {**SMALL, "head_dim": 8, "final_logit_softcapping": 2.0}, (1, 2.0)),
    "gemma3_plain": ("Gemma3TextConfig", {**SMALL, "head_dim": 8}, (1, None)),
    "phi": ("PhiConfig", SMALL, (1, None)),  # a head with a bias
    "phi3": ("Phi3Config", SMALL, (1, None)),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **IDS},
        (1, None),
    ),
    "gpt_neox": ("GPTNeoXConfig", {**SLIM, "intermediate_size": 48}, (1, None)),
    "gptj_bias": (
        "GPTJConfig",
        {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, **IDS},
        (1, None),
    ),
    "falcon": ("FalconConfig", SLIM, (1, None)),
    "mpt_ignores_its_logit_scale": (
        "MptConfig",
        {"vocab_size": 97, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "logit_scale": 0.5, **IDS},
        (1, None),
    ),
    "olmo2": ("Olmo2Config", SMALL, (1, None)),
    "cohere": ("CohereConfig", {**SMALL, "logit_scale": 0.25}, (0.25, None)),
    "cohere2": ("Cohere2Config", {**SMALL, "logit_scale": 0.25}, (0.25, None)),
    "granite": ("GraniteConfig", {**SMALL, "logits_scaling": 4.0}, (0.25, None)),
    "granitemoe": ("GraniteMoeConfig", {**SMALL, **EXPERTS, "logits_scaling": 4.0}, (0.25, None)),
    "hyperclovax_multiplies": ("HyperCLOVAXConfig", {**SMALL, "logits_scaling": 4.0}, (4.0, None)),
    "minicpm3_scales_before": (
        "MiniCPM3Config",
        {
            **SMALL,
            "num_key_value_heads": 4,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
            "dim_model_base": 8,
        },
        (1, None),
    ),
    "nanochat": ("NanoChatConfig", {**SMALL, "final_logit_softcapping": 2.5}, (1, 2.5)),
    "vaultgemma": ("VaultGemmaConfig", {**SMALL, "head_dim": 8, "final_logit_softcapping": 2.5}, (1, 2.5)),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        {
            **SMALL,
            "lru_width": 32,
            "logits_soft_cap": 2.5,
            "attention_window_size": 16,
            "block_types": ["recurrent", "attention"],
        },
        (1, 2.5),
    ),
    "xlstm": (
        "xLSTMConfig",
        {
            "vocab_size": 97,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_heads": 2,
            "output_logit_soft_cap": 2.5,
            **IDS,
        },
        (1, 2.5),
    ),
    "falcon_h1": (
        "FalconH1Config",
        {
            **SMALL,
            "lm_head_multiplier": 0.25,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
        },
        (0.25, None),
    ),
    "mamba_casts_to_the_weight": (
        "MambaConfig",
        {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, **IDS},
        (1, None),
    ),
}


def build(name, dtype=torch.float32):
    torch.manual_seed(1)
    config_class, arguments, _ = MODELS[name]
    config = getattr(transformers, config_class)(**arguments)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    # initialised logits are close to zero: spread them, so that scale and softcap matter
    head = model.get_output_embeddings()
    head.weight.data.mul_(20)
    if head.bias is not None:
        head.bias.data.normal_()
    return model


def batch():
    input_ids = torch.randint(3, VOCAB_SIZE, (2, 10))
    score_positions = torch.tensor([2, 3, 4, 12, 17])  # rows of [2 * 10, H]
    return input_ids, score_positions, input_ids.flatten()[score_positions + 1]


def grads_of(model):
    grads = {key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    return grads
