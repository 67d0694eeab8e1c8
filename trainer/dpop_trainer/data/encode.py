"""Preference pairs -> token ids, a batch at a time: one tokenizer call for all prompts and answers of a kind.

Each pair becomes three strings, prompt, prompt + chosen and prompt + rejected. The answers begin where the tokens of
the three part, which is before the prompt's end if tokens merge across it.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2

from dpop_trainer.data.edits import common_prefix_length
from dpop_trainer.data.pair_tree import PairIds
from dpop_trainer.data.records import Kind, MessagesPair, Pair, TextPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# what a template's expressions raise on a message of another shape than they were written for
_TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError)


class EncodedPair(NamedTuple):
    """A pair's token ids, and whether its prompt has fewer of them than the prompt tokenised alone."""

    ids: PairIds
    prompt_shortened: bool


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
    encoded: list[EncodedPair | Refused] = [
        EncodedPair(pair, False) if isinstance(pair, PairIds) else Refused("") for pair in pairs
    ]
    for pair_type, encode in ((TextPair, _encode_texts), (MessagesPair, _encode_messages)):
        rows = [row for row, pair in enumerate(pairs) if isinstance(pair, pair_type)]
        if rows:
            for row, result in zip(rows, encode([pairs[row] for row in rows], tokenizer), strict=True):
                encoded[row] = result
    return encoded


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
        raise ValueError(
            "processing_class: expected a tokenizer with a chat template, since the pairs are messages, got one "
            "without. Give one with chat_template_path (chatml, a .jinja file, a chat model to take it from, or the "
            "template itself), set tokenizer.chat_template, take the chat model's tokenizer, or write the pairs as "
            "text."
        )


def _encode_texts(pairs: list[Any], tokenizer: "PreTrainedTokenizerBase") -> list[EncodedPair]:
    threes = [(pair.prompt, pair.prompt + pair.chosen, pair.prompt + pair.rejected) for pair in pairs]
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
    return [_end_answers(_split(*(ids[text] for text in three)), tokenizer.eos_token_id) for three in threes]


def _encode_messages(pairs: list[Any], tokenizer: "PreTrainedTokenizerBase") -> list[EncodedPair | Refused]:
    rendered = [_render(pair, tokenizer) for pair in pairs]
    texts = list(dict.fromkeys(text for three in rendered if not isinstance(three, Refused) for text in three))
    if not texts:
        return [three for three in rendered if isinstance(three, Refused)]
    # the template has written the special tokens, the turn's end among them
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids = dict(zip(texts, encoded["input_ids"], strict=True))
    return [three if isinstance(three, Refused) else _split(*(ids[text] for text in three)) for three in rendered]


def _render(pair: MessagesPair, tokenizer: "PreTrainedTokenizerBase") -> tuple[str, str, str] | Refused:
    """The chat template's text of the prompt, prompt + chosen and prompt + rejected."""
    options: dict[str, Any] = {**pair.template_options, "tokenize": False}
    prompt_options: dict[str, Any] = {**options, "add_generation_prompt": True}
    try:
        return (
            str(tokenizer.apply_chat_template(pair.prompt, **prompt_options)),
            str(tokenizer.apply_chat_template(pair.prompt + pair.chosen, **options)),
            str(tokenizer.apply_chat_template(pair.prompt + pair.rejected, **options)),
        )
    except _TEMPLATE_ERRORS as error:
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


def _split(prompt_ids: list[int], prompt_chosen_ids: list[int], prompt_rejected_ids: list[int]) -> EncodedPair:
    length = min(
        common_prefix_length(prompt_ids, prompt_chosen_ids), common_prefix_length(prompt_ids, prompt_rejected_ids)
    )
    ids = PairIds(prompt_ids[:length], prompt_chosen_ids[length:], prompt_rejected_ids[length:])
    return EncodedPair(ids, prompt_shortened=length < len(prompt_ids))


def _end_answers(pair: EncodedPair, eos_token_id: Any) -> EncodedPair:
    """The pair with exactly one EOS at the end of each answer; an answer without tokens stays without."""
    prompt_ids, *answers = pair.ids
    ended = []
    for answer_ids in answers:
        end = len(answer_ids)
        while end and answer_ids[end - 1] == eos_token_id:
            end -= 1
        ended.append([*answer_ids[:end], eos_token_id] if answer_ids else [])
    return pair._replace(ids=PairIds(prompt_ids, *ended))
