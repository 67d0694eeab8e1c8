"""One type after collation, through all that handles batches on their way to a model."""

import copy
import pickle

import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import concatenate, find_batch_size, send_to_device
from dpop_trainer.batches import Batch, PairCollator
from dpop_trainer.batches.batch import as_batch
from dpop_trainer.batches.shares import FillerCollator
from dpop_trainer.training.sft import CompletionCollator
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory
from transformers.trainer_pt_utils import find_batch_size as find_batch_size_of_trainer

RECORDS = [
    {"prompt_ids": [1, 2], "chosen_ids": [3 + i], "rejected_ids": [9], "pair_id": i, "ref_chosen_logps": -1.0 - i}
    | {"ref_rejected_logps": -2.0}
    for i in range(4)
]


def pair_batch(layout="tree", records=RECORDS[:2]):
    return PairCollator(pad_token_id=0, layout=layout)(records)


def assert_same(batch, expected):
    assert type(batch) is Batch
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(batch[name], value), name
        else:
            assert batch[name] is value, name


@pytest.mark.parametrize("layout", ["rows", "tree", "packed", "flat", "auto"])
def test_every_layout_collates_to_a_batch(layout):
    batch = pair_batch(layout)
    assert type(batch) is Batch
    assert batch.pair_ids.tolist() == [0, 1]
    # the answers share nothing: shared, chosen tail, rejected tail are 0, 1 and 1 tokens of each pair
    assert batch.cu_seqlens.tolist() == [0, 0, 1, 2, 2, 3, 4]
    assert batch.target_ids.tolist() == [3, 9, 4, 9]
    assert batch.ref_segment_logps is not None
    assert batch.ref_segment_logps.tolist() == [[0.0, -1.0, -2.0], [0.0, -2.0, -2.0]]
    assert (batch.trie_ends is None) == (batch.position_ids is None) == (layout == "rows")
    assert batch.is_filler is False


def test_completions_collate_to_a_batch():
    batch = CompletionCollator(0)(RECORDS[:2])
    assert type(batch) is Batch
    assert batch.cu_seqlens.tolist() == [0, 1, 2]
    assert batch.trie_ends is None


def test_what_a_model_takes():
    rows = pair_batch("rows")
    assert rows.model_inputs().keys() == {"input_ids", "attention_mask"}
    tree, mask = pair_batch(), torch.zeros(2, 1, 4, 4)
    inputs = tree.model_inputs(mask)
    assert inputs.keys() == {"input_ids", "attention_mask", "position_ids"}
    assert inputs["attention_mask"] is mask
    with pytest.raises(
        AssertionError, match="rows of tries need the mask"
    ):  # padding alone would show a tail the other
        tree.model_inputs()


def test_a_missing_field_is_named():
    with pytest.raises(AttributeError, match="cu_seqlens: expected it in the batch, got input_ids, pair_ids"):
        _ = Batch(input_ids=torch.zeros(1, 2), pair_ids=torch.zeros(1)).cu_seqlens
    assert not hasattr(pair_batch(), "labels")


def test_a_user_s_mapping_becomes_a_batch_and_keeps_its_own_keys():
    batch = as_batch({**pair_batch(), "note": "kept"})
    assert type(batch) is Batch
    assert batch["note"] == "kept"
    assert as_batch(batch) is batch


def test_a_filler_is_marked():
    batch = FillerCollator(PairCollator(pad_token_id=0))([{**RECORDS[0], "is_filler": True}])
    assert type(batch) is Batch
    assert batch.is_filler
    assert not FillerCollator(PairCollator(pad_token_id=0))(RECORDS).is_filler


@pytest.mark.parametrize(
    "handled",
    [
        lambda batch: batch.to("cpu"),
        lambda batch: send_to_device(batch, torch.device("cpu"), non_blocking=True),
        copy.copy,
        copy.deepcopy,
        lambda batch: pickle.loads(pickle.dumps(batch)),  # from a worker's process to the loader's
    ],
    ids=["to", "accelerate", "copy", "deepcopy", "pickle"],
)
def test_a_batch_stays_one(handled):
    batch = Batch(pair_batch(), is_filler=True)
    assert_same(handled(batch), batch)


def test_placing_places_every_tensor():
    placed = send_to_device(pair_batch(), torch.device("meta"))
    assert type(placed) is Batch
    assert {value.device.type for value in placed.values()} == {"meta"}


def test_a_pinned_batch_is_one(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    batch = pair_batch()
    assert_same(pin_memory(batch), batch)
    assert len(pinned) == len(batch)


def test_batch_sizes_are_found():
    batch = pair_batch("rows")
    assert find_batch_size(batch) == find_batch_size_of_trainer(batch) == 4  # two rows for each of two pairs


def test_concatenating_gives_a_batch():
    first, second = pair_batch("rows", RECORDS[:2]), pair_batch("rows", RECORDS[2:])
    both = concatenate([first, second])
    assert type(both) is Batch
    assert both.pair_ids.tolist() == [0, 1, 2, 3]


def test_accelerate_s_loaders_give_batches_also_behind_skipped_ones():
    loader = DataLoader(RECORDS, batch_size=2, collate_fn=PairCollator(pad_token_id=0))
    prepared = prepare_data_loader(loader, device=torch.device("cpu"), put_on_device=True)
    for batches, expected in ((prepared, [[0, 1], [2, 3]]), (skip_first_batches(prepared, 1), [[2, 3]])):
        seen = list(batches)
        assert all(type(batch) is Batch for batch in seen)
        assert [batch.pair_ids.tolist() for batch in seen] == expected
