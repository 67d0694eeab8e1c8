"""Preference fine-tuning with DPOP on Hugging Face models: `DPOPTrainer` feels like TRL's `DPOTrainer`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpop_trainer.config import DPOPConfig, SFTConfig
    from dpop_trainer.sft import SFTTrainer
    from dpop_trainer.trainer import DPOPTrainer

__all__ = ["DPOPConfig", "DPOPTrainer", "SFTConfig", "SFTTrainer"]

_MODULES = {"DPOPConfig": "config", "DPOPTrainer": "trainer", "SFTConfig": "config", "SFTTrainer": "sft"}


def __getattr__(name: str) -> Any:
    # imported when asked for: building pairs, and a command's help, wait for neither torch nor transformers
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
