"""The demo's results for people: a table for the terminal, a verdict in words, and a self-contained HTML page.

Both read the run's summary:

    {"config": {...}, "versions": {...}, "device": str, "seconds": float,
     "data": {"num_train_problems", "num_pairs", "num_eval_pairs", "vocab_size", "mean_answer_tokens"},
     "example": {"prompt", "chosen", "rejected"},
     "methods": {"sft": {"exact_match"},
                 "dpo": {"chosen_logratio", "rejected_logratio",            nats per answer, mean over pairs
                         "before_edit_per_token", "at_edit_per_token", "after_edit_per_token",      nats per token
                         "reward_accuracy", "exact_match", "train_seconds"},
                 "dpop": {the same}}}

Every sentence follows the numbers, also when they are not the expected ones.
"""

import base64
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from dpop_trainer.edits import EditRegions, edit_regions


class _Column(NamedTuple):
    key: str
    title: str
    unit: str
    text: Callable[[float], str]


_METHOD_NAMES = {"sft": "SFT", "dpo": "DPO", "dpop": "DPOP"}
_COLUMNS = (
    _Column("chosen_logratio", "chosen Δ", "nats", "{:+.2f}".format),
    _Column("rejected_logratio", "rejected Δ", "nats", "{:+.2f}".format),
    _Column("after_edit_per_token", "after edit Δ", "nats/token", "{:+.3f}".format),
    _Column("reward_accuracy", "reward accuracy", "", "{:.1%}".format),
    _Column("exact_match", "exact match", "", "{:.1%}".format),
)
_LEGEND = (
    "Δ is the log-prob under the trained model minus the log-prob under the SFT model that it started from, on "
    "held-out pairs: mean per answer, or per token after the edit. Reward accuracy is the share of pairs whose chosen "
    "answer gained more than the rejected one. Exact match is the share of held-out problems that end in the right "
    "number."
)
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1f; --soft: #5d5d66; --line: #d5d5dc; --page: #ffffff; --box: #f5f5f8;
        --good: #cde7f7; --bad: #fbd9c4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e9e9ee; --soft: #a5a5b0; --line: #3d3d47; --page: #17171b; --box: #212128;
          --good: #10415e; --bad: #6b3010; } }
body { max-width: 54rem; margin: 2.5rem auto; padding: 0 1.25rem; color: var(--ink); background: var(--page);
       font: 1rem/1.55 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.verdict { padding: .8rem 1.1rem; border-left: 4px solid #0072b2; background: var(--box); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .9rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th small { display: block; font-weight: normal; color: var(--soft); }
.note, figcaption { color: var(--soft); font-size: .875rem; }
pre { padding: .8rem 1rem; background: var(--box); white-space: pre-wrap; overflow-wrap: anywhere;
      font: .875rem/1.5 ui-monospace, monospace; }
mark { color: inherit; padding: 0 .15em; border-radius: .2em; font-weight: bold; }
mark.chosen { background: var(--good); } mark.rejected { background: var(--bad); }
figure { margin: 1.2rem 0; }
img { box-sizing: border-box; max-width: 100%; height: auto; padding: .4rem; background: white; }
.facts { columns: 2; } .facts td, .facts th { padding: .15rem .9rem .15rem 0; font-size: .875rem; }
"""


def format_table(summary: Mapping[str, Any]) -> str:
    """The results for a terminal: one row per method, columns aligned, "—" where a value does not apply."""
    titles = ["", *(f"{column.title} ({column.unit})" if column.unit else column.title for column in _COLUMNS)]
    rows = [titles, *_rows(summary)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(titles))]

    def line(row: Sequence[str]) -> str:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "  ".join([row[0].ljust(widths[0]), *cells])

    rule = "  ".join("─" * width for width in widths)
    return "\n".join([line(titles), rule, *map(line, rows[1:])])


def format_verdict(summary: Mapping[str, Any]) -> str:
    """What the numbers say about DPO and DPOP, in a few sentences. Changes that round to 0.00 count as none."""
    sft, dpo, dpop = (summary["methods"][method] for method in ("sft", "dpo", "dpop"))
    moved = (
        f"DPO {_movement(dpo['chosen_logratio'])}; DPOP {_movement(dpop['chosen_logratio'])} "
        "(mean log-prob of the held-out chosen answers, relative to the SFT model)."
    )
    after = (
        f"Per token after the edit the change is {_nats(dpo['after_edit_per_token'], 3)} with DPO and "
        f"{_nats(dpop['after_edit_per_token'], 3)} with DPOP."
    )
    solved = (
        f"Exact match is {dpo['exact_match']:.1%} after DPO and {dpop['exact_match']:.1%} after DPOP; "
        f"the SFT model had {sft['exact_match']:.1%}."
    )
    return f"{moved} {after} {solved} {_conclusion(dpo['chosen_logratio'], dpop['chosen_logratio'])}"


def write_report(
    summary: Mapping[str, Any], figures: Sequence[tuple[str, str | os.PathLike[str]]], path: str | os.PathLike[str]
) -> None:
    """Writes the report as one HTML file that needs nothing else: figures embedded, no scripts, no network.

    Args:
        summary: the run, laid out as this module's docstring says.
        figures: titles and PNG files.
        path: the HTML file; missing folders are made.
    """
    data = summary["data"]
    introduction = (
        f"A tiny Llama learned {data['num_train_problems']:,} generated word problems (SFT). From there DPO and DPOP "
        f"each trained it on the same {data['num_pairs']:,} low-edit pairs, in which the rejected answer is the chosen "
        f"one with one intermediate result wrong. Measured on {data['num_eval_pairs']:,} held-out pairs; answers "
        f"average {data['mean_answer_tokens']:.0f} tokens out of a vocabulary of {data['vocab_size']:,}. The whole run "
        f"took {summary['seconds']:.0f} s (device: {summary['device']})."
    )
    sections = [
        "<h1>DPO and DPOP on low-edit pairs</h1>",
        f"<p>{escape(introduction)}</p>",
        f'<p class="verdict">{escape(format_verdict(summary))}</p>',
        "<h2>Results</h2>",
        _html_table(summary),
        f'<p class="note">{escape(_LEGEND)}</p>',
        *(_html_figure(title, figure) for title, figure in figures),
        "<h2>One pair</h2>",
        _html_example(summary["example"]),
        "<h2>Configuration</h2>",
        _html_facts(summary["config"]),
        "<h2>Versions</h2>",
        _html_facts(summary["versions"]),
    ]
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>DPO and DPOP on low-edit pairs</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _conclusion(dpo: float, dpop: float) -> str:
    """`dpo` and `dpop` are the chosen answers' mean log-ratios, in nats."""
    if math.isnan(dpo) or math.isnan(dpop):
        return "A run without a number allows no conclusion."
    dpo, dpop = round(dpo, 2), round(dpop, 2)
    if dpo >= 0:
        if dpop >= 0:
            return "DPO did not lower the chosen answers here, so there was no fall for the penalty to prevent."
        return "DPO did not lower the chosen answers here and DPOP did: not what the penalty is for."
    if dpop >= 0:
        return "DPO lowered the very answers that it was to prefer; DPOP's penalty prevented that."
    if dpop > dpo:
        return (
            "DPO lowered the very answers that it was to prefer; DPOP's penalty removed "
            f"{_share(1 - dpop / dpo)} of that fall."
        )
    return "Both lowered the chosen answers, DPOP by no less than DPO: the penalty did not help in this run."


def _movement(logratio: float) -> str:
    """ "lowered the chosen answers by 1.50 nats" and its like."""
    if math.isnan(logratio):
        return "has no number for the chosen answers"
    amount = f"{abs(logratio):.2f}"
    if float(amount) == 0:
        return "left the chosen answers unchanged"
    return f"{'lowered' if logratio < 0 else 'raised'} the chosen answers by {amount} nats"


def _share(part: float) -> str:
    """A share below 1 as percent, never rounded up to all of it."""
    return f"{math.floor(100 * part)} %"


def _nats(value: float, digits: int) -> str:
    return "not known" if math.isnan(value) else f"{value:+.{digits}f} nats"


def _rows(summary: Mapping[str, Any]) -> list[list[str]]:
    methods: Mapping[str, Mapping[str, float]] = summary["methods"]
    return [
        [_METHOD_NAMES.get(method, method), *(_cell(results.get(column.key), column) for column in _COLUMNS)]
        for method, results in methods.items()
    ]


def _cell(value: float | None, column: _Column) -> str:
    return "—" if value is None or math.isnan(value) else column.text(value)


def _html_table(summary: Mapping[str, Any]) -> str:
    titles = "".join(
        f"<th>{escape(column.title)}<small>{escape(column.unit) or '&nbsp;'}</small></th>" for column in _COLUMNS
    )
    rows = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in _rows(summary))
    return f'<div class="wide"><table>\n<tr><th>method</th>{titles}</tr>\n{rows}\n</table></div>'


def _html_figure(title: str, path: str | os.PathLike[str]) -> str:
    png = base64.b64encode(Path(path).read_bytes()).decode("ascii")
    return (
        f'<figure><img alt="{escape(title)}" src="data:image/png;base64,{png}">'
        f"<figcaption>{escape(title)}</figcaption></figure>"
    )


def _html_example(example: Mapping[str, str]) -> str:
    """Prompt and both answers, with the words that differ marked."""
    chosen, rejected = (re.findall(r"\s|\w+|[^\w\s]", example[answer].strip()) for answer in ("chosen", "rejected"))
    return (
        f"<p>Prompt</p><pre>{escape(example['prompt'])}</pre>"
        f"<p>Chosen</p><pre>{_mark(chosen, edit_regions(chosen, rejected), 'chosen')}</pre>"
        f"<p>Rejected</p><pre>{_mark(rejected, edit_regions(rejected, chosen), 'rejected')}</pre>"
    )


def _mark(words: Sequence[str], region: EditRegions, kind: str) -> str:
    before, edit, after = words[: region.start], words[region.start : region.end], words[region.end :]
    return (
        f'{escape("".join(before))}<mark class="{escape(kind)}">{escape("".join(edit))}</mark>{escape("".join(after))}'
    )


def _html_facts(facts: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><th>{escape(str(key))}</th><td>{escape(str(value))}</td></tr>" for key, value in facts.items())
    return f'<div class="facts"><table>{rows}</table></div>'
