"""Real tokenizers on real and hard texts: an answer's tokens are those of the whole text, and its end comes once."""

import datasets.config
import pytest
from datasets import Dataset
from dpop_trainer.data import load_pairs, tokenise_pairs
from transformers import PreTrainedTokenizerFast
from words import texts, turn


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module", params=["gpt2", "mistral", "stories260K"])
def subword_tokenizer(request, shared) -> PreTrainedTokenizerFast:
    folder = "models" if request.param == "stories260K" else "tokenizers"
    path = shared / folder / request.param / "tokenizer.json"
    ends = ("<|endoftext|>", "<|endoftext|>") if request.param == "gpt2" else ("<s>", "</s>")
    return PreTrainedTokenizerFast(tokenizer_file=str(path), bos_token=ends[0], eos_token=ends[1])


def test_texts_of_a_file(subword_tokenizer, shared_data):
    """Prompt and answer together are the tokens of the whole text, and EOS."""
    records = load_pairs(shared_data / "prefs" / "tulu_preference_sample.jsonl")
    dataset = texts(
        *((r["prompt"], "\n" + r["chosen"][-1]["content"], "\n" + r["rejected"][-1]["content"]) for r in records)
    )
    tokenised, counts = tokenise_pairs(dataset, subword_tokenizer, vocab_size=len(subword_tokenizer))
    assert counts.num_pairs_in == len(records) == counts.num_pairs + counts.dropped_identical
    for row in tokenised.to_list():
        text = dataset[row["pair_id"]]
        for answer in ("chosen", "rejected"):
            whole = subword_tokenizer(text["prompt"] + text[answer], verbose=False)["input_ids"]
            assert row["prompt_ids"] + row[f"{answer}_ids"] == [*whole, subword_tokenizer.eos_token_id]


def test_conversations_of_a_file(subword_tokenizer, shared_data):
    """Every prompt ends with the generation prompt, and every token of the rendered conversation is there."""
    subword_tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]\n{% endif %}"
    )
    dataset = load_pairs(shared_data / "prefs" / "tulu_preference_sample.jsonl")
    tokenised, counts = tokenise_pairs(dataset, subword_tokenizer, max_length=512)
    dropped = counts.dropped_no_room + counts.dropped_identical + counts.dropped_identical_after_truncation
    assert counts.num_pairs + dropped + counts.dropped_empty == counts.num_pairs_in == 100
    rows = tokenised.to_list()
    assert counts.prompt_tokens == sum(len(row["prompt_ids"]) for row in rows)
    for row in rows:
        for answer in ("chosen", "rejected"):
            conversation = dataset[row["pair_id"]][answer]
            whole = subword_tokenizer.apply_chat_template(conversation, tokenize=False)
            ids = subword_tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]
            assert row["prompt_ids"] + row[f"{answer}_ids"] == ids[:512]


# right to left, joined emoji, both line ends, NUL, a combining accent, white space at either end, the EOS's own text
HARD_TEXTS = [
    "سلام دنیا",
    "👩‍👩‍👧 ok 🇯🇵",
    "one\r\ntwo\n\n",
    "a\x00b",
    "e\u0301t\u00e9",
    "  indented\t",
    "שלום </s> <|endoftext|>",
]


@pytest.mark.parametrize("joint", ["", " ", "\n"])
def test_hard_texts(subword_tokenizer, joint):
    """Prompt and answer are the tokens of the whole text and one EOS, whatever the text and wherever it is cut."""
    pairs = [
        (prompt, joint + chosen, joint + rejected)
        for prompt, chosen, rejected in zip(HARD_TEXTS, HARD_TEXTS[1:], HARD_TEXTS[2:], strict=False)
    ]
    dataset = texts(*pairs)
    tokenised, counts = tokenise_pairs(dataset, subword_tokenizer, vocab_size=len(subword_tokenizer))
    assert counts.num_pairs == len(pairs)
    eos = subword_tokenizer.eos_token_id
    for row, (prompt, *answers) in zip(tokenised.to_list(), pairs, strict=True):
        for ids, answer in zip((row["chosen_ids"], row["rejected_ids"]), answers, strict=True):
            whole = subword_tokenizer(prompt + answer)["input_ids"]
            while whole[-1] == eos:  # the text may end with it
                whole.pop()
            assert row["prompt_ids"] + ids == [*whole, eos]
        alone = subword_tokenizer(prompt)["input_ids"]
        assert row["prompt_ids"] == alone[: len(row["prompt_ids"])]


CHAT_TEMPLATES = {
    # name: template, what ends the assistant's turn
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>\n",
    ),
    "llama-3": (
        "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}<|start_header_id|>{{ m['role'] }}"
        "<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        "<|eot_id|>",
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}",
        None,  # EOS
    ),
    "thinking": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}",
        "<|im_end|>\n",
    ),
}


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_templates_end_turns_in_their_own_way(subword_tokenizer, name):
    """BOS, EOS and the ends of turns are those that the template wrote, each once; nothing is added or lost."""
    template, end = CHAT_TEMPLATES[name]
    end = subword_tokenizer.eos_token if end is None else end
    question, answers = turn("user", "What is 2 + 2?"), ("It is 4.", "It is 5. سلام 👩‍👧")
    right, wrong = (turn("assistant", answer) for answer in answers)
    dataset = Dataset.from_list([{"prompt": [question], "chosen": [right], "rejected": [wrong]}])
    before = subword_tokenizer.chat_template
    subword_tokenizer.chat_template = template
    try:
        tokenised, counts = tokenise_pairs(dataset, subword_tokenizer)
    finally:
        subword_tokenizer.chat_template = before
    (row,) = tokenised.to_list()
    special = [subword_tokenizer.bos_token_id, subword_tokenizer.eos_token_id]
    for ids, answer in zip((row["chosen_ids"], row["rejected_ids"]), answers, strict=True):
        assert subword_tokenizer.decode(ids).lstrip("\n ") == answer + end
        # gpt2's BOS is its EOS; only a template that writes one has it
        expected = {"llama-3": 1, "mistral": 2}.get(name, 0)
        assert sum(i in special for i in row["prompt_ids"] + ids) == expected
    # the empty thought of the generation prompt is in no conversation, so the prompt ends before it
    prompt_end = {"llama-3": "<|end_header_id|>", "mistral": "[/INST]"}.get(name, "assistant")
    assert subword_tokenizer.decode(row["prompt_ids"]).rstrip("\n ").endswith(prompt_end)
    whole_prompt = subword_tokenizer.apply_chat_template(
        [question], chat_template=template, add_generation_prompt=True, tokenize=False
    )
    num_alone = len(subword_tokenizer(whole_prompt, add_special_tokens=False)["input_ids"])
    assert counts.merged_boundaries == (len(row["prompt_ids"]) < num_alone)
    assert counts.merged_boundaries == 1 or name != "thinking"
