"""The command line of a run: one flag per field, in sections, with errors that name the flag and what was meant."""

import argparse
import inspect
import shutil
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NoReturn, get_type_hints

from dpop_trainer.settings.errors import UsageError
from dpop_trainer.settings.source_classes import module_from_file
from dpop_trainer.settings.trl_fields import ALTERNATIVES, name_hint

if TYPE_CHECKING:
    from transformers import HfArgumentParser
    from transformers.hf_argparser import string_to_bool
else:  # the file needs nothing of transformers, whose import would take ten seconds
    _hf_argparser = module_from_file("transformers.hf_argparser")
    HfArgumentParser, string_to_bool = _hf_argparser.HfArgumentParser, _hf_argparser.string_to_bool

# of transformers' hundred, those that most runs set; shown before the rest
EVERYDAY_FIELDS = (
    "output_dir",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "warmup_steps",
    "eval_strategy",
    "eval_steps",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "report_to",
    "seed",
    "use_cpu",
)

EXIT_CODES = (
    "Exit codes: 0 done; 1 the run failed, and says on what; 2 wrong usage; 130 interrupted (Ctrl-C): the same command "
    "goes on from the last checkpoint. DPOP_DEBUG=1 in the environment shows where an error came from."
)


class RunParser(HfArgumentParser):
    """HfArgumentParser whose help has sections, this package's fields first, and whose errors are exceptions.

    Args:
        dataclass_types: dataclasses of arguments, configurations among them.
        program: what the usage line begins with.
    """

    def __init__(self, dataclass_types: tuple[type, ...], program: str) -> None:
        super().__init__(
            dataclass_types,  # type: ignore[arg-type]
            prog=program,
            usage=f"{program} [--config FILE.yaml | --recipe NAME] [--FIELD VALUE ...] [--print-config]",
            description="Every field may stand in the YAML file or be a flag; flags win. What is on by default is "
            "switched off by --no_FIELD or by --FIELD false. Lists: --FIELD a b.",
            epilog=EXIT_CODES,
            formatter_class=_Help,
            allow_abbrev=False,
        )
        for action in self._actions:
            if action.option_strings and action.option_strings[0].startswith("--no_"):
                action.help = argparse.SUPPRESS
        self.add_argument("--config", metavar="FILE.yaml", help="read any of the fields below from this file")
        self.add_argument("--recipe", metavar="NAME", help="or from this one that `dpop recipes` lists")
        self.add_argument("--print-config", action="store_true", help="print the complete YAML of the run, and stop")

    def field_actions(self) -> dict[str, argparse.Action]:
        """The fields of the dataclasses -> how each is parsed."""
        actions = {action.dest: action for action in reversed(self._actions)}  # the first of a name is no --no_FIELD
        return {
            name: action for name, action in actions.items() if name not in ("help", "config", "recipe", "print_config")
        }

    def parse(self, argv: list[str]) -> argparse.Namespace:
        """
        Raises:
            UsageError: a flag does not exist (the closest is named), or lacks a value that it can take.
        """
        namespace, unknown = self.parse_known_args(argv)
        for argument in unknown:
            if not argument.startswith("--"):
                raise UsageError(f"{argument!r}: expected flags such as --beta 0.1, got a value without one.")
            name = argument[2:].partition("=")[0]
            hint = name_hint(name, self.field_actions(), f"`{self.prog} --help` lists the fields.")
            raise UsageError(f"--{name}: expected a field of the run, got an unknown flag. {hint}")
        return namespace

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message.rstrip('.')}. `{self.prog} --help` lists the fields.")

    def _add_dataclass_arguments(self, dtype: Any) -> None:
        hints = get_type_hints(dtype)
        by_name = {item.name: item for item in fields(dtype)}
        for title, names in sections(dtype).items():
            group = self.add_argument_group(title)
            for name in names:
                by_name[name].type = hints[name]
                self._parse_dataclass_field(group, by_name[name])  # type: ignore[arg-type]


def sections(dtype: type) -> dict[str, list[str]]:
    """The fields of a dataclass of arguments by the title of the section they are shown in."""
    names = [item.name for item in fields(dtype) if item.init]  # type: ignore[arg-type]
    base = training_arguments(dtype)
    if base is None:
        return {_first_line(dtype): names}
    inherited = {item.name for item in fields(base)}
    own = inspect.get_annotations(dtype)
    here = sorted((name for name in names if name not in inherited), key=lambda name: name not in own)
    overridden = {
        name
        for cls in dtype.__mro__
        if cls is not base and training_arguments(cls)
        for name in inspect.get_annotations(cls)
        if name in inherited and name not in ALTERNATIVES
    }
    everyday = {*EVERYDAY_FIELDS, *overridden}
    return {
        "Loss, data processing, kernels": here,
        "Training": [name for name in names if name in everyday and name not in here],
        "Training, the rest of transformers.TrainingArguments": [
            n for n in names if n not in here and n not in everyday
        ],
    }


def training_arguments(dtype: type) -> Any:
    """The `TrainingArguments` that a class derives from: transformers', or what their source says; else None."""
    return next((cls for cls in dtype.__mro__ if cls.__name__ == "TrainingArguments"), None)


def check_yaml_value(place: str, action: argparse.Action, value: Any) -> Any:
    """The value of a field as YAML gives it, where it is of a kind that the field can take.

    Args:
        place: file and field, for the message.
        action: how the flag of this name is parsed.
        value: what the file says. Text is parsed later, as the flag's would be.

    Raises:
        ValueError: it is of another kind; the message says of which.
    """
    if isinstance(value, str) and action.choices and value not in (choices := [*map(str, action.choices)]):
        raise ValueError(f"{place}: expected one of {', '.join(choices)}, got {value!r}.")
    if value is None or isinstance(value, str):
        return [value] if isinstance(value, str) and action.nargs == "+" else value
    if action.nargs == "+":
        return value if isinstance(value, list) else [value]
    expected = None
    if action.type is string_to_bool and not isinstance(value, bool):
        expected = "true or false"
    elif action.type in (int, float) and (isinstance(value, bool) or not isinstance(value, (int, float))):
        expected = "a number"
    elif action.type is int and value != int(value):
        expected = "a whole number"
    elif isinstance(value, bool) and (action.type is str or action.choices):
        expected = "text (YAML reads no, yes, on and off as booleans: put it in quotes)"
    if expected:
        raise ValueError(f"{place}: expected {expected}, got {value!r}.")
    return value


class _Help(argparse.HelpFormatter):
    """Flags in one spelling, defaults where there are any."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36, width=min(120, shutil.get_terminal_size().columns))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.nargs == 0:
            return action.option_strings[-1]
        value = {"+": "A B ..", "?": "true|false"}.get(str(action.nargs), action.metavar or "X")
        return f"{action.option_strings[0]} {value}"

    def _get_help_string(self, action: argparse.Action) -> str:
        text = " ".join((action.help or "").split())
        default = action.default
        if action.nargs == 0 or default in (None, argparse.SUPPRESS, [], ""):
            return text
        return f"{text} (default: %(default)s)"


def _first_line(dtype: type) -> str:
    return (dtype.__doc__ or dtype.__name__).partition(".")[0]
