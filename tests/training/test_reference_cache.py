"""Reference log-probs on disk: what they are known by, and a pass that computes only what is not known."""

import logging
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, concatenate_datasets
from dpop_trainer.batches import PairCollator
from dpop_trainer.reference.cache import ReferenceCache, cache_root
from dpop_trainer.reference.keys import describe_reference, pair_keys, reference_key, weights_digest
from dpop_trainer.reference.precompute import BATCHES_PER_ROUND, precompute_reference
from peft import LoraConfig, get_peft_model
from ranks import run_alone
from sharded import run_ranks
from tiny import VOCAB_SIZE, tiny_llama, token_pairs

DESCRIPTION = {"weights": "w"}


def tokenised(num_pairs=5, seed=1):
    return Dataset.from_list([{**pair, "pair_id": i} for i, pair in enumerate(token_pairs(num_pairs, seed=seed))])


def key_of(model, *, with_adapter=True, mixed_precision="no"):
    weights = weights_digest(model, with_adapter=with_adapter)
    return reference_key(describe_reference(model, weights, with_adapter=with_adapter, mixed_precision=mixed_precision))


def adapted(model=None, **overrides):
    settings = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **overrides}
    return get_peft_model(model if model is not None else tiny_llama(), LoraConfig(**settings))


class SumsOfIds:
    """A reference with sums known by hand, (Σ prompt ids, -Σ chosen ids, -Σ rejected ids); says what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, records):
        self.asked += [record["pair_id"] for record in records]
        return torch.tensor(
            [[sum(r["prompt_ids"]), -sum(r["chosen_ids"]), -sum(r["rejected_ids"])] for r in records],
            dtype=torch.float32,
        )


def precompute(dataset, cache=None, scorer=None, batch_size=2, **options):
    return precompute_reference(
        scorer or SumsOfIds(),
        dataset,
        name="train",
        batch_size=batch_size,
        accelerator=Accelerator(cpu=True),
        cache=cache,
        show_progress=False,
        **options,
    )


def check_columns(dataset):
    for record in dataset:
        prompt, chosen, rejected = (sum(record[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected"))
        assert record["ref_shared_logps"] == prompt
        assert record["ref_chosen_logps"] == prompt - chosen
        assert record["ref_rejected_logps"] == prompt - rejected


def test_a_pair_is_known_by_its_tokens_wherever_it_stands():
    dataset = tokenised(6)
    keys = pair_keys(dataset)
    assert len(set(keys)) == 6
    assert {len(key) for key in keys} == {16}
    order = [4, 0, 5, 2]
    assert pair_keys(dataset.select(order)) == [keys[i] for i in order]  # selected rows are read through indices
    assert pair_keys(dataset.select(range(2, 5))) == keys[2:5]  # ... and a range as a slice of the table
    assert pair_keys(concatenate_datasets([dataset.select([3]), dataset])) == [keys[3], *keys]


def test_every_token_and_boundary_of_a_pair_counts():
    pair = {"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5, 6]}
    others = [
        pair,
        {**pair, "prompt_ids": [1, 7]},
        {**pair, "prompt_ids": [1, 2, 3], "chosen_ids": [4]},  # the same tokens in a row
        {**pair, "chosen_ids": [3, 4, 5], "rejected_ids": [6]},
        {**pair, "chosen_ids": [5, 6], "rejected_ids": [3, 4]},
        {**pair, "rejected_ids": [5]},  # cut shorter
    ]
    assert len(set(pair_keys(Dataset.from_list(others)))) == len(others)


def test_a_base_under_an_adapter_is_known_as_itself():
    alone = weights_digest(tiny_llama(), with_adapter=True)
    model = adapted(r=4, target_modules="all-linear", modules_to_save=["lm_head"])
    with torch.no_grad():  # a trained adapter: what is off does not matter
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_()
    assert weights_digest(model, with_adapter=False) == alone
    assert weights_digest(model, with_adapter=True) != alone
    assert key_of(model, with_adapter=False) == key_of(tiny_llama())


def test_whatever_changes_log_probs_changes_the_key():
    keys = {"as it is": key_of(tiny_llama())}
    one_weight = tiny_llama()
    with torch.no_grad():
        one_weight.model.layers[1].mlp.up_proj.weight[-1, -1] += 1e-3
    keys["one weight"] = key_of(one_weight)
    keys["dtype"] = key_of(tiny_llama().to(torch.bfloat16))
    rope = tiny_llama()
    rope.config.rope_parameters = {**rope.config.rope_parameters, "rope_theta": 5000.0}
    keys["configuration"] = key_of(rope)
    keys["autocast"] = key_of(tiny_llama(), mixed_precision="bf16")
    keys["adapter"] = key_of(adapted())
    keys["scale of the adapter"] = key_of(adapted(lora_alpha=32))
    assert len(set(keys.values())) == len(keys), keys


def test_what_changes_no_log_prob_changes_no_key():
    model = tiny_llama()
    model.config._name_or_path, model.config.use_cache, model.config.attention_dropout = "elsewhere", False, 0.3
    assert key_of(model) == key_of(tiny_llama())
    torch.manual_seed(3)
    one = adapted(lora_dropout=0.5)
    torch.manual_seed(3)
    assert key_of(one) == key_of(adapted())


def test_a_fingerprint_tells_a_trained_model():
    model = tiny_llama()
    before = weights_digest(model, with_adapter=True)
    assert before == weights_digest(tiny_llama(), with_adapter=True)
    with torch.no_grad():
        model.lm_head.weight[VOCAB_SIZE // 2, 3] += 1e-6  # the middle of a tensor
    assert weights_digest(model, with_adapter=True) != before


def test_weights_that_cannot_be_read_have_no_digest():
    with pytest.raises(ValueError, match=r"weights: expected all of them to be readable, got 'model\.embed_tokens"):
        weights_digest(tiny_llama().to("meta"), with_adapter=True)
    sharded = tiny_llama()
    sharded.model.norm.weight.ds_id = 3  # what ZeRO-3 leaves of a parameter is marked so
    with pytest.raises(ValueError, match=r"got 'model\.norm\.weight' sharded"):
        weights_digest(sharded, with_adapter=True)


def test_cache_gives_back_what_it_was_given(tmp_path):
    keys = [bytes([i]) * 16 for i in range(4)]
    values = np.array([[-0.1, -1.0, -2.0], [0.0, -3.0, -4.0], [np.nan, -1.0, -1.0]])
    ReferenceCache(tmp_path, DESCRIPTION).add(keys[:3], values)
    ReferenceCache(tmp_path, DESCRIPTION).add(keys[3:], np.array([[-7.0, -8.0, -9.0]]))  # another run, at any time
    found = ReferenceCache(tmp_path, DESCRIPTION).lookup([keys[3], keys[2], keys[0], b"?" * 16])
    np.testing.assert_array_equal(found[[0, 2]], [[-7.0, -8.0, -9.0], values[0]])
    assert np.isnan(found[[1, 3]]).all()  # a NaN is not kept
    assert np.isnan(ReferenceCache(tmp_path, {"weights": "other"}).lookup(keys)).all()
    folder = ReferenceCache(tmp_path, DESCRIPTION, {"device": "cpu"}).folder
    moved = folder.rename(tmp_path / "moved")
    assert sorted(path.suffix for path in moved.iterdir()) == [".json", ".safetensors", ".safetensors"]
    (tmp_path / "elsewhere").mkdir()
    moved.rename(tmp_path / "elsewhere" / folder.name)
    assert np.isfinite(ReferenceCache(tmp_path / "elsewhere", DESCRIPTION).lookup(keys[:2])).all()


@pytest.mark.parametrize("damage", ["a bit", "cut", "emptied"])
def test_a_damaged_part_is_named_removed_and_not_believed(tmp_path, caplog, damage):
    cache = ReferenceCache(tmp_path, DESCRIPTION)
    keys = [bytes([i]) * 16 for i in range(2)]
    cache.add(keys[:1], np.array([[-1.0, -2.0, -3.0]]))
    (part,) = cache.folder.glob("part-*")
    cache.add(keys[1:], np.array([[-4.0, -5.0, -6.0]]))
    content = bytearray(part.read_bytes())
    content[-1] ^= 1  # the last value's exponent or sign: still a number, but another
    part.write_bytes({"a bit": bytes(content), "cut": bytes(content[:-8]), "emptied": b""}[damage])
    found = cache.lookup(keys)
    assert np.isnan(found[0]).all()
    np.testing.assert_array_equal(found[1], [-4.0, -5.0, -6.0])
    assert f"{part}: expected the bytes that were written, got others" in caplog.text
    assert not part.exists()


def test_a_disk_that_takes_nothing_costs_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    dataset = precompute(tokenised(), ReferenceCache(tmp_path / "file", DESCRIPTION))
    check_columns(dataset)
    assert "ref_cache_dir: expected a folder to write to" in caplog.text


def test_a_write_that_fails_leaves_no_file(tmp_path, monkeypatch, caplog):
    cache = ReferenceCache(tmp_path, DESCRIPTION)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    cache.add([b"k" * 16], np.zeros((1, 3)))
    assert "No space left on device" in caplog.text
    assert list(cache.folder.iterdir()) == []


@pytest.mark.parametrize("value", [None, "none", "None"])
def test_no_cache_where_none_is_wanted(value):
    assert cache_root(value) is None


def test_where_the_cache_is(tmp_path):
    assert cache_root(str(tmp_path)) == tmp_path
    assert cache_root("auto") == Path(os.environ["HF_DATASETS_CACHE"]) / "dpop_reference"


def test_a_pass_puts_every_result_in_its_place_longest_first():
    dataset, scorer = tokenised(7), SumsOfIds()
    check_columns(precompute(dataset, scorer=scorer))
    lengths = [sum(len(record[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")) for record in dataset]
    asked = [lengths[i] for i in scorer.asked]
    assert asked == sorted(lengths, reverse=True)


def test_known_pairs_are_not_computed_again(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    cache = ReferenceCache(tmp_path, DESCRIPTION)
    dataset = tokenised(6)
    precompute(dataset, cache)
    others = tokenised(3, seed=8).map(lambda row: {"pair_id": row["pair_id"] + 6})
    for again, computed in [
        (dataset, []),
        (dataset.select([5, 1, 3]), []),  # another selection, another order
        (concatenate_datasets([dataset, others]), [8, 7, 6]),
    ]:
        caplog.clear()
        scorer = SumsOfIds()
        check_columns(precompute(again, cache, scorer))
        assert scorer.asked == computed
        assert f"{len(again) - len(computed)} of {len(again)} pairs from the cache" in caplog.text


def test_an_interrupted_pass_keeps_what_it_had(tmp_path):
    class Interrupted(SumsOfIds):
        def __call__(self, records):
            if len(self.asked) >= BATCHES_PER_ROUND:
                raise KeyboardInterrupt
            return super().__call__(records)

    cache, dataset = ReferenceCache(tmp_path, DESCRIPTION), tokenised(20)
    first = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        precompute(dataset, cache, first, batch_size=1)
    second = SumsOfIds()
    check_columns(precompute(dataset, cache, second, batch_size=1))
    assert len(first.asked) == BATCHES_PER_ROUND
    assert sorted(first.asked + second.asked) == list(range(20))


class Killed(SumsOfIds):
    def __call__(self, records):
        if len(self.asked) >= BATCHES_PER_ROUND + 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(records)


def killed_pass(folder):
    precompute(tokenised(20), ReferenceCache(folder, DESCRIPTION), Killed(), 1, seconds_between_writes=0.0)


@pytest.mark.forked
def test_a_killed_pass_goes_on_from_its_last_write(tmp_path):
    code, written = run_alone(killed_pass, tmp_path)
    assert code == -signal.SIGKILL, written
    scorer = SumsOfIds()
    check_columns(precompute(tokenised(20), ReferenceCache(tmp_path, DESCRIPTION), scorer, batch_size=1))
    assert len(scorer.asked) == 20 - BATCHES_PER_ROUND  # the round that was under way is lost, the one before is not


def test_a_reference_that_is_not_finite_is_named(tmp_path):
    def broken(records):
        sums = SumsOfIds()(records)
        sums[[record["pair_id"] == 3 for record in records], 1] = float("nan")
        return sums

    cache = ReferenceCache(tmp_path, DESCRIPTION)
    with pytest.raises(ValueError, match=r"expected finite values, got NaN or infinity for 1 pairs, pair ids \[3\]"):
        precompute(tokenised(), cache, broken)
    scorer = SumsOfIds()
    check_columns(precompute(tokenised(), cache, scorer))
    assert scorer.asked == [3]


def test_collated_segments_are_those_that_were_cached():
    # a long shared part and short tails: the tails must come back bit for bit from sums of whole answers
    sums = torch.tensor([[-700.78, -1e-4, -3.25], [-0.1, -812.3, -1e-3]], dtype=torch.float32)
    rows = iter(sums)
    dataset = precompute(tokenised(2), scorer=lambda records: torch.stack([next(rows) for _ in records]))
    longest_first = dataset.select([1, 0]).to_list()
    shared = PairCollator(pad_token_id=0)(longest_first)["ref_segment_logps"]
    assert torch.equal(shared, sums)
    whole = PairCollator(pad_token_id=0, prefix_sharing=False)(longest_first)["ref_segment_logps"]
    expected = torch.stack([torch.zeros(2), sums[:, 0] + sums[:, 1], sums[:, 0] + sums[:, 2]], dim=1)
    torch.testing.assert_close(whole, expected, rtol=1e-7, atol=0)
    with pytest.raises(ValueError, match=r"ref_shared_logps: expected it in every record .* got pair 0 without"):
        PairCollator(pad_token_id=0)([longest_first[0], {**longest_first[1], "ref_shared_logps": None}])


def _columns_of_two_ranks(rank, folder):
    os.environ["LOCAL_RANK"] = str(rank)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    dataset, scorer = tokenised(17), SumsOfIds()
    cache = ReferenceCache(Path(folder), DESCRIPTION) if rank == 0 else None  # the other rank's disk holds nothing
    for known in (0, 17):
        scorer.asked = []
        columns = precompute_reference(
            scorer,
            dataset,
            name="train",
            batch_size=2,
            accelerator=accelerator,
            cache=cache,
            show_progress=False,
        )
        check_columns(columns)
        # nine batches: five turns, in the last of which the second rank repeats the last batch, of one pair
        assert len(scorer.asked) == (0 if known else 9)
    assert "ref_shared_logps" in columns.column_names


@pytest.mark.forked
@pytest.mark.slow
def test_two_ranks_share_the_pass(tmp_path):
    run_ranks(_columns_of_two_ranks, str(tmp_path))
