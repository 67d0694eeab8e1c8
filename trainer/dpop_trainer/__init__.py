"""Preference fine-tuning with DPOP on Hugging Face models: `DPOPTrainer` feels like TRL's `DPOTrainer`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpop_trainer.settings.config import DPOPConfig, KTOConfig, SFTConfig
    from dpop_trainer.training.kto import KTOTrainer
    from dpop_trainer.training.sft import SFTTrainer
    from dpop_trainer.training.trainer import DPOPTrainer

__all__ = ["DPOPConfig", "DPOPTrainer", "KTOConfig", "KTOTrainer", "SFTConfig", "SFTTrainer"]

_MODULES = {
    "DPOPConfig": "settings.config",
    "DPOPTrainer": "training.trainer",
    "KTOConfig": "settings.config",
    "KTOTrainer": "training.kto",
    "SFTConfig": "settings.config",
    "SFTTrainer": "training.sft",
}


def __getattr__(name: str) -> Any:
    # imported when asked for: building pairs, and a command's help, wait for neither torch nor transformers
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
