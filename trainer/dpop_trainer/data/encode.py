"""Preference pairs -> token ids, a batch at a time: one tokenizer call for all prompts and answers of a kind.

Each pair becomes three strings, prompt, prompt + chosen and prompt + rejected. The answers begin where the tokens of
the three part, which is before the prompt's end if tokens merge across it.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from dpop_trainer.data.edits import common_prefix_length
from dpop_trainer.data.left_out import has_foreign_turns, leaves_out
from dpop_trainer.data.messages import NO_CHAT_TEMPLATE, Message
from dpop_trainer.data.pair_tree import PairIds
from dpop_trainer.data.records import Kind, MessagesPair, Pair, TextPair
from dpop_trainer.data.seams import (
    Specials,
    has_stray_specials,
    last_visible,
    specials_of,
    without_ends,
    without_second_bos,
    without_specials,
)
from dpop_trainer.data.templates import TEMPLATE_ERRORS, TemplateLimitError, render_within, turn_opening
from dpop_trainer.data.tool_arguments import as_objects, as_texts, has_tool_calls, is_in_python

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class EncodedPair(NamedTuple):
    """A pair's token ids, and what is to be said of them."""

    ids: PairIds
    prompt_shortened: bool = False
    """The prompt has fewer tokens than when tokenised alone."""
    mended_seams: bool = False
    """A second BOS or a second end of a turn was left out."""
    stray_specials: bool = False
    """A special token stands at a seam where none should, or twice."""
    left_out: bool = False
    """The chat template leaves out a part of an answer, or a tool."""
    foreign_turns: bool = False
    """An answer goes on over turns that the model does not write."""
    plain_text: bool = False
    """The tokenizer has a chat template, and the prompt is text without the turns that it writes."""
    chosen_end: int = -1
    """The last token of the chosen answer that is not white space; -1 of none."""
    rejected_end: int = -1


class Refused(NamedTuple):
    """A pair that the chat template does not take."""

    reason: str


def encode_records(pairs: list[Pair], tokenizer: "PreTrainedTokenizerBase") -> list[EncodedPair | Refused]:
    """
    Args:
        pairs: of any kinds, mixed.
        tokenizer: has an EOS token for texts and a chat template for messages.

    Returns:
        For each pair its tokens or, where the chat template refuses it, why.
    """
    specials = specials_of(tokenizer)
    encoded: list[EncodedPair | Refused] = [
        EncodedPair(pair) if isinstance(pair, PairIds) else Refused("") for pair in pairs
    ]
    for pair_type, encode in ((TextPair, _encode_texts), (MessagesPair, _encode_messages)):
        rows = [row for row, pair in enumerate(pairs) if isinstance(pair, pair_type)]
        if rows:
            for row, result in zip(rows, encode([pairs[row] for row in rows], tokenizer, specials), strict=True):
                encoded[row] = result
    return [
        item
        if isinstance(item, Refused)
        else item._replace(
            stray_specials=has_stray_specials(item.ids, specials, is_chat=isinstance(pair, MessagesPair)),
            chosen_end=last_visible(item.ids.chosen_ids, tokenizer, specials.end_ids),
            rejected_end=last_visible(item.ids.rejected_ids, tokenizer, specials.end_ids),
        )
        for pair, item in zip(pairs, encoded, strict=True)
    ]


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase", kinds: Iterable[Kind]) -> None:
    """
    Raises:
        ValueError: this is no tokenizer, or it lacks the EOS token or the chat template that the pairs need.
    """
    if hasattr(tokenizer, "tokenizer"):
        raise ValueError(
            f"processing_class: expected a tokenizer, got {type(tokenizer).__name__}. "
            "Pass its .tokenizer; images are not trained on."
        )
    kinds = set(kinds)
    if "text" in kinds and tokenizer.eos_token_id is None:
        raise ValueError(
            "processing_class: expected a tokenizer with an EOS token, which ends each answer, got one without. "
            "Set tokenizer.eos_token."
        )
    if "messages" in kinds and not tokenizer.chat_template:
        raise ValueError(NO_CHAT_TEMPLATE)


class _Answer(NamedTuple):
    """A text answer, without what stands twice."""

    text: str
    adds_eos: bool
    """Its text has no end of its own, or one that is EOS."""
    has_end: bool
    """The data set wrote an end behind it."""
    is_mended: bool


def _encode_texts(pairs: list[Any], tokenizer: "PreTrainedTokenizerBase", specials: Specials) -> list[EncodedPair]:
    answers = [[_answer(text, specials) for text in (pair.chosen, pair.rejected)] for pair in pairs]
    threes = [
        (pair.prompt, *(pair.prompt + answer.text for answer in both))
        for pair, both in zip(pairs, answers, strict=True)
    ]
    texts = list(dict.fromkeys(text for three in threes for text in three))  # several pairs may share a prompt
    encoded = tokenizer(
        texts,
        return_attention_mask=False,
        return_special_tokens_mask=True,
        verbose=False,
    )
    ids = {
        text: _without_appended(text_ids, added)
        for text, text_ids, added in zip(texts, encoded["input_ids"], encoded["special_tokens_mask"], strict=True)
    }
    eos_id: Any = tokenizer.eos_token_id
    opening = turn_opening(tokenizer)
    return [
        _end_answers(_split([ids[text] for text in three], specials), both, eos_id)._replace(
            plain_text=opening is not None and opening not in three[0]
        )
        for three, both in zip(threes, answers, strict=True)
    ]


def _answer(text: str, specials: Specials) -> _Answer:
    bare, end = without_ends(text, specials.ends)
    if end is None:
        return _Answer(text, True, False, False)
    is_eos = end == specials.eos
    return _Answer(bare if is_eos else bare + end, is_eos, True, text != bare + end or not is_eos)


def _encode_messages(
    pairs: list[Any], tokenizer: "PreTrainedTokenizerBase", specials: Specials
) -> list[EncodedPair | Refused]:
    bare = [
        pair._replace(**{name: _bare(getattr(pair, name), specials) for name in ("prompt", "chosen", "rejected")})
        for pair in pairs
    ]
    rendered = [_render(pair, tokenizer) for pair in bare]
    texts = list(dict.fromkeys(text for three in rendered if not isinstance(three, Refused) for text in three))
    if not texts:
        return [three for three in rendered if isinstance(three, Refused)]
    # the template has written the special tokens, the turn's end among them
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids = dict(zip(texts, encoded["input_ids"], strict=True))
    results: list[EncodedPair | Refused] = []
    for given, pair, three in zip(pairs, bare, rendered, strict=True):
        if isinstance(three, Refused):
            results.append(three)
            continue
        encoded_pair = _split([ids[text] for text in three], specials)
        results.append(
            encoded_pair._replace(
                mended_seams=encoded_pair.mended_seams or pair != given,
                left_out=leaves_out(pair, *three),
                foreign_turns=has_foreign_turns(pair),
            )
        )
    return results


def _bare(turns: list[Message], specials: Specials) -> list[Message]:
    return [without_specials(message, specials) for message in turns]


def _render(pair: MessagesPair, tokenizer: "PreTrainedTokenizerBase") -> tuple[str, str, str] | Refused:
    """The chat template's text of the prompt, prompt + chosen and prompt + rejected."""
    if not has_tool_calls(pair):
        return _render_as_is(pair, tokenizer)
    texts = _render_as_is(as_objects(pair), tokenizer)
    if not isinstance(texts, Refused) and not is_in_python(as_objects(pair), texts):
        return texts
    others = _render_as_is(as_texts(pair), tokenizer)
    return texts if isinstance(others, Refused) else others


def _render_as_is(pair: MessagesPair, tokenizer: "PreTrainedTokenizerBase") -> tuple[str, str, str] | Refused:
    options: dict[str, Any] = {**pair.template_options, "tokenize": False}
    prompt_options: dict[str, Any] = {**options, "add_generation_prompt": True}
    try:
        return (
            render_within(lambda: str(tokenizer.apply_chat_template(pair.prompt, **prompt_options))),
            render_within(lambda: str(tokenizer.apply_chat_template(pair.prompt + pair.chosen, **options))),
            render_within(lambda: str(tokenizer.apply_chat_template(pair.prompt + pair.rejected, **options))),
        )
    except TemplateLimitError as error:
        return Refused(
            f"expected messages that the chat template of {tokenizer.name_or_path!r} renders, got none: {error}. Use "
            "another template (chat_template_path), or remove the record."
        )
    except TEMPLATE_ERRORS as error:
        return Refused(
            f"expected messages that the chat template accepts, got its error: {error}. "
            "Correct the record's roles and their order, or use another template."
        )


def _without_appended(ids: list[int], added: list[int]) -> list[int]:
    """The ids less the special tokens that the tokenizer put behind the text (EOS, SEP)."""
    end = len(ids)
    while end and added[end - 1]:
        end -= 1
    # of nothing but added tokens, none is known to stand behind
    return ids[:end] or ids


def _split(three: list[list[int]], specials: Specials) -> EncodedPair:
    """The ids of prompt, prompt + chosen and prompt + rejected, parted where the answers begin."""
    prompt_ids, *wholes = (without_second_bos(ids, specials.bos_id) for ids in three)
    length = min(common_prefix_length(prompt_ids, whole) for whole in wholes)
    ids = PairIds(prompt_ids[:length], *(whole[length:] for whole in wholes))
    is_mended = any(len(after) < len(before) for after, before in zip((prompt_ids, *wholes), three, strict=True))
    return EncodedPair(ids, prompt_shortened=length < len(prompt_ids), mended_seams=is_mended)


def _end_answers(pair: EncodedPair, answers: list[_Answer], eos_token_id: int) -> EncodedPair:
    """The pair with one EOS behind each answer that has no other end; an answer without tokens stays without."""
    ended = []
    for ids, answer in zip(pair.ids[1:], answers, strict=True):
        end = len(ids)
        while answer.adds_eos and end and ids[end - 1] == eos_token_id:
            end -= 1
        ended.append([*ids[:end], eos_token_id] if answer.adds_eos and (ids or answer.has_end) else ids)
    is_mended = pair.mended_seams or any(answer.is_mended for answer in answers)
    return pair._replace(ids=PairIds(pair.ids.prompt_ids, *ended), mended_seams=is_mended)
