"""The examination as one HTML file that needs nothing else: no script, no network, every text escaped."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpop_trainer.report.html_page import write_page
from dpop_trainer.tools.doctor.charts import Axis, histogram, scatter
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

_STYLE = """
:root { --width: 72rem; }
* { box-sizing: border-box; }
.soft, .note { color: var(--soft); } .note { font-size: .875rem; max-width: 54rem; }
.verdict.serious { border-color: var(--serious); }
.tiles { display: grid; gap: .75rem; margin: 1.2rem 0;
         grid-template-columns: repeat(auto-fit, minmax(min(13rem, 45%), 1fr)); }
.tile { background: var(--box); padding: .6rem .9rem; border-radius: .4rem; }
.tile b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; line-height: 1.3; }
.tile span { color: var(--soft); font-size: .8rem; }
table { width: 100%; }
th, td { padding: .45rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { font-weight: 600; font-size: .875rem; color: var(--soft); }
td.n, th.n { text-align: right; white-space: nowrap; }
.level { font-weight: 600; white-space: nowrap; }
.level.serious { color: var(--serious); } .level.warning { color: var(--warning); } .level.note { color: var(--note); }
@media (max-width: 44rem) {
  .stack tr, .stack td { display: block; } .stack tr:first-child { display: none; }
  .stack tr { padding: .5rem 0; border-bottom: 1px solid var(--line); } .stack td { border: 0; padding: .1rem 0; }
  .stack td.n { text-align: left; white-space: normal; color: var(--soft); } .stack td.n::before { content: "rows "; } }
code { font: .875em ui-monospace, monospace; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); gap: 1rem; }
figure { margin: 0; background: var(--box); border-radius: .4rem; padding: .5rem .6rem .2rem; }
svg { width: 100%; height: auto; display: block; }
.bar { fill: var(--blue); } .dot { fill: var(--blue); fill-opacity: .55; }
.median { stroke: var(--ink); stroke-dasharray: 4 3; stroke-width: 1.2; }
.axis { stroke: var(--soft); } .grid { stroke: var(--line); stroke-width: .7; }
.tick { font-size: 10px; fill: var(--soft); text-anchor: middle; } .tick.end { text-anchor: end; }
.label { font-size: 11.5px; fill: var(--ink); text-anchor: middle; } .label.end { text-anchor: end; }
.pair { border: 1px solid var(--line); border-radius: .4rem; margin: .8rem 0; overflow: hidden; }
.pair header { padding: .4rem .8rem; background: var(--box); font-size: .85rem; color: var(--soft); }
.pair header b { color: var(--ink); }
.answers { display: grid; grid-template-columns: 1fr 1fr; }
.answers > div + div { border-left: 1px solid var(--line); }
@media (max-width: 44rem) { .answers { grid-template-columns: 1fr; }
  .answers > div + div { border-left: 0; border-top: 1px solid var(--line); } }
.side { padding: .5rem .8rem; min-width: 0; }
.side > span { font-size: .75rem; color: var(--soft); text-transform: uppercase; letter-spacing: .04em; }
pre { margin: .15rem 0 .2rem; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext;
      font: .84rem/1.5 ui-monospace, monospace; }
.prompt { border-bottom: 1px solid var(--line); } .prompt pre { color: var(--soft); }
mark { color: inherit; border-radius: .2em; font-weight: 600; padding: 0 .05em; }
.hidden { border: 1px solid var(--serious); color: var(--serious); border-radius: .2em; font-size: .75em;
          padding: 0 .2em; }
"""


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
    name = Path(examination.pair_file.source).name
    sections = [
        f'<p class="soft">{_text(_subtitle(examination))}</p>',
        _verdict(examination),
        _tiles(examination),
        "<h2>Findings</h2>",
        _findings(examination),
        "<h2>Recommended</h2>",
        _recommendations(examination),
        "<h2>Distributions</h2>",
        _charts(examination),
        _model_section(examination),
        "<h2>All figures</h2>",
        _statistics(examination),
        "<h2>Pairs to look at</h2>",
        '<p class="note">Marked: what the shortest edit between the two answers changes. Long stretches are '
        "shortened. Characters that do not show stand in a frame.</p>",
        *_examples(examination, tokenizer),
    ]
    write_page(name, [section for section in sections if section], path, style=_STYLE)


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
            f"{examination.num_pairs:,} pairs",
            f"form: {examination.pair_file.form}",
            *(f"{k}: {v}" for k, v in known.items()),
        ]
    )


def _verdict(examination: Examination) -> str:
    told = verdict(examination)
    reasons = "".join(f"<li>{_text(reason)}.</li>" for reason in told.reasons)
    options = f"<p><code>dpop train {_text(told.options)}</code></p>" if told.is_yes else ""
    lines = [*left_out(examination.pair_file)]
    return (
        f'<div class="verdict{"" if told.is_yes else " serious"}"><b>{_text(told.sentence)}</b>{options}'
        f"<ol>{reasons}</ol></div>" + (f"<pre>{_text(chr(10).join(lines))}</pre>" if lines else "")
    )


def _tiles(examination: Examination) -> str:
    measures, statistics = examination.measures, examination.statistics()
    unit = "token" if "token_distance" in statistics else "character"
    distance = statistics[f"{'token' if unit == 'token' else 'char'}_distance"]
    tiles = [(f"{examination.num_pairs:,}", "pairs"), (f"{len(examination.drop):,}", "to drop")]
    tiles.append((f"{distance['median']:.2f}", f"median {unit} edit distance"))
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
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{_text(value)}</b><span>{_text(what)}</span></div>' for value, what in tiles)
        + "</div>"
    )


def _findings(examination: Examination) -> str:
    if not examination.findings:
        return "<p>None.</p>"
    numbers = examination.pair_file.numbers
    rows = "".join(
        f'<tr><td class="level {finding.level}">{finding.level}</td><td>{_text(finding.message)}.</td>'
        f"<td>{_text(finding.remedy)}</td><td class=n>{_text(_first_rows(numbers[finding.rows[:4]]))}</td></tr>"
        for finding in examination.findings
    )
    thresholds = ", ".join(
        f"{name.replace('_', ' ')} {f'{share:.1%}' if share else 'any'}" for name, share in SERIOUS_SHARE.items()
    )
    return (
        '<div class="wide stack"><table>'
        "<tr><th>level</th><th>finding</th><th>what to do</th><th class=n>rows</th></tr>"
        f'{rows}</table></div><p class="note">Serious from a share of: {_text(thresholds)}. Rows count from 0.</p>'
    )


def _first_rows(rows: NDArray[np.int64]) -> str:
    shown = ", ".join(map(str, rows[:3]))
    return f"{shown}, …" if len(rows) > 3 else shown


def _recommendations(examination: Examination) -> str:
    rows = "".join(
        f"<tr><td><code>{_text(item.setting)}</code></td><td><b>{_text(item.value)}</b></td><td>{_text(item.why)}</td></tr>"
        for item in examination.recommendations
    )
    return f'<div class="wide stack"><table><tr><th>setting</th><th>value</th><th>why</th></tr>{rows}</table></div>'


def _charts(examination: Examination) -> str:
    measures = examination.measures
    unit = "tokens" if (measures.chosen_tokens >= 0).any() else "characters"
    known = measures.chosen_length > 0
    length = measures.chosen_length[known]
    charts = [
        histogram(measures.token_distance, _distance_axis("token", measures.token_distance)),
        histogram(measures.char_distance, _distance_axis("character", measures.char_distance)),
        histogram(measures.prefix[known], Axis(f"first difference, {unit} from the answer's beginning", 0)),
        histogram(measures.prefix[known] / length, Axis("share of the chosen answer before the edit", 0, 1)),
        histogram(measures.suffix[known] / length, Axis("share of the chosen answer after the edit", 0, 1)),
        histogram(np.log2(measures.ratio), Axis("log₂ (chosen / rejected length)")),
        histogram(measures.length[measures.length > 0], Axis("prompt + longer answer, tokens", 0)),
    ]
    weights = examination.pair_file.weights()
    if (weights != 1).any():
        charts.append(histogram(weights, Axis("weight of a pair in the loss", 0)))
    return _figures(charts)


def _distance_axis(unit: str, distance: NDArray[Any]) -> Axis:
    """From 0 to 1, but closer where everything is small: low-edit pairs would stand in a single bar."""
    label = f"{unit} edit distance, normalised"
    known = distance[np.isfinite(distance)]
    return Axis(label, 0, 1) if len(known) and np.quantile(known, 0.99) > 0.25 else Axis(label, 0)


def _figures(charts: Sequence[str]) -> str:
    return '<div class="charts">' + "".join(f"<figure>{chart}</figure>" for chart in charts if chart) + "</div>"


def _model_section(examination: Examination) -> str:
    scores, summary = examination.model_scores, model_summary(examination)
    if scores is None or summary is None:
        return ""
    distance = examination.measures.token_distance[scores.rows]
    correlation = summary["rank_correlation_ches_edit_distance"]
    sentence = (
        f"On {summary['num_pairs']:,} pairs the model gives the chosen answer more log-prob in "
        f"{summary['prefers_chosen']:.1%}, more per token in {summary['prefers_chosen_per_token']:.1%}. CHES and edit "
        f"distance rank these pairs with a correlation of {correlation:+.2f}. {EDIT_DISTANCE_IS_NOT_ALL} The pairs "
        "with the highest CHES are the first to look at, and to leave out if the chosen answers fall."
    )
    charts = [
        histogram(scores.margins, Axis("reference margin, nats")),
        histogram(scores.ches_normalised, Axis("CHES, length-normalised", None, float(scores.ches_normalised.max()))),
        scatter(distance, scores.ches_normalised, _distance_axis("token", distance), "CHES, length-normalised"),
    ]
    return f"<h2>What the model says</h2><p>{_text(sentence)}</p>{_figures(charts)}"


def _statistics(examination: Examination) -> str:
    keys = ("mean", "p5", "median", "p95", "min", "max")
    rows = "".join(
        f"<tr><td>{_text(name.replace('_', ' '))}</td>"
        + "".join(f"<td class=n>{number(values[key])}</td>" for key in keys)
        + "</tr>"
        for name, values in examination.statistics().items()
    )
    head = "".join(f"<th class=n>{key}</th>" for key in keys)
    return f'<div class="wide"><table><tr><th></th>{head}</tr>{rows}</table></div>'


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
        f"<h3>{_text(title[:1].upper() + title[1:])}</h3>"
        + "".join(_pair(examination, example, tokenizer) for example in examples)
        for title, examples in groups
        if examples
    ]


def _pair(examination: Examination, example: _Example, tokenizer: "PreTrainedTokenizerBase | None") -> str:
    texts = pair_texts(examination.pair_file.pair(example.row))
    chosen, rejected = _marked(examination, example.row, texts.chosen, texts.rejected, tokenizer)
    measures = examination.measures
    facts = [
        f"row {examination.pair_file.numbers[example.row]:,}",
        example.why,
        f"edit distance {measures.distance[example.row]:.3f}",
    ]
    if measures.chosen_tokens[example.row] >= 0:
        lengths = (measures.prompt_tokens, measures.chosen_tokens, measures.rejected_tokens)
        facts.append("prompt {}, chosen {}, rejected {} tokens".format(*(f"{c[example.row]:,}" for c in lengths)))
    shown = texts.prompt if len(texts.prompt) <= _PROMPT_SHOWN else _clipped(texts.prompt)
    header = " · ".join(f"<b>{_text(fact)}</b>" if not i else _text(fact) for i, fact in enumerate(facts) if fact)
    return (
        f'<div class="pair"><header>{header}</header>'
        f'<div class="side prompt"><span>prompt</span><pre dir="auto" lang="">{_text(shown)}</pre></div>'
        '<div class="answers">'
        f'<div class="side"><span>chosen</span><pre dir="auto" lang="">{_pieces(chosen, "chosen")}</pre></div>'
        f'<div class="side"><span>rejected</span><pre dir="auto" lang="">{_pieces(rejected, "rejected")}</pre></div>'
        "</div></div>"
    )


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
    parts = []
    for piece in shortened(pieces, _CONTEXT):
        text = _text(piece.text)
        parts.append(f'<mark class="{side}">{text}</mark>' if piece.differs else text)
    return "".join(parts)


def _clipped(text: str) -> str:
    half = _PROMPT_SHOWN // 2
    return f"{text[:half]} ⋯ {len(text) - 2 * half:,} characters ⋯ {text[-half:]}"
