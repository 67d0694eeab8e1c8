"""Batches by a budget of positions: what every plan keeps, and a training that is none the worse for it."""

from collections import Counter

import pytest
import torch
import trainers
from accelerate.data_loader import BatchSamplerShard, skip_first_batches
from datasets import Dataset
from dpop_trainer import DPOPConfig, DPOPTrainer
from dpop_trainer.batches import Budget, BudgetBatchSampler, PairCollator, pair_units, plan_batches
from dpop_trainer.batches.budget import Unit
from dpop_trainer.data import PairTree
from tiny import tiny_llama, token_pairs, word_tokenizer
from torch.utils.data import DataLoader
from trainers import logged

LAYOUTS = ["rows", "tree", "packed", "flat"]


def random_records(num_pairs, *, num_prompts=None, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def ids(low, high):
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, 50, (length,), generator=generator).tolist()

    prompts = [ids(3, 20) for _ in range(num_prompts or num_pairs)]
    return [
        {"prompt_ids": prompts[i % len(prompts)], "chosen_ids": ids(2, 30), "rejected_ids": ids(2, 30), "pair_id": i}
        for i in range(num_pairs)
    ]


def plan(records, budget, *, group_by_prompt=False, num_epochs=3, num_processes=1, seed=0):
    dataset = Dataset.from_list(records)
    options = {"prefix_sharing": True, "group_by_prompt": group_by_prompt, "seed": seed}
    return plan_batches(dataset, budget, num_processes=num_processes, num_epochs=num_epochs, **options)


def batches_of(sampler, epoch):
    sampler.set_epoch(epoch)
    return list(sampler)


# ---- plans


@pytest.mark.parametrize("num_processes", [1, 4])
@pytest.mark.parametrize("multiple", [None, 16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_plan_keeps_to_the_budget_and_leaves_no_pair_out(layout, multiple, num_processes):
    records = random_records(150)
    budget = Budget(250, layout, multiple)
    sampler = plan(records, budget, num_processes=num_processes)
    collator = PairCollator(pad_token_id=0, layout=layout, pad_to_multiple_of=multiple, hidden_size=64)
    assert len(sampler) % num_processes == 0
    for epoch in range(3):
        batches = batches_of(sampler, epoch)
        assert len(batches) == len(sampler)  # in every epoch, or transformers would count its steps wrongly
        assert Counter(pair for batch in batches for pair in batch) == Counter(range(150))
        for batch in batches:
            assert 0 < collator([records[pair] for pair in batch])["input_ids"].numel() <= 250


def test_plans_depend_on_seed_and_epoch_alone():
    budget = Budget(250, "flat")
    sampler = plan(random_records(60), budget)
    first = batches_of(sampler, 0)
    assert batches_of(sampler, 1) != first
    torch.rand(3)  # no global generator takes part
    assert batches_of(plan(random_records(60), budget), 0) == batches_of(sampler, 0) == first
    assert batches_of(plan(random_records(60), budget, seed=1), 0) != first


def test_a_window_is_filled_up_longest_first():
    # into 10: 6 and 4; 5, 5; 3, 3, 3. First-come would leave more than three batches
    units = [Unit([i], length) for i, length in enumerate([6, 5, 5, 4, 3, 3, 3])]
    sampler = BudgetBatchSampler(units, Budget(10, "flat"), seed=0, num_epochs=1)
    assert {tuple(sorted(batch)) for batch in sampler} == {(0, 3), (1, 2), (4, 5, 6)}
    assert sampler.mean_positions == pytest.approx((10 + 10 + 9) / 3)


def test_rows_of_a_batch_are_of_like_length():
    # two rows of 5 are 10 positions: the longest pair alone, then 4 and 3 at 8 each could not share 12 either
    units = [Unit([i], length) for i, length in enumerate([2, 5, 1, 2, 4])]
    sampler = BudgetBatchSampler(units, Budget(12, "rows"), seed=0, num_epochs=1)
    assert {tuple(sorted(batch)) for batch in sampler} == {(1,), (4,), (0, 2, 3)}


def test_flat_batches_are_nearly_full():
    sampler = plan(random_records(2000), Budget(500, "flat"))
    assert sampler.mean_positions > 0.95 * 500


def test_the_order_is_random_up_to_a_window():
    records = random_records(2000)
    sampler = plan(records, Budget(500, "flat"))
    lengths = torch.tensor([len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in records])
    batches = batches_of(sampler, 0)
    assert len(batches) > 100
    # neither order nor place in the data set shows in the place in the epoch: correlations of 200 batches' means are
    # below 4 / sqrt(200) by chance
    place = torch.arange(len(batches)).double()
    for values in (lengths.double(), torch.arange(2000).double()):
        means = torch.stack([values[batch].mean() for batch in batches])
        assert abs(float(torch.corrcoef(torch.stack([place, means]))[0, 1])) < 4 / len(batches) ** 0.5


def test_too_many_processes_for_the_pairs():
    assert len(plan(random_records(3), Budget(250, "flat"), num_processes=4)) == 3  # accelerate repeats one


def test_processes_get_batches_of_their_own():
    sampler = plan(random_records(100), Budget(250, "flat"), num_processes=2)
    shards = [BatchSamplerShard(sampler, num_processes=2, process_index=rank) for rank in range(2)]
    parts = [list(shard) for shard in shards]
    assert len(parts[0]) == len(parts[1]) == len(shards[0]) == len(sampler) // 2
    assert Counter(pair for part in parts for batch in part for pair in batch) == Counter(range(100))


def test_pairs_of_a_prompt_stay_together():
    records = random_records(90, num_prompts=30)
    trees = [PairTree.from_ids(r["prompt_ids"], r["chosen_ids"], r["rejected_ids"], share_prefix=True) for r in records]
    budget = Budget(600, "flat")
    units = pair_units(trees, budget, group_by_prompt=True)
    assert sorted(map(tuple, (sorted(unit.pairs) for unit in units))) == [(i, i + 30, i + 60) for i in range(30)]
    collator = PairCollator(pad_token_id=0, layout="flat")
    for unit in units:
        assert collator([records[pair] for pair in unit.pairs])["input_ids"].numel() == unit.length
    apart, together = (plan(records, budget, group_by_prompt=grouped) for grouped in (False, True))
    assert len(together) < len(apart)
    for batch in batches_of(together, 0):
        assert collator([records[pair] for pair in batch])["input_ids"].numel() <= 600


def test_a_group_beyond_the_budget_is_split():
    pair = {"prompt_ids": [1] * 10, "chosen_ids": [2] * 10}
    records = [{**pair, "rejected_ids": [3 + i] * 10, "pair_id": i} for i in range(5)]
    # prompt and chosen answer 20, each rejected answer 10: five make 70, two 40, three 50
    sampler = plan(records, Budget(50, "packed"), group_by_prompt=True, num_epochs=1)
    assert {tuple(batch) for batch in sampler} == {(0, 1), (2, 3, 4)}


def test_a_pair_beyond_the_budget_is_named():
    records = [{**record, "pair_id": 100 + record["pair_id"]} for record in random_records(4)]
    records[2]["prompt_ids"] = [5] * 300
    expected = 300 + len(records[2]["chosen_ids"]) + len(records[2]["rejected_ids"])
    message = rf"max_tokens_per_batch: expected at least {expected}, the positions of pair 102 alone in layout 'flat', "
    with pytest.raises(ValueError, match=message + r"got 250, which 1 of 4 pairs exceed\. Raise it, or lower max_l"):
        plan(records, Budget(250, "flat"))


# ---- training


def trainer(tmp_path, *, records=None, **overrides):
    plain = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": -1}
    settings = {"output_dir": str(tmp_path), **plain, **overrides}
    return trainers.trainer(tmp_path, word_tokenizer(), records=records or token_pairs(8), **settings)


@pytest.mark.parametrize("layout", ["rows", "flat"])
def test_the_mean_is_over_the_pairs_whatever_the_batches(tmp_path, layout):
    # one optimizer step an epoch over all eight pairs, in micro-batches of unequal numbers of pairs
    whole = trainer(tmp_path, layout="rows", per_device_train_batch_size=8, max_steps=4, loss_type="dpo")
    whole.train()
    budget = {"rows": 120, "flat": 60}[layout]
    packed = trainer(
        tmp_path,
        layout=layout,
        max_tokens_per_batch=budget,
        gradient_accumulation_steps=8,
        max_steps=4,
        loss_type="dpo",
    )
    sizes = {len(batch) for batch in packed.get_train_dataloader().batch_sampler}
    assert len(sizes) > 1
    packed.train()
    assert logged(packed, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-4)
    assert packed.state.epoch == 4
    assert logged(packed, "num_tokens") == logged(whole, "num_tokens")


def test_epochs_and_steps_are_counted_right(tmp_path, caplog):
    run = trainer(tmp_path, max_tokens_per_batch=60, num_train_epochs=3, gradient_accumulation_steps=2)
    sampler = run.get_train_dataloader().batch_sampler
    seen = []
    collate = run.data_collator
    run.data_collator = lambda records: seen.append([r["pair_id"] for r in records]) or collate(records)
    run.train()
    steps = -(-len(sampler) // 2)
    assert run.state.global_step == run.state.max_steps == 3 * steps
    epochs = [seen[i : i + len(sampler)] for i in range(0, len(seen), len(sampler))]
    assert epochs == [batches_of(sampler, epoch) for epoch in range(3)]
    assert logged(run, "batch/pairs")[0] == pytest.approx((len(seen[0]) + len(seen[1])) / 2)
    assert all(0 < fill <= 1 for fill in logged(run, "batch/fill"))
    assert f"Batches: {len(sampler)} per epoch, of {8 / len(sampler):.1f} pairs" in caplog.text
    assert run.get_total_train_batch_size(run.args) == round(8 / len(sampler) * 2)


def test_resumed_in_the_second_epoch_it_goes_on_as_if_never_stopped(tmp_path):
    settings = {"max_tokens_per_batch": 60, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 4}
    whole = trainer(tmp_path, **settings)
    assert len(whole.get_train_dataloader()) == 3  # so that the fourth step is within the second epoch
    whole.train()
    resumed = trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert logged(resumed, "loss") == logged(whole, "loss")
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_epoch_reaches_a_plan_behind_skipped_and_sharded_batches(tmp_path):
    run = trainer(tmp_path, max_tokens_per_batch=60, num_train_epochs=2)
    sampler = run.get_train_dataloader().batch_sampler
    shard = BatchSamplerShard(sampler, num_processes=2, process_index=1)
    loader = skip_first_batches(DataLoader(range(8), batch_sampler=shard, collate_fn=list), 1)
    parts = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        parts.append(list(shard)[1:])
    assert parts[0] != parts[1]
    sampler.set_epoch(0)
    run.state.epoch = 1.25  # as a checkpoint within the second epoch leaves it
    run.callback_handler.on_epoch_begin(run.args, run.state, run.control)
    assert list(loader) == parts[1]


def test_budget_and_masked_auto_pack(tmp_path):
    model = tiny_llama()
    model.set_attn_implementation("eager")
    run = DPOPTrainer(
        model,
        args=DPOPConfig(output_dir=str(tmp_path), max_tokens_per_batch=60, use_cpu=True, report_to="none"),
        train_dataset=Dataset.from_list(token_pairs()),
        processing_class=word_tokenizer(),
    )
    assert run.data_collator.layout == "packed"


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_transformers_own_grouping_by_length_works(tmp_path, strategy):
    records = token_pairs(16)
    settings = {"layout": "tree", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    settings |= {"num_train_epochs": 1, "records": records, "loss_type": "dpo"}
    plain = trainer(tmp_path, **settings)
    grouped = trainer(tmp_path, **settings, train_sampling_strategy=strategy)
    # pair 0: prompt 3, answers of 4 that part after 1: 3 + 1 + 3 + 3; pair 1: 4, 6, 2
    assert grouped.train_dataset["length"][:2] == [10, 4 + 2 + 4 + 4]
    plain.train()
    grouped.train()
    padding = [sum(logged(run, "tokens/padding_share")) for run in (plain, grouped)]
    assert padding[1] < 0.6 * padding[0]
    assert logged(grouped, "num_tokens")[-1] == logged(plain, "num_tokens")[-1]  # every pair once


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"max_tokens_per_batch": 1}, "max_tokens_per_batch: expected None or at least 2 positions, got 1"),
        ({"group_by_prompt": True}, "group_by_prompt: expected max_tokens_per_batch beside it, got None"),
        (
            {"group_by_prompt": True, "max_tokens_per_batch": 64, "layout": "tree"},
            "group_by_prompt: expected layout 'auto', 'packed' or 'flat', got 'tree'",
        ),
        (
            {"max_tokens_per_batch": 64, "train_sampling_strategy": "group_by_length"},
            "train_sampling_strategy: expected 'random' with max_tokens_per_batch.*got 'group_by_length'",
        ),
        (
            {"max_tokens_per_batch": 64, "auto_find_batch_size": True},
            "auto_find_batch_size: expected False with max_tokens_per_batch",
        ),
    ],
)
def test_settings_that_disagree_are_named(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        DPOPConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **overrides)


def test_a_collator_of_ones_own_has_no_budget(tmp_path):
    with pytest.raises(ValueError, match="data_collator: expected None with max_tokens_per_batch"):
        DPOPTrainer(
            tiny_llama(),
            args=DPOPConfig(output_dir=str(tmp_path), max_tokens_per_batch=64, use_cpu=True, report_to="none"),
            data_collator=PairCollator(pad_token_id=0),
            train_dataset=Dataset.from_list(token_pairs()),
            processing_class=word_tokenizer(),
        )
