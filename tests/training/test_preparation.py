"""How a run makes its splits ready: one value for all of them."""

import json

import pytest
from datasets import Dataset, IterableDataset
from dpop_trainer import DPOPConfig
from dpop_trainer.data import SkippedRecords, TokenisedStream
from dpop_trainer.models.loading import Policy
from dpop_trainer.training.split_preparation import Preparation
from tiny import tiny_llama, word_tokenizer

PAIRS = [
    {"prompt_ids": [3, 4], "chosen_ids": [5, 6], "rejected_ids": [5, 7, 8]},
    {"prompt_ids": [3], "chosen_ids": [4], "rejected_ids": [4]},
]


@pytest.fixture
def preparation(tmp_path):
    def make(*, keep_identical=False, **options):
        args = DPOPConfig(str(tmp_path), report_to=[], **options)
        policy = Policy(tiny_llama(), word_tokenizer(), 1000)
        return Preparation(policy=policy, args=args, keep_identical=keep_identical, skipped=SkippedRecords(tmp_path))

    return make


def test_splits_by_name_are_counted_by_name(preparation):
    prepared = preparation()
    splits = prepared.split({"a": Dataset.from_list(PAIRS), "b": Dataset.from_list(PAIRS[:1])}, "eval")
    assert {name: len(split) for name, split in splits.items()} == {"a": 1, "b": 1}
    assert prepared.counts["a_data/dropped_identical"] == 1
    assert prepared.counts["b_data/dropped_identical"] == 0
    assert prepared.split(None, "train") is None


def test_identical_answers_are_kept_where_that_is_asked_for(preparation):
    assert len(preparation(keep_identical=True).split(Dataset.from_list(PAIRS), "train")) == 2


def test_a_stream_is_tokenised_as_it_is_read(preparation):
    prepared = preparation(max_steps=1)
    stream = prepared.split(IterableDataset.from_generator(lambda: iter(PAIRS)), "train", repeat=True)
    assert isinstance(stream, TokenisedStream)
    assert not prepared.counts


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_pairs_bring_their_lengths_where_batches_go_by_them(preparation, strategy):
    prepared = preparation(train_sampling_strategy=strategy)
    split = prepared.split(Dataset.from_list(PAIRS), "train")
    if strategy == "random":
        assert "length" not in split.column_names
    else:  # the tree of the first: 2 tokens of the prompt, the 5 once, then 6 and 7 8; the second's answers are one
        assert split["length"][:] == [6]


def test_what_is_left_out_is_written_down(preparation, tmp_path):
    prepared = preparation(on_bad_record="skip")
    prepared.split(Dataset.from_list([*PAIRS, {**PAIRS[0], "chosen_ids": None}]), "train")
    (line,) = (tmp_path / "skipped_records.jsonl").read_text().splitlines()
    assert json.loads(line)["dataset"] == "train"
