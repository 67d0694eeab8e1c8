"""Low-edit pairs from any good answers: a rule makes the rejected answer wrong in one place.

    number   one digit of one number is another      48/2 = 24 clips      ->  48/2 = 26 clips
    word     one English word becomes its opposite   The price increased  ->  The price decreased
    code     one operator or constant is another     while i < n:         ->  while i <= n:

Each rule draws one place uniformly from all that it could change outside of `protected` spans.
"""

import random
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from dpop_trainer.measure.numerals import HAN_NUMBER, LETTER, change_one_digit, change_one_numeral, in_ascii
from dpop_trainer.tools.pairs.protected import CODE_FENCES, FENCE, outside_protected
from dpop_trainer.tools.pairs.recipe import BuiltPair, Edit, Scaffold, SkippedRecord, record_rng, text_field

# digits that are part of no longer word or number: neither x1 nor 1.2.3 nor 3rd
_NUMBER = re.compile(
    rf"""(?<![0-9{LETTER}.,])
         (?: [0-9]{{1,3}}(?:,[0-9]{{3}})+ | [0-9]{{1,2}}(?:,[0-9]{{2}})+,[0-9]{{3}} | [0-9]+ ) (?:\.[0-9]+)?
         (?![0-9{LETTER}] | [.,][0-9])""",
    re.VERBOSE,
)
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")
# strings and comments come first, so that nothing inside them is found
_CODE_TOKEN = re.compile(
    r"""(?P<other> \"\"\".*?\"\"\" | '''.*?''' | "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])*'
                 | \#[^\n]* | //[^\n]* | /\*.*?\*/ | -> | => | <<=? | >>=? | \*\* | [-+*/%]= | \+\+ | --)
      | (?P<operator> <= | >= | == | != | && | \|\| | < | > | (?<=[\w)\]]\s)[-+*/%](?=\s)
                    | \b(?:and|or|True|False|true|false|min|max|any|all|break|continue)\b)
      | (?P<number> (?<![\w.])[0-9]+(?![\w.]))""",
    re.VERBOSE | re.DOTALL,
)
_OPERATORS = {
    "<": "<=",
    "<=": "<",
    ">": ">=",
    ">=": ">",
    "==": "!=",
    "!=": "==",
    "&&": "||",
    "||": "&&",
    "+": "-",
    "-": "+",
    "*": "+",
    "/": "*",
    "%": "/",
    "and": "or",
    "or": "and",
    "True": "False",
    "False": "True",
    "true": "false",
    "false": "true",
    "min": "max",
    "max": "min",
    "any": "all",
    "all": "any",
    "break": "continue",
    "continue": "break",
}
_OPPOSITES = """
    above below | accept reject | add subtract | after before | agree disagree | all none | allow forbid
    | always never | and or | ascending descending | begin end | best worst | better worse | big small | black white
    | both neither | buy sell | can cannot | cheap expensive | cold hot | correct incorrect | day night
    | deeper shallower | divide multiply | dry wet | early late | east west | easy hard | empty full | enter leave
    | even odd | false true | fast slow | few many | first last | forward backward | gain loss | give take
    | good bad | greater smaller | heavy light | high low | higher lower | highest lowest | import export
    | include exclude | increase decrease | increased decreased | increases decreases | increasing decreasing
    | inside outside | is isn't | large tiny | largest smallest | left right | legal illegal | less more
    | long short | longer shorter | lose win | maximum minimum | morning evening | most least | near far | new old
    | next previous | north south | often rarely | old young | older younger | on off | open close | over under
    | past future | possible impossible | positive negative | profit loss | push pull | rich poor | rise fall
    | rising falling | safe dangerous | same different | smaller larger | start stop | strong weak
    | strongest weakest | success failure | summer winter | up down | warm cool | was wasn't | will won't
    | with without | wide narrow | yes no
"""


class Place(NamedTuple):
    """A stretch of a text, and what it could become."""

    start: int
    end: int
    replacements: list[str]


def _read_opposites() -> dict[str, str]:
    """Both directions; where a word stands in several pairs, the first that begins with it counts."""
    opposites: dict[str, str] = {}
    pairs = [pair.split() for pair in _OPPOSITES.split("|")]
    for a, b in pairs:
        opposites.setdefault(a, b)
    for a, b in pairs:
        opposites.setdefault(b, a)
    return opposites


OPPOSITES = _read_opposites()


@dataclass(frozen=True)
class EditRule:
    """Any records with a prompt and a good answer: one number, word or piece of code of the answer is made wrong."""

    name: ClassVar[str] = "edit"
    scaffold: ClassVar[Scaffold] = "verbatim"

    rule: str = field(default="number", metadata={"help": "what is changed", "choices": ["number", "word", "code"]})
    prompt_field: str = field(default="prompt", metadata={"help": "the prompt, taken as it is"})
    chosen_field: str = field(default="chosen", metadata={"help": "the good answer, taken as it is"})

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {self.rule!r}.")

    def build(self, record: Mapping[str, Any], seed: int) -> list[BuiltPair]:
        prompt, chosen = text_field(record, self.prompt_field), text_field(record, self.chosen_field)
        edit, spared = corrupt(chosen, self.rule, record_rng(seed, self.rule, prompt, chosen))
        if edit is None:
            but = f" but in {' and '.join(spared)}" if spared else ""
            raise SkippedRecord(f"nothing in the answer that the rule {self.rule!r} could change{but}")
        return [BuiltPair(prompt, chosen, chosen[: edit.start] + edit.replacement + chosen[edit.end :], edit, spared)]


def corrupt(text: str, rule: str, rng: random.Random) -> tuple[Edit | None, tuple[str, ...]]:
    """One edit of a text by a rule of `RULES`, or None where the rule finds no place.

    Returns:
        The edit, and the kinds of protected spans that hold places which were left alone.
    """
    found = RULES[rule](text, rng)
    without = CODE_FENCES if rule == "code" else ""
    places, spared = outside_protected(text, found, lambda place: (place.start, place.end), without=without)
    if not places:
        return None, spared
    place = rng.choice(places)
    original = text[place.start : place.end]
    return Edit(original, rng.choice(place.replacements), place.start, place.end), spared


def number_places(text: str, rng: random.Random) -> Iterable[Place]:
    """Every number: whole, with decimals or thousands commas, part of no word; also Chinese numerals (二十四)."""
    for match in _NUMBER.finditer(in_ascii(text)):
        start, end = match.span()
        yield Place(start, end, [change_one_digit(text[start:end], rng)])
    for match in HAN_NUMBER.finditer(text):
        yield Place(*match.span(), [change_one_numeral(match.group(), rng)])


def word_places(text: str, rng: random.Random) -> Iterable[Place]:
    """Every English word with a known opposite, in its own case."""
    for match in _WORD.finditer(text):
        word = match.group()
        opposite = OPPOSITES.get(word.lower())
        if opposite is not None:
            yield Place(*match.span(), [_in_case_of(word, opposite)])


def code_places(text: str, rng: random.Random) -> Iterable[Place]:
    """Every operator, truth value, bound and whole number of the code, strings and comments left out.

    The code is what stands between ``` fences or, where there are none, the whole text.
    """
    fenced = [match.span("code") for match in FENCE.finditer(text)]
    for start, end in fenced or [(0, len(text))]:
        for match in _CODE_TOKEN.finditer(text, start, end):
            token = match.group()
            if match.group("operator"):
                yield Place(*match.span(), [_OPERATORS[token]])
            elif match.group("number"):
                number = int(token)
                yield Place(*match.span(), [str(number + 1)] + ([str(number - 1)] if number else []))


def _in_case_of(word: str, opposite: str) -> str:
    if len(word) > 1 and word.isupper():
        return opposite.upper()
    return opposite[:1].upper() + opposite[1:] if word[0].isupper() else opposite


RULES: dict[str, Callable[[str, random.Random], Iterable[Place]]] = {
    "number": number_places,
    "word": word_places,
    "code": code_places,
}
"""Rule -> the places of a text that it could change. A new rule is one function and one line here."""
