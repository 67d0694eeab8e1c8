"""Records of preference pairs -> token ids, a batch at a time: one tokenizer call for all prompts and answers.

Each record becomes three strings, prompt, prompt + chosen and prompt + rejected. The answers begin where the tokens of
the three part, which is before the prompt's end if tokens merge across it.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2

from dpop_trainer.data.pair_tree import PairIds
from dpop_trainer.data.records import Form, read_messages_pair, read_text_pair, read_token_pair
from dpop_trainer.edits import common_prefix_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class EncodedPair(NamedTuple):
    """A pair's token ids, and whether its prompt has fewer of them than the prompt tokenised alone."""

    ids: PairIds
    prompt_shortened: bool


def encode_records(
    records: list[dict[str, Any]], indices: list[int], *, form: Form, tokenizer: "PreTrainedTokenizerBase"
) -> list[EncodedPair]:
    """
    Args:
        records: checked records, all of one form.
        indices: their rows in the data set, for messages.
        form: what the records hold.
        tokenizer: has an EOS token for texts and a chat template for messages.

    Raises:
        ValueError: the chat template refuses a record.
    """
    if form == "tokens":
        return [EncodedPair(read_token_pair(record), False) for record in records]
    if form == "text":
        return _encode_texts(records, tokenizer)
    return _encode_messages(records, indices, tokenizer)


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase", form: Form) -> None:
    """
    Raises:
        ValueError: this is no tokenizer, or it lacks the EOS token or the chat template that the form needs.
    """
    if hasattr(tokenizer, "tokenizer"):
        raise ValueError(
            f"processing_class: expected a tokenizer, got {type(tokenizer).__name__}. "
            "Pass its .tokenizer; images are not trained on."
        )
    if form == "text" and tokenizer.eos_token_id is None:
        raise ValueError(
            "processing_class: expected a tokenizer with an EOS token, which ends each answer, got one without. "
            "Set tokenizer.eos_token."
        )
    if form == "messages" and not tokenizer.chat_template:
        raise ValueError(
            "processing_class: expected a tokenizer with a chat template, since the pairs are messages, got one "
            "without. Set tokenizer.chat_template, take the chat model's tokenizer, or write the pairs as text."
        )


def _encode_texts(records: list[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase") -> list[EncodedPair]:
    pairs = [read_text_pair(record) for record in records]
    texts = [(pair.prompt, pair.prompt + pair.chosen, pair.prompt + pair.rejected) for pair in pairs]
    encoded = tokenizer(
        [text for three in texts for text in three],
        return_attention_mask=False,
        return_special_tokens_mask=True,
        verbose=False,
    )
    ids = [
        _without_appended(text_ids, added)
        for text_ids, added in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)
    ]
    return [_end_answers(pair, tokenizer.eos_token_id) for pair in _split_all(ids)]


def _encode_messages(
    records: list[dict[str, Any]], indices: list[int], tokenizer: "PreTrainedTokenizerBase"
) -> list[EncodedPair]:
    rendered = [_render(record, index, tokenizer) for record, index in zip(records, indices, strict=True)]
    # the template has written the special tokens, the turn's end among them
    encoded = tokenizer(
        [text for three in rendered for text in three],
        add_special_tokens=False,
        return_attention_mask=False,
        verbose=False,
    )
    return _split_all(encoded["input_ids"])


def _render(record: dict[str, Any], index: int, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The chat template's text of the prompt, prompt + chosen and prompt + rejected."""
    pair = read_messages_pair(record)
    options = {**pair.template_options, "tokenize": False}
    prompt_options = {**options, "add_generation_prompt": True}
    try:
        return [
            str(tokenizer.apply_chat_template(pair.prompt, **prompt_options)),
            str(tokenizer.apply_chat_template(pair.prompt + pair.chosen, **options)),
            str(tokenizer.apply_chat_template(pair.prompt + pair.rejected, **options)),
        ]
    except jinja2.TemplateError as error:
        raise ValueError(
            f"record {index}: expected messages that the chat template accepts, got its error: {error}. "
            "Correct the record's roles and their order, or use another template."
        ) from error


def _without_appended(ids: list[int], added: list[int]) -> list[int]:
    """The ids less the special tokens that the tokenizer put behind the text (EOS, SEP)."""
    end = len(ids)
    while end and added[end - 1]:
        end -= 1
    # of nothing but added tokens, none is known to stand behind
    return ids[:end] or ids


def _split_all(ids: list[list[int]]) -> list[EncodedPair]:
    return [_split(*ids[start : start + 3]) for start in range(0, len(ids), 3)]


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
