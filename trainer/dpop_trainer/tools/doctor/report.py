"""The examination as one HTML file that needs nothing else: no script, no network, every text escaped."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpop_trainer.report import html_page
from dpop_trainer.report.charts import histogram, scatter
from dpop_trainer.report.scale import Axis
from dpop_trainer.report.signed import signed
from dpop_trainer.report.svg import Panel
from dpop_trainer.tools.doctor.examine import Examination
from dpop_trainer.tools.doctor.findings import SERIOUS_SHARE
from dpop_trainer.tools.doctor.marks import Piece, mark_tokens, mark_words, shortened
from dpop_trainer.tools.doctor.measure import HIDDEN, without_eos
from dpop_trainer.tools.doctor.summary import EDIT_DISTANCE_IS_NOT_ALL, left_out, model_summary, number
from dpop_trainer.tools.doctor.texts import pair_texts
from dpop_trainer.tools.doctor.verdict import verdict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_EXAMPLES = 4
_PER_FINDING = 2
_CONTEXT = 240
_PROMPT_SHOWN = 600
_MARKED_TOKENS = 4000


class _Example(NamedTuple):
    row: int
    why: str


def write_report(examination: Examination, path: Path, tokenizer: "PreTrainedTokenizerBase | None" = None) -> None:
    """
    Args:
        examination: what was seen.
        path: the HTML file.
        tokenizer: the one that the pairs were examined with; marks then fall on tokens, else on words.
    """
    told = verdict(examination)
    sections = [
        _verdict(examination),
        _tiles(examination),
        html_page.heading("Findings"),
        _findings(examination),
        html_page.heading("Recommended"),
        _recommendations(examination),
        html_page.heading("Distributions"),
        html_page.paragraph("Dashed: the median.", "note"),
        _charts(examination),
        _model_section(examination),
        html_page.heading("Pairs to look at"),
        html_page.paragraph(
            "Marked: what the shortest edit between the two answers changes, where that is no more than half of them. "
            "Long stretches are shortened. Characters that do not show stand in a frame.",
            "note",
        ),
        *_examples(examination, tokenizer),
        html_page.heading("All figures"),
        _statistics(examination),
    ]
    html_page.write_page(
        told.sentence,
        [section for section in sections if section],
        path,
        about=_subtitle(examination),
        kind="good" if told.is_yes else "serious",
    )


def _text(text: str) -> str:
    """Text as HTML: escaped, and what does not show made visible."""
    parts = []
    for character in text.replace("\r\n", "\n"):
        if HIDDEN.match(character) or character in "\r\u200b\u2028\u2029" or "\ud800" <= character <= "\udfff":
            parts.append(f'<span class="hidden">U+{ord(character):04X}</span>')
        else:
            parts.append(escape(character))
    return "".join(parts)


def _subtitle(examination: Examination) -> str:
    known = {key: value for key, value in examination.settings.items() if value not in (None, 0)}
    return " · ".join(
        [
            Path(examination.pair_file.source).name,
            f"{examination.num_pairs:,} pairs",
            f"form: {examination.pair_file.form}",
            *(f"{k}: {v}" for k, v in known.items()),
        ]
    )


def _verdict(examination: Examination) -> str:
    told = verdict(examination)
    command = f"dpop train {told.options}" if told.is_yes else ""
    reasons = html_page.verdict(
        [f"{reason}." for reason in told.reasons], "" if told.is_yes else "serious", command=command, numbered=True
    )
    lines = left_out(examination.pair_file)
    return reasons + (f"<pre>{_text(chr(10).join(lines))}</pre>" if lines else "")


def _tiles(examination: Examination) -> str:
    measures, statistics = examination.measures, examination.statistics()
    unit = "token" if "token_distance" in statistics else "character"
    distance = statistics[f"{'token' if unit == 'token' else 'char'}_distance"]
    tiles = [(f"{examination.num_pairs:,}", "pairs"), (f"{len(examination.drop):,}", "to drop")]
    tiles.append((f"{distance['median']:.2g}", f"median {unit} edit distance"))
    tiles.append(
        (f"{statistics['common_prefix_share']['median']:.0%}", "of the chosen answer before the edit (median)")
    )
    tiles.append((f"{statistics['common_suffix_share']['median']:.0%}", "after the edit (median)"))
    if "length_ratio" in statistics:
        tiles.append((f"{statistics['length_ratio']['median']:.2f}", "chosen / rejected length (median)"))
    if (measures.length > 0).any():
        tiles.append((f"{measures.length.max():,}", "tokens in the longest pair"))
    if "ches_normalised" in statistics:
        tiles.append((number(statistics["ches_normalised"]["median"]), "CHES, length-normalised (median)"))
    return html_page.tiles(tiles)


def _findings(examination: Examination) -> str:
    if not examination.findings:
        return "<p>None.</p>"
    numbers = examination.pair_file.numbers
    rows = [
        [finding.level, f"{finding.message}.", finding.remedy, _first_rows(numbers[finding.rows[:4]])]
        for finding in examination.findings
    ]
    thresholds = ", ".join(
        f"{name.replace('_', ' ')} {f'{share:.1%}' if share else 'any'}" for name, share in SERIOUS_SHARE.items()
    )
    titles = [(title, "") for title in ("level", "finding", "what to do", "rows")]
    kinds = [finding.level for finding in examination.findings]
    return html_page.table(titles, rows, words=True, kinds=kinds) + html_page.folded(
        "What is serious", html_page.paragraph(f"Serious from a share of: {thresholds}. Rows count from 0.", "note")
    )


def _first_rows(rows: NDArray[np.int64]) -> str:
    shown = ", ".join(map(str, rows[:3]))
    return f"{shown}, …" if len(rows) > 3 else shown


def _recommendations(examination: Examination) -> str:
    rows = [[item.setting, item.value, item.why] for item in examination.recommendations]
    return html_page.table([(title, "") for title in ("setting", "value", "why")], rows, words=True)


def _charts(examination: Examination) -> str:
    measures = examination.measures
    unit = "tokens" if (measures.chosen_tokens >= 0).any() else "characters"
    known = measures.chosen_length > 0
    length = measures.chosen_length[known]
    tokens, characters = measures.token_distance, measures.char_distance
    from_beginning = f"First difference, {unit} from the beginning"
    charts = [
        histogram("Token edit distance, normalised", tokens, _distance_axis(tokens)),
        histogram("Character edit distance, normalised", characters, _distance_axis(characters)),
        histogram(from_beginning, measures.prefix[known], Axis(low=0)),
        histogram("Share of the chosen answer before the edit", measures.prefix[known] / length, Axis(low=0, high=1)),
        histogram("Share of the chosen answer after the edit", measures.suffix[known] / length, Axis(low=0, high=1)),
        histogram("Length, log₂ (chosen / rejected)", np.log2(measures.ratio), Axis()),
        histogram("Prompt and longer answer, tokens", measures.length[measures.length > 0], Axis(low=0)),
    ]
    weights = examination.pair_file.weights()
    if (weights != 1).any():
        charts.append(histogram("Weight of a pair in the loss", weights, Axis(low=0)))
    return _figures(charts)


def _distance_axis(distance: NDArray[Any]) -> Axis:
    """From 0 to 1, but closer where everything is small: low-edit pairs would stand in a single bar."""
    known = distance[np.isfinite(distance)]
    return Axis(low=0, high=1) if len(known) and np.quantile(known, 0.99) > 0.25 else Axis(low=0)


def _figures(charts: Sequence[str]) -> str:
    return html_page.charts(Panel("", chart) for chart in charts if chart)


def _model_section(examination: Examination) -> str:
    scores, summary = examination.model_scores, model_summary(examination)
    if scores is None or summary is None:
        return ""
    distance = examination.measures.token_distance[scores.rows]
    correlation = summary["rank_correlation_ches_edit_distance"]
    sentence = (
        f"On {summary['num_pairs']:,} pairs the model gives the chosen answer more log-prob in "
        f"{summary['prefers_chosen']:.1%}, more per token in {summary['prefers_chosen_per_token']:.1%}. CHES and edit "
        f"distance rank these pairs with a correlation of {signed(correlation)}. {EDIT_DISTANCE_IS_NOT_ALL} The pairs "
        "with the highest CHES are the first to look at, and to leave out if the chosen answers fall."
    )
    ches = scores.ches_normalised
    axis = _distance_axis(distance)._replace(label="token edit distance, normalised")
    charts = [
        histogram("Reference margin, nats", scores.margins, Axis()),
        histogram("CHES, length-normalised", ches, Axis(high=float(ches.max()))),
        scatter("CHES against edit distance", distance, ches, axis, Axis("CHES, length-normalised")),
    ]
    return html_page.heading("What the model says") + html_page.paragraph(sentence) + _figures(charts)


def _statistics(examination: Examination) -> str:
    keys = ("mean", "p5", "median", "p95", "min", "max")
    rows = [
        [name.replace("_", " "), *(number(values[key]) for key in keys)]
        for name, values in examination.statistics().items()
    ]
    return html_page.table([("", ""), *((key, "") for key in keys)], rows)


def _examples(examination: Examination, tokenizer: "PreTrainedTokenizerBase | None") -> list[str]:
    measures = examination.measures
    groups: list[tuple[str, list[_Example]]] = []
    for finding in examination.findings:
        if finding.name not in ("low_edit", "length_cue") and len(finding.rows):
            shown = [_Example(int(row), "") for row in finding.rows[:_PER_FINDING]]
            groups.append((f"{finding.level}: {finding.name.replace('_', ' ')}", shown))
    scores = examination.model_scores
    if scores is not None:
        order = np.argsort(-scores.ches_normalised, kind="stable")[:_EXAMPLES]
        shown = [_Example(int(scores.rows[i]), f"CHES {number(float(scores.ches_normalised[i]))}") for i in order]
        groups.append(("Highest CHES", shown))
    distance = np.where(measures.identical, np.nan, measures.distance)
    order = np.argsort(distance, kind="stable")[:_EXAMPLES]
    groups.append(("Smallest edits", [_Example(int(i), "") for i in order if np.isfinite(distance[i])]))
    order = np.argsort(-np.abs(np.log2(np.where(measures.ratio > 0, measures.ratio, 1))), kind="stable")[:_PER_FINDING]
    groups.append(("Most unequal lengths", [_Example(int(i), "") for i in order]))
    return [
        html_page.heading(title[:1].upper() + title[1:], 3)
        + "".join(_pair(examination, example, tokenizer) for example in examples)
        for title, examples in groups
        if examples
    ]


def _pair(examination: Examination, example: _Example, tokenizer: "PreTrainedTokenizerBase | None") -> str:
    texts = pair_texts(examination.pair_file.pair(example.row))
    marked = _marked(examination, example.row, texts.chosen, texts.rejected, tokenizer)
    answers = dict(zip(("chosen", "rejected"), marked, strict=True))
    measures = examination.measures
    header = [
        f"row {examination.pair_file.numbers[example.row]:,}",
        example.why,
        f"edit distance {measures.distance[example.row]:.3f}",
    ]
    if measures.chosen_tokens[example.row] >= 0:
        lengths = (measures.prompt_tokens, measures.chosen_tokens, measures.rejected_tokens)
        header.append("prompt {}, chosen {}, rejected {} tokens".format(*(f"{c[example.row]:,}" for c in lengths)))
    shown = texts.prompt if len(texts.prompt) <= _PROMPT_SHOWN else _clipped(texts.prompt)
    is_marked = measures.distance[example.row] <= html_page.MARKED_UP_TO
    sides = [(side, _pieces(of_side, side if is_marked else "")) for side, of_side in answers.items()]
    return html_page.pair([fact for fact in header if fact], _text(shown), *sides)


def _marked(
    examination: Examination, row: int, chosen: str, rejected: str, tokenizer: "PreTrainedTokenizerBase | None"
) -> tuple[list[Piece], list[Piece]]:
    measures = examination.measures
    longest = max(measures.chosen_tokens[row], measures.rejected_tokens[row])
    if tokenizer is None or not 0 <= longest <= _MARKED_TOKENS:
        return mark_words(chosen[: 8 * _MARKED_TOKENS], rejected[: 8 * _MARKED_TOKENS])
    prompt_ids, chosen_ids, rejected_ids = examination.token_ids(row)
    eos: Any = tokenizer.eos_token_id
    return mark_tokens(without_eos(chosen_ids, eos), without_eos(rejected_ids, eos), tokenizer, before=prompt_ids)


def _pieces(pieces: Sequence[Piece], side: str) -> str:
    """The answer, what differs marked as its side's; unmarked where none is given."""
    parts = []
    for piece in shortened(pieces, _CONTEXT):
        text = _text(piece.text)
        parts.append(f'<mark class="{side}">{text}</mark>' if piece.differs and side else text)
    return "".join(parts)


def _clipped(text: str) -> str:
    half = _PROMPT_SHOWN // 2
    return f"{text[:half]} ⋯ {len(text) - 2 * half:,} characters ⋯ {text[-half:]}"
