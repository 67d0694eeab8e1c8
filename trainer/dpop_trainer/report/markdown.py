"""Text of others in Markdown: it is shown as it is written, and read neither as Markdown nor as HTML."""

import re
from collections.abc import Iterable, Sequence

_ESCAPED = str.maketrans({"<": "&lt;", ">": "&gt;", "&": "&amp;"} | {sign: f"\\{sign}" for sign in "\\`*[]|"})


def plain(text: object) -> str:
    """As words of a sentence, a heading or a table's cell; on one line."""
    return " ".join(str(text).split()).translate(_ESCAPED)


def code(text: object) -> str:
    """As code within a line, between more backticks than it has in a row."""
    words = " ".join(str(text).split())
    fence = "`" * (1 + max(map(len, re.findall("`+", words)), default=0))
    space = " " if words.startswith("`") or words.endswith("`") else ""
    return f"{fence}{space}{words}{space}{fence}" if words else "(without a name)"


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table of plain cells."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(plain, line)) + " |" for line in lines)


def joined(value: object) -> str:
    """A setting's value: several with commas between, without brackets; not escaped."""
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
