"""Is a sample's answer right? One function per way to tell, each from two texts to a verdict."""

import re
from collections import deque
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Any, NamedTuple, TypeAlias

from dpop_trainer.measure.announced import PHRASES
from dpop_trainer.measure.numerals import HAN_NUMBER, LETTER, in_ascii

Verdict: TypeAlias = bool | None
"""Right, wrong, or None: the sample gives no answer of the kind looked for."""

_NUMBER = re.compile(r"-?[$€£¥₹₩]?-?(?P<number>[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)")
_ANNOUNCED = re.compile(
    rf"####|\\boxed\{{|{PHRASES}|\banswer:|(?<![回解问問])答案?[:：]|الإجابة:|(?:정답|답):", re.IGNORECASE
)
# "A: 18" as well, where it begins a line and no "B:" begins a later one: then it is the first of several
_NUMBER_ANNOUNCED = re.compile(
    rf"{_ANNOUNCED.pattern}|^[ \t*]*A(?:ns)?\.?[ \t*]*:(?![\s\S]*^[ \t*]*B[ \t*]*:)", re.IGNORECASE | re.MULTILINE
)
_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")
# 48+24 = 72: what is announced is what the equation comes to
_EQUATION = re.compile(r"(?:[ )]*[-+*/×÷][ ($€£¥]*[0-9][0-9,.]*\)*)+ *(?==)")
_MYRIADS = {"万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8}
_HAN_DIGIT = re.compile(" *[二三四五六七八九十两兩]")
_LETTER = re.compile(rf"(?<![0-9{LETTER}])(?P<letter>[A-Z1-9])(?![0-9{LETTER}])")
_LONE_LETTER = re.compile(r"\s*\(?(?P<letter>[A-Z1-9])(?:[).:、．：]|\s*$|\s*\n)")


class Matcher(NamedTuple):
    """Compares what it reads of a sample with what it reads of a label."""

    read_sample: Callable[[str], Any]
    """A text -> its answer, None where it gives none."""
    read_label: Callable[[str], Any]
    """The same of a label, which may be the answer alone."""
    looks_for: str
    """What an answer is to it, in words."""

    def __call__(self, sample: str, label: str) -> Verdict:
        """
        Raises:
            ValueError: the label gives no answer.
        """
        right = self.read_label(label)
        if right is None:
            raise ValueError(f"label: expected {self.looks_for}, got {label[-60:]!r}. Use another --matcher.")
        given = self.read_sample(sample)
        return None if given is None else given == right


def regex_matcher(pattern: str) -> Matcher:
    """The same text in the last match of a pattern: its first group, or the whole match where it has none.

    A label in which the pattern does not match stands for itself: whoever grades against whole solutions asks
    `matches` first (see `from_samples`).

    Raises:
        ValueError: the pattern does not compile.
    """
    found = regex_reader(pattern)

    def of_label(label: str) -> str:
        right = found(label)
        return _plain(label) if right is None else right

    return Matcher(found, of_label, f"a match of {pattern!r}")


def regex_reader(pattern: str) -> Callable[[str], str | None]:
    """Text -> the last match of a pattern, white space and thousands commas aside; None where it does not match.

    Raises:
        ValueError: the pattern does not compile.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"answer_regex: expected a regular expression, got {pattern!r} ({error}).") from error

    def last(text: str) -> str | None:
        found = _last_match(compiled, text)
        return None if found is None else _plain((found.group(1) if compiled.groups else found.group()) or "")

    return last


def _plain(text: str) -> str:
    """A text to compare: white space once, and 5,600 as 5600."""
    return _THOUSANDS.sub(lambda number: number.group().replace(",", ""), " ".join(text.split()))


def _read_number(text: str) -> Decimal | None:
    return _final_number(in_ascii(text))


def _read_number_of_label(text: str) -> Decimal | None:
    text = in_ascii(text)
    return _final_number(text) if _NUMBER_ANNOUNCED.search(text) else _last_number(text)


def _final_number(text: str) -> Decimal | None:
    """The first number behind the last announcement, or the result of the equation that begins with it."""
    announced = _last_match(_NUMBER_ANNOUNCED, text)
    match = None if announced is None else _NUMBER.search(text, announced.end())
    if announced is None or match is None:
        return None
    # 答案是七十二，因为 24+48=72: the first number is not the answer
    if HAN_NUMBER.search(text, announced.end(), match.start()) or _HAN_DIGIT.match(text, announced.end()):
        return None
    while equation := _EQUATION.match(text, match.end()):
        result = _NUMBER.match(text, equation.end() + len("=")) or _NUMBER.match(text, equation.end() + len("= "))
        if result is None:
            break
        match = result
    return _value(match)


def _last_number(text: str) -> Decimal | None:
    match = _last_match(_NUMBER, text)
    return None if match is None else _value(match)


def _value(match: re.Match[str]) -> Decimal | None:
    sign = -1 if "-" in match.group()[: match.start("number") - match.start()] else 1
    behind = match.string[match.end() : match.end() + 3].lstrip(" ")
    myriad = _MYRIADS.get(behind[:1], 1)
    if myriad > 1 and re.match(r"[0-9千百]|" + "|".join(_MYRIADS), behind[1:]):  # 3万5千, 2万亿
        return None
    try:
        return sign * myriad * Decimal(match.group("number").replace(",", ""))
    except InvalidOperation:
        return None


def _choice(text: str) -> str | None:
    text = in_ascii(text)
    announced = _last_match(_ANNOUNCED, text)
    match = _LONE_LETTER.match(text) if announced is None else _LETTER.search(text, announced.end())
    return None if match is None else match.group("letter")


def _last_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(iter(deque(pattern.finditer(text), maxlen=1)), None)


matches_exactly = Matcher(lambda text: _plain(text) or None, _plain, "a text")
"""The same text; white space at its ends and how much of it stands inside do not count, nor do thousands commas."""

matches_number = Matcher(
    _read_number, _read_number_of_label, 'a number behind "####", "the answer is", "answer:", "A:" or "\\boxed{"'
)
"""The same final number, in value: the first after the last "####", "the answer is", "answer:", "A:" or "\\boxed{".

A sample that announces no answer gives none: it may have been cut off. A label may be the number alone. Digits of any
script count, and 万 and 亿 behind them; an answer in Chinese numerals is not read."""

matches_choice = Matcher(_choice, _choice, 'an option such as "B", announced or at the beginning')
"""The same option, a capital letter or a digit: announced ("the answer is (B)") or at the beginning ("B) ...")."""

MATCHERS: dict[str, Matcher] = {
    "numeric": matches_number,
    "exact": matches_exactly,
    "choice": matches_choice,
}
"""By name; "regex" is made by `regex_matcher`. A new matcher is one entry here."""


def find_matcher(name: str, answer_regex: str | None) -> Matcher:
    """The matcher of that name; `answer_regex` is the pattern of "regex", which no other takes.

    Raises:
        ValueError: there is no such matcher, or a pattern is missing, out of place or does not compile.
    """
    if name not in (*MATCHERS, "regex"):
        raise ValueError(f"matcher: expected one of {', '.join(MATCHERS)} or regex, got {name!r}.")
    if (name == "regex") != bool(answer_regex):
        raise ValueError(
            f"answer_regex: expected a pattern with matcher 'regex' and with no other, got {answer_regex!r} with "
            f"{name!r}."
        )
    return regex_matcher(answer_regex) if answer_regex else MATCHERS[name]
