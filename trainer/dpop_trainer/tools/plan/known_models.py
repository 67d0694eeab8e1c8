"""Shapes of published models, for plans without a network: of their config.json what cost depends on."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def _shape(
    model_type: str, vocab: int, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": False,
        **more,
    }


_TIED = {"tie_word_embeddings": True}
_GEMMA_2 = {"tie_word_embeddings": True, "sliding_window": 4096, "final_logit_softcapping": 30.0}

SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": _shape("llama", 49152, 576, 1536, 30, 9, 3, **_TIED),
    "SmolLM2-360M": _shape("llama", 49152, 960, 2560, 32, 15, 5, **_TIED),
    "SmolLM2-1.7B": _shape("llama", 49152, 2048, 8192, 24, 32, 32, **_TIED),
    "Llama-2-7b": _shape("llama", 32000, 4096, 11008, 32, 32, 32),
    "Llama-2-13b": _shape("llama", 32000, 5120, 13824, 40, 40, 40),
    "Llama-2-70b": _shape("llama", 32000, 8192, 28672, 80, 64, 8),
    "Llama-3-8B": _shape("llama", 128256, 4096, 14336, 32, 32, 8),
    "Llama-3-70B": _shape("llama", 128256, 8192, 28672, 80, 64, 8),
    "Llama-3.2-1B": _shape("llama", 128256, 2048, 8192, 16, 32, 8, **_TIED),
    "Llama-3.2-3B": _shape("llama", 128256, 3072, 8192, 28, 24, 8, head_dim=128, **_TIED),
    "Yi-34B": _shape("llama", 64000, 7168, 20480, 60, 56, 8),
    "Qwen-72B": _shape("llama", 152064, 8192, 24576, 80, 64, 64, attention_bias=True),
    "Mistral-7B-v0.1": _shape("mistral", 32000, 4096, 14336, 32, 32, 8, sliding_window=4096),
    "Mistral-7B-v0.3": _shape("mistral", 32768, 4096, 14336, 32, 32, 8, sliding_window=None),
    "Mixtral-8x7B": _shape(
        "mixtral", 32000, 4096, 14336, 32, 32, 8, num_local_experts=8, num_experts_per_tok=2, sliding_window=None
    ),
    "Qwen2.5-0.5B": _shape("qwen2", 151936, 896, 4864, 24, 14, 2, **_TIED),
    "Qwen2.5-1.5B": _shape("qwen2", 151936, 1536, 8960, 28, 12, 2, **_TIED),
    "Qwen2.5-3B": _shape("qwen2", 151936, 2048, 11008, 36, 16, 2, **_TIED),
    "Qwen2.5-7B": _shape("qwen2", 152064, 3584, 18944, 28, 28, 4),
    "Qwen2.5-14B": _shape("qwen2", 152064, 5120, 13824, 48, 40, 8),
    "Qwen2.5-32B": _shape("qwen2", 152064, 5120, 27648, 64, 40, 8),
    "Qwen2.5-72B": _shape("qwen2", 152064, 8192, 29568, 80, 64, 8),
    "Qwen3-8B": _shape("qwen3", 151936, 4096, 12288, 36, 32, 8, head_dim=128),
    "Qwen3-14B": _shape("qwen3", 151936, 5120, 17408, 40, 40, 8, head_dim=128),
    "Qwen3-32B": _shape("qwen3", 151936, 5120, 25600, 64, 64, 8, head_dim=128),
    "gemma-2-2b": _shape("gemma2", 256000, 2304, 9216, 26, 8, 4, head_dim=256, **_GEMMA_2),
    "gemma-2-9b": _shape("gemma2", 256000, 3584, 14336, 42, 16, 8, head_dim=256, **_GEMMA_2),
    "gemma-2-27b": _shape("gemma2", 256000, 4608, 36864, 46, 32, 16, head_dim=128, **_GEMMA_2),
}


def _family(hub_id: str, shape: str, sizes: tuple[str, ...], kinds: tuple[str, ...]) -> dict[str, str]:
    return {hub_id.format(size=size, kind=kind): shape.format(size=size) for size in sizes for kind in kinds}


_QWEN_2_5 = ("0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B")
_INSTRUCT, _CHAT, _IT = ("", "-Instruct"), ("", "-chat"), ("", "-it")

HUB_IDS: dict[str, str] = {
    **_family("HuggingFaceTB/SmolLM2-{size}{kind}", "SmolLM2-{size}", ("135M", "360M", "1.7B"), _INSTRUCT),
    **_family("meta-llama/Llama-2-{size}{kind}-hf", "Llama-2-{size}", ("7b", "13b", "70b"), _CHAT),
    **_family("meta-llama/Meta-Llama-3-{size}{kind}", "Llama-3-{size}", ("8B", "70B"), _INSTRUCT),
    **_family("meta-llama/Llama-3.1-{size}{kind}", "Llama-3-{size}", ("8B", "70B"), _INSTRUCT),
    **_family("meta-llama/Llama-3.3-{size}{kind}", "Llama-3-{size}", ("70B",), ("-Instruct",)),
    **_family("meta-llama/Llama-3.2-{size}{kind}", "Llama-3.2-{size}", ("1B", "3B"), _INSTRUCT),
    "01-ai/Yi-34B": "Yi-34B",
    "01-ai/Yi-34B-200K": "Yi-34B",
    "jondurbin/bagel-34b-v0.2": "Yi-34B",
    "abacusai/Smaug-34B-v0.1": "Yi-34B",
    "moreh/MoMo-72B-lora-1.8.7-DPO": "Qwen-72B",
    "abacusai/Smaug-72B-v0.1": "Qwen-72B",
    "mistralai/Mistral-7B-v0.1": "Mistral-7B-v0.1",
    "mistralai/Mistral-7B-v0.3": "Mistral-7B-v0.3",
    "mistralai/Mistral-7B-Instruct-v0.3": "Mistral-7B-v0.3",
    "mistralai/Mixtral-8x7B-v0.1": "Mixtral-8x7B",
    "mistralai/Mixtral-8x7B-Instruct-v0.1": "Mixtral-8x7B",
    **_family("Qwen/Qwen2.5-{size}{kind}", "Qwen2.5-{size}", _QWEN_2_5, _INSTRUCT),
    **_family("Qwen/Qwen3-{size}{kind}", "Qwen3-{size}", ("8B", "14B", "32B"), ("",)),
    **_family("google/gemma-2-{size}{kind}", "gemma-2-{size}", ("2b", "9b", "27b"), _IT),
}
"""Hub ids -> names in `SHAPES`."""


def known_name(name: str) -> str | None:
    """The shape's name for a hub id or for itself, whatever the case; None for others."""
    for table in (HUB_IDS, {key: key for key in SHAPES}):
        for key, shape in table.items():
            if key.lower() == name.lower():
                return shape
    return None


def known_config(name: str) -> "PreTrainedConfig":
    """The configuration of a shape, by its name in `SHAPES`."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**SHAPES[name])
