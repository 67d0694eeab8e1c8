"""Text for a terminal: tables in columns, sentences broken at its width, colours; plain where there is no terminal."""

import os
import re
import shutil
from collections.abc import Sequence
from typing import NamedTuple, TextIO

from dpop_trainer.report.graphemes import columns, pad, pad_left

_CODES = {"good": "1;32", "bad": "1;31", "serious": "1;31", "warning": "33", "note": "2"}
_LEVEL = re.compile(r"(\n  )(SERIOUS|WARNING|NOTE)(?= )")
_GAP = "  "


class Terminal(NamedTuple):
    """What text is written for."""

    width: int | None = None
    """In columns; None: lines are as long as they are."""
    has_colours: bool = False

    @classmethod
    def of(cls, stream: TextIO) -> "Terminal":
        """A stream's own; colours unless the environment says NO_COLOR, or that the terminal is a dumb one."""
        if not stream.isatty():
            return cls()
        has_colours = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        return cls(shutil.get_terminal_size().columns, has_colours)

    def painted(self, text: str) -> str:
        """A verdict, up to its first indented line, and the levels of findings, in colours. Of text that is printable:
        what others wrote in it colours nothing."""
        if not self.has_colours:
            return text
        sentence, gap, rest = text.partition("\n  ")
        kind = "bad" if sentence.startswith("Do not") else "good"
        rest = _LEVEL.sub(lambda found: f"{found[1]}{_paint(found[2], found[2].lower())}", gap + rest)
        return _paint(sentence, kind) + rest

    def filled(self, text: str, indent: str = "", *, after: str = "") -> str:
        """A sentence in lines of the terminal's width.

        Args:
            text: the words.
            indent: before every line but the first.
            after: what stands before the first line; `indent` where it is not given.
        """
        lines, line, taken = [], after or indent, columns(after or indent)
        is_empty = True
        for word in text.split(" "):
            if not is_empty and self.width is not None and taken + 1 + columns(word) > self.width:
                lines.append(line)
                line, taken, is_empty = indent, columns(indent), True
            gap = "" if is_empty else " "
            line, taken, is_empty = line + gap + word, taken + len(gap) + columns(word), False
        return "\n".join([*lines, line])

    def table(self, rows: Sequence[Sequence[str]]) -> str:
        """The first row has the titles, the first column the names: aligned to the left, everything else to the right.

        Where that is wider than the terminal, each row is folded into lines of a title and a value.
        """
        widths = [max(columns(row[place]) for row in rows) for place in range(len(rows[0]))]
        if self.width is not None and sum(widths) + len(_GAP) * (len(widths) - 1) > self.width:
            return self._folded(rows)
        lines = []
        for first, *cells in rows:
            right = (pad_left(cell, width) for cell, width in zip(cells, widths[1:], strict=True))
            lines.append(_GAP.join([pad(first, widths[0]), *right]))
        return "\n".join(lines)

    def _folded(self, rows: Sequence[Sequence[str]]) -> str:
        titles, *others = rows
        widest = max(map(columns, titles[1:]), default=0)
        blocks = []
        for name, *cells in others:
            lines = [f"{_GAP}{pad(title, widest)}  {cell}" for title, cell in zip(titles[1:], cells, strict=True)]
            blocks.append("\n".join([name, *lines]))
        return "\n\n".join(blocks)


PLAIN = Terminal()


def _paint(text: str, kind: str) -> str:
    return f"\x1b[{_CODES[kind]}m{text}\x1b[0m"
