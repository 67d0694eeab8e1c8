"""Tokens and pairs that count by a weight, in the trainer: against sums and means by hand."""

import pytest
import torch
from datasets import Dataset
from rounding import EQUAL, SUM, UNIT, Guarantee
from tiny import tiny_llama, token_pairs, word_tokenizer
from trainers import answer_logp, logged, trainer


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def ragged(num_pairs=3):
    """Pairs whose rejected answers go on for one token more, or for two."""
    return [
        {**pair, "rejected_ids": pair["rejected_ids"] + [7, 8][: 1 + i % 2]}
        for i, pair in enumerate(token_pairs(num_pairs))
    ]


def test_reference_of_weighted_tokens_is_kept_for_its_alpha(tmp_path, tokenizer):
    """The second run finds the first one's folder beside its own, and takes nothing from it."""
    model, records = tiny_llama(), ragged()
    options = {"precompute_ref_log_probs": True, "ref_cache_dir": str(tmp_path / "cache"), "prefix_sharing": False}
    for num_folders, alpha in ((1, None), (2, 0.25), (2, 1.0)):
        run = trainer(tmp_path, tokenizer, records=records, ld_alpha=alpha, **options)
        for record, columns in zip(records, run.train_dataset, strict=True):
            prompt, rejected = record["prompt_ids"], record["rejected_ids"]
            whole = answer_logp(model, prompt, rejected).item()
            start = answer_logp(model, prompt, rejected[: len(record["chosen_ids"])]).item()
            weight = 1.0 if alpha is None else alpha
            assert columns["ref_rejected_logps"] == pytest.approx(start + weight * (whole - start), abs=SUM)
            chosen = answer_logp(model, prompt, record["chosen_ids"]).item()
            assert columns["ref_chosen_logps"] == pytest.approx(chosen, abs=SUM)
        assert len(list((tmp_path / "cache").iterdir())) == num_folders


def test_columns_of_whole_sums_do_not_go_with_weighted_tokens(tmp_path, tokenizer):
    given = [{**pair, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for pair in ragged()]
    message = (
        "ld_alpha: expected pairs without the columns ref_chosen_logps and ref_rejected_logps, since they are sums"
    )
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, tokenizer, records=given, ld_alpha=0.5)
    run = trainer(tmp_path, tokenizer, records=ragged(), ld_alpha=0.5)
    with pytest.raises(ValueError, match=message):
        run.evaluate(Dataset.from_list(given))
    trainer(tmp_path, tokenizer, records=given, ld_alpha=1.0)


LOGGED = 4 * UNIT[torch.float32]  # transformers sums the losses of a log line in fp32
WEIGHTS = (1.0, 2.0, 0.5, 4.0, 0.25)  # of fp32 to the bit, so that no rounding is of weights


def with_weights(records, weights=WEIGHTS):
    return [{**pair, "weight": weight} for pair, weight in zip(records, weights, strict=True)]


def fp64(tmp_path, tokenizer, records, **options):
    """Trained in fp64 against another reference, so that no pair is on the hinge."""
    settings = {"max_steps": 3, "gradient_accumulation_steps": 1, "layout": "rows", **options}
    run = trainer(
        tmp_path, tokenizer, tiny_llama().double(), ref_model=tiny_llama(seed=7).double(), records=records, **settings
    )
    run.train()
    return run


def same_weights(ours, theirs):
    pairs = zip(ours.model.parameters(), theirs.model.parameters(), strict=True)
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in pairs)


def test_loss_and_metrics_are_weighted_means(tmp_path, tokenizer):
    """One step of all pairs against the values of each pair alone."""
    records = token_pairs(3)
    alone = [fp64(tmp_path, tokenizer, [pair], max_steps=1, beta=0.1) for pair in records]
    weights = (1.0, 2.0, 0.5)
    run = fp64(tmp_path, tokenizer, with_weights(records, weights), max_steps=1, beta=0.1)
    for key in ("loss", "rewards/margins", "logps/chosen", "dpop/penalty"):
        values = [logged(single, key)[0] for single in alone]
        mean = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
        assert logged(run, key)[0] == pytest.approx(mean, rel=LOGGED if key == "loss" else EQUAL), key


def test_accumulation_does_not_change_the_weighted_mean(tmp_path, tokenizer):
    """Four pairs at once and four times one: another micro-batch has another sum of weights."""
    records = with_weights(token_pairs(4), WEIGHTS[:4])
    at_once = fp64(tmp_path, tokenizer, records, per_device_train_batch_size=4)
    one_by_one = fp64(tmp_path, tokenizer, records, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert logged(one_by_one, "loss") == pytest.approx(logged(at_once, "loss"), rel=LOGGED)
    assert same_weights(one_by_one, at_once) <= EQUAL
    unweighted = fp64(tmp_path, tokenizer, token_pairs(4), per_device_train_batch_size=4)
    assert same_weights(unweighted, at_once) > 1e-4


@pytest.mark.parametrize(
    "options",
    [{"layout": "tree"}, {"layout": "packed"}, {"precompute_ref_log_probs": True, "ref_cache_dir": "none"}],
    ids=lambda options: "_".join(map(str, options.values())),
)
def test_weights_in_every_layout_and_reference(options, tmp_path, tokenizer):
    rows = fp64(tmp_path, tokenizer, with_weights(token_pairs(5)), per_device_train_batch_size=5)
    other = fp64(tmp_path, tokenizer, with_weights(token_pairs(5)), per_device_train_batch_size=5, **options)
    ours, theirs = torch.tensor([logged(run, "loss") for run in (other, rows)], dtype=torch.float64)
    apart = float(((ours - theirs) / theirs).abs().max())
    if "layout" in options:  # equal in fp64, and each rounded once to fp32
        assert apart <= Guarantee(LOGGED)
    else:  # a reference that is computed once passes through fp32, and βλ = 15 multiplies its errors
        assert apart <= 15 * SUM


def test_weights_in_batches_by_budget_and_resumed(tmp_path, tokenizer):
    records, budget = with_weights(token_pairs(5)), {"max_tokens_per_batch": 64, "max_steps": 4}
    whole = fp64(tmp_path / "whole", tokenizer, records, **budget)
    fp64(tmp_path / "parts", tokenizer, records, **budget | {"max_steps": 2}, save_strategy="steps", save_steps=2)
    resumed = trainer(
        tmp_path / "parts",
        tokenizer,
        tiny_llama().double(),
        ref_model=tiny_llama(seed=7).double(),
        records=records,
        gradient_accumulation_steps=1,
        layout="rows",
        **budget,
    )
    resumed.train(resume_from_checkpoint=True)
    assert logged(resumed, "loss") == logged(whole, "loss")
    assert same_weights(resumed, whole) == 0


def test_weights_of_one_give_the_same_bits(tmp_path, tokenizer):
    plain = fp64(tmp_path, tokenizer, token_pairs(5))
    ones = fp64(tmp_path, tokenizer, with_weights(token_pairs(5), [1.0] * 5))
    assert same_weights(plain, ones) == 0
    assert logged(plain, "loss") == logged(ones, "loss")


def test_weights_multiply_those_of_the_policy(tmp_path, tokenizer):
    """WPO's weight of a pair is in its own loss, and only the data's are in the divisor."""
    records, weights = token_pairs(2), (1.0, 3.0)
    alone = [fp64(tmp_path, tokenizer, [pair], max_steps=1, use_weighting=True) for pair in records]
    run = fp64(tmp_path, tokenizer, with_weights(records, weights), max_steps=1, use_weighting=True)
    losses = [logged(single, "loss")[0] for single in alone]
    assert logged(run, "loss")[0] == pytest.approx((losses[0] + 3 * losses[1]) / 4, rel=LOGGED)
    assert logged(run, "wpo/weight")[0] == pytest.approx(sum(logged(s, "wpo/weight")[0] for s in alone) / 2, rel=EQUAL)


def test_evaluation_is_weighted(tmp_path, tokenizer):
    records = token_pairs(3)
    run = trainer(
        tmp_path, tokenizer, tiny_llama().double(), ref_model=tiny_llama(seed=7).double(), per_device_eval_batch_size=2
    )
    alone = [run.evaluate(Dataset.from_list([pair]))["eval_loss"] for pair in records]
    found = run.evaluate(Dataset.from_list(with_weights(records, (1.0, 2.0, 0.5))))["eval_loss"]
    assert found == pytest.approx((alone[0] + 2 * alone[1] + alone[2] / 2) / 3.5, rel=EQUAL)


def test_pairs_that_are_compared_have_no_weights(tmp_path, tokenizer):
    """Told before a model runs; a data set that says nothing of weights, or is not asked for them, is taken."""
    batch = {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 1, "loss_type": "aot"}
    records = with_weights(ragged(5))
    with pytest.raises(ValueError, match="pair_weight: expected 'none' with loss_type 'aot'"):
        trainer(tmp_path, tokenizer, records=records, **batch)
    trainer(tmp_path, tokenizer, records=records, pair_weight="none", **batch)
    trainer(tmp_path, tokenizer, records=ragged(5), **batch)
