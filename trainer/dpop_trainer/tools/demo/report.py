"""The demo's results for people: a table for the terminal, a verdict in words, and a self-contained HTML page.

Both read the run's summary:

    {"config": {...}, "versions": {...}, "device": str, "seconds": float,
     "data": {"num_train_problems", "num_pairs", "num_eval_pairs", "vocab_size", "mean_answer_tokens"},
     "example": {"prompt", "chosen", "rejected"},
    "answers": {"number", "num_problems", "question", "right", "texts": {"sft", "dpo", "dpop"},
                "is_right": {the same}},                        one held-out problem, as each model answers it
    "histories": by a method's name what `report.plots.logratio_panels` takes,
     "methods": {"sft": {"exact_match"},
                 "dpo": {"chosen_logratio", "rejected_logratio",            nats per answer, mean over pairs
                         "before_edit_per_token", "at_edit_per_token", "after_edit_per_token",      nats per token
                         "reward_accuracy", "exact_match", "train_seconds"},
                 "dpop": {the same}}}

Every sentence follows the numbers, also when they are not the expected ones.
"""

import functools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from dpop_trainer.data.edits import EditRegions, edit_regions
from dpop_trainer.report import html_page
from dpop_trainer.report.html_page import visible
from dpop_trainer.report.signed import signed
from dpop_trainer.report.svg import Panel
from dpop_trainer.report.terminal import PLAIN


class _Column(NamedTuple):
    key: str
    title: str
    unit: str
    text: Callable[[float], str]


_METHOD_NAMES = {"sft": "SFT", "dpo": "DPO", "dpop": "DPOP"}
_COLUMNS = (
    _Column("chosen_logratio", "chosen Δ", "nats", signed),
    _Column("rejected_logratio", "rejected Δ", "nats", signed),
    _Column("after_edit_per_token", "after edit Δ", "nats/token", functools.partial(signed, digits=3)),
    _Column("reward_accuracy", "reward accuracy", "", "{:.1%}".format),
    _Column("exact_match", "exact match", "", "{:.1%}".format),
)
_LEGEND = (
    "Δ is the log-prob under the trained model minus the log-prob under the SFT model that it started from, on "
    "held-out pairs: mean per answer, or per token after the edit. Reward accuracy is the share of pairs whose chosen "
    "answer gained more than the rejected one. Exact match is the share of held-out problems that end in the right "
    "number."
)


def format_table(summary: Mapping[str, Any]) -> str:
    """The results for a terminal: one row per method, columns aligned, "—" where a value does not apply."""
    titles = ["", *(f"{column.title} ({column.unit})" if column.unit else column.title for column in _COLUMNS)]
    return PLAIN.table([titles, *_rows(summary)])


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
    summary: Mapping[str, Any], panels: Mapping[str, Sequence[Panel]], path: str | os.PathLike[str]
) -> None:
    """Writes the report as one HTML file that needs nothing else.

    Args:
        summary: the run, laid out as this module's docstring says.
        panels: charts by the heading that they stand under.
        path: the HTML file; missing folders are made.
    """
    data, methods = summary["data"], summary["methods"]
    introduction = (
        f"A tiny Llama learned {data['num_train_problems']:,} generated word problems (SFT). From there DPO and DPOP "
        f"each trained it on the same {data['num_pairs']:,} low-edit pairs, in which the rejected answer is the chosen "
        f"one with one intermediate result wrong. Measured on {data['num_eval_pairs']:,} held-out pairs; answers "
        f"average {data['mean_answer_tokens']:.0f} tokens out of a vocabulary of {data['vocab_size']:,}. The whole run "
        f"took {summary['seconds']:.0f} s (device: {summary['device']})."
    )
    before, dpo, dpop = (f"{methods[method]['exact_match']:.0%}" for method in ("sft", "dpo", "dpop"))
    tiles = [
        (_nats(methods["dpo"]["chosen_logratio"], 2), "the chosen answers' log-prob after DPO"),
        (_nats(methods["dpop"]["chosen_logratio"], 2), "after DPOP, from the same start on the same pairs"),
        (f"{dpo} | {dpop}", f"of the held-out problems solved after DPO | after DPOP; before, {before}"),
    ]
    sections = [
        html_page.tiles(tiles),
        html_page.heading("What each model writes"),
        *_answers(summary["answers"]),
        html_page.heading("Results"),
        html_page.paragraph(format_verdict(summary)),
        html_page.table([("method", ""), *((column.title, column.unit) for column in _COLUMNS)], _rows(summary)),
        html_page.paragraph(_LEGEND, "note"),
    ]
    for title, of_title in panels.items():
        sections += [html_page.heading(title), html_page.charts(of_title, large=True)]
    sections += [
        html_page.heading("One pair of the training set"),
        _example(summary["example"]),
        html_page.heading("How it was made"),
        html_page.paragraph(introduction),
        html_page.folded("Configuration", html_page.facts(summary["config"])),
        html_page.folded("Versions", html_page.facts(summary["versions"])),
    ]
    html_page.write_page(
        headline(summary), sections, path, about="dpop demo · DPO and DPOP on low-edit pairs, measured on held-out ones"
    )


def headline(summary: Mapping[str, Any]) -> str:
    """The judgement in a sentence."""
    dpo, dpop = (summary["methods"][method]["chosen_logratio"] for method in ("dpo", "dpop"))
    return f"DPO {_movement(dpo)}; DPOP {_movement(dpop).replace('the chosen answers', 'them')}."


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
    return "not known" if math.isnan(value) else f"{signed(value, digits)} nats"


def _rows(summary: Mapping[str, Any]) -> list[list[str]]:
    methods: Mapping[str, Mapping[str, float]] = summary["methods"]
    return [
        [_METHOD_NAMES.get(method, method), *(_cell(results.get(column.key), column) for column in _COLUMNS)]
        for method, results in methods.items()
    ]


def _cell(value: float | None, column: _Column) -> str:
    return "—" if value is None or math.isnan(value) else column.text(value)


def _answers(answers: Mapping[str, Any]) -> list[str]:
    """One problem, and what the three models write for it."""
    names = {"sft": "before (SFT)", "dpo": "DPO", "dpop": "DPOP"}
    columns = [
        html_page.answer(f"{names[key]}: {'right' if answers['is_right'][key] else 'wrong'}", visible(text), key)
        for key, text in answers["texts"].items()
    ]
    told = (
        f"Held-out problem {answers['number']} of {answers['num_problems']}: the first that the models answer in "
        f"different words. Its right answer is {answers['right']}."
    )
    return [
        html_page.paragraph(told, "note"),
        html_page.paragraph(answers["question"]),
        html_page.beside(columns),
    ]


def _example(example: Mapping[str, str]) -> str:
    """Prompt and both answers, with the words that differ marked."""
    chosen, rejected = (re.findall(r"\s|\w+|[^\w\s]", example[answer].strip()) for answer in ("chosen", "rejected"))
    return html_page.pair(
        ["what differs is marked"],
        visible(example["prompt"]),
        ("chosen", _mark(chosen, edit_regions(chosen, rejected), "chosen")),
        ("rejected", _mark(rejected, edit_regions(rejected, chosen), "rejected")),
    )


def _mark(words: Sequence[str], region: EditRegions, kind: str) -> str:
    before, edit, after = words[: region.start], words[region.start : region.end], words[region.end :]
    return f'{visible("".join(before))}<mark class="{kind}">{visible("".join(edit))}</mark>{visible("".join(after))}'
