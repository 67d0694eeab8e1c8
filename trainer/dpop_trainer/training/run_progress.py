"""What a run has summed up towards its next log line, kept in a checkpoint, so that a resumed run logs the same."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dpop_trainer.training.hf_hooks import LossSums


class Progress(NamedTuple):
    """The sums of one rank."""

    losses: LossSums
    metric_keys: list[str]
    metric_totals: Tensor | None
    """See `MeanMetrics.state`."""
    token_counts: dict[str, Tensor]
    carried: dict[str, Tensor]
    """What a trainer adds, see `HeadTrainer.carried_state`."""


def save_progress(progress: Progress, checkpoint: Path, *, rank: int) -> None:
    """Write a rank's sums into a checkpoint. Reads them from the device."""
    tensors = {"loss": progress.losses.since_log}
    tensors |= {f"tokens/{key}": value for key, value in progress.token_counts.items()}
    if progress.metric_totals is not None:
        tensors["metrics"] = progress.metric_totals
    tensors |= {f"carried/{key}": value for key, value in progress.carried.items()}
    told = {
        "metric_keys": json.dumps(progress.metric_keys),
        "total_loss": progress.losses.before.hex(),  # to the bit
        "last_logged_step": str(progress.losses.last_logged_step),
    }
    checkpoint.mkdir(parents=True, exist_ok=True)
    kept = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    save_file(kept, _path(checkpoint, rank), metadata=told)


def load_progress(checkpoint: Path, *, rank: int, device: torch.device) -> Progress | None:
    """A rank's sums, on its device. None where another trainer wrote the checkpoint: the next log line begins anew."""
    path = _path(checkpoint, rank)
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        told = file.metadata()
        tensors: dict[str, Tensor] = {key: file.get_tensor(key).to(device) for key in file.keys()}  # noqa: SIM118
    losses = LossSums(
        tensors["loss"].to(torch.float32), float.fromhex(told["total_loss"]), int(told["last_logged_step"])
    )
    return Progress(
        losses,
        json.loads(told["metric_keys"]),
        tensors.get("metrics"),
        _with_prefix(tensors, "tokens/"),
        _with_prefix(tensors, "carried/"),
    )


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _path(checkpoint: Path, rank: int) -> Path:
    return checkpoint / f"progress_{rank}.safetensors"
