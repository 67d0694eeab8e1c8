"""What a recipe is: it makes preference pairs of one record, and knows nothing of files or output formats.

A recipe is a frozen dataclass in a file of its own. Its fields are its options, its docstring's first line is its help,
`build` makes the pairs. `recipes.RECIPES` lists it, and the command line follows from that.
"""

import random
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

Scaffold = Literal["question", "continuation", "verbatim"]
"""What stands around prompt and answers where pairs are written as text, see `form.text_fields`."""


class Edit(NamedTuple):
    """What makes the rejected answer of the chosen one: chosen[start:end] becomes `replacement`."""

    original: str
    replacement: str
    start: int
    """First character of the replaced stretch in the chosen answer."""
    end: int
    """One past its last character."""


class BuiltPair(NamedTuple):
    """A pair as the bare texts of a prompt and two answers."""

    prompt: str
    chosen: str
    rejected: str
    edit: Edit
    spared: tuple[str, ...] = ()
    """The kinds of `protected` spans in which the rule would have found a place to edit."""


class SkippedRecord(Exception):
    """A sound record of which this recipe can make no pair.

    Args:
        reason: one of few, for counting.
        example: what of this record shows it.
        remedy: what the user can do about such records.
    """

    def __init__(self, reason: str, example: str = "", remedy: str = "") -> None:
        super().__init__(reason)
        self.example, self.remedy = example, remedy


class Recipe(Protocol):
    """Makes pairs of records, one at a time."""

    name: ClassVar[str]
    """What the command line calls it."""
    scaffold: ClassVar[Scaffold]

    def build(self, record: Mapping[str, Any], seed: int) -> list[BuiltPair]:
        """The pairs of one record: the same for the same record and seed, whatever stands around it.

        Raises:
            ValueError: the record is not of the kind that the recipe reads; names the field.
            SkippedRecord: it is, but no pair can be made of it.
        """
        ...


def record_rng(seed: int, *texts: str) -> random.Random:
    """A generator that depends on the seed and a record's texts alone, not on where the record stands."""
    return random.Random("\0".join([str(seed), *texts]).encode("utf-8", "surrogatepass"))


def edit_between(chosen: str, rejected: str) -> Edit:
    """The smallest single stretch of the chosen answer that must change to give the rejected one."""
    start = 0
    while start < min(len(chosen), len(rejected)) and chosen[start] == rejected[start]:
        start += 1
    suffix = 0
    while suffix < min(len(chosen), len(rejected)) - start and chosen[-1 - suffix] == rejected[-1 - suffix]:
        suffix += 1
    end = len(chosen) - suffix
    return Edit(chosen[start:end], rejected[start : len(rejected) - suffix], start, end)


def field_value(record: Mapping[str, Any], name: str) -> Any:
    """A field, or one inside others by its path ("6b_finetuning.solution"); None where there is none."""
    if name in record:
        return record[name]
    outer, _, inner = name.partition(".")
    nested = record.get(outer)
    return field_value(nested, inner) if inner and isinstance(nested, Mapping) else None


def text_field(record: Mapping[str, Any], name: str) -> str:
    """
    Raises:
        ValueError: the field is missing, blank or not a string.
    """
    value = field_value(record, name)
    if not isinstance(value, str) or not value.strip():
        if name in record or value is not None:
            raise ValueError(f"{name}: expected a non-empty string, got {excerpt(value)}.")
        raise ValueError(
            f"{name}: expected a non-empty string, got the fields {sorted(map(str, record))}. Options of the recipe "
            "name other fields, where it takes any (one inside another as outer.inner): see its --help."
        )
    return value


def excerpt(value: Any) -> str:
    """A value for a message, at most 60 characters of it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
