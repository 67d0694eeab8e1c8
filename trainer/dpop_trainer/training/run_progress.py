"""What a run has summed up towards its next log line, kept in a checkpoint, so that a resumed run logs the same."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

if TYPE_CHECKING:
    from dpop_trainer.training.base import HeadTrainer


def save_progress(trainer: "HeadTrainer", checkpoint: Path) -> None:
    """Write this rank's sums into a checkpoint. Reads them from the device."""
    keys, totals = trainer._mean_metrics["train"].state()
    tensors = {"loss": trainer._tr_loss, **{f"tokens/{key}": value for key, value in trainer._token_counts.items()}}
    if totals is not None:
        tensors["metrics"] = totals
    tensors |= {f"carried/{key}": value for key, value in trainer.carried_state().items()}
    told = {
        "metric_keys": json.dumps(keys),
        "total_loss": float(trainer._total_loss_scalar).hex(),  # to the bit
        "last_logged_step": str(trainer._globalstep_last_logged),
    }
    checkpoint.mkdir(parents=True, exist_ok=True)
    kept = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    save_file(kept, _path(trainer, checkpoint), metadata=told)


def load_progress(trainer: "HeadTrainer", checkpoint: Path) -> None:
    """Take this rank's sums up again. A checkpoint of another trainer has none: its next log line begins anew."""
    path = _path(trainer, checkpoint)
    if not path.is_file():
        return
    with safe_open(path, framework="pt") as file:
        told = file.metadata()
        tensors: dict[str, Tensor] = {key: file.get_tensor(key).to(trainer.args.device) for key in file.keys()}  # noqa: SIM118
    trainer._tr_loss = tensors["loss"].to(torch.float32)
    trainer._total_loss_scalar = float.fromhex(told["total_loss"])
    trainer._globalstep_last_logged = int(told["last_logged_step"])
    trainer._mean_metrics["train"].restore(json.loads(told["metric_keys"]), tensors.get("metrics"))
    trainer._token_counts = _with_prefix(tensors, "tokens/")
    trainer.restore_carried_state(_with_prefix(tensors, "carried/"))


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _path(trainer: "HeadTrainer", checkpoint: Path) -> Path:
    return checkpoint / f"progress_{trainer.args.process_index}.safetensors"
