"""Numbers as the world writes them: digits of every script, full-width forms, Chinese numerals.

A rule that looks for numbers looks at `in_ascii(text)`, in which every character stands where it stood, and changes the
text itself at the same place:

    共１２个，٣٫٥ كغ    in_ascii ->    共12个，3.5 كغ    one digit changed ->    共１７个，٣٫٥ كغ
"""

import random
import re
import unicodedata

LETTER = "A-Za-z_ªµºÀ-ÖØ-öø-ʯͰ-ԯ"
"""For a character class: letters that make a name of the digits beside them (x1, 3rd). Not those of scripts that write
words without spaces, or units and particles without one: in 共12个 the number is 12."""

# the colon, the semicolon and the marks that end a sentence stay: they are no part of a number
_TWINS = {code: code - 0xFEE0 for code in (*range(0xFF21, 0xFF3B), *range(0xFF41, 0xFF5B))}
_TWINS |= {ord(wide): ascii for wide, ascii in zip("＝＋－−＊／％＄（）￥٫٬", "=+--*/%$()¥.,", strict=True)}
_DIGIT = re.compile(r"[^\D0-9]")
# a full-width comma separates clauses, but not between the full-width digits of one number
_WIDE_SEPARATOR = re.compile(r"(?<=[０-９])(?:，(?=[０-９]{3}(?![０-９]))|．(?=[０-９]))")

_HAN_DIGITS = "一二三四五六七八九"
_HAN_POWERS = "十百千万萬亿億"
_HAN_NUMERALS = f"{_HAN_DIGITS}{_HAN_POWERS}两兩零〇"
HAN_NUMBER = re.compile(rf"(?<![{_HAN_NUMERALS}])[{_HAN_DIGITS}两兩][{_HAN_POWERS}][{_HAN_NUMERALS}]*")
"""A number of at least two Chinese numerals, a digit and a power of ten (二十四). A lone 一 is mostly an article."""


def in_ascii(text: str) -> str:
    """The text with ASCII in place of digits of any script and of full-width letters and signs, as long as it was."""
    if text.isascii():
        return text
    text = _WIDE_SEPARATOR.sub(lambda match: "," if match.group() == "，" else ".", text)
    return _DIGIT.sub(lambda match: str(unicodedata.decimal(match.group())), text).translate(_TWINS)


def change_one_digit(number: str, rng: random.Random) -> str:
    """Another number of the same form and script: one digit differs, and a leading digit never becomes 0."""
    plain = in_ascii(number)
    position = rng.choice([i for i, character in enumerate(plain) if character.isdecimal()])
    digits = "123456789" if position == 0 else "0123456789"
    digit = rng.choice(digits.replace(plain[position], ""))
    zero = ord(number[position]) - int(plain[position])
    return number[:position] + chr(zero + int(digit)) + number[position + 1 :]


def change_one_numeral(number: str, rng: random.Random) -> str:
    """The same for a `HAN_NUMBER`: one digit becomes another one, from 二 to 九, which all powers of ten take."""
    position = rng.choice([i for i, character in enumerate(number) if character in _HAN_DIGITS or character in "两兩"])
    own = "二" if number[position] in "两兩" else number[position]
    return number[:position] + rng.choice(_HAN_DIGITS[1:].replace(own, "")) + number[position + 1 :]
