"""High-edit pairs from sentence completion: the right ending of a context against each wrong one.

    prompt     Tango: A band on stage plays. They
    chosen     dance to the music.
    rejected   leave the stage by bicycle.

Reads the hub's form (activity_label, ctx_a, ctx_b, endings, label) and the prepared one (query, choices, gold). Of the
first, WikiHow's marks are taken out of the text: "[title]" and "[step]" end a sentence, other brackets hold no text.

Source: Pal et al. 2024, arXiv:2402.13228 (the paper's HellaSwag pairs); Zellers et al. 2019, arXiv:1905.07830 (the
data).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from dpop_trainer.tools.pairs.arc import read_options, read_prepared, right_against_wrong
from dpop_trainer.tools.pairs.recipe import BuiltPair, Scaffold, text_field

_SENTENCE_MARK = re.compile(r"\.?\s*\[(?:title|step|substeps)\]\s*")
_OTHER_MARK = re.compile(r"\[[^\[\]]*\]")
_SPACES = re.compile(r" {2,}")


@dataclass(frozen=True)
class HellaSwag:
    """Contexts with one right and several wrong endings (ctx, endings, label; or query, choices, gold)."""

    name: ClassVar[str] = "hellaswag"
    scaffold: ClassVar[Scaffold] = "continuation"

    def build(self, record: Mapping[str, Any], seed: int) -> list[BuiltPair]:
        if "query" in record:
            return right_against_wrong(*read_prepared(record))
        endings, right = read_options(record, "endings", "label")
        return right_against_wrong(_context(record), [clean(ending) for ending in endings], right)


def clean(text: str) -> str:
    """A text without WikiHow's marks: "Wash it [title] Dry it. [step] Use [substeps] air" has none of them left."""
    text = _SENTENCE_MARK.sub(". ", text.strip())
    return _SPACES.sub(" ", _OTHER_MARK.sub("", text)).strip()


def _context(record: Mapping[str, Any]) -> str:
    """ "Activity: context", whose last sentence is begun and left to the endings."""
    if isinstance(record.get("ctx_a"), str) and isinstance(record.get("ctx_b"), str):
        begun = record["ctx_b"]
        context = f"{record['ctx_a']} {begun[:1].upper()}{begun[1:]}"
    else:
        context = text_field(record, "ctx")
    if not context.strip():
        raise ValueError("ctx_a: expected a non-empty string here or in ctx_b, got blanks.")
    activity = record.get("activity_label")
    return clean(f"{activity}: {context}" if isinstance(activity, str) and activity else context)
