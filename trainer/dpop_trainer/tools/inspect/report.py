"""An inspection in words, as a table for the terminal, and as an HTML page with the tokens that changed.

Every sentence follows the numbers, also when they are not the expected ones.
"""

import math
import os
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

from dpop_trainer.data import TokeniseCounts
from dpop_trainer.data.edits import EditRegions
from dpop_trainer.measure.pairs_under_model import LOST_NATS, PairEvaluation
from dpop_trainer.measure.shares import share_interval, with_interval
from dpop_trainer.measure.token_shift import TokenShift
from dpop_trainer.report import html_page
from dpop_trainer.report.graphemes import columns, graphemes, pad, pad_left
from dpop_trainer.report.signed import signed
from dpop_trainer.run_folder.versions import versions

_REGIONS = ("before", "at", "after")
_FULL_COLOUR_NATS = 3.0
_UNDERLINED_NATS = 1.0
_GAINED, _LOST = "0 114 178", "213 94 0"  # blue and vermillion, which colour-blind readers tell apart


class AnswerTokens(NamedTuple):
    """One answer of a pair. The three lists have one item per token."""

    texts: list[str]
    ref_logps: list[float]
    """Nats."""
    policy_logps: list[float]
    edit: EditRegions

    @property
    def logratio(self) -> float:
        """log π - log π_ref of the whole answer, in nats."""
        return sum(self.policy_logps) - sum(self.ref_logps)


class PairChange(NamedTuple):
    """What training did to one pair."""

    pair_id: int
    """The pair's row in the file."""
    prompt: str
    chosen: AnswerTokens
    rejected: AnswerTokens

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        answers = {
            side: {**answer._asdict(), "edit": list(answer.edit), "logratio": answer.logratio}
            for side, answer in (("chosen", self.chosen), ("rejected", self.rejected))
        }
        return {"pair_id": self.pair_id, "prompt": self.prompt, **answers}


class Inspection(NamedTuple):
    """A trained model against its reference on a file of pairs."""

    name: str
    reference: str
    pairs: str
    counts: TokeniseCounts
    evaluation: PairEvaluation
    history: dict[int, PairEvaluation]
    """By optimizer step, of the run's checkpoints."""
    worst: list[PairChange]
    """Those whose chosen answers lost most, the worst first."""


def verdict(evaluation: PairEvaluation, num_pairs: int) -> str:
    """What the numbers say of so many pairs, in a few sentences. A mean within two standard errors of zero counts as no
    change, a share whose score interval (95 %) holds a half as chance."""
    shift = evaluation.shift
    changes = {region: getattr(shift, region).mean_change for region in _REGIONS}
    known = {region: change for region, change in changes.items() if not math.isnan(change)}
    lowest = min(known, key=known.__getitem__)
    moved = f"Training {_movement(evaluation.chosen_logratio, evaluation.chosen_logratio_error, 'chosen')}"
    if _is_fall(evaluation.chosen_logratio, evaluation.chosen_logratio_error):
        moved += f", most {_place(lowest)} ({signed(known[lowest], 3)} nats per token)"
    moved += f"; it {_movement(evaluation.rejected_logratio, evaluation.rejected_logratio_error, 'rejected')}."
    lost = (
        f"{evaluation.lost_share:.0%} of the chosen answers' tokens lost more than {LOST_NATS} nats of their log-prob."
    )
    ranks = (
        "The chosen answer gained more than the rejected one in "
        f"{with_interval(evaluation.reward_accuracy, num_pairs)} of the pairs, and is the likelier one in "
        f"{with_interval(evaluation.ranking.accuracy, num_pairs)}, where the reference had "
        f"{100 * evaluation.ref_ranking.accuracy:.1f} %."
    )
    if share_interval(evaluation.reward_accuracy, num_pairs).is_chance:
        ranks += " Which of the two gained more is chance: no preference was learned."
    return f"{moved} {lost} {ranks} {_advice(evaluation)}".strip()


def movement(evaluation: PairEvaluation) -> str:
    """What became of the chosen answers in a word: rose, fell, unchanged."""
    if _is_noise(evaluation.chosen_logratio, evaluation.chosen_logratio_error):
        return "unchanged"
    return "fell" if evaluation.chosen_logratio < 0 else "rose"


def format_inspection(inspection: Inspection) -> str:
    """For the terminal: the regions' table, then the verdict."""
    rows = [["", *_REGIONS_TITLES], *_region_rows(inspection.evaluation)]
    widths = [max(columns(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([pad(row[0], widths[0]), *(pad_left(cell, w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    told = verdict(inspection.evaluation, inspection.counts.num_pairs)
    return "\n".join([*lines, "", f"Chosen answers: {movement(inspection.evaluation)}. {told}"])


def write_inspection(
    inspection: Inspection, figures: Sequence[tuple[str, str | os.PathLike[str]]], path: str | os.PathLike[str]
) -> None:
    """Write the page.

    Args:
        inspection: what is shown.
        figures: titles and PNG files.
        path: the HTML file; missing folders are made.
    """
    evaluation, counts = inspection.evaluation, inspection.counts
    introduction = (
        f"{inspection.name} against {inspection.reference}, on {counts.num_pairs:,} pairs of {inspection.pairs}. "
        f"{counts.summary()}"
    )
    ranks = [
        [name, *(f"{value:.1%}" for value in values)]
        for name, values in (("policy", evaluation.ranking), ("reference", evaluation.ref_ranking))
    ]
    sections = [
        html_page.paragraph(introduction),
        html_page.judgement(
            f"Chosen answers: {movement(evaluation)}",
            verdict(evaluation, counts.num_pairs),
            {"fell": "bad", "rose": "good"}.get(movement(evaluation), ""),
        ),
        html_page.heading("Change against the reference"),
        html_page.table(
            [("", ""), *((title, unit) for title, unit in zip(_REGIONS_TITLES, _REGIONS_UNITS, strict=True))],
            _region_rows(evaluation),
        ),
        html_page.paragraph(_LEGEND, "note"),
        *(html_page.figure(title, figure) for title, figure in figures),
        html_page.heading("Which answer is the likelier one"),
        html_page.table([("model", ""), ("ranking accuracy", ""), ("per token", "")], ranks),
        html_page.paragraph(_RANKING_LEGEND, "note"),
        *_worst_sections(inspection.worst),
        html_page.heading("Versions"),
        html_page.facts(versions()),
    ]
    html_page.write_page("What training did to the answers", sections, path)


_REGIONS_TITLES = ("whole answer", "before", "at", "after the edit")
_REGIONS_UNITS = ("nats per answer", "nats per token", "nats per token", "nats per token")
_LEGEND = (
    "Log-prob under the trained model minus log-prob under the reference: a mean over answers with its standard error, "
    "or over tokens. The edit is the smallest stretch in which an answer differs from the other one."
)
_RANKING_LEGEND = (
    "Share of pairs in which a model gives the chosen answer the higher log-prob, as it is or divided by the number of "
    "tokens (Chen et al. 2024, arXiv:2405.19534). It says what the model would rather write; reward accuracy only says "
    "which answer gained more."
)
_TOKENS_LEGEND = (
    f"Blue tokens gained, orange ones lost, the stronger the more, up to {_FULL_COLOUR_NATS:g} nats; underlined ones "
    f"lost more than {_UNDERLINED_NATS:g} nat; the edit is framed. Tokens that only together are a character are one. "
    "Point at a token for its log-probs."
)


def _region_rows(evaluation: PairEvaluation) -> list[list[str]]:
    answers = (
        ("chosen", evaluation.chosen_logratio, evaluation.chosen_logratio_error, evaluation.shift),
        ("rejected", evaluation.rejected_logratio, evaluation.rejected_logratio_error, evaluation.rejected_shift),
    )
    return [
        [name, f"{signed(mean)}{_plus_minus(error)}", *_region_cells(shift)] for name, mean, error, shift in answers
    ]


def _region_cells(shift: TokenShift) -> list[str]:
    parts = [getattr(shift, region) for region in _REGIONS]
    return ["—" if not part.num_tokens else f"{signed(part.mean_change, 3)}" for part in parts]


def _movement(mean: float, error: float, answer: str) -> str:
    """ "lowered the chosen answers by 1.50 ± 0.10 nats" and its like."""
    if _is_noise(mean, error):
        return f"left the {answer} answers where they were ({signed(mean)}{_plus_minus(error)} nats per answer)"
    verb = "lowered" if mean < 0 else "raised"
    return f"{verb} the {answer} answers by {abs(mean):.2f}{_plus_minus(error)} nats"


def _advice(evaluation: PairEvaluation) -> str:
    if not _is_fall(evaluation.chosen_logratio, evaluation.chosen_logratio_error):
        return ""
    return (
        "The model is now less likely to write the very answers that it was to prefer: train with DPOP, a larger λ, or "
        "a smaller learning rate."
    )


def _is_fall(mean: float, error: float) -> bool:
    return mean < 0 and not _is_noise(mean, error)


def _is_noise(mean: float, error: float) -> bool:
    # of a single pair no error is known
    return abs(mean) < LOST_NATS or (not math.isnan(error) and abs(mean) <= 2 * error)


def _plus_minus(error: float) -> str:
    return "" if math.isnan(error) else f" ± {error:.2f}"


def _place(region: str) -> str:
    return {"before": "before the edit", "at": "at the edit", "after": "after the edit"}[region]


def _worst_sections(pairs: Sequence[PairChange]) -> list[str]:
    """The pairs that lost, as lost; where none did, those that gained least, as that."""
    lost = [pair for pair in pairs if pair.chosen.logratio < 0]
    shown = lost or pairs
    which = "lost most" if lost else "gained least: none lost"
    many = "The pair whose chosen answer" if len(shown) == 1 else f"The {len(shown)} pairs whose chosen answers"
    return [
        html_page.heading(f"{many} {which}"),
        html_page.paragraph(_TOKENS_LEGEND, "note"),
        *(section for pair in shown for section in _pair_sections(pair)),
    ]


def _pair_sections(pair: PairChange) -> list[str]:
    return [
        html_page.heading(f"Pair {pair.pair_id}: chosen {signed(pair.chosen.logratio)} nats", 3),
        f'<pre dir="auto" lang="">{html_page.visible(pair.prompt)}</pre>',
        html_page.paragraph(f"Chosen, {signed(pair.chosen.logratio)} nats"),
        f'<pre dir="auto" lang="">{_coloured(pair.chosen)}</pre>',
        html_page.paragraph(f"Rejected, {signed(pair.rejected.logratio)} nats"),
        f'<pre dir="auto" lang="">{_coloured(pair.rejected)}</pre>',
    ]


class _Stretch(NamedTuple):
    """Tokens that are shown as one, since only together they are characters."""

    text: str
    num_tokens: int
    before: float
    """Nats, of all its tokens."""
    after: float
    is_edit: bool


def _coloured(answer: AnswerTokens) -> str:
    return "".join(_span(stretch) for stretch in _stretches(answer))


def _stretches(answer: AnswerTokens) -> list[_Stretch]:
    """The answer's tokens, those put together that share a character: the bytes of 苹, the people of an emoji."""
    ends, position = set(), 0
    for grapheme in graphemes("".join(answer.texts)):
        position += len(grapheme)
        ends.add(position)
    stretches: list[_Stretch] = []
    position, begin = 0, 0
    for index, text in enumerate(answer.texts):
        position += len(text)
        is_last = index + 1 == len(answer.texts)
        if not is_last and (position not in ends or not text):
            continue
        own = slice(begin, index + 1)
        stretches.append(
            _Stretch(
                "".join(answer.texts[own]),
                index + 1 - begin,
                sum(answer.ref_logps[own]),
                sum(answer.policy_logps[own]),
                is_edit=begin < answer.edit.end and answer.edit.start <= index,
            )
        )
        begin = index + 1
    return stretches


def _span(stretch: _Stretch) -> str:
    change = stretch.after - stretch.before
    kinds = [kind for kind, holds in (("edit", stretch.is_edit), ("fell", change < -_UNDERLINED_NATS)) if holds]
    attributes = f' class="{" ".join(kinds)}"' if kinds else ""
    alpha = round(0.7 * min(1.0, abs(change) / _FULL_COLOUR_NATS), 2)
    if alpha:
        attributes += f' style="background: rgb({_LOST if change < 0 else _GAINED} / {alpha:g})"'
    tokens = f", {stretch.num_tokens} tokens" if stretch.num_tokens > 1 else ""
    title = escape(f"{signed(change)} nats: {stretch.before:.2f} → {stretch.after:.2f}{tokens}")
    return f'<span{attributes} title="{title}">{html_page.visible(stretch.text)}</span>'
