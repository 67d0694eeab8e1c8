"""The models that a step is counted of, by their published sizes."""

from dataclasses import dataclass
from typing import Any

import torch
from dpop_trainer.tools.plan.known_models import known_config
from dpop_trainer.tools.plan.paper_model import ModelSetting, build
from peft import LoraConfig
from transformers import PreTrainedConfig

from benchmarks.shapes import gemma_3_1b

RANK = 16


@dataclass(frozen=True)
class Case:
    """A model, and what of it is trained."""

    config: PreTrainedConfig
    lora: bool = True
    """LoRA on all linear maps of the layers, the reference being the model without it; else all weights are trained,
    and the reference is a model of its own."""
    bits: int | None = None
    """Of frozen weights; None for bf16."""

    @property
    def tuning(self) -> str:
        return "all weights" if not self.lora else "LoRA" if self.bits is None else "QLoRA"

    @property
    def has_equal_layers(self) -> bool:
        return len(set(getattr(self.config, "layer_types", None) or ())) <= 1

    def models(self, num_layers: int | None = None) -> tuple[Any, Any]:
        """Policy, and the reference where it is another model; on the meta device, in bf16.

        Args:
            num_layers: of so many layers; None for all.
        """
        lora = LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM") if self.lora else None
        setting = ModelSetting(torch.bfloat16, bits=self.bits, nested=True, lora=lora)
        policy = build(self.config, setting, num_layers=num_layers)
        for parameter in policy.parameters():
            if parameter.requires_grad:  # one dtype for all: nothing is converted on the way
                parameter.data = parameter.data.to(torch.bfloat16)
        return policy, None if self.lora else build(self.config, setting, num_layers=num_layers).requires_grad_(False)


CASES: dict[str, Case] = {
    "Llama-3.2-1B": Case(known_config("Llama-3.2-1B")),
    "Llama-3.2-1B, all weights": Case(known_config("Llama-3.2-1B"), lora=False),
    "Gemma-3-1B": Case(gemma_3_1b()),
    "Llama-3-8B": Case(known_config("Llama-3-8B")),
    "Qwen2.5-72B": Case(known_config("Qwen2.5-72B"), bits=4),
}
