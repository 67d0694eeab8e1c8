"""Command-line and YAML arguments beside the training configuration, and how the two sources are merged."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from dpop_trainer.run_folder.private import SecretFreeRepr
from dpop_trainer.settings.config_checks import check_data_fields, check_preference_fields
from dpop_trainer.settings.errors import UsageError
from dpop_trainer.settings.loss_fields import check_with_losses, option_values
from dpop_trainer.settings.ranges import check_finite, check_ranges
from dpop_trainer.settings.recipes import run_recipe
from dpop_trainer.settings.run_parser import RunParser, check_yaml_value, sections, training_arguments
from dpop_trainer.settings.source_classes import class_from_source, function_from_source
from dpop_trainer.settings.told import is_ours
from dpop_trainer.settings.trl_fields import TRLFields, check_trl_fields, name_hint
from dpop_trainer.settings.without_effect import check_refused

if TYPE_CHECKING:
    from transformers import TrainingArguments

Config = TypeVar("Config", bound="TrainingArguments")


@dataclass(repr=False)
class ModelArguments(SecretFreeRepr):
    """The model and, where wanted, the LoRA adapter. Names as in TRL."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id or local folder of the model."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the hub."})
    dtype: str | None = field(
        default="float32",
        metadata={"help": "Dtype to load the weights in: float32, bfloat16, float16; auto: the checkpoint's own."},
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager, flash_attention_2, ..."})
    ref_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Reference model, where it is not the model itself before training."}
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "QLoRA: load the base in 4 bits (bitsandbytes)."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Load the base in 8 bits (bitsandbytes)."})
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"help": "nf4 or fp4.", "choices": ["nf4", "fp4"]})
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "Quantise the 4-bit scales as well."})
    bnb_4bit_quant_storage: str | None = field(
        default=None, metadata={"help": "Dtype that the 4-bit weights are stored in; FSDP wants the model's."}
    )
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of all weights."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapter: alpha / r."})
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Dropout on the adapter's input; disable_dropout sets it to 0."}
    )
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules to adapt; unset: every linear layer but the head."}
    )
    lora_target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Parameters to adapt that are no modules, such as an expert's weights."}
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained in full and saved with the adapter, such as lm_head."}
    )
    lora_task_type: str = field(default="CAUSAL_LM", metadata={"help": "CAUSAL_LM; nothing else is trained here."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale the adapter by alpha / sqrt(r)."})
    use_dora: bool = field(default=False, metadata={"help": "DoRA: learn the adapted weights' norms apart."})
    peft_config: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Any other field of peft's LoraConfig, as a mapping (a flag: JSON). Implies use_peft."},
    )

    def __post_init__(self) -> None:
        if isinstance(self.peft_config, str):
            try:
                self.peft_config = json.loads(self.peft_config)
            except ValueError as error:
                raise ValueError(f"peft_config: expected JSON, got {self.peft_config!r} ({error}).") from error
        if self.peft_config is not None and not isinstance(self.peft_config, dict):
            raise ValueError(f"peft_config: expected a mapping of LoraConfig's fields, got {self.peft_config!r}.")
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_8bit: expected false together with load_in_4bit, got both. Choose one.")
        check_finite(self)
        if self.lora_task_type != "CAUSAL_LM":
            raise ValueError(f"lora_task_type: expected 'CAUSAL_LM', got {self.lora_task_type!r}.")
        if self.lora_r < 1:
            raise ValueError(
                f"lora_r: expected a rank of at least 1, got {self.lora_r}. To train all weights, leave use_peft out."
            )


@dataclass(repr=False)
class DataArguments(SecretFreeRepr):
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


@dataclass(repr=False)
class ComparisonArguments(SecretFreeRepr):
    """What `dpop compare` compares, beside the arguments of the runs themselves."""

    methods: list[str] = field(
        default_factory=lambda: [*class_from_source("dpop_kernels.losses.formulas", "PAPER_LOSSES")],
        metadata={
            "help": "Losses and their settings: dpo dpop:dpop_lambda=5 dpo:beta=0.1 dpo+sft:loss_weights=[1,0.1]"
        },
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Each method runs once with each seed."}
    )
    max_eval_pairs: int = field(default=256, metadata={"help": "Measure on the first so many held-out pairs."})
    matcher: str | None = field(
        default=None,
        metadata={
            "help": "Let every model answer held-out prompts, and grade the answers against the chosen ones: numeric "
            "(the number after the last '####' or the like), choice, exact, regex. With none they are not graded; how "
            "they are written is told with each."
        },
    )
    answer_regex: str | None = field(
        default=None, metadata={"help": "For --matcher regex: its first group (or whole match) is the answer."}
    )
    max_answers: int = field(default=128, metadata={"help": "Answer the first so many held-out prompts."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest answer."})
    answer_batch_size: int = field(
        default=32,
        metadata={"help": "Prompts that are answered together; more take more memory, and less time on a CPU."},
    )
    neutral_texts: str | None = field(
        default=None,
        metadata={
            "help": "Texts that training is not about (column 'text'; file, folder or hub id): their change per token "
            "is measured too, as what the model unlearned."
        },
    )
    neutral_texts_split: str = field(default="train", metadata={"help": "Split of the neutral texts."})
    max_neutral_texts: int = field(default=128, metadata={"help": "Measure on the first so many of them."})
    keep_models: bool = field(
        default=False, metadata={"help": "Keep the trained weights; by default only what was measured is kept."}
    )


def parse_arguments(
    config_class: type[Config], argv: list[str], program: str, *more_classes: type[Any]
) -> tuple[Any, ...]:
    """Merge `--config FILE.yaml` or `--recipe NAME` with flags (flags win) into ModelArguments, DataArguments, the
    config and any more.

    Raises:
        UsageError: a flag does not exist, or lacks a value that it can take; or there is no such recipe.
        ValueError: the file does not exist or parse, holds a key that no field has (the closest is named), or a value
            that its field cannot take.
    """
    parser = RunParser((ModelArguments, DataArguments, config_class, *more_classes), program)
    actions = parser.field_actions()
    path = _config_path(argv)
    if path is not None:
        values = read_yaml(path)
        for key, value in values.items():
            if key not in actions:
                hint = name_hint(str(key), actions, f"`{program} --help` lists the fields.")
                if key in {item.name for item in fields(ComparisonArguments)}:
                    hint = "`dpop compare` takes it."
                raise ValueError(f"{path}: expected fields of the run, got {key!r}. {hint}")
            values[key] = check_yaml_value(f"{path}: {key}", actions[key], value)
        parser.set_defaults(**values)
    namespace = parser.parse(argv)
    values = {key: value for key, value in vars(namespace).items() if key in actions}
    try:
        return parser.parse_dict(values, allow_extra_keys=False)
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        if is_ours(error):
            raise
        raise ValueError(f"{program}: expected values that transformers takes, got its refusal: {error}") from error


def check_arguments(
    module: str, name: str, argv: list[str], program: str, *more_classes: type[Any]
) -> tuple[Any, ...] | None:
    """What can be told of a command line before torch and transformers are imported; `--help` is printed, and stops.

    Args:
        module: of the configuration class, which is read from its source.
        name: of that class.
        argv: as for `parse_arguments`, with the two below.
        program: what the usage line begins with.
        more_classes: further dataclasses of arguments.

    Returns:
        As `parse_arguments`, with a stand-in for the configuration, its own checks partly made. None: nothing is told.

    Raises:
        UsageError: a flag does not exist, or lacks a value that it can take.
        ValueError: a file, key or value that `parse_arguments` would refuse, or a number out of its range.
    """
    stand_in = class_from_source(module, name)
    if stand_in is None:
        return None
    parts = parse_arguments(stand_in, argv, program, *more_classes)
    config: Any = parts[2]
    check_trl_fields(config)
    check_refused(config)
    check_ranges(config)
    check_data_fields(config)
    if hasattr(config, "loss_type"):
        check_preference_fields(config)
        _check_losses(config)
    return parts


def _check_losses(config: Any) -> None:
    """Names, weights and numbers of losses, by the kernels' own functions, which need no torch for it."""
    names = ("resolve_losses", "losses_of_batch", "has_penalty", "check_options")
    functions = [function_from_source("dpop_kernels.losses.weights", name) for name in names]
    options_class = class_from_source("dpop_kernels.losses.options", "LossOptions")
    if options_class is None or None in functions:
        return
    resolve_losses, losses_of_batch, has_penalty, check_options = functions
    losses = list(resolve_losses(config.loss_type, config.loss_weights))
    check_with_losses(config, of_batch=losses_of_batch(losses), has_penalty=has_penalty(losses))
    check_options(options_class(**option_values(config, options_class._fields)), losses)


def arguments_of(values: dict[str, Any], config_class: type[Config]) -> tuple[ModelArguments, DataArguments, Config]:
    """The dataclasses from what `run_config` made of them."""
    parser = RunParser((ModelArguments, DataArguments, config_class), "dpop")
    return parser.parse_dict(values, allow_extra_keys=False)  # type: ignore[return-value]


def run_config(*parts: Any) -> dict[str, Any]:
    """The complete configuration of a run as plain values: `--config` on it gives the same run.

    With its secrets, since a run may be started from it; what writes or shows it asks `run_folder.private`.
    """
    merged: dict[str, Any] = {}
    for part in parts:
        base = training_arguments(type(part))
        if base:
            # transformers puts a mark in the place of every *_token, of which one is the padding token
            tokens = {name: value for name, value in vars(part).items() if name.endswith("_token")}
            values = {**base.to_dict(part), **tokens}
            left_out = {item.name for item in fields(TRLFields)}
            names = [item.name for item in fields(part) if item.init and item.name not in left_out]
            merged.update({name: values[name] for name in names if name in values})
        else:
            merged.update(asdict(part))
    return merged


def format_config(*parts: Any) -> str:
    """`run_config` as YAML with a heading over each section, without secrets."""
    from dpop_trainer.run_folder.run_files import as_yaml

    values = run_config(*parts)
    text = []
    for part in parts:
        for title, names in sections(type(part)).items():
            shown = {name: values[name] for name in names if name in values}
            text.append(f"# {title}\n{as_yaml(shown, sort_keys=False)}")
    return "\n".join(text)


def read_yaml(path: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: no such file, not YAML, or not a mapping.
    """
    if not path.is_file():
        raise ValueError(f"--config: expected a YAML file, found none at {str(path)!r}.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: expected YAML, got a syntax error{_where(error)}") from error
    except (OSError, ValueError, TypeError, OverflowError, RecursionError) as error:  # other bytes, a 13th month
        raise ValueError(f"{path}: expected YAML, got what cannot be read: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping of fields to values, got {type(values).__name__}.")
    return values


def _where(error: yaml.YAMLError) -> str:
    """Line and column of a syntax error, counted from 1, and what is wrong there."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f". {error}"
    return f" in line {mark.line + 1}, column {mark.column + 1}: {getattr(error, 'problem', '')}."


def _config_path(argv: list[str]) -> Path | None:
    config, recipe = _value_of("--config", "a file name", argv), _value_of("--recipe", "a recipe's name", argv)
    if config is not None and recipe is not None:
        raise UsageError(
            f"--recipe: expected it or --config, got both ({recipe!r}, {config!r}). Leave one out; to change a recipe, "
            "give flags, or copy it first: dpop recipes --copy DIR."
        )
    if recipe is not None:
        return run_recipe(recipe)
    return None if config is None else Path(config)


def _value_of(flag: str, what: str, argv: list[str]) -> str | None:
    for i, argument in enumerate(argv):
        if argument == flag:
            if i + 1 == len(argv):
                raise ValueError(f"{flag}: expected {what} after it, got nothing.")
            return argv[i + 1]
        if argument.startswith(f"{flag}="):
            return argument.partition("=")[2]
    return None
