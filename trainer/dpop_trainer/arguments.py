"""Command-line and YAML arguments beside the training configuration, and how the two sources are merged."""

import difflib
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers import HfArgumentParser, TrainingArguments

Config = TypeVar("Config", bound=TrainingArguments)


@dataclass
class ModelArguments:
    """The model and, where wanted, the LoRA adapter. Names as in TRL."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id or local folder of the model."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the hub."})
    dtype: str | None = field(
        default=None, metadata={"help": "Dtype to load in: float32, bfloat16, float16; unset: the checkpoint's own."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager, flash_attention_2, ..."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes with the weights."})
    ref_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Reference model, where it is not the model itself before training."}
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "QLoRA: load the base in 4 bits (bitsandbytes, CUDA)."})
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of all weights."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapter: alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules to adapt; unset: every linear layer but the head."}
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained in full and saved with the adapter, such as lm_head."}
    )


@dataclass
class DataArguments:
    """The preference pairs. Names as in TRL."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Hub id, or local file (.jsonl, .json, both also .gz; .parquet, .arrow) or folder."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the hub data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str | None = field(default=None, metadata={"help": "Split to evaluate on, if any."})
    eval_dataset_name: str | None = field(default=None, metadata={"help": "Another data set to evaluate on."})
    max_train_pairs: int | None = field(default=None, metadata={"help": "Train on the first so many pairs only."})
    dataset_mixture: list[str] | None = field(
        default=None,
        metadata={
            "help": "Several data sets to train on, instead of dataset_name: in YAML a list of mappings with path and, "
            "where wanted, name, split, revision, label and one of fraction, weight, num_pairs; as a flag, paths or "
            "such mappings as JSON."
        },
    )
    eval_datasets: list[str] | None = field(
        default=None,
        metadata={"help": "Data sets to evaluate on by name (label), given like dataset_mixture: eval_<name>_loss ..."},
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read, convert and tokenise the training data as it is needed; set max_steps."},
    )
    shuffle_buffer_size: int = field(
        default=10_000,
        metadata={"help": "Records among which a streamed data set is shuffled; 0 keeps its order."},
    )


def parse_arguments(
    config_class: type[Config], argv: list[str], program: str
) -> tuple[ModelArguments, DataArguments, Config]:
    """Merge `--config FILE.yaml` with flags (flags win) into the three dataclasses.

    Raises:
        ValueError: the file does not exist or parse, or holds a key that no field has (the closest is named).
    """
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, config_class),  # type: ignore[arg-type]
        prog=program,
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="read any of the fields below from this file; flags win")
    known = {action.dest for action in parser._actions} - {"help", "config"}
    path = _config_path(argv)
    if path is not None:
        values = read_yaml(path)
        for key in values:
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else f" `{program} --help` lists the fields."
                raise ValueError(f"{path}: expected fields of the run, got {key!r}.{hint}")
        parser.set_defaults(**values)
    parser.set_defaults(config=SUPPRESS)
    namespace = parser.parse_args(argv)
    values = {key: value for key, value in vars(namespace).items() if key in known}
    model_arguments, data_arguments, config = parser.parse_dict(values, allow_extra_keys=False)  # type: ignore[misc]
    return model_arguments, data_arguments, config


def run_config(*parts: Any) -> dict[str, Any]:
    """The complete configuration of a run as plain values: `--config` on it gives the same run."""
    merged: dict[str, Any] = {}
    for part in parts:
        if isinstance(part, TrainingArguments):
            values = part.to_dict()
            merged.update({item.name: values[item.name] for item in fields(part) if item.init and item.name in values})
        else:
            merged.update(asdict(part))
    return merged


def read_yaml(path: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: no such file, not YAML, or not a mapping.
    """
    if not path.is_file():
        raise ValueError(f"--config: expected a YAML file, found none at {str(path)!r}.")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: expected YAML, got a syntax error. {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping of fields to values, got {type(values).__name__}.")
    return values


def _config_path(argv: list[str]) -> Path | None:
    for i, argument in enumerate(argv):
        if argument == "--config":
            if i + 1 == len(argv):
                raise ValueError("--config: expected a file name after it, got nothing.")
            return Path(argv[i + 1])
        if argument.startswith("--config="):
            return Path(argument.partition("=")[2])
    return None
