"""README.md of a run's folder and of its checkpoints: what lies there and how it came about, no path of the machine.

Peft writes a form with empty fields there, and the base model's path into it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dpop_trainer.data.source_path import looks_local
from dpop_trainer.report.markdown import code, joined, plain, table
from dpop_trainer.report.run_page import PAGE_FILE
from dpop_trainer.run_folder.files import write_atomically
from dpop_trainer.run_folder.private import shareable
from dpop_trainer.run_folder.run_files import CONFIG_FILE, METRICS_FILE

README = "README.md"
_OURS = "<!-- written with the model, and anew with each save; take this line out to keep what you change -->"
_SETTINGS = (
    "loss_type",
    "beta",
    "dpop_lambda",
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "seed",
)


def is_kept(folder: Path) -> bool:
    """Whether a README stands there that was not written here."""
    readme = folder / README
    return readme.is_file() and _OURS not in readme.read_text(encoding="utf-8", errors="replace")


def write_run_card(folder: Path, *, base: str, tags: list[str], run_config: Mapping[str, Any], step: int) -> None:
    """
    Args:
        folder: of the run or of a checkpoint.
        base: what it was trained from, a path or a hub id.
        tags: for the hub.
        run_config: the run's configuration.
        step: of the optimizer.
    """
    is_adapter = (folder / "adapter_config.json").is_file()
    front: dict[str, Any] = {
        "library_name": "peft" if is_adapter else "transformers",
        **({"base_model": base} if base and not looks_local(base) and not Path(base).exists() else {}),
        **({"tags": tags} if tags else {}),
    }
    config = shareable(dict(run_config))
    data = config.get("dataset_name")
    started = f" of {code(shareable(base))}" if base else ""
    trained = f"{'An adapter' if is_adapter else 'All weights'}{started} after {step:,} steps"
    rows = [(name, joined(config[name])) for name in _SETTINGS if config.get(name) is not None]
    lines = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        _OURS,
        f"# {plain(folder.resolve().name)}",
        f"{trained}{f' on {code(data)}' if data else ''}, trained with dpop-kernels.",
        table(("setting", "value"), rows),
        f"The run's folder has all settings (`{CONFIG_FILE}`: `dpop train --config` on it is the same run) and how it "
        f"went (`{PAGE_FILE}`, to open in a browser, and `{METRICS_FILE}`). `dpop inspect` shows what it did to the "
        "answers, `dpop export` makes a folder to share, with a whole card.",
    ]
    write_atomically(folder / README, "\n\n".join(lines) + "\n")
