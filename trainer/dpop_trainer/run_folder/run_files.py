"""What every run leaves on disk: config.yaml, environment.json and metrics.jsonl (one line per log)."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainerCallback, TrainingArguments

from dpop_trainer.data.read_json import all_records
from dpop_trainer.run_folder.files import append_lines, write_atomically, write_json
from dpop_trainer.run_folder.private import secret_places, without_secrets
from dpop_trainer.run_folder.versions import environment

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
ENVIRONMENT_FILE = "environment.json"
FINISHED_FILE = "finished.json"
"""There once a run has reached its last step and its model is saved."""


class RunFiles(TrainerCallback):
    """Writes the run's configuration and environment at its start, and its metrics as they come.

    A line that cannot be written, the disk being full, does not end the run: it is told once, and lines are kept to be
    written later.

    Args:
        run_config: written to config.yaml, less its secrets; plain values only.
        data_metrics: what happened to the data; written as step 0 of metrics.jsonl.
    """

    def __init__(self, run_config: dict[str, Any], data_metrics: dict[str, float]) -> None:
        self._run_config, self._data_metrics = run_config, data_metrics
        self._unwritten: list[str] = []
        self._has_failed = False

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        folder = _folder(args)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FINISHED_FILE).unlink(missing_ok=True)
        write_atomically(folder / CONFIG_FILE, as_yaml(self._run_config))
        write_json(folder / ENVIRONMENT_FILE, environment(args))
        # a resumed run has its lines from the checkpoint, whatever became of the file since
        lines = [{"step": 0, **self._data_metrics}, *({"step": line["step"], **line} for line in state.log_history)]
        write_atomically(folder / METRICS_FILE, "".join(map(_as_line, lines)))
        self._unwritten = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        self._unwritten.append(_as_line({"step": state.global_step, **logs}))
        try:
            append_lines(_folder(args) / METRICS_FILE, "".join(self._unwritten))
            self._unwritten = []
        except OSError as error:
            self._tell_once(f"{_folder(args) / METRICS_FILE}: {len(self._unwritten)} lines are not written yet", error)

    def _tell_once(self, what: str, error: Exception) -> None:
        if not self._has_failed:
            logger.warning("%s (%s: %s). The run goes on.", what, type(error).__name__, error)
        self._has_failed = True


def as_yaml(values: Mapping[str, Any], *, sort_keys: bool = True) -> str:
    """Settings as YAML without their secrets, and a first line that says which fields had some."""
    places = secret_places(values)
    told = f"# secrets, left out: {', '.join(places)}\n" if places else ""
    return told + yaml.safe_dump(without_secrets(values), sort_keys=sort_keys, allow_unicode=True)


def _as_line(values: Mapping[str, Any]) -> str:
    return json.dumps(values) + "\n"


def _folder(args: TrainingArguments) -> Path:
    assert args.output_dir is not None
    return Path(args.output_dir)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a last line cut short by a kill is left out."""
    path = folder / METRICS_FILE
    return [record for _, record in all_records(path, may_end_early=True)] if path.exists() else []
