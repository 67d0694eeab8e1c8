"""The shell of every HTML report: one file that needs nothing else. Figures embedded, no scripts, no network.

Every function returns HTML; all text given to them is escaped here, so that no caller needs to.
"""

import base64
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

# of every report: light and dark, widths, headings, what is said first, marks
_BASE = """
:root { color-scheme: light dark; --ink: #1b1b1f; --soft: #5d5d66; --line: #d5d5dc; --page: #ffffff; --box: #f5f5f8;
        --good: #cde7f7; --bad: #fbd9c4; --blue: #0072b2; --fell: #a84300;
        --serious: #b3261e; --warning: #8a5a00; --note: #5d5d66; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e9e9ee; --soft: #a5a5b0; --line: #3d3d47; --page: #17171b; --box: #212128;
          --good: #10415e; --bad: #6b3010; --blue: #56b4e9; --fell: #ff9e5e;
          --serious: #ff8a80; --warning: #f0b95a; --note: #a5a5b0; } }
body { max-width: var(--width, 54rem); margin: 2.5rem auto; padding: 0 1.25rem; color: var(--ink);
       background: var(--page); font: 1rem/1.55 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.8rem 0 .3rem; }
.verdict { padding: .8rem 1.1rem; border-left: 4px solid var(--blue); background: var(--box); }
.verdict strong.good { color: var(--blue); } .verdict strong.bad { color: var(--fell); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
mark.chosen { background: var(--good); } mark.rejected { background: var(--bad); }
"""

STYLE = """
th, td { padding: .35rem .5rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.wide table { font-size: .875rem; } .wide th { white-space: normal; vertical-align: bottom; }
.wide th:first-child, .wide td:first-child { position: sticky; left: 0; background: var(--page); }
th small { display: block; font-weight: normal; color: var(--soft); }
.note, figcaption { color: var(--soft); font-size: .875rem; }
pre { padding: .8rem 1rem; background: var(--box); white-space: pre-wrap; overflow-wrap: anywhere;
      font: .875rem/1.5 ui-monospace, monospace; unicode-bidi: plaintext; }
pre span { border-radius: .15em; } pre span.edit { outline: 1.5px solid var(--ink); outline-offset: -1px; }
pre span.fell { text-decoration: underline; text-decoration-thickness: 2px; text-underline-offset: .2em; }
mark { color: inherit; padding: 0 .15em; border-radius: .2em; font-weight: bold; }
figure { margin: 1.2rem 0; }
img { box-sizing: border-box; max-width: 100%; height: auto; padding: .4rem; background: white; }
.beside { display: flex; flex-wrap: wrap; gap: 0 1rem; } .beside div { flex: 1 1 15rem; min-width: 0; }
.facts { columns: 24rem; column-gap: 2rem; font-size: .875rem; }
.facts div { display: flex; gap: 1rem; justify-content: space-between; break-inside: avoid; padding: .15rem 0;
             border-bottom: 1px solid var(--line); }
.facts dt { font-weight: 600; flex: 0 0 auto; max-width: 70%; } .facts dd { margin: 0; text-align: right; }
.facts dt, .facts dd { unicode-bidi: isolate; overflow-wrap: anywhere; min-width: 4rem; }
summary { cursor: pointer; color: var(--soft); font-size: .875rem; margin: .4rem 0; }
"""

# control pictures for control characters but tab and newline; code points for what ends a line or changes its direction
# without being seen
_VISIBLE = {code: 0x2400 + code for code in range(0x20) if code not in (0x09, 0x0A)} | {0x7F: 0x2421}
_VISIBLE |= {
    code: f"⟨U+{code:04X}⟩"
    for code in (*range(0x80, 0xA0), 0x200B, *range(0x2028, 0x202F), *range(0x2066, 0x206A), 0xFEFF)
}


def write_page(title: str, sections: Iterable[str], path: str | os.PathLike[str], *, style: str = STYLE) -> None:
    """Write a page of sections (HTML) under its title; missing folders are made.

    Args:
        title: of the page, and its first heading.
        sections: what follows it.
        path: the HTML file.
        style: CSS beside what all reports share; that of the functions below where it is not given.
    """
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{visible(title)}</title>\n<style>{_BASE}{style}</style>\n</head>\n<body>\n<h1>{visible(title)}</h1>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # lone surrogates, which JSON may carry, have no UTF-8
    path.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{visible(text)}</h{level}>"


def paragraph(text: str, kind: str = "") -> str:
    """`kind`: "verdict" sets it off, "note" makes it small."""
    attribute = f' class="{escape(kind)}"' if kind else ""
    return f"<p{attribute}>{visible(text)}</p>"


def judgement(word: str, text: str, kind: str = "") -> str:
    """What is said first: a few words in the colour of their kind ("good", "bad" or neither), then the sentences."""
    attribute = f' class="{escape(kind)}"' if kind else ""
    return f'<p class="verdict"><strong{attribute}>{visible(word)}.</strong> {visible(text)}</p>'


def visible(text: str) -> str:
    """Text from data, escaped, with control characters and those that turn the direction of writing made visible."""
    return escape(text.translate(_VISIBLE))


def table(titles: Sequence[tuple[str, str]], rows: Iterable[Sequence[str]]) -> str:
    """A table of text cells.

    Args:
        titles: per column its title and its unit, which may be "".
        rows: as many cells each as there are titles; the first is aligned to the left.
    """
    has_units = any(unit for _, unit in titles)
    head = "".join(
        f"<th>{visible(title)}" + (f"<small>{visible(unit) or '&nbsp;'}</small></th>" if has_units else "</th>")
        for title, unit in titles
    )
    body = "\n".join("<tr>" + "".join(f"<td>{visible(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n{body}\n</table></div>'


def figure(title: str, path: str | os.PathLike[str]) -> str:
    """A PNG file, embedded."""
    png = base64.b64encode(Path(path).read_bytes()).decode("ascii")
    return (
        f'<figure><img alt="{escape(title)}" src="data:image/png;base64,{png}">'
        f"<figcaption>{visible(title)}</figcaption></figure>"
    )


def side_by_side(texts: Mapping[str, str]) -> str:
    """Texts under their names, beside one another where there is room."""
    columns = "".join(f"<div><b>{visible(name)}</b><pre>{visible(text)}</pre></div>" for name, text in texts.items())
    return f'<div class="beside">{columns}</div>'


def facts(values: Mapping[str, Any]) -> str:
    """Names and values, small, in two columns where there is room for two."""
    rows = "".join(
        f"<div><dt>{visible(str(key))}</dt><dd>{visible(str(value))}</dd></div>" for key, value in values.items()
    )
    return f'<dl class="facts">{rows}</dl>'


def folded(title: str, section: str) -> str:
    """A section (HTML) that is shown when its title is clicked."""
    return f"<details><summary>{visible(title)}</summary>{section}</details>"
