"""Special tokens where texts meet: one BOS at the beginning, one end behind an answer, none where the two join.

    "<s>Hi"              the tokenizer adds a BOS of its own           one is left out
    "Hello</s> "         EOS is added behind the white space           ends in the first
    "Hello<|im_end|>\\n"  a chat written out as text                    ends in it, without EOS
    content "Hello</s>"  the template ends the turn again              the content goes without

What is left out is counted. What stays as it is, since nobody can tell what was meant (a BOS in front of an answer, an
EOS behind the prompt, token ids), is counted as well.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from dpop_trainer.data.messages import Message
from dpop_trainer.data.pair_tree import PairIds
from dpop_trainer.data.templates import TEMPLATE_ERRORS, render_within

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# what families call the end of a turn or of a text; one that a tokenizer does not know is ordinary text
_KNOWN_ENDS = (
    "</s>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|eot|>",
    "<|end|>",
    "<|return|>",
    "<|end_of_turn|>",
    "<|END_OF_TURN_TOKEN|>",
    "<end_of_turn>",
    "<turn|>",
    "<｜end▁of▁sentence｜>",
)
_MARK = "qxmark"
_LIKE_A_TOKEN = re.compile(r"<.+>|\[.+\]", re.DOTALL)
_NUM_BLANK = 4  # white space tokens behind an end, at most


class Specials(NamedTuple):
    """The special tokens of a tokenizer and its chat template that belong at the seams."""

    bos: str | None
    bos_id: int | None
    eos: str | None
    ends: tuple[str, ...]
    """Texts that end a turn, EOS among them."""
    end_ids: frozenset[int]
    """Those of them that are one token."""
    template_end: str
    """What the chat template ends an answer with, less white space; "" without a template, or where it has no mark."""


def specials_of(tokenizer: "PreTrainedTokenizerBase") -> Specials:
    """Read from the tokenizer, and from what its template makes of one answer."""
    template_end = _template_end(tokenizer) if tokenizer.chat_template else ""
    eos: str | None = tokenizer.eos_token  # type: ignore[assignment]
    added = tokenizer.added_tokens_encoder
    ends = [text for text in _KNOWN_ENDS if text in added]
    ends = list(dict.fromkeys([*([eos] if eos else []), *([template_end] if template_end else []), *ends]))
    ids = {added[text] for text in ends if text in added} | {tokenizer.eos_token_id} - {None}
    if template_end:
        end_ids: list[int] = tokenizer(template_end, add_special_tokens=False)["input_ids"]
        ids |= set(end_ids) if len(end_ids) == 1 else set()
    if getattr(tokenizer, "split_special_tokens", False):
        ends = []  # then no text is a special token
    bos: str | None = tokenizer.bos_token if ends else None  # type: ignore[assignment]
    return Specials(bos, tokenizer.bos_token_id, eos, tuple(ends), frozenset(ids), template_end)  # type: ignore[arg-type]


def without_ends(text: str, ends: Sequence[str]) -> tuple[str, str | None]:
    """The text before the ends that it ends with, white space around them included, and the first of these; or None."""
    first = None
    while True:
        bare = text.rstrip()
        end = next((end for end in ends if bare.endswith(end)), None)
        if end is None:
            return text, first
        text, first = bare[: -len(end)], end


def without_specials(message: Message, specials: Specials) -> Message:
    """A turn whose text neither begins with BOS nor ends with an end, where the template writes these itself."""
    content = message.get("content")
    if not isinstance(content, str):
        return message
    bare = content
    while specials.bos and bare.startswith(specials.bos):
        bare = bare[len(specials.bos) :]
    if specials.template_end and message["role"] not in ("system", "developer", "user"):
        bare, _ = without_ends(bare, specials.ends)
    return message if bare == content else {**message, "content": bare}


def without_second_bos(ids: list[int], bos_id: int | None) -> list[int]:
    """The ids with one BOS where they begin with more."""
    start = 0
    while len(ids) > start + 1 and ids[start] == ids[start + 1] == bos_id:
        start += 1
    return ids[start:]


def has_stray_specials(ids: PairIds, specials: Specials, *, is_chat: bool) -> bool:
    """Whether a special token at a seam stands where none should, or twice."""
    bos_id = specials.bos_id
    begins_twice = len(ids.prompt_ids) > 1 and ids.prompt_ids[0] == ids.prompt_ids[1] == bos_id
    # a chat template without a generation prompt ends the prompt with the end of the user's turn
    is_ended = not is_chat and len(ids.prompt_ids) > 1 and ids.prompt_ids[-1] in specials.end_ids
    return begins_twice or is_ended or any(_is_stray(answer, specials) for answer in ids[1:])


def last_visible(ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase", end_ids: frozenset[int]) -> int:
    """The last token that is not white space: the end that a chat template writes may stand before a line break.

    -1 where there is none.
    """
    for token_id in reversed(ids[-_NUM_BLANK:]):
        # an id that is none is refused later, by name
        if token_id in end_ids or token_id < 0 or str(tokenizer.decode([token_id])).strip():
            return token_id
    return ids[-1] if ids else -1


def _is_stray(answer: list[int], specials: Specials) -> bool:
    begins = len(answer) > 1 and (answer[0] == specials.bos_id or answer[0] in specials.end_ids)
    return begins or (len(answer) > 1 and answer[-1] == answer[-2] and answer[-1] in specials.end_ids)


def _template_end(tokenizer: "PreTrainedTokenizerBase") -> str:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}]
    try:
        text = render_within(lambda: str(tokenizer.apply_chat_template(turns, tokenize=False)))
    except TEMPLATE_ERRORS:
        return ""  # it wants more than a question and an answer
    end = text.rpartition(_MARK)[2].strip()
    return end if _LIKE_A_TOKEN.fullmatch(end) else ""
