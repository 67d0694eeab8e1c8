"""Pairs become token ids: where answers begin and end, how they are cut, what is dropped, what is counted."""

import itertools
import json
import logging
import shutil
from pathlib import Path

import datasets.config
import dpop_trainer
import numpy as np
import pytest
from datasets import Dataset
from dpop_trainer.data import (
    SourceStream,
    TokeniseCounts,
    TokenisedStream,
    code_hash,
    load_pairs,
    tokenise,
    tokenise_pairs,
)
from dpop_trainer.data.pair_tree import PairIds
from dpop_trainer.data.tokenizer_digest import tokenizer_digest
from dpop_trainer.data.truncate import truncate_pair
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast
from words import (
    ASSISTANT,
    BOS,
    END,
    EOS,
    TEMPLATE,
    USER,
    A,
    B,
    C,
    D,
    E,
    chat_tokenizer,
    ids_of,
    mixed_pairs,
    texts,
    tokens,
    turn,
    word_tokenizer,
)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-pair encoding of the letters a, b, c in which "a" followed by "b" is one token."""
    vocab = {"</s>": 0, "a": 1, "b": 2, "c": 3, "ab": 4}
    tokenizer = Tokenizer(models.BPE(vocab, [("a", "b")]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def counts_of(**counts: int) -> TokeniseCounts:
    return TokeniseCounts(**{**dict.fromkeys(TokeniseCounts._fields, 0), **counts})


def test_texts_and_their_counts():
    tokenised, counts = tokenise_pairs(texts(("a b", " c", " d"), ("a", " b c", " b")), word_tokenizer("<s> $A"))
    assert ids_of(tokenised) == [
        ([BOS, A, B], [C, EOS], [D, EOS]),
        ([BOS, A], [B, C, EOS], [B, EOS]),
    ]
    assert tokenised.column_names == ["prompt_ids", "chosen_ids", "rejected_ids", "pair_id"]
    assert tokenised["pair_id"][:] == [0, 1]
    assert counts == counts_of(num_pairs_in=2, num_pairs=2, prompt_tokens=5, chosen_tokens=5, rejected_tokens=4)


@pytest.mark.parametrize("single", ["<s> $A", "<s> $A </s>"])
def test_eos_ends_each_answer_exactly_once(single):
    """Whether the text has it, has it twice or lacks it, and whether or not the tokenizer appends it."""
    dataset = texts(("a", " b </s>", " c"), ("a", " b </s> </s>", " </s>"))
    tokenised, counts = tokenise_pairs(dataset, word_tokenizer(single))
    assert ids_of(tokenised) == [
        ([BOS, A], [B, EOS], [C, EOS]),
        ([BOS, A], [B, EOS], [EOS]),
    ]
    assert counts.merged_boundaries == 0


def test_empty_prompt_is_the_tokenizers_bos():
    tokenised, counts = tokenise_pairs(texts(("", "b", "c")), word_tokenizer("<s> $A"))
    assert ids_of(tokenised) == [([BOS], [B, EOS], [C, EOS])]
    assert counts.merged_boundaries == 0


def test_prompt_without_tokens_is_refused():
    with pytest.raises(ValueError, match="record 1: prompt_ids: expected at least one token"):
        tokenise_pairs(texts(("a", " b", " c"), ("", "b", "c")), word_tokenizer())
    # "a" followed by "b" is one token, so nothing of the prompt is left before it
    with pytest.raises(ValueError, match="record 0: prompt_ids: expected at least one token"):
        tokenise_pairs(texts(("a", "b", "c")), merging_tokenizer())
    with pytest.raises(ValueError, match="record 0: prompt_ids: expected at least one token"):
        tokenise_pairs(tokens(([], [1], [2])), word_tokenizer())


def test_tokens_merge_across_the_boundary():
    """ "ca" is [c, a] but "cab" is [c, ab]: the prompt ends where all three agree, for both answers."""
    tokenised, counts = tokenise_pairs(texts(("ca", "b", "c"), ("ca", "c", "a")), merging_tokenizer())
    assert ids_of(tokenised) == [
        ([3], [4, 0], [1, 3, 0]),
        ([3, 1], [3, 0], [1, 0]),
    ]
    assert counts.merged_boundaries == 1


def test_answer_without_tokens_is_dropped():
    """White space is no token of this tokenizer, so " " is an answer of none."""
    tokenised, counts = tokenise_pairs(texts(("a", " ", " b"), ("a", " b", "  "), ("a", " b", " c")), word_tokenizer())
    assert tokenised["pair_id"][:] == [2]
    assert (counts.num_pairs_in, counts.num_pairs, counts.dropped_empty) == (3, 1, 2)


def test_identical_answers_are_dropped_or_kept():
    dataset = texts(("a", " b", " b </s>"), ("a", " b c", " b d"), ("a", " b", " c"))
    # there is room for one answer token, and the second pair's answers part at their second
    tokenised, counts = tokenise_pairs(dataset, word_tokenizer(), max_length=2)
    assert ids_of(tokenised) == [([A], [B], [C])]
    assert tokenised["pair_id"][:] == [2]
    assert counts == counts_of(
        num_pairs_in=3,
        num_pairs=1,
        dropped_identical=1,
        dropped_identical_after_truncation=1,
        truncated_chosen=1,
        truncated_rejected=1,
        prompt_tokens=1,
        chosen_tokens=1,
        rejected_tokens=1,
    )
    tokenised, counts = tokenise_pairs(dataset, word_tokenizer(), max_length=2, keep_identical=True)
    assert ids_of(tokenised) == [([A], [B], [B]), ([A], [B], [B]), ([A], [B], [C])]
    assert counts == counts_of(
        num_pairs_in=3,
        num_pairs=3,
        truncated_chosen=3,
        truncated_rejected=3,
        prompt_tokens=3,
        chosen_tokens=3,
        rejected_tokens=3,
    )


@pytest.mark.parametrize(
    ("max_length", "mode", "expected"),
    [
        pytest.param(7, "keep_start", ([1, 2, 3], [4, 5, 6, 7], [4, 8]), id="fits"),
        pytest.param(6, "keep_start", ([1, 2, 3], [4, 5, 6], [4, 8]), id="end of the longer answer"),
        pytest.param(4, "keep_start", ([1, 2, 3], [4], [4]), id="end of both"),
        pytest.param(3, "keep_start", None, id="no room"),
        pytest.param(7, "keep_end", ([1, 2, 3], [4, 5, 6, 7], [4, 8]), id="fits from the end"),
        pytest.param(6, "keep_end", ([2, 3], [4, 5, 6, 7], [4, 8]), id="start of the prompt, for both"),
        pytest.param(5, "keep_end", ([3], [4, 5, 6, 7], [4, 8]), id="all but one of the prompt"),
        pytest.param(4, "keep_end", ([3], [5, 6, 7], [4, 8]), id="start of the longer answer"),
        pytest.param(2, "keep_end", ([3], [7], [8]), id="shortest"),
    ],
)
def test_truncation(max_length, mode, expected):
    pair = PairIds([1, 2, 3], [4, 5, 6, 7], [4, 8])
    assert truncate_pair(pair, max_length, mode) == expected


def test_truncation_is_counted():
    pairs = tokens(([1, 2], [3, 4, 5], [3]), ([1, 2, 3, 4], [5], [6]), ([1], [2], [3, 4, 5]), ([1], [2], [3]))
    tokenised, counts = tokenise_pairs(pairs, word_tokenizer(), max_length=3)
    # the second has no room; the first's answers are the same once cut to one token
    assert ids_of(tokenised) == [([1], [2], [3, 4]), ([1], [2], [3])]
    assert tokenised["pair_id"][:] == [2, 3]
    assert counts == counts_of(
        num_pairs_in=4,
        num_pairs=2,
        dropped_no_room=1,
        dropped_identical_after_truncation=1,
        truncated_rejected=1,
        prompt_tokens=2,
        chosen_tokens=2,
        rejected_tokens=3,
    )
    tokenised, counts = tokenise_pairs(pairs, word_tokenizer(), max_length=3, truncation_mode="keep_end")
    assert ids_of(tokenised) == [([2], [4, 5], [3]), ([3, 4], [5], [6]), ([1], [2], [4, 5]), ([1], [2], [3])]
    assert counts == counts_of(
        num_pairs_in=4,
        num_pairs=4,
        truncated_prompts=2,
        truncated_chosen=1,
        truncated_rejected=1,
        stray_specials=1,  # the first prompt ends with EOS
        prompt_tokens=5,
        chosen_tokens=5,
        rejected_tokens=5,
    )


def test_messages():
    question, right, wrong = turn("user", "a b"), turn("assistant", "c"), turn("assistant", "d")
    explicit = Dataset.from_list([{"prompt": [question], "chosen": [right], "rejected": [wrong]}])
    implicit = Dataset.from_list([{"chosen": [question, right], "rejected": [question, wrong]}])
    repeated = Dataset.from_list([{"prompt": "a b", "chosen": [question, right], "rejected": [question, wrong]}])
    # neither BOS nor EOS is in the template, so neither is in the ids
    expected = [([USER, A, B, END, ASSISTANT], [C, END], [D, END])]
    for dataset in (explicit, implicit, repeated):
        tokenised, counts = tokenise_pairs(dataset, chat_tokenizer())
        assert ids_of(tokenised) == expected
        assert counts.merged_boundaries == 0


def test_template_that_ends_turns_with_eos_gets_no_second():
    dataset = Dataset.from_list(
        [{"prompt": [turn("user", "a")], "chosen": [turn("assistant", "b")], "rejected": [turn("assistant", "c")]}]
    )
    template = TEMPLATE.replace("<end>", "{{ eos_token }}")
    tokenised, _ = tokenise_pairs(dataset, chat_tokenizer(template))
    assert ids_of(tokenised) == [([USER, A, EOS, ASSISTANT], [B, EOS], [C, EOS])]


def test_template_whose_generation_prompt_is_not_in_the_conversation():
    """A thinking template adds more to the prompt than stays before an answer."""
    template = TEMPLATE.replace("%}<assistant>{%", "%}<assistant> e{%")
    dataset = Dataset.from_list(
        [{"prompt": [turn("user", "a")], "chosen": [turn("assistant", "b")], "rejected": [turn("assistant", "c")]}]
    )
    tokenised, counts = tokenise_pairs(dataset, chat_tokenizer(template))
    assert ids_of(tokenised) == [([USER, A, END, ASSISTANT], [B, END], [C, END])]
    assert counts.merged_boundaries == 1


@pytest.mark.parametrize("tools", ['[{"name": "adder"}]', [{"name": "adder"}]])
def test_tools_and_template_arguments_reach_the_template(tools):
    record = {"prompt": [turn("user", "a")], "chosen": [turn("assistant", "b")], "rejected": [turn("assistant", "c")]}
    dataset = Dataset.from_list([{**record, "tools": tools, "chat_template_kwargs": {"word": "d"}}])
    tokenised, _ = tokenise_pairs(dataset, chat_tokenizer("{{ word }} " + TEMPLATE))
    assert ids_of(tokenised) == [([D, E, USER, A, END, ASSISTANT], [B, END], [C, END])]
    tokenised, _ = tokenise_pairs(Dataset.from_list([{**record, "tools": "[]"}]), chat_tokenizer())
    assert ids_of(tokenised) == [([USER, A, END, ASSISTANT], [B, END], [C, END])]


def test_template_error_names_the_record():
    good, bad = turn("user", "a"), turn("system", "a")
    answers = {"chosen": [turn("assistant", "b")], "rejected": [turn("assistant", "c")]}
    dataset = Dataset.from_list([{"prompt": [good], **answers}, {"prompt": [bad], **answers}])
    with pytest.raises(ValueError, match=r"record 1: expected messages that the chat template accepts.*no system turn"):
        tokenise_pairs(dataset, chat_tokenizer())


def test_token_ids_are_taken_as_they_are():
    pairs = [([9, 1], [2], [3, 4])]
    tokenised, counts = tokenise_pairs(tokens(*pairs, pair_id=[7]), word_tokenizer())
    assert ids_of(tokenised) == pairs
    assert tokenised["pair_id"][:] == [0]
    again, same_counts = tokenise_pairs(tokenised, word_tokenizer())
    assert (ids_of(again), same_counts) == (pairs, counts)


@pytest.mark.parametrize(
    ("pair", "vocab_size", "message"),
    [
        pytest.param(([1], [-100], [2]), None, r"record 1: chosen_ids: expected ids >= 0, got -100", id="label mask"),
        pytest.param(([1], [2], [9]), 9, r"record 1: rejected_ids: expected ids in \[0, 9\), got 9", id="first beyond"),
        pytest.param(([99], [2], [3]), 9, r"record 1: prompt_ids: expected ids in \[0, 9\), got 99", id="prompt"),
    ],
)
def test_ids_outside_the_vocabulary(pair, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        tokenise_pairs(tokens(([8], [7], [6]), pair), word_tokenizer(), vocab_size=vocab_size)


def test_reference_log_probs_are_carried_unless_their_pair_is_cut():
    columns = {"ref_chosen_logps": [-1.25, -2.0], "ref_rejected_logps": [-3.0, -4.5]}
    dataset = tokens(([1], [2], [2]), ([1], [2, 3], [4]), **columns)
    tokenised, _ = tokenise_pairs(dataset, word_tokenizer(), max_length=3)
    assert tokenised.to_list() == [
        {
            "prompt_ids": [1],
            "chosen_ids": [2, 3],
            "rejected_ids": [4],
            "pair_id": 1,
            "ref_chosen_logps": -2.0,
            "ref_rejected_logps": -4.5,
        }
    ]
    with pytest.raises(ValueError, match="record 1: ref_chosen_logps: expected a pair that fits max_length"):
        tokenise_pairs(dataset, word_tokenizer(), max_length=2)


def test_no_pair_left():
    with pytest.raises(ValueError, match=r"0 of 2 pairs kept; dropped: 1 whose prompt .*, 1 with identical answers"):
        tokenise_pairs(tokens(([1, 2], [3], [4]), ([1], [3], [3])), word_tokenizer(), max_length=2)


@pytest.mark.parametrize(
    ("tokenizer", "dataset", "options", "message"),
    [
        pytest.param(
            word_tokenizer(eos_token=None), texts(("a", " b", " c")), {}, "with an EOS token", id="no EOS token"
        ),
        pytest.param(
            word_tokenizer(),
            Dataset.from_list(
                [{"prompt": [turn("user", "a")], "chosen": [turn("x", "b")], "rejected": [turn("x", "c")]}]
            ),
            {},
            "processing_class: expected a tokenizer with a chat template",
            id="no chat template",
        ),
        pytest.param(word_tokenizer(), texts(("a", "", " c")), {}, "record 0: chosen: expected an answer", id="record"),
        pytest.param(word_tokenizer(), texts(("a", "b", "c")), {"max_length": 1}, "max_length: .* at least 2", id="1"),
        pytest.param(
            word_tokenizer(),
            texts(("a", "b", "c")),
            {"truncation_mode": "keep"},
            "truncation_mode: .*'keep'",
            id="mode",
        ),
        pytest.param(
            word_tokenizer(), texts(("a", "b", "c")).to_iterable_dataset(), {}, "got IterableDataset", id="streamed"
        ),
    ],
)
def test_unusable_arguments(tokenizer, dataset, options, message):
    with pytest.raises(ValueError, match=message):
        tokenise_pairs(dataset, tokenizer, **options)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_processes_change_nothing():
    alone, counts = tokenise_pairs(mixed_pairs(), word_tokenizer(), max_length=4)
    together, same_counts = tokenise_pairs(mixed_pairs(), word_tokenizer(), max_length=4, num_proc=2)
    assert together.to_list() == alone.to_list()
    assert same_counts == counts
    drawn = np.bincount(np.random.default_rng(0).integers(5, size=97), minlength=5)
    # the first kind has room for b c d and b c e, without EOS
    assert counts.truncated_chosen == counts.truncated_rejected == drawn[0]
    assert (counts.dropped_no_room, counts.dropped_identical, counts.dropped_empty) == tuple(drawn[[1, 2, 4]])
    assert counts.num_pairs == drawn[0] + drawn[3]


def test_cached_result_is_used_and_counted_alike(tmp_path, monkeypatch):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, mixed_pairs().to_list())))
    first, counts = tokenise_pairs(load_pairs(path), word_tokenizer(), max_length=4)
    monkeypatch.setattr(tokenise, "encode_records", None)  # a call would raise
    again, same_counts = tokenise_pairs(load_pairs(path), word_tokenizer(), max_length=4)
    assert (again.to_list(), same_counts) == (first.to_list(), counts)
    assert again._fingerprint == first._fingerprint
    # whether identical pairs are kept and how large the vocabulary is do not change the tokens
    tokenise_pairs(load_pairs(path), word_tokenizer(), max_length=4, keep_identical=True, vocab_size=100)
    # what does change them is tokenised anew
    for tokenizer, max_length in [(word_tokenizer(), 5), (word_tokenizer("<s> $A"), 4)]:
        with pytest.raises(TypeError, match="not callable"):
            tokenise_pairs(load_pairs(path), tokenizer, max_length=max_length)
    monkeypatch.setattr(tokenise, "code_hash", lambda module: "another version")
    with pytest.raises(TypeError, match="not callable"):
        tokenise_pairs(load_pairs(path), word_tokenizer(), max_length=4)


def test_a_cache_knows_a_tokenizer_by_all_that_it_is_and_not_by_how_it_was_called():
    digest = tokenizer_digest(merging_tokenizer())
    called = merging_tokenizer()
    called("a b c", truncation=True, max_length=2)  # which its Rust tokenizer keeps
    assert tokenizer_digest(called) == digest

    def changed(change):
        tokenizer = merging_tokenizer()
        change(tokenizer)
        return tokenizer_digest(tokenizer)

    class Own(PreTrainedTokenizerFast):
        """With code that another version may change."""

    others = [
        changed(lambda tokenizer: tokenizer.add_tokens(["d"])),
        changed(lambda tokenizer: setattr(tokenizer, "chat_template", "{{ messages }}")),
        changed(lambda tokenizer: setattr(tokenizer, "bos_token", "a")),
        changed(lambda tokenizer: setattr(tokenizer, "padding_side", "left")),
        changed(lambda tokenizer: setattr(tokenizer.backend_tokenizer, "normalizer", normalizers.Lowercase())),
        tokenizer_digest(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])))),
        tokenizer_digest(Own(tokenizer_object=merging_tokenizer().backend_tokenizer, eos_token="</s>")),
    ]
    assert len({digest, *others}) == 1 + len(others)


def test_a_cache_is_known_by_all_that_made_it_and_by_nothing_else(tmp_path, monkeypatch):
    copy = tmp_path / "dpop_trainer"
    shutil.copytree(Path(dpop_trainer.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(code_hash, "_FOLDER", copy)

    def hash_after(*changed):
        for name in changed:
            with (copy / name).open("a") as file:
                file.write("# changed\n")
        code_hash._hash.cache_clear()
        return code_hash.code_hash("dpop_trainer.data.tokenise")

    before = hash_after()
    assert hash_after("batches/budget.py", "data/mixture.py", "data/write.py", "training/trainer.py") == before
    seen = {before}
    for name in ("tokenise", "encode", "edits", "truncate", "records", "messages"):  # the last two by way of others
        seen.add(hash_after(f"data/{name}.py"))
    monkeypatch.setenv("DPOP_MAX_RECORD", "17")  # under which another record may be bad
    seen.add(hash_after())
    assert len(seen) == 8
    code_hash._hash.cache_clear()


def test_counts_in_words_and_as_metrics():
    counts = counts_of(
        num_pairs_in=1284,
        num_pairs=1280,
        dropped_no_room=3,
        dropped_identical=1,
        truncated_chosen=7,
        prompt_tokens=20100,
        chosen_tokens=30000,
        rejected_tokens=999,
    )
    assert counts.summary() == (
        "1,280 of 1,284 pairs kept; dropped: 3 whose prompt leaves no room for an answer, 1 with identical answers.\n"
        "20,100 prompt, 30,000 chosen and 999 rejected tokens; changed: 7 chosen answers truncated."
    )
    one = counts_of(num_pairs_in=1, num_pairs=1, truncated_prompts=1, truncated_chosen=1, weighted=1)
    assert one.summary().startswith("1 of 1 pair kept; dropped: nothing.")
    assert "changed: 1 prompt truncated, 1 chosen answer truncated.\n1 pair has a weight other than 1" in one.summary()
    metrics = counts.as_metrics()
    assert metrics["data/num_pairs"] == 1280
    assert set(metrics) == {f"data/{name}" for name in TokeniseCounts._fields}


@pytest.mark.parametrize(("num_long", "is_told"), [(2, True), (1, False)])
def test_losing_more_than_a_fifth_is_told_with_what_to_set(caplog, num_long, is_told):
    """Prompts of 100 tokens, with answers of one word and EOS, take 102: the next multiple of 64 is 128."""
    short = {"prompt": "a", "chosen": " b", "rejected": " c"}
    records = [{**short, "prompt": "a " * 99 + "a"}] * num_long + [short] * (7 if num_long == 2 else 4)
    caplog.set_level(logging.WARNING)
    tokenise_pairs(Dataset.from_list(records), word_tokenizer(), max_length=50)
    told = [message for message in caplog.messages if "are lost" in message]
    expected = "2 of 9 pairs (22%) are lost: 2 to max_length 50. Set max_length to 128, which at "
    expected = [expected + "least 99% of the pairs fit."] if is_told else []  # 1 of 5 is a fifth, not more
    assert told == expected
    # a stream is judged where a thousand records are read, or at its end; once, however often it begins anew
    caplog.clear()
    dataset = Dataset.from_list(records).to_iterable_dataset()
    stream = TokenisedStream(SourceStream(dataset), word_tokenizer(), name="train", max_length=50, repeat=True)
    list(itertools.islice(stream, 50))
    assert [message for message in caplog.messages if "are lost" in message] == expected
