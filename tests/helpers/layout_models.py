"""Models of two layers that any layout can run, and pairs that branch wherever a pair can."""

import torch
import transformers
from tiny import IDS, SIZES, VOCAB_SIZE
from transformers import AutoModelForCausalLM

PAD = IDS["pad_token_id"]
SMALL = {"vocab_size": VOCAB_SIZE, **SIZES, "initializer_range": 0.2}  # far from uniform predictions
MODELS = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "gpt2": ("GPT2Config", {"n_positions": 64}),  # learned positions, tied embeddings
    "mistral_without_window": ("MistralConfig", {"sliding_window": None}),
    "phi": ("PhiConfig", {}),  # half of each head rotated, a head with a bias
    "mixtral": ("MixtralConfig", {"num_local_experts": 2, "num_experts_per_tok": 1}),  # routed token by token
}


def build(config_class, overrides, *, attn_implementation="sdpa", seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    arguments = {**SMALL, **overrides}
    if config_class == "GPT2Config":
        for name in ("intermediate_size", "num_key_value_heads", "max_position_embeddings"):
            del arguments[name]
    config = getattr(transformers, config_class)(**arguments)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation, dtype=dtype)
    if hasattr(config, "num_local_experts"):
        model.set_experts_implementation("eager")  # the grouped product takes no fp64, and torch 2.8's no CPU
    for module in model.modules():  # GPT-2 and Phi are built with dropout
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def family(name, **options):
    return build(*MODELS[name], **options)


def compute_nothing_in_fp32(set_attribute=setattr):
    """A model of fp64 computes its norms and the eager attention's softmax in fp64 too, where they ask for fp32."""
    to, softmax = torch.Tensor.to, torch.nn.functional.softmax

    def unchanged(tensor, *args, **kwargs):
        is_cut = tensor.dtype == torch.float64 and torch.float32 in (*args, kwargs.get("dtype"))
        return tensor if is_cut else to(tensor, *args, **kwargs)

    def in_own_dtype(tensor, *args, dtype=None, **kwargs):
        return softmax(tensor, *args, **kwargs, dtype=tensor.dtype if tensor.dtype == torch.float64 else dtype)

    set_attribute(torch.Tensor, "to", unchanged)
    set_attribute(torch.Tensor, "float", lambda tensor: unchanged(tensor, torch.float32))
    set_attribute(torch.nn.functional, "softmax", in_own_dtype)


def edge_pairs():
    """Every place a branch can be at, in ragged lengths."""
    answers = {
        "branch at the first token": ([5, 6, 7, 8], [9, 6, 7, 8]),
        "branch at the last token": ([5, 6, 7, 8, 9, 10], [5, 6, 7, 8, 9, 11]),
        "identical": ([12, 13, 14], [12, 13, 14]),
        "chosen begins rejected": ([15, 16], [15, 16, 17, 18, 19]),
        "rejected begins chosen": ([20, 21, 22, 23], [20]),
        "low edit": ([24, 25, 26, 27, 28, 29, 30], [24, 25, 31, 27, 28, 29, 30]),
    }
    return [
        {"prompt_ids": [1, *range(32, 33 + i)], "chosen_ids": chosen, "rejected_ids": rejected, "pair_id": i}
        for i, (chosen, rejected) in enumerate(answers.values())
    ]
