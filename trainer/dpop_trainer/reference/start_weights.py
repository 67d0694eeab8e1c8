"""The policy's trainable parameters as they are at the start: kept, switched in for the reference, re-read on resuming.

What training changes is what has to be kept. For an adapter that is the adapter, whatever its kind: LoRA, a bias or a
layer trained beside it, a prompt. Nothing is added to the model, so its checkpoints hold the policy alone.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from dpop_trainer.data.digests import digests_of, problem_with
from dpop_trainer.reference.source import eval_mode
from dpop_trainer.reference.weight_files import read_weights, write_weights
from dpop_trainer.run_folder.files import write_json

logger = logging.getLogger(__name__)

RECORD_FILE, WEIGHTS_FILE = "reference.json", "reference_start.safetensors"


def recorded_kind(path: Path) -> str | None:
    """What `reference.json` says that a run's reference is; None where it cannot be read."""
    try:
        return json.loads(path.read_text()).get("reference")
    except (OSError, ValueError, AttributeError):
        return None


def check_start_weights(folder: Path) -> None:
    """
    Raises:
        ValueError: the start weights of a run's folder are not the ones that it wrote there.
    """
    try:
        listed = json.loads((folder / RECORD_FILE).read_text()).get("files", {})
    except (OSError, ValueError, AttributeError):
        logger.warning(
            "%s: not found or not readable; %s is taken on trust.", folder / RECORD_FILE, folder / WEIGHTS_FILE
        )
        return
    problem = problem_with(folder, listed)
    if problem is not None:
        raise ValueError(
            f"{folder}: expected the reference's start weights as the run wrote them, {problem}. Start the run anew in "
            "another output_dir, from the model that it began with."
        )


class StartWeights:
    """A copy of a model's trainable parameters.

    Args:
        model: whose parameters with requires_grad are copied as they are now, each where it is.
    """

    def __init__(self, model: nn.Module) -> None:
        self._values = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @contextmanager
    def switched_in(self, model: nn.Module) -> Iterator[None]:
        """The model as it was, in eval mode; after, as it is. No weight is written: the two sets change places, so that
        an autograd graph from before finds its own again."""
        with eval_mode(model):
            self._exchange(model)
            try:
                yield
            finally:
                self._exchange(model)

    @property
    def values(self) -> dict[str, Tensor]:
        """The weights by name, those that are held and not those that are switched in."""
        return self._values

    @torch.no_grad()
    def _exchange(self, model: nn.Module) -> None:
        for name, value in self._values.items():
            parameter = model.get_parameter(name)
            parameter.data, self._values[name] = value, parameter.data


class ReferenceRecord(TrainerCallback):
    """Sees to it that a resumed run has the reference it began with.

    At the start it leaves `reference.json` in the output folder: which reference, and a fingerprint of its weights; and
    start weights in `reference_start.safetensors`. A run that resumes takes the start weights from there, and stops if
    the fingerprint is another one.

    Args:
        kind: of the reference.
        fingerprint: of the reference's weights; None where they cannot be compared.
        start_weights: where the reference is made of them.
    """

    def __init__(self, kind: str, fingerprint: str | None, start_weights: StartWeights | None = None) -> None:
        self._kind, self._fingerprint, self._start_weights = kind, fingerprint, start_weights

    def on_train_begin(self, args, state, control, **kwargs):
        assert args.output_dir is not None
        folder = Path(args.output_dir)
        if state.global_step:
            self._check(folder)
        elif state.is_world_process_zero:
            folder.mkdir(parents=True, exist_ok=True)
            if self._start_weights is not None:
                write_weights(self._start_weights.values, folder / WEIGHTS_FILE)
            record: dict[str, Any] = {"reference": self._kind, "weights": self._fingerprint}
            if self._start_weights is not None:
                record["files"] = digests_of(folder, [folder / WEIGHTS_FILE])
            write_json(folder / RECORD_FILE, record)

    def _check(self, folder: Path) -> None:
        if self._start_weights is not None and (folder / WEIGHTS_FILE).exists():
            check_start_weights(folder)
            start = self._start_weights.values
            if read_weights(start, folder / WEIGHTS_FILE, "the reference's start weights"):
                logger.warning(
                    "The adapter given is not the one that this run began with; the reference is the one it began with "
                    "(%s).",
                    folder / WEIGHTS_FILE,
                )
            return
        try:
            record = json.loads((folder / RECORD_FILE).read_text())
        except (OSError, ValueError):
            logger.warning(
                "%s: not found or not readable; taken on trust that the reference is the one this run began with.",
                folder / RECORD_FILE,
            )
            return
        ours, began_with = self._fingerprint, record.get("weights")
        if ours is not None and began_with is not None and ours != began_with:
            raise ValueError(
                f"reference: expected the weights that this run began with ({folder / RECORD_FILE}), got others. Build "
                "the trainer from the model that the run began with, not from its checkpoint (resume_from_checkpoint "
                "loads that), or pass the same ref_model."
            )
