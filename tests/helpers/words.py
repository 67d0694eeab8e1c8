"""A tokenizer of eleven words, one of characters, and pairs in them whose ids can be written down by hand."""

import numpy as np
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

UNK, BOS, EOS, A, B, C, D, E, USER, ASSISTANT, END = range(11)
WORDS = ["<unk>", "<s>", "</s>", "a", "b", "c", "d", "e", "<user>", "<assistant>", "<end>"]

# every turn ends with <end>, not with EOS; a generation prompt is the role alone
TEMPLATE = (
    "{% if tools %}e {% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "<{{ message['role'] }}> {{ message['content'] }} <end> "
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

CHARACTER_TEMPLATE = (
    "{{ tools | tojson }}|{{ (options or {}) | tojson }}|{{ flag is defined }}|"
    "{% for m in messages %}{{ m | tojson }};{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


def word_tokenizer(single: str = "$A", **special_tokens) -> PreTrainedTokenizerFast:
    """Words are tokens; `single` says which special tokens are added, as "<s> $A </s>" does."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    special_tokens = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", **special_tokens}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens)


def chat_tokenizer(template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    tokenizer = word_tokenizer("<s> $A")
    tokenizer.chat_template = template
    return tokenizer


def texts(*pairs: tuple[str, str, str]) -> Dataset:
    return Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in pairs])


def tokens(*pairs: tuple[list[int], list[int], list[int]], **columns) -> Dataset:
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return Dataset.from_dict({**dict(zip(names, map(list, zip(*pairs, strict=True)), strict=True)), **columns})


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def ids_of(dataset: Dataset) -> list[tuple[list[int], list[int], list[int]]]:
    return [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in dataset.to_list()]


def mixed_pairs() -> Dataset:
    """Pairs of every outcome, in an order that splits them unevenly over processes."""
    kinds = [
        ("a", " b c d", " b c e"),
        ("a b c d e", " a", " b"),
        ("a", " b", " b"),
        ("a", " c", " d"),
        ("b", " ", " c"),
    ]
    return texts(*(kinds[index] for index in np.random.default_rng(0).integers(len(kinds), size=97)))


def text_of(row):
    """Ids are codes of characters."""
    return tuple("".join(map(chr, row[name])) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character of ASCII, and a template that writes all that it is given, nulls too."""
    vocab = {"<end>": 0, **{chr(code): code for code in range(1, 128)}}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", chat_template=CHARACTER_TEMPLATE)
