"""The shell of every HTML report: one file that needs nothing else. Figures embedded, no scripts, no network.

Every function returns HTML; all text given to them is escaped here, so that no caller needs to.
"""

import base64
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

STYLE = """
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
h3 { font-size: 1rem; margin: 1.8rem 0 .3rem; }
pre { padding: .8rem 1rem; background: var(--box); white-space: pre-wrap; overflow-wrap: anywhere;
      font: .875rem/1.5 ui-monospace, monospace; unicode-bidi: plaintext; }
pre span { border-radius: .15em; } pre span.edit { outline: 1.5px solid var(--ink); outline-offset: -1px; }
pre span.fell { text-decoration: underline; text-decoration-thickness: 2px; text-underline-offset: .2em; }
mark { color: inherit; padding: 0 .15em; border-radius: .2em; font-weight: bold; }
mark.chosen { background: var(--good); } mark.rejected { background: var(--bad); }
figure { margin: 1.2rem 0; }
img { box-sizing: border-box; max-width: 100%; height: auto; padding: .4rem; background: white; }
.facts { columns: 2; } .facts td, .facts th { padding: .15rem .9rem .15rem 0; font-size: .875rem; }
"""

# control pictures for control characters but tab and newline; code points for embeddings and overrides of direction
_VISIBLE = {code: 0x2400 + code for code in range(0x20) if code not in (0x09, 0x0A)} | {0x7F: 0x2421}
_VISIBLE |= {code: f"⟨U+{code:04X}⟩" for code in (*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def write_page(title: str, sections: Iterable[str], path: str | os.PathLike[str]) -> None:
    """Write a page of sections (HTML) under its title; missing folders are made."""
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{visible(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{visible(title)}</h1>\n"
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


def visible(text: str) -> str:
    """Text from data, escaped, with control characters and those that turn the direction of writing made visible."""
    return escape(text.translate(_VISIBLE))


def table(titles: Sequence[tuple[str, str]], rows: Iterable[Sequence[str]]) -> str:
    """A table of text cells.

    Args:
        titles: per column its title and its unit, which may be "".
        rows: as many cells each as there are titles; the first is aligned to the left.
    """
    head = "".join(f"<th>{visible(title)}<small>{visible(unit) or '&nbsp;'}</small></th>" for title, unit in titles)
    body = "\n".join("<tr>" + "".join(f"<td>{visible(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n{body}\n</table></div>'


def figure(title: str, path: str | os.PathLike[str]) -> str:
    """A PNG file, embedded."""
    png = base64.b64encode(Path(path).read_bytes()).decode("ascii")
    return (
        f'<figure><img alt="{escape(title)}" src="data:image/png;base64,{png}">'
        f"<figcaption>{visible(title)}</figcaption></figure>"
    )


def facts(values: Mapping[str, Any]) -> str:
    """Names and values, small, in two columns."""
    rows = "".join(
        f"<tr><th>{escape(str(key))}</th><td>{escape(str(value))}</td></tr>" for key, value in values.items()
    )
    return f'<div class="facts"><table>{rows}</table></div>'
