"""What a run was held against, found out from what it left, and loaded anew: never taken out of the trained model.

    --ref_model                     that model
    ref_model_name_or_path          the run's second model, as config.yaml names it
    model_name_or_path              what training began with, as config.yaml names it
    reference_start.safetensors     the adapter as it was at the start, on the base that it names
    an adapter                      its base

The first of these that is there. A checkpoint is asked like the run that it is of.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from dpop_trainer.data.source_path import expanded
from dpop_trainer.models.adapters import adapter_base
from dpop_trainer.models.quantised import as_trained
from dpop_trainer.models.trained import load_trained, read_run_config, run_file
from dpop_trainer.reference.start_weights import RECORD_FILE, WEIGHTS_FILE, check_start_weights, recorded_kind

# kinds of reference.json whose weights are neither an adapter's base nor stored
_ELSEWHERE = ("a second model", "a copy of the model as it was at the start", "the model as it was at the start")


class RunReference(NamedTuple):
    """The reference of a run, not loaded yet."""

    name: str
    """Folder or hub id of a model or an adapter."""
    shown: str
    """What it is, for a report."""
    rounding: Any = None
    """A BitsAndBytesConfig, where training saw it rounded."""
    start_weights: Path | None = None
    """Weights that the adapter `name` had at the start, to be put in place of its own."""

    def load(self) -> Any:
        """The model, in evaluation mode.

        Raises:
            ValueError: it cannot be loaded, or the start weights are another adapter's.
        """
        model = load_trained(self.name, quantization_config=self.rounding).model
        if self.start_weights is not None:
            check_start_weights(self.start_weights.parent)
            _put_in(model, self.start_weights)
        return model


def reference_of_run(model: str, ref_model: str | None = None) -> RunReference:
    """
    Args:
        model: folder of a run, of one of its checkpoints, of a model or an adapter, or a hub id.
        ref_model: the reference, where it is not the run's.

    Raises:
        ValueError: the reference is neither given nor known.
    """
    folder = expanded(model)
    config = read_run_config(folder)
    rounding = as_trained(config)
    if ref_model is not None:
        is_start = ref_model == config.get("model_name_or_path")
        return RunReference(ref_model, ref_model, rounding if is_start else None)
    name = reference_name(config)
    if name is not None:
        return RunReference(name, name, None if config.get("ref_model_name_or_path") else rounding)
    record = run_file(folder, RECORD_FILE)
    kind = None if record is None else recorded_kind(record)
    start = run_file(folder, WEIGHTS_FILE)
    base = adapter_base(model)
    if start is not None and base is not None:
        return RunReference(model, "the adapter as it was at the start", rounding, start)
    if base is not None and kind not in _ELSEWHERE:
        return RunReference(base, "the base model under the adapter", rounding)
    was = f"it was {kind}, which no file names" if kind in _ELSEWHERE else f"{model!r} has no config.yaml that says"
    raise ValueError(
        f"ref_model: expected the model that training was held against, got None, and {was}. Pass --ref_model."
    )


def reference_name(config: Any) -> str | None:
    """The reference that a run's configuration names: its second model, or what training began with."""
    return config.get("ref_model_name_or_path") or config.get("model_name_or_path")


@torch.no_grad()
def _put_in(model: Any, path: Path) -> None:
    own = dict(model.named_parameters())
    for name, value in load_file(path).items():
        if name not in own or own[name].shape != value.shape:
            raise ValueError(f"{path}: expected weights of this run's adapter, got {name!r}, which it does not have.")
        own[name].copy_(value)
