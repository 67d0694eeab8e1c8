"""What is wrong with a set of pairs: one function per kind of trouble, each from measures to a finding or none.

A finding is serious where its share of the pairs reaches the threshold in `SERIOUS_SHARE`; then the command's exit code
says so. The thresholds are our choice: below them a run is a little worse or wastes a little compute, from there on its
result should not be trusted before somebody has looked.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpop_trainer.data.truncate import fitting_length
from dpop_trainer.measure.surface import SURFACE_REMEDY, Surface
from dpop_trainer.settings.wording import counted
from dpop_trainer.tools.doctor.measure import CUT, EMPTY, NO_ROOM, SAME_AFTER_CUT, Measures
from dpop_trainer.tools.doctor.texts import Fingerprints

Level = Literal["serious", "warning", "note"]

SERIOUS_SHARE: dict[str, float] = {
    "leaked": 0.0,
    "contradictory": 0.001,
    "identical": 0.01,
    "same_after_cut": 0.01,
    "no_room": 0.01,
    "empty": 0.01,
    "duplicate": 0.05,
    "near_duplicate": 0.05,
    "cut": 0.10,
    "same_when_normalised": 0.10,
    "prompt_shortened": 0.10,
    "hidden_characters": 0.10,
    "left_out": 0.01,
    "stray_specials": 0.10,
    "foreign_turns": 0.10,
}
"""Share of all pairs from which a finding is serious; what is not listed never is."""

LENGTH_FINDINGS = ("cut", "no_room", "same_after_cut")
"""What another max_length mends."""

LOW_EDIT = 0.2
"""Normalised edit distance up to which a pair counts as low-edit: four fifths of the answer stand in both."""
_LOW_EDIT_SHARE = 0.25
_OFTEN = 10
_OFTEN_SHARE = 0.01
_LENGTH_CUE = 0.7
_ENOUGH_PAIRS = 30


class Finding(NamedTuple):
    """One kind of trouble and the pairs that have it."""

    name: str
    level: Level
    rows: NDArray[np.int64]
    """The pairs, by row in the file."""
    of: int
    """All pairs."""
    message: str
    remedy: str

    @property
    def share(self) -> float:
        return len(self.rows) / self.of


class Evidence(NamedTuple):
    """What the checks look at."""

    measures: Measures
    fingerprints: Fingerprints
    held_out: Fingerprints | None
    """Of the evaluation pairs."""
    max_length: int | None
    notes: Mapping[str, NDArray[np.bool_]]
    """What tokenising says of each pair, by column of `outcomes.NOTE_COLUMNS`, and "endless"; empty without it."""
    surface: Surface
    taken_end: str | None = None
    """The end of sequence that was taken for a tokenizer that names none."""

    @property
    def num_pairs(self) -> int:
        return len(self.fingerprints.exact)


def find_all(evidence: Evidence) -> list[Finding]:
    """Everything that the checks find, the serious first, then by share."""
    found = [finding for check in CHECKS for finding in check(evidence)]
    order = {"serious": 0, "warning": 1, "note": 2}
    return sorted(found, key=lambda finding: (order[finding.level], -finding.share))


def rows_to_drop(
    findings: Sequence[Finding], outcome: NDArray[np.int8], weights: NDArray[np.float64]
) -> dict[int, str]:
    """The rows that should not be trained on, each with why, the first reason of `DROPPED`. Of duplicates the first
    stays.

    Args:
        findings: all of them.
        outcome: [n] what becomes of each pair under the length that it is to be trained with, whatever was asked for.
        weights: [n] of each pair in the loss.
    """
    rows = {finding.name: finding.rows for finding in findings}
    rows |= {"no_room": np.flatnonzero(outcome == NO_ROOM), "same_after_cut": np.flatnonzero(outcome == SAME_AFTER_CUT)}
    rows["zero_weight"] = np.flatnonzero(weights == 0)
    reasons: dict[int, str] = {}
    for name in DROPPED:
        for row in map(int, rows.get(name, ())):
            reasons.setdefault(row, name)
    return dict(sorted(reasons.items()))


def _empty(evidence: Evidence) -> list[Finding]:
    return _finding(
        evidence,
        "empty",
        evidence.measures.outcome == EMPTY,
        "have an answer without tokens",
        "The trainer leaves them out.",
    )


def _identical(evidence: Evidence) -> list[Finding]:
    return _finding(
        evidence,
        "identical",
        evidence.measures.identical,
        "have the same answer twice: nothing to prefer",
        "The trainer leaves them out; look at where they come from.",
    )


def _same_when_normalised(evidence: Evidence) -> list[Finding]:
    prints = evidence.fingerprints
    return _finding(
        evidence,
        "same_when_normalised",
        (prints.chosen == prints.rejected) & ~evidence.measures.identical,
        "have answers that differ in white space or invisible characters alone",
        "Keep them only if that is what the model is to learn.",
    )


def _same_after_cut(evidence: Evidence) -> list[Finding]:
    return _finding(
        evidence,
        "same_after_cut",
        evidence.measures.outcome == SAME_AFTER_CUT,
        f"differ only in what max_length {evidence.max_length} cuts off",
        f"{_raise_to(evidence)}: the trainer leaves them out.",
    )


def _no_room(evidence: Evidence) -> list[Finding]:
    return _finding(
        evidence,
        "no_room",
        evidence.measures.outcome == NO_ROOM,
        f"have a prompt that alone fills max_length {evidence.max_length}",
        f"{_raise_to(evidence)}, or shorten the prompts: the trainer leaves them out.",
    )


def _cut(evidence: Evidence) -> list[Finding]:
    return _finding(
        evidence,
        "cut",
        evidence.measures.outcome == CUT,
        f"lose tokens to max_length {evidence.max_length}",
        f"{_raise_to(evidence)}: a cut answer teaches not to end.",
    )


def _raise_to(evidence: Evidence) -> str:
    lengths = [length for length in map(int, evidence.measures.length) if length > 0]
    return f"Raise max_length to {fitting_length(lengths)}" if lengths else "Raise max_length"


def _duplicate(evidence: Evidence) -> list[Finding]:
    prints = evidence.fingerprints
    exact = repeated(prints.exact)
    near = repeated(prints.pair) & ~exact
    return _finding(
        evidence, "duplicate", exact, "repeat an earlier pair to the letter", "Drop all but the first."
    ) + _finding(
        evidence,
        "near_duplicate",
        near,
        "repeat an earlier pair but for white space, invisible characters or the prompt's case",
        "Drop all but the first.",
    )


def _contradictory(evidence: Evidence) -> list[Finding]:
    prints = evidence.fingerprints
    # a pair whose answers are the same when normalised is its own opposite, and another finding
    opposed = _among(prints.swapped, prints.pair) & (prints.swapped != prints.pair)
    both = _among(prints.chosen, prints.rejected) | _among(prints.rejected, prints.chosen)
    both &= ~opposed & (prints.chosen != prints.rejected)
    return _finding(
        evidence,
        "contradictory",
        opposed,
        "stand against a pair with the same prompt and the answers exchanged",
        "Drop both sides, or find out which is right.",
    ) + _finding(
        evidence,
        "both_ways",
        both,
        "have an answer that another pair of the same prompt prefers the other way round",
        "Natural where answers were ranked; else look at the labels.",
    )


def _over_represented(evidence: Evidence) -> list[Finding]:
    _, inverse, counts = np.unique(evidence.fingerprints.prompt, return_inverse=True, return_counts=True)
    often = (counts >= _OFTEN) & (counts > _OFTEN_SHARE * evidence.num_pairs)
    if not often.any():
        return []
    return _finding(
        evidence,
        "over_represented",
        often[inverse],
        f"belong to {counted(int(often.sum()), 'prompt')} with {_OFTEN} pairs or more and over {_OFTEN_SHARE:.0%} of "
        f"the data each (the most frequent: {counts.max():,} pairs)",
        "Keep a few pairs of each: the run learns these prompts.",
    )


def _among(prints: NDArray[Any], others: NDArray[Any]) -> NDArray[np.bool_]:
    # sorted: the table that numpy tries first for integers is no use over 64 bits, and numpy 2.0 overflows on its way
    return np.isin(prints, others, kind="sort")


def _leaked(evidence: Evidence) -> list[Finding]:
    if evidence.held_out is None:
        return []
    prints, held_out = evidence.fingerprints, evidence.held_out
    leaked = _among(prints.prompt, held_out.prompt)
    num_pairs = int(_among(held_out.pair, prints.pair).sum())
    num_prompts = int(_among(held_out.prompt, prints.prompt).sum())
    return _finding(
        evidence,
        "leaked",
        leaked,
        f"have a prompt of the evaluation set: {num_prompts:,} of its {len(held_out.prompt):,} pairs are met in "
        f"training, {num_pairs:,} of them with both answers",
        "Split by prompt: evaluation on these measures memory.",
    )


def _length_cue(evidence: Evidence) -> list[Finding]:
    measures = evidence.measures
    longer = measures.chosen_length > measures.rejected_length
    shorter = measures.chosen_length < measures.rejected_length
    num_unequal = int(longer.sum() + shorter.sum())
    if num_unequal < _ENOUGH_PAIRS:
        return []
    share = longer.sum() / num_unequal
    if max(share, 1 - share) < _LENGTH_CUE:
        return []
    which, side = (longer, "longer") if share > 0.5 else (shorter, "shorter")
    ratio = float(np.nanmedian(measures.ratio))
    return _finding(
        evidence,
        "length_cue",
        which,
        f"have the {side} answer as the chosen one: {max(share, 1 - share):.0%} of those whose lengths differ "
        f"(median chosen / rejected {ratio:.2f})",
        "The model can learn length instead of quality: balance the pairs, and look at length-normalised accuracy.",
    )


def _surface(evidence: Evidence) -> list[Finding]:
    if not evidence.surface.gives_away:
        return []
    level: Level = "serious" if evidence.surface.is_format else "warning"
    rows = np.flatnonzero(~evidence.measures.identical)
    told = str(evidence.surface)
    return [Finding("surface", level, rows, evidence.num_pairs, told[:1].upper() + told[1:], SURFACE_REMEDY)]


def _low_edit(evidence: Evidence) -> list[Finding]:
    measures = evidence.measures
    low = (measures.distance <= LOW_EDIT) & ~measures.identical
    if low.mean() < _LOW_EDIT_SHARE:
        return []
    after = float(measures.suffix[low].mean())
    unit = "tokens" if (measures.chosen_tokens >= 0).any() else "characters"
    return _finding(
        evidence,
        "low_edit",
        low,
        f"are low-edit (normalised distance up to {LOW_EDIT}), with {after:,.0f} {unit} on average after the edit that "
        "both answers share",
        "Plain DPO would part the answers at the edit and lower what follows it in both, the chosen answer with it; "
        "DPOP's penalty holds the chosen answer.",
    )


def _noted(evidence: Evidence) -> list[Finding]:
    """What tokenising took note of."""
    return [
        finding
        for name, (what, remedy) in _NOTED.items()
        if name in evidence.notes
        for finding in _finding(evidence, name, evidence.notes[name], what, remedy)
    ]


def _no_end_token(evidence: Evidence) -> list[Finding]:
    end = evidence.taken_end
    if end is None:
        return []
    message = f"The tokenizer names no end of sequence: {end} is counted as the end of each answer"
    remedy = f'`dpop train` needs one: write "eos_token": "{end}", or the model\'s own, into its tokenizer_config.json.'
    return [Finding("no_end_token", "warning", np.array([], np.int64), evidence.num_pairs, message, remedy)]


def _hidden_characters(evidence: Evidence) -> list[Finding]:
    return _finding(
        evidence,
        "hidden_characters",
        evidence.measures.hidden_characters,
        "hold control or bidirectional formatting characters, or U+FFFD where a character broke",
        "Clean the text, or see that the source was decoded as UTF-8.",
    )


def repeated(keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Whether a value has stood earlier in the array. [n] -> [n]"""
    first = np.ones(len(keys), np.bool_)
    first[np.unique(keys, return_index=True)[1]] = False
    return first


def _finding(evidence: Evidence, name: str, mask: NDArray[np.bool_], what: str, remedy: str) -> list[Finding]:
    rows = np.flatnonzero(mask)
    if not len(rows):
        return []
    share = len(rows) / evidence.num_pairs
    verb, _, rest = what.partition(" ")
    what = f"{_OF_ONE[verb] if len(rows) == 1 else verb} {rest}"
    level: Level = "note" if name in _NOTES else "warning"
    if name in SERIOUS_SHARE and share >= SERIOUS_SHARE[name]:
        level = "serious"
    message = f"{len(rows):,} of {evidence.num_pairs:,} pairs ({percent(share)}) {what}"
    return [Finding(name, level, rows, evidence.num_pairs, message, remedy)]


def percent(share: float) -> str:
    """A share that is not nothing never reads as 0.0%, and one that is not all never as 100%."""
    if 0 < share < 0.001:
        return "<0.1%"
    return ">99.9%" if 0.9995 <= share < 1 else f"{share:.1%}"


_NOTED = {
    "prompt_shortened": (
        "have a prompt that ends in a token that merges into the answer's first",
        "End prompts so that no token crosses over (begin answers with the space, not end prompts with it): the model "
        "is trained on another context than it generates from.",
    ),
    "mended_seams": (
        "have a second BOS, or a second end of a turn, written out in the text",
        "The trainer leaves it out; leave it out of the data too: tokenizer and chat template write their own.",
    ),
    "stray_specials": (
        "have a special token where prompt and answer meet, or one twice",
        "Remove it: an answer begins without BOS, a prompt ends without EOS. It is trained on as it stands.",
    ),
    "left_out": (
        "lose a part of an answer, a tool call or a tool to the chat template (an R1-like one strips reasoning)",
        "Give a template that writes it (chat_template_path), or pairs without it: what is left out is not trained.",
    ),
    "foreign_turns": (
        "have an answer that goes on over turns that the model does not write (a user's, a tool's), which are scored",
        "End answers with the assistant's turn; make a pair of each later turn, with the turns before as its prompt.",
    ),
    "plain_text": (
        "are plain text, without the turns of the tokenizer's chat template",
        'For a chat model give messages ([{"role": "user", "content": ...}]): it is asked in turns. For a base model '
        "text is right.",
    ),
    "endless": (
        "have an answer that ends in no token at which the model stops",
        "End turns with the model's own EOS, as --chat_template_path zephyr does, or name the template's end in "
        "generation_config.eos_token_id: else the trained model does not stop.",
    ),
}
"""Name -> what such pairs have, and the remedy."""
_OF_ONE = {
    "are": "is",
    "belong": "belongs",
    "differ": "differs",
    "have": "has",
    "hold": "holds",
    "lose": "loses",
    "repeat": "repeats",
    "stand": "stands",
}
_NOTES = {"both_ways", "over_represented", "mended_seams", "plain_text"}
DROPPED_BY_TRAIN = ("zero_weight", "empty", "identical", "no_room", "same_after_cut")
"""What `dpop train` leaves out by itself."""
DROPPED = (*DROPPED_BY_TRAIN, "contradictory", "duplicate", "near_duplicate", "leaked")
"""What `--write_clean` leaves out; the first that applies is a row's reason."""
CHECKS: tuple[Callable[[Evidence], list[Finding]], ...] = (
    _empty,
    _identical,
    _same_when_normalised,
    _same_after_cut,
    _no_room,
    _cut,
    _duplicate,
    _contradictory,
    _over_represented,
    _leaked,
    _length_cue,
    _surface,
    _low_edit,
    _noted,
    _no_end_token,
    _hidden_characters,
)
