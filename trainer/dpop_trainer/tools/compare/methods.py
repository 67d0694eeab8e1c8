"""What is compared: losses with their settings, as they are written on a command line.

dpop                                  DPOP as the run's configuration has it
dpop:dpop_lambda=5                    with another λ
dpo:beta=0.1,learning_rate=1e-4       with any field of DPOPConfig
dpo+sft:loss_weights=[1,0.1]          a weighted sum of losses
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from typing import Any, NamedTuple

import yaml

from dpop_kernels.losses.options import LossOptions
from dpop_kernels.losses.weights import has_penalty, reads_option
from dpop_trainer.settings.command_parser import did_you_mean
from dpop_trainer.settings.config import DPOPConfig
from dpop_trainer.settings.loss_fields import field_of
from dpop_trainer.settings.run_parser import RunParser, check_yaml_value

_SYMBOLS = {"dpop_lambda": "λ", "beta": "β", "simpo_gamma": "γ", "learning_rate": "lr", "loss_weights": "weights"}


class Method(NamedTuple):
    """One way to train."""

    name: str
    """For people: "DPOP, λ = 5"."""
    slug: str
    """For folders: "dpop-dpop_lambda=5"."""
    overrides: dict[str, Any]
    """Fields of DPOPConfig that differ from the run's configuration."""

    def run_values(self, values: dict[str, Any]) -> dict[str, Any]:
        """What all methods share, of the hyper-parameters those that this one's losses read, with its own fields: so λ
        can be set beside a DPO that has none."""
        unread = {field_of(name) for name in LossOptions._fields if not reads_option(self.overrides["loss_type"], name)}
        if not has_penalty(self.overrides["loss_type"]):
            unread.add("dpop_lambda_warmup_steps")
        return {name: value for name, value in values.items() if name not in unread} | self.overrides


def parse_methods(texts: Sequence[str]) -> list[Method]:
    """
    Raises:
        ValueError: there is none, one is malformed or names an unknown field, or two are the same.
    """
    if not texts:
        raise ValueError("methods: expected at least one, got none. For example: --methods dpo dpop dpop:dpop_lambda=5")
    methods = [parse_method(text) for text in texts]
    seen: dict[str, str] = {}
    for method, text in zip(methods, texts, strict=True):
        if method.slug in seen:
            raise ValueError(f"methods: expected each once, got {text!r} and {seen[method.slug]!r}.")
        seen[method.slug] = text
    return methods


def parse_method(text: str) -> Method:
    """LOSS[+LOSS...][:FIELD=VALUE[,FIELD=VALUE...]] -> `Method`.

    Raises:
        ValueError: the text is malformed or names a field that DPOPConfig does not have.
    """
    losses, _, settings = text.partition(":")
    names = [name.strip() for name in losses.split("+")]
    if not all(re.fullmatch(r"\w+", name) for name in names):
        raise ValueError(f"methods: expected LOSS[+LOSS][:FIELD=VALUE,...], got {text!r}.")
    overrides: dict[str, Any] = {"loss_type": names[0] if len(names) == 1 else names}
    # a comma within brackets belongs to a value
    for setting in re.split(r",(?![^\[]*\])", settings) if settings else []:
        field, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"methods: expected FIELD=VALUE after the colon, got {setting!r} in {text!r}.")
        _check_field(field.strip(), text)
        overrides[field.strip()] = _value_of(field.strip(), value, text)
    changed = [(field, value) for field, value in overrides.items() if field != "loss_type"]
    title = " + ".join(name.upper() for name in names)
    return Method(
        name=", ".join([title, *(f"{_SYMBOLS.get(field, field)} = {value}" for field, value in changed)]),
        slug=re.sub(r"[^\w.=+-]+", "-", text.strip()).strip("-"),
        overrides=overrides,
    )


def _value_of(field: str, value: str, text: str) -> Any:
    """As the field would be read from a YAML file: 1e-4, which YAML takes for text, is a number."""
    action, place = _actions()[field], f"methods: {field} in {text!r}"
    read = check_yaml_value(place, action, yaml.safe_load(value))
    kind: Any = action.type
    if not isinstance(read, str) or kind in (None, str):
        return read
    try:
        return kind(read)
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise ValueError(f"{place}: expected a value that the field can take, got {read!r} ({error}).") from error


@cache
def _actions() -> dict[str, argparse.Action]:
    return RunParser((DPOPConfig,), "dpop compare").field_actions()


def _check_field(name: str, text: str) -> None:
    known = {field.name for field in fields(DPOPConfig) if field.init} - {"output_dir", "seed", "loss_type"}
    if name not in known:
        hint = did_you_mean(name, known)
        raise ValueError(f"methods: expected a field of DPOPConfig that may differ, got {name!r} in {text!r}.{hint}")
