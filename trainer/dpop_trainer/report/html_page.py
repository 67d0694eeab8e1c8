"""The frame of every HTML report: one file that needs nothing else. No scripts, no network, charts inline.

What is judged stands first, as the heading; what was looked at stands small above it. Every function returns HTML; all
text given to them is escaped here, so that no caller needs to.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dpop_trainer.report import palette, svg
from dpop_trainer.report.svg import Panel
from dpop_trainer.run_folder.files import write_atomically

MARKED_UP_TO = 0.5
"""Normalised edit distance of two answers beyond which a mark on what differs is on most of both, and is left out."""
STYLE = Path(__file__).with_name("pages.css").read_text(encoding="utf-8")

# control pictures for control characters but tab and newline; code points for what ends a line or changes its direction
# without being seen
_VISIBLE = {code: 0x2400 + code for code in range(0x20) if code not in (0x09, 0x0A)} | {0x7F: 0x2421}
_VISIBLE |= {
    code: f"⟨U+{code:04X}⟩"
    for code in (*range(0x80, 0xA0), 0x200B, *range(0x2028, 0x202F), *range(0x2066, 0x206A), 0xFEFF)
}


def write_page(
    judgement: str, sections: Iterable[str], path: str | os.PathLike[str], *, about: str, kind: str = ""
) -> None:
    """Write a page of sections (HTML) under its judgement; missing folders are made.

    Args:
        judgement: the heading: what is to be thought of it, in a sentence.
        sections: what follows.
        path: the HTML file.
        about: what was looked at; the window's title too.
        kind: of the judgement: "good", "bad", "serious" or neither.
    """
    attribute = f' class="{escape(kind)}"' if kind else ""
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{visible(about)}</title>\n<style>\n{palette.variables()}{palette.classes()}{svg.CSS}{STYLE}</style>\n"
        f'</head>\n<body>\n<p class="about">{visible(about)}</p>\n'
        f"<h1><span{attribute}>{visible(judgement)}</span></h1>\n" + "\n".join(sections) + "\n</body>\n</html>\n"
    )
    # lone surrogates, which JSON may carry, have no UTF-8
    write_atomically(Path(path), page.encode("utf-8", "xmlcharrefreplace"))


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{visible(text)}</h{level}>"


def paragraph(text: str, kind: str = "") -> str:
    """`kind`: "note" makes it small."""
    attribute = f' class="{escape(kind)}"' if kind else ""
    return f"<p{attribute}>{visible(text)}</p>"


def verdict(texts: Sequence[str], kind: str = "", *, command: str = "", numbered: bool = False) -> str:
    """What the judgement rests on, set off.

    Args:
        texts: a sentence or a reason each.
        kind: "bad", "serious" or neither.
        command: to be pasted.
        numbered: as a list.
    """
    # a line ends between options, never within one
    options = " ".join(f"<span>{visible(part)}</span>" for part in re.split(r" (?=--)", command))
    code = f"<p><code>{options}</code></p>" if command else ""
    if numbered:
        inside = f"{code}<ol>{''.join(f'<li>{visible(text)}</li>' for text in texts)}</ol>"
    else:
        inside = "".join(f"<p>{visible(text)}</p>" for text in texts) + code
    return f'<div class="verdict{f" {escape(kind)}" if kind else ""}">{inside}</div>'


def visible(text: str) -> str:
    """Text from data, escaped, with control characters and those that turn the direction of writing made visible."""
    return escape(text.translate(_VISIBLE))


def tiles(values: Iterable[tuple[str, str]]) -> str:
    """Figures and what they are, large, side by side."""
    parts = (f'<div class="tile"><b>{visible(value)}</b><span>{visible(what)}</span></div>' for value, what in values)
    return f'<div class="tiles">{"".join(parts)}</div>'


def table(
    titles: Sequence[tuple[str, str]],
    rows: Iterable[Sequence[str]],
    *,
    words: bool = False,
    kinds: Iterable[str] | None = None,
) -> str:
    """A table of text cells; on a phone each row is folded into a card. A second line of a cell is small.

    Args:
        titles: per column its title and its unit, which may be "".
        rows: as many cells each as there are titles; the first is aligned to the left.
        words: cells are sentences.
        kinds: per row, "serious", "warning", "note" or another class for its first cell.
    """
    rows = list(rows)
    classes = [f' class="{escape(kind)}"' if kind else "" for kind in kinds or [""] * len(rows)]
    has_units = any(unit for _, unit in titles)
    head = "".join(
        f"<th>{visible(title)}" + (f"<small>{visible(unit) or '&nbsp;'}</small></th>" if has_units else "</th>")
        for title, unit in titles
    )
    names = [f"{title}, {unit}" if unit else title for title, unit in titles]
    body = "\n".join(
        f"<tr{of_row}>" + "".join(_cell(name, cell) for name, cell in zip(names, row, strict=True)) + "</tr>"
        for of_row, row in zip(classes, rows, strict=True)
    )
    kind = "words" if words else "figures"
    inside = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>"
    return f'<div class="wide"><table class="{kind}">\n{inside}</table></div>'


def charts(panels: Iterable[Panel], *, large: bool = False) -> str:
    """As many side by side as there is room for."""
    return f'<div class="charts{" large" * large}">{"".join(f"<div>{panel.svg}</div>" for panel in panels)}</div>'


def beside(answers: Iterable[str]) -> str:
    """Answers, of `answer`, beside one another where there is room."""
    return f'<div class="beside">{"".join(answers)}</div>'


def pair(header: Sequence[str], prompt: str, chosen: tuple[str, str], rejected: tuple[str, str]) -> str:
    """A pair of answers side by side under their prompt.

    Args:
        header: what is said of it, the first in bold.
        prompt: HTML.
        chosen: what stands over it, and the answer as HTML.
        rejected: likewise.
    """
    first, *rest = map(visible, header)
    told = " · ".join([f"<b>{first}</b>", *rest])
    answers = beside([answer(*chosen, "chosen"), answer(*rejected, "rejected")])
    return f'<div class="pair"><header>{told}</header>{answer("prompt", prompt, kind="prompt")}{answers}</div>'


def answer(name: str, text: str, role: str = "soft", *, kind: str = "") -> str:
    """A text (HTML) under its name, which is written in the colour of its role."""
    colour = "soft" if role == "soft" else f"of-{role}"
    return (
        f'<div class="side{f" {kind}" if kind else ""}"><b class="{colour}">{visible(name)}</b>'
        f'<pre dir="auto" lang="">{text}</pre></div>'
    )


def facts(values: Mapping[str, Any]) -> str:
    """Names and values, small, in two columns where there is room for two."""
    rows = "".join(
        f"<div><dt>{visible(str(key))}</dt><dd>{visible(str(value))}</dd></div>" for key, value in values.items()
    )
    return f'<dl class="facts">{rows}</dl>'


def folded(title: str, section: str) -> str:
    """A section (HTML) that is shown when its title is clicked."""
    return f"<details><summary>{visible(title)}</summary>{section}</details>"


def _cell(title: str, cell: str) -> str:
    first, _, second = cell.partition("\n")
    small = f"<small>{visible(second)}</small>" if second else ""
    return f'<td data-title="{visible(title)}"><span>{visible(first)}{small}</span></td>'
