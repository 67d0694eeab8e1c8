"""An inspection in words, as a table for the terminal, and as an HTML page with the tokens that changed.

Every sentence follows the numbers, also when they are not the expected ones.
"""

import math
import os
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, NamedTuple

from dpop_trainer.data import TokeniseCounts
from dpop_trainer.data.edits import EditRegions
from dpop_trainer.measure.pairs_under_model import LOST_NATS, PairEvaluation
from dpop_trainer.measure.shares import share_interval, with_interval
from dpop_trainer.measure.token_shift import TokenShift
from dpop_trainer.report import html_page
from dpop_trainer.report.graphemes import graphemes
from dpop_trainer.report.signed import minus, signed
from dpop_trainer.report.svg import Panel
from dpop_trainer.report.terminal import PLAIN, Terminal
from dpop_trainer.run_folder.versions import versions

_REGIONS = ("before", "at", "after")
_FULL_SHARE = 0.98
"""Of the shown tokens, those that changed less than what is coloured in full."""
_LEAST_FULL = 0.05
_UNDERLINED = 1 / 3
"""Of what is coloured in full; a token that lost more is underlined."""


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
    distance: float = 0.0
    """Edit distance of the two answers in tokens, by the longer one's length: 0 the same, 1 nothing in common."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        answers = {
            side: {**answer._asdict(), "edit": list(answer.edit), "logratio": answer.logratio}
            for side, answer in (("chosen", self.chosen), ("rejected", self.rejected))
        }
        return {"pair_id": self.pair_id, "prompt": self.prompt, "distance": self.distance, **answers}


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


def format_inspection(inspection: Inspection, terminal: Terminal = PLAIN) -> str:
    """For the terminal: the regions' table, then the verdict."""
    table = terminal.table([["", *_REGIONS_TITLES], *_region_rows(inspection.evaluation)])
    told, moved = verdict(inspection.evaluation, inspection.counts.num_pairs), movement(inspection.evaluation)
    return f"{table}\n\n{terminal.filled(f'Chosen answers: {moved}. {told}')}"


def headline(evaluation: PairEvaluation) -> str:
    """The judgement in a sentence."""
    mean, error = evaluation.chosen_logratio, evaluation.chosen_logratio_error
    amount = f"by {abs(mean):.2f}{_plus_minus(error)} nats each"
    return {
        "fell": f"Training lowered the chosen answers {amount}",
        "rose": f"Training raised the chosen answers {amount}",
        "unchanged": f"Training left the chosen answers where they were ({signed(mean)}{_plus_minus(error)} nats each)",
    }[movement(evaluation)]


def write_inspection(
    inspection: Inspection, panels: Sequence[tuple[str, Sequence[Panel]]], path: str | os.PathLike[str]
) -> None:
    """Write the page.

    Args:
        inspection: what is shown.
        panels: charts by the heading that they stand under.
        path: the HTML file; missing folders are made.
    """
    evaluation, counts = inspection.evaluation, inspection.counts
    told = movement(evaluation)
    ranks = [
        [name, *(f"{value:.1%}" for value in values)]
        for name, values in (("policy", evaluation.ranking), ("reference", evaluation.ref_ranking))
    ]
    sections = [
        html_page.verdict([verdict(evaluation, counts.num_pairs)], "bad" if told == "fell" else ""),
        *_worst_sections(inspection.worst),
        html_page.heading("Change against the reference"),
        html_page.table(
            [("", ""), *((title, unit) for title, unit in zip(_REGIONS_TITLES, _REGIONS_UNITS, strict=True))],
            _region_rows(evaluation),
        ),
        html_page.paragraph(_LEGEND, "note"),
    ]
    for title, of_title in panels:
        sections += [html_page.heading(title), html_page.charts(of_title, large=True)]
    sections += [
        html_page.heading("Which answer is the likelier one"),
        html_page.table([("model", ""), ("ranking accuracy", ""), ("per token", "")], ranks),
        html_page.paragraph(_RANKING_LEGEND, "note"),
        html_page.heading("How it was made"),
        html_page.paragraph(
            f"{inspection.name} against {inspection.reference}, on {counts.num_pairs:,} pairs of {inspection.pairs}. "
            f"{counts.summary()}"
        ),
        html_page.folded("Versions", html_page.facts(versions())),
    ]
    kind = {"fell": "bad", "rose": "good"}.get(told, "")
    about = f"dpop inspect · {inspection.name} against {inspection.reference} · {counts.num_pairs:,} pairs"
    html_page.write_page(headline(evaluation), sections, path, about=about, kind=kind)


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
    full = _full_colour(answer for pair in shown for answer in (pair.chosen, pair.rejected))
    return [
        html_page.heading(f"{many} {which}"),
        _scale(full),
        html_page.paragraph(
            f"Tokens that gained are blue, those that lost are orange, in full from {full:g} nats on, where all but "
            f"{1 - _FULL_SHARE:.0%} of the tokens below changed less; those that lost more than a third of it are "
            "underlined. The edit is framed where the two answers differ in no more than half. Tokens that only "
            "together are a character are one. Point at a token for its log-probs.",
            "note",
        ),
        *(_pair(pair, full) for pair in shown),
    ]


def _pair(pair: PairChange, full: float) -> str:
    is_marked = pair.distance <= html_page.MARKED_UP_TO
    header = [f"Pair {pair.pair_id}: chosen {signed(pair.chosen.logratio)} nats"]
    if not is_marked:
        header.append(f"the answers differ in {pair.distance:.0%}: the edit is not framed")
    sides = [
        (f"{side} {signed(answer.logratio)} nats", f'<span class="tokens">{_coloured(answer, full, is_marked)}</span>')
        for side, answer in (("chosen", pair.chosen), ("rejected", pair.rejected))
    ]
    return html_page.pair(header, html_page.visible(pair.prompt), *sides)


def _full_colour(answers: Iterable[AnswerTokens]) -> float:
    """Nats of a change that is coloured in full: a round number that all but a few of the shown tokens stay below."""
    changes = sorted(abs(stretch.change) for answer in answers for stretch in _stretches(answer))
    most = changes[min(len(changes) - 1, int(_FULL_SHARE * len(changes)))] if changes else 0.0
    most = max(most, _LEAST_FULL)
    power = 10.0 ** math.floor(math.log10(most))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= most * 0.999)


def _scale(full: float) -> str:
    return f'<p class="note scale"><span>−{full:g} nats</span><i></i><span>+{full:g} nats</span></p>'


class _Stretch(NamedTuple):
    """Tokens that are shown as one, since only together they are characters."""

    text: str
    num_tokens: int
    before: float
    """Nats, of all its tokens."""
    after: float
    is_edit: bool

    @property
    def change(self) -> float:
        return self.after - self.before


def _coloured(answer: AnswerTokens, full: float, is_marked: bool) -> str:
    return "".join(_span(stretch, full, is_marked) for stretch in _stretches(answer))


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


def _span(stretch: _Stretch, full: float, is_marked: bool) -> str:
    much = round(min(1.0, abs(stretch.change) / full), 2)
    is_lost = stretch.change < 0
    kinds = {
        "edit": stretch.is_edit and is_marked,
        "gained": much > 0 and not is_lost,
        "lost": much > 0 and is_lost,
        "far": is_lost and -stretch.change > _UNDERLINED * full,
    }
    names = " ".join(name for name, holds in kinds.items() if holds)
    attributes = (f' class="{names}"' if names else "") + (f' style="--much: {much:g}"' if much else "")
    tokens = f", {stretch.num_tokens} tokens" if stretch.num_tokens > 1 else ""
    before_and_after = minus(f"{stretch.before:.2f} → {stretch.after:.2f}")
    title = escape(f"{signed(stretch.change)} nats: {before_and_after}{tokens}")
    return f'<span{attributes} title="{title}">{html_page.visible(stretch.text)}</span>'
