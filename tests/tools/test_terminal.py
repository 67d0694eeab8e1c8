"""Text for a terminal: broken at its width, coloured there alone, tables that fold where they are too wide."""

import io
import os
import re

import pytest
from dpop_trainer.report.terminal import PLAIN, Terminal
from dpop_trainer.settings.terminal import say

WORDS = "one two three four five six seven eight nine ten 你好 世界"
ROWS = [["task", "a", "b"], ["arc", "1.00 ± 0.50", "–"], ["hellaswag", "2.00", "3.00"]]


class Tty(io.StringIO):
    def isatty(self):
        return True


def test_lines_are_broken_at_the_width():
    filled = Terminal(20).filled(WORDS, "  ", after="> ")
    assert filled.split("\n") == ["> one two three four", "  five six seven", "  eight nine ten", "  你好 世界"]
    assert PLAIN.filled(WORDS, "  ") == f"  {WORDS}"
    assert Terminal(5).filled("longer than five", "") == "longer\nthan\nfive"  # a word is not divided


def test_two_columns_for_a_wide_character():
    # "eight nine ten" and the two characters are 14 + 1 + 4 columns, with the indent 21
    assert Terminal(21).filled("eight nine ten 你好", "  ") == "  eight nine ten 你好"
    assert Terminal(20).filled("eight nine ten 你好", "  ") == "  eight nine ten\n  你好"


def test_a_table_is_aligned_or_folded():
    lines = PLAIN.table(ROWS).split("\n")
    assert lines == ["task                 a     b", "arc        1.00 ± 0.50     –", "hellaswag         2.00  3.00"]
    assert Terminal(28).table(ROWS) == PLAIN.table(ROWS)
    folded = Terminal(27).table(ROWS)
    assert folded == "arc\n  a  1.00 ± 0.50\n  b  –\n\nhellaswag\n  a  2.00\n  b  3.00"


@pytest.mark.parametrize(
    ("stream", "environment", "expected"),
    [
        (io.StringIO(), {}, Terminal()),
        (Tty(), {}, Terminal(91, True)),
        (Tty(), {"NO_COLOR": "1"}, Terminal(91, False)),
        (Tty(), {"TERM": "dumb"}, Terminal(91, False)),
    ],
)
def test_a_stream_says_what_it_is(stream, environment, expected, monkeypatch):
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"COLUMNS": "91", **environment}.items():
        monkeypatch.setitem(os.environ, name, value)
    assert Terminal.of(stream) == expected


def test_colours_are_for_terminals_alone():
    text = "Do not train on this: a\nb.\n  WARNING  one\n  SERIOUS  two WARNING \n"
    assert PLAIN.painted(text) == text
    coloured = Terminal(80, True).painted(text)
    assert coloured.startswith("\x1b[1;31mDo not train on this: a\nb.\x1b[0m\n  \x1b[33mWARNING\x1b[0m  one")
    assert "\x1b[1;31mSERIOUS\x1b[0m  two WARNING" in coloured  # a word of the sentence is none
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == text
    assert Terminal(80, True).painted("Train with DPOP.").startswith("\x1b[1;32m")


def test_what_others_wrote_colours_nothing(capsys):
    say("Train: \x1b[31mx", painted=Terminal(80, True).painted)
    assert capsys.readouterr().out == "\x1b[1;32mTrain: \\x1b[31mx\x1b[0m\n"
