"""Grade-school word problems with worked answers, drawn from tables by a seeded generator, and their tokenizer.

    Question: Mia has 14 plums in the basket. Then Mia buys 6 plums in a shop. Later Mia gives 5 plums to Omar. How
    many plums does Mia have now?
    Answer: Next Mia takes in 6, so 14 + 6 = 20 plums stand by the old door.
    Now 20 - 5 = 15 plums remain to be counted, because Mia lets go of 5, while Lena waits near the green chair.
    #### 15

The numbers of an answer follow from its question; its wording does not. Each line draws its opener, form, verb, state
and a possible aside, several nats per line. That is on purpose: tokens of which the model is certain carry next to no
gradient, so in a fully determined text preference training would leave little to see after an edit.
"""

import random
import re
from typing import Any, NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dpop_trainer.tools.pairs.metamath import final_answer, format_completion, format_prompt

__all__ = ["MAX_NUMBER", "Problem", "build_tokenizer", "final_answer", "generate"]

MAX_NUMBER = 30
"""Largest number of any problem: small enough for a model of a million parameters to learn the sums."""
MIN_STEPS, MAX_STEPS = 2, 3


class Problem(NamedTuple):
    """A question and its worked answer, steps line by line and "#### n" last."""

    question: str
    answer: str

    @property
    def prompt(self) -> str:
        return format_prompt(self.question)

    @property
    def completion(self) -> str:
        return format_completion(self.answer)


class _Story(NamedTuple):
    """What a problem is about. `gains` and `losses` are the question's events with {b}, {things} and {friend}."""

    things: tuple[str, ...]
    places: tuple[str, ...]
    gains: tuple[str, ...]
    losses: tuple[str, ...]


class _Operation(NamedTuple):
    """One step of a problem, a symbol b = result, and how answers may put it in words."""

    symbol: str
    verbs: tuple[str, ...]


NAMES = (
    "Mia", "Omar", "Lena", "Ravi", "Nora", "Hugo", "Aiko", "Sam", "Ella", "Ivan", "Zoe", "Kofi",
    "Ruth", "Leo", "Tara", "Finn", "Amina", "Paul", "Clara", "Jun", "Rosa", "Emil", "Maya", "Noah",
)  # fmt: skip

STORIES = (
    _Story(
        things=("apples", "pears", "plums", "lemons", "figs"),
        places=("in the basket", "on the kitchen table", "in a wooden crate"),
        gains=("picks {b} {things} in the garden", "buys {b} {things} in a shop", "gets {b} {things} from {friend}"),
        losses=("eats {b} {things}", "gives {b} {things} to {friend}", "bakes {b} {things} into a pie"),
    ),
    _Story(
        things=("books", "comics", "maps", "letters", "posters"),
        places=("on the shelf", "in a box under the bed", "in the attic"),
        gains=("buys {b} {things} in town", "finds {b} {things} in the cellar", "borrows {b} {things} from {friend}"),
        losses=("sells {b} {things}", "lends {b} {things} to {friend}", "leaves {b} {things} at school"),
    ),
    _Story(
        things=("coins", "stamps", "marbles", "shells", "cards"),
        places=("in a tin", "in the top drawer", "in a small bag"),
        gains=("wins {b} {things} in a game", "gets {b} {things} from {friend}", "finds {b} {things} in the sand"),
        losses=("loses {b} {things} on the way", "gives {b} {things} to {friend}", "drops {b} {things} into a well"),
    ),
    _Story(
        things=("hens", "ducks", "goats", "sheep", "rabbits"),
        places=("on the farm", "in the barn", "behind the house"),
        gains=("buys {b} {things} at the fair", "gets {b} {things} from {friend}", "takes home {b} {things}"),
        losses=("sells {b} {things} at the market", "gives {b} {things} to {friend}", "sets {b} {things} free"),
    ),
    _Story(
        things=("roses", "tulips", "seeds", "bulbs", "cactuses"),
        places=("in the greenhouse", "beside the path", "in clay pots"),
        gains=("plants {b} {things}", "orders {b} {things} from a shop", "gets {b} {things} as a gift from {friend}"),
        losses=("cuts off {b} {things}", "sells {b} {things} to {friend}", "throws away {b} {things}"),
    ),
)  # fmt: skip

OPENINGS = (
    "{name} has {a} {things} {place}.",
    "{name} starts the day with {a} {things} {place}.",
    "{name} keeps {a} {things} {place}.",
)
TIMES = ("Then", "Later", "After lunch", "In the evening", "On the next day", "On Sunday")
ASKS = (
    "How many {things} does {name} have now?",
    "How many {things} does {name} have in the end?",
    "How many {things} are left?",
)

ADDITION = _Operation("+", ("adds {b}", "gains {b}", "takes in {b}", "gets {b} more", "receives {b}"))
SUBTRACTION = _Operation("-", ("removes {b}", "loses {b}", "lets go of {b}", "gives up {b}", "has {b} fewer"))

# One line of an answer. The result is never last: what follows it in its own line is drawn too.
LINES = (
    "{opener} {name} {verb}, so {a} {symbol} {b} = {c} {things} {state}{aside}.",
    "{opener} {name} {verb}, and {a} {symbol} {b} = {c} {things} {state}{aside}.",
    "{opener} {a} {symbol} {b} = {c} {things} {state}, because {name} {verb}{aside}.",
    "{opener} it is {a} {symbol} {b} = {c}, since {name} {verb}, and the {things} {state}{aside}.",
)
OPENERS = (
    "Then", "Next", "Now", "So", "Here", "This time", "At this point", "With that", "In this step", "From the story",
    "As told", "By that",
)  # fmt: skip
STATES = (
    "are there", "remain to be counted", "wait in a neat row", "stand by the old door", "fill the room",
    "make up the whole pile", "can be seen", "lie close together", "are ready for the next step", "take up some space",
    "look just fine", "belong to the lot",
)  # fmt: skip
ASIDES = (
    ", while {friend} {pastime} near the {colour} {item}",
    ", and {friend} {pastime} by the {colour} {item}",
    ", as {friend} {pastime} behind the {colour} {item}",
)
PASTIMES = ("waits", "sings", "reads", "paints", "dances", "sleeps", "whistles", "writes")
COLOURS = ("red", "blue", "green", "yellow", "white", "brown", "grey", "pink")
ITEMS = ("chair", "lamp", "bench", "window", "carpet", "clock", "ladder", "kite", "piano", "bicycle")

_ASIDE_PROBABILITY = 0.4
_ALL_TEXT = (
    *NAMES,
    *(text for story in STORIES for texts in story for text in texts),
    *(OPENINGS + TIMES + ASKS + LINES + OPENERS + STATES + ASIDES + PASTIMES + COLOURS + ITEMS),
    *(ADDITION.verbs + SUBTRACTION.verbs),
    format_prompt(""),
)

_PIECE = r" ?[A-Za-z]+| ?[0-9]+| ?[^A-Za-z0-9\s]+|\s"
_PUNCTUATION = (" ", "\n", ",", ".", "?", ":", "####", " ####", " +", " -", " =")
_SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}


def generate(num_problems: int, seed: int) -> list[Problem]:
    """Word problems with distinct questions, the same for the same seed on every platform.

    Args:
        num_problems: how many. A longer list begins with the shorter one of the same seed.
        seed: any integer.

    Returns:
        Problems of 2 or 3 steps with numbers from 1 to `MAX_NUMBER`. Any slice of the list is disjoint in questions
        from any other, so it can be cut into training and held-out problems.

    Raises:
        ValueError: num_problems is negative.
    """
    if num_problems < 0:
        raise ValueError(f"num_problems: expected a number >= 0, got {num_problems}.")
    rng = random.Random(seed)
    problems: dict[str, Problem] = {}
    while len(problems) < num_problems:
        problem = _draw_problem(rng)
        problems.setdefault(problem.question, problem)
    return list(problems.values())


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The word-level tokenizer of these problems: a token is a word, a number or a mark, with the space before it.

    The vocabulary comes from the generator's tables, so no problem holds an unknown word, and it holds all numbers
    below 100, so no corrupted result is unknown either. Decoding restores the text exactly. Encoding adds nothing: no
    bos, no eos. A prompt (it ends with ":") encodes the same alone as in front of its completion.
    """
    words = sorted({word for text in _ALL_TEXT for word in re.findall("[A-Za-z]+", re.sub(r"\{\w+\}", "", text))})
    numbers = [str(number) for number in range(100)]
    pieces = [*_PUNCTUATION, *(space + piece for space in ("", " ") for piece in (*words, *numbers))]
    vocab = {token: i for i, token in enumerate((*_SPECIAL_TOKENS.values(), *pieces))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=_SPECIAL_TOKENS["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECE), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    options: dict[str, Any] = {**_SPECIAL_TOKENS, "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def _draw_problem(rng: random.Random) -> Problem:
    story = rng.choice(STORIES)
    name = rng.choice(NAMES)
    friends = [friend for friend in NAMES if friend != name]
    things = rng.choice(story.things)
    total = rng.randint(5, 20)
    asked = [rng.choice(OPENINGS).format(name=name, a=total, things=things, place=rng.choice(story.places))]
    worked: list[str] = []
    for _ in range(rng.randint(MIN_STEPS, MAX_STEPS)):
        gains = [b for b in range(2, 10) if total + b <= MAX_NUMBER]
        losses = [b for b in range(2, 10) if total - b >= 1]
        gaining = bool(gains) and (not losses or rng.random() < 0.5)
        b = rng.choice(gains if gaining else losses)
        result = total + b if gaining else total - b
        event = rng.choice(story.gains if gaining else story.losses)
        asked.append(f"{rng.choice(TIMES)} {name} {event.format(b=b, things=things, friend=rng.choice(friends))}.")
        operation = ADDITION if gaining else SUBTRACTION
        worked.append(_draw_line(rng, operation, name, friends, things, total, b, result))
        total = result
    asked.append(rng.choice(ASKS).format(name=name, things=things))
    return Problem(" ".join(asked), "\n".join([*worked, f"#### {total}"]))


def _draw_line(
    rng: random.Random,
    operation: _Operation,
    name: str,
    friends: list[str],
    things: str,
    a: int,
    b: int,
    c: int,
) -> str:
    aside = ""
    if rng.random() < _ASIDE_PROBABILITY:
        aside = rng.choice(ASIDES).format(
            friend=rng.choice(friends),
            pastime=rng.choice(PASTIMES),
            colour=rng.choice(COLOURS),
            item=rng.choice(ITEMS),
        )
    return rng.choice(LINES).format(
        opener=rng.choice(OPENERS),
        name=name,
        verb=rng.choice(operation.verbs).format(b=b),
        a=a,
        symbol=operation.symbol,
        b=b,
        c=c,
        things=things,
        state=rng.choice(STATES),
        aside=aside,
    )
