"""Preference fine-tuning with DPOP on Hugging Face models: `DPOPTrainer` feels like TRL's `DPOTrainer`."""

from dpop_trainer.config import DPOPConfig, SFTConfig
from dpop_trainer.sft import SFTTrainer
from dpop_trainer.trainer import DPOPTrainer

__all__ = ["DPOPConfig", "DPOPTrainer", "SFTConfig", "SFTTrainer"]
