"""Is a sample's answer right? One function per way to tell, each from two texts to a verdict."""

import re
from collections import deque
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import TypeAlias

from dpop_trainer.measure.announced import PHRASES
from dpop_trainer.measure.numerals import HAN_NUMBER, LETTER, in_ascii

Verdict: TypeAlias = bool | None
"""Right, wrong, or None: the sample gives no answer of the kind looked for."""

_NUMBER = re.compile(r"-?[$€£¥₹₩]?-?(?P<number>[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)")
_ANNOUNCED = re.compile(
    rf"####|\\boxed\{{|{PHRASES}|\banswer:|(?<![回解问問])答案?[:：]|الإجابة:|(?:정답|답):", re.IGNORECASE
)
# 48+24 = 72: what is announced is what the equation comes to
_EQUATION = re.compile(r"(?:[ )]*[-+*/×÷][ ($€£¥]*[0-9][0-9,.]*\)*)+ *(?==)")
_MYRIADS = {"万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8}
_HAN_DIGIT = re.compile(" *[二三四五六七八九十两兩]")
_LETTER = re.compile(rf"(?<![0-9{LETTER}])(?P<letter>[A-Z1-9])(?![0-9{LETTER}])")
_LONE_LETTER = re.compile(r"\s*\(?(?P<letter>[A-Z1-9])(?:[).:、．：]|\s*$|\s*\n)")


def matches_exactly(sample: str, label: str) -> Verdict:
    """The same text, leading, trailing and repeated white space aside."""
    return sample.split() == label.split() if sample.strip() else None


def matches_number(sample: str, label: str) -> Verdict:
    """The same final number, in value: the first after the last "####", "the answer is", "answer:" or "\\boxed{".

    A sample that announces no answer gives none: it may have been cut off. A label may be the number alone. Digits of
    any script count, and 万 and 亿 behind them; an answer in Chinese numerals is not read.

    Raises:
        ValueError: the label holds no number.
    """
    label, sample = in_ascii(label), in_ascii(sample)
    right = _final_number(label) if _ANNOUNCED.search(label) else _last_number(label)
    if right is None:
        raise ValueError(f"label: expected a number, got {label[-60:]!r}. Use another --matcher.")
    given = _final_number(sample)
    return None if given is None else given == right


def matches_choice(sample: str, label: str) -> Verdict:
    """The same option, a capital letter or a digit: announced ("the answer is (B)") or at the beginning ("B) ...").

    Raises:
        ValueError: the label names no option.
    """
    label, sample = in_ascii(label), in_ascii(sample)
    right = _choice(label)
    if right is None:
        raise ValueError(f"label: expected an option such as 'B', got {label[-60:]!r}. Use another --matcher.")
    given = _choice(sample)
    return None if given is None else given == right


def regex_matcher(pattern: str) -> Callable[[str, str], Verdict]:
    """The same text in the last match of a pattern: its first group, or the whole match where it has none.

    A label in which the pattern does not match stands for itself.

    Raises:
        ValueError: the pattern does not compile.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"answer_regex: expected a regular expression, got {pattern!r} ({error}).") from error

    def last(text: str) -> str | None:
        found = _last_match(compiled, text)
        return None if found is None else (found.group(1) if compiled.groups else found.group()) or ""

    def matches(sample: str, label: str) -> Verdict:
        given, right = last(sample), last(label)
        return None if given is None else given.strip() == (label if right is None else right).strip()

    return matches


def _final_number(text: str) -> Decimal | None:
    """The first number behind the last announcement, or the result of the equation that begins with it."""
    announced = _last_match(_ANNOUNCED, text)
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
    announced = _last_match(_ANNOUNCED, text)
    match = _LONE_LETTER.match(text) if announced is None else _LETTER.search(text, announced.end())
    return None if match is None else match.group("letter")


def _last_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(iter(deque(pattern.finditer(text), maxlen=1)), None)


MATCHERS: dict[str, Callable[[str, str], Verdict]] = {
    "numeric": matches_number,
    "exact": matches_exactly,
    "choice": matches_choice,
}
"""By name; "regex" is made by `regex_matcher`. A new matcher is one function and one line here."""


def find_matcher(name: str, answer_regex: str | None) -> Callable[[str, str], Verdict]:
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
