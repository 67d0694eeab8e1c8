"""The generated files have the forms of the real ones, are the same each time, and the model has learned from them."""

import json
import math
import re
from collections import Counter

import pytest
import torch
from dpop_trainer.tools.pairs.counts import PairCounts
from dpop_trainer.tools.pairs.metamath import NO_RESULT, build_pairs
from stand_ins import NUM_RECORDS, english, write_stand_ins
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer


def read(path):
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("name", NUM_RECORDS)
def test_as_many_records_as_the_real_files_have(shared_data, name):
    records = read(shared_data / name)
    if name.startswith("gsm8k"):
        assert len(records) >= NUM_RECORDS[name]
    else:
        assert len(records) == NUM_RECORDS[name]


def test_word_problems(shared_data):
    for name in ("train", "test"):
        records = read(shared_data / "gsm8k" / f"{name}.jsonl")
        assert {tuple(record) for record in records} == {("question", "answer")}
        assert all(record["answer"].splitlines()[-1].startswith("#### ") for record in records)
        assert 0.95 < sum("<<" in record["answer"] for record in records) / len(records) < 1


def test_generated_sums_are_right_and_some_have_none(generated):
    records = read(generated / "data" / "gsm8k" / "train.jsonl")
    for record in records:
        result = None
        for mark in re.findall(r"<<(.*?)>>", record["answer"]):
            formula, result = mark.split("=")
            assert eval(formula) == int(result)
        if result is not None:
            assert record["answer"].endswith(f"#### {int(result):,}")
    counts = PairCounts()
    assert len(list(build_pairs(records, seed=0, counts=counts))) == 390
    assert counts.skipped == {NO_RESULT: 10}  # every fortieth of 400


def test_multiple_choice(shared_data):
    for name in ("Challenge", "Easy"):
        records = read(shared_data / "arc" / f"ARC-{name}_validation.jsonl")
        assert {tuple(record) for record in records} == {("id", "question", "choices", "answerKey")}
        labels = {"".join(record["choices"]["label"]) for record in records}
        assert labels == {"ABCD", "1234", "ABC", "ABCDE"}
        for record in records:
            assert record["answerKey"] in record["choices"]["label"]
            assert len(set(record["choices"]["text"])) == len(record["choices"]["label"])


def test_completions(shared_data):
    records = read(shared_data / "hellaswag" / "hellaswag_val_1000.jsonl")
    assert {tuple(record) for record in records} == {("ind", "query", "choices", "gold")}
    assert {len(set(record["choices"])) for record in records} == {4}
    assert {record["gold"] for record in records} == {0, 1, 2, 3}


def test_preferences(shared_data):
    folder = shared_data / "prefs"
    seen = set()
    for record in read(folder / "dpo_en_demo.json"):
        assert list(record) == ["conversations", "chosen", "rejected"]
        assert record["chosen"]["from"] == record["rejected"]["from"] == "gpt"
        said = [turn["from"] for turn in record["conversations"]]
        start = int(said[0] == "system")
        assert said[start:] == ["human", *["gpt", "human"] * ((len(said) - start) // 2)]
        seen.add((said[0], len(said) - start))
    assert {("human", 1), ("system", 1), ("human", 3), ("human", 5), ("human", 7)} <= seen
    for record in read(folder / "orca_dpo_pairs_validation.jsonl"):
        assert list(record) == ["input", "preferred_output", "non_preferred_output"]
        assert [turn["role"] for turn in record["input"]["messages"]] == ["system", "user"]
        assert [turn["role"] for turn in record["preferred_output"]] == ["assistant"]
    for record in read(folder / "tulu_preference_sample.jsonl"):
        assert list(record) == ["id", "source", "prompt", "chosen", "rejected"]
        assert [turn["role"] for turn in record["chosen"]] == ["user", "assistant"]
        assert record["chosen"][0] == record["rejected"][0]
        assert record["chosen"][0]["content"] == record["prompt"]


@pytest.mark.parametrize("folder", ["tokenizers/mistral", "models/stories260K"])
def test_tokenizers_that_fall_back_to_bytes(shared, folder):
    tokenizer = Tokenizer.from_file(str(shared / folder / "tokenizer.json"))
    assert [tokenizer.id_to_token(i) for i in (0, 1, 2, 3, 258)] == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]
    assert tokenizer.pre_tokenizer is None
    tokens = tokenizer.encode("a 12\n你", add_special_tokens=True).tokens
    known = ["你"] if "mistral" in folder else ["<0xE4>", "<0xBD>", "<0xA0>"]
    assert tokens == ["<s>", "▁a", "▁", "1", "2", "<0x0A>", *known]


def test_byte_level_tokenizer(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "gpt2")
    assert tokenizer.eos_token_id == len(tokenizer) - 1
    assert tokenizer.bos_token == tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.tokenize("a the\nb") == ["a", "Ġthe", "Ċ", "b"]
    assert tokenizer("")["input_ids"] == []  # nothing is added


def test_the_same_each_time(tmp_path):
    first, second = (written(tmp_path / name) for name in ("first", "second"))
    assert sum(path.name == "tokenizer.json" for path in first) == 3
    assert len(first) > len(NUM_RECORDS) + 3
    assert first == second


def written(folder):
    write_stand_ins(folder)
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@torch.no_grad()
def test_the_model_has_learned(tiny_llama):
    """It tells texts of the kind that it has not seen better than the frequencies of their own tokens would."""
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_llama), AutoModelForCausalLM.from_pretrained(tiny_llama)
    texts = [text for text in english(seed=1, num_texts=40) if text.startswith("Once")]
    nats, counts = 0.0, Counter()
    for ids in tokenizer(texts)["input_ids"]:
        rows = torch.tensor([ids])
        nats += model(input_ids=rows, labels=rows).loss.item() * (len(ids) - 1)
        counts.update(ids[1:])
    total = sum(counts.values())
    entropy = sum(-count / total * math.log(count / total) for count in counts.values())
    assert nats / total < entropy
