"""Losses by weight, the dead zone and λ's warm-up in the trainer: exact means, metrics, resume, YAML, flags."""

import json
import math

import pytest
import torch
import trainers
import yaml
from datasets import Dataset
from dpop_trainer import DPOPConfig, DPOPTrainer
from dpop_trainer.batches import Batch
from dpop_trainer.settings.arguments import parse_arguments, run_config
from tiny import tiny_llama, token_pairs, word_tokenizer
from trainers import logged

from dpop_kernels.losses.formulas import LOSSES, register_loss


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def config(tmp_path, **overrides):
    return trainers.config(tmp_path, **{"per_device_train_batch_size": 2, "max_steps": 4, **overrides})


def trained(tmp_path, tokenizer, *, records=None, eval_dataset=None, resume=None, **overrides):
    run = DPOPTrainer(
        tiny_llama(),
        args=config(tmp_path, **overrides),
        train_dataset=Dataset.from_list(records or token_pairs(4)),
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
    )
    run.train(resume_from_checkpoint=resume)
    return run


def answer_nll(model, record):
    """Mean negative log-prob of the chosen answer's tokens, one unpadded sequence, eager, fp64."""
    ids = torch.tensor([[*record["prompt_ids"], *record["chosen_ids"]]])
    log_probs = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
    picked = log_probs[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
    return -picked[len(record["prompt_ids"]) - 1 :].mean()


def test_sft_is_the_mean_over_pairs_whatever_the_micro_batches(tmp_path, tokenizer):
    """Answers of 4 to 12 tokens, in one batch of five, in micro-batches of 2, 2 and 1, and in a plain loop."""
    records = token_pairs(5)
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    expected = []
    for _ in range(3):
        loss = sum(answer_nll(model, record) for record in records) / len(records)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    settings = {"records": records, "loss_type": "sft", "max_steps": 3, "learning_rate": 0.05, "optim": "sgd"}
    batches = {"one": (5, 1), "three": (2, 3)}
    for name, (batch_size, num_batches) in batches.items():
        run = trained(
            tmp_path / name,
            tokenizer,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=num_batches,
            **settings,
        )
        assert logged(run, "loss") == pytest.approx(expected, rel=1e-5)
        for ours, theirs in zip(run.model.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss_type", ["simpo", "orpo"])
def test_without_a_reference_a_run_starts_at_the_eager_loss_and_logs_no_rewards(tmp_path, tokenizer, loss_type):
    model, expected = tiny_llama(), []
    for record in token_pairs(4):
        chosen = -answer_nll(model, record)
        rejected = -answer_nll(model, {**record, "chosen_ids": record["rejected_ids"]})
        if loss_type == "simpo":
            expected.append(torch.log1p(torch.exp(1 - 2 * (chosen - rejected))))  # β = 2, γ = 1
        else:
            odds = [torch.exp(a) / (1 - torch.exp(a)) for a in (chosen, rejected)]
            expected.append(2 * torch.log1p(odds[1] / odds[0]) - chosen)
    options = {"simpo_gamma": 1.0} if loss_type == "simpo" else {}
    run = trained(tmp_path, tokenizer, max_steps=1, loss_type=loss_type, beta=2.0, **options)
    assert run.ref_model is None
    assert logged(run, "loss")[0] == pytest.approx(sum(expected).item() / 4, rel=1e-5)
    assert logged(run, "logps/chosen")
    assert not [key for line in run.state.log_history for key in line if key.startswith(("rewards/", "dpop/"))]


def test_terms_are_logged_and_sum_to_the_loss(tmp_path, tokenizer):
    run = trained(
        tmp_path,
        tokenizer,
        loss_type=["sigmoid", "sft", "ipo"],
        loss_weights=[1.0, 0.1, 0.0],
        eval_dataset=Dataset.from_list(token_pairs(3, seed=9)),
        eval_strategy="steps",
        eval_steps=4,
    )
    assert run.args.loss_type == ["dpo", "sft", "ipo"]
    dpo, sft, ipo = (logged(run, f"loss/{name}") for name in ("dpo", "sft", "ipo"))
    assert logged(run, "loss") == pytest.approx([a + 0.1 * b for a, b in zip(dpo, sft, strict=True)], rel=1e-5)
    assert dpo[0] == pytest.approx(math.log(2))
    assert ipo[0] == pytest.approx((1 / 0.6) ** 2)  # at the tie the margin is 0
    assert sft[0] == pytest.approx(sum(answer_nll(tiny_llama(), r).item() for r in token_pairs(4)) / 4, rel=1e-5)
    evaluated = next(line for line in run.state.log_history if "eval_loss" in line)
    assert evaluated["eval_loss"] == pytest.approx(evaluated["eval_loss/dpo"] + 0.1 * evaluated["eval_loss/sft"])


def test_one_loss_is_logged_as_the_loss_alone(tmp_path, tokenizer):
    run = trained(tmp_path, tokenizer, max_steps=1, loss_type="dpo")
    assert not any(key.startswith("loss/") or key == "dpop/lambda" for line in run.state.log_history for key in line)


def test_dead_zone_makes_dpop_with_a_cached_reference_the_run_with_a_live_one(tmp_path, tokenizer):
    """The cached log-probs come from other batches than the training's and differ in the last bits, which at the tie
    decide whether the hinge is active."""
    settings = {"dpop_dead_zone": 0.01, "max_steps": 6}
    live = trained(tmp_path / "live", tokenizer, **settings)
    cached = trained(tmp_path / "cached", tokenizer, precompute_ref_log_probs=True, **settings)
    assert logged(live, "loss") == pytest.approx(logged(cached, "loss"), rel=1e-4, abs=1e-5)
    assert logged(cached, "dpop/active_fraction")[0] == logged(cached, "dpop/penalty")[0] == 0.0
    dpo = trained(tmp_path / "dpo", tokenizer, precompute_ref_log_probs=True, loss_type="dpo", max_steps=1)
    assert logged(cached, "grad_norm")[0] == pytest.approx(logged(dpo, "grad_norm")[0], rel=1e-6)


def test_lambda_warms_up_over_optimizer_steps_and_evaluation_takes_all_of_it(tmp_path, tokenizer):
    records = [{**record, "ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0} for record in token_pairs(4)]
    run = trained(
        tmp_path,
        tokenizer,
        records=records,  # every Δw is far below 0
        dpop_lambda=8.0,
        dpop_lambda_warmup_steps=4,
        max_steps=6,
        eval_dataset=Dataset.from_list(records),
        eval_strategy="steps",
        eval_steps=2,
    )
    lambdas, deficits = logged(run, "dpop/lambda"), logged(run, "dpop/chosen_deficit")
    penalties = [0.3 * lam * deficit for lam, deficit in zip(lambdas, deficits, strict=True)]
    assert lambdas == [0.0, 2.0, 4.0, 6.0, 8.0, 8.0]
    assert logged(run, "dpop/penalty") == pytest.approx(penalties, rel=1e-5)
    assert logged(run, "eval_dpop/lambda") == [8.0, 8.0, 8.0]


@pytest.mark.parametrize(
    ("warmup", "expected"),
    [(0, [5.0] * 5), (1, [0.0, 5.0, 5.0, 5.0, 5.0]), (2, [0.0, 2.5, 5.0, 5.0, 5.0]), (0.15, [0.0, 2.5, 5.0, 5.0, 5.0])],
)
def test_warm_up_by_steps_or_by_fraction(tmp_path, warmup, expected):
    args = config(tmp_path, dpop_lambda=5.0, dpop_lambda_warmup_steps=warmup)
    assert [args.lambda_at(step, num_steps=10) for step in range(5)] == expected  # ⌈0.15 · 10⌉ = 2


def test_warm_up_resumes_where_it_was(tmp_path, tokenizer):
    settings = {"records": token_pairs(8), "dpop_lambda_warmup_steps": 6, "dpop_dead_zone": 0.001, "max_steps": 8}
    settings |= {"loss_type": ["dpop", "sft"], "loss_weights": [1.0, 0.5], "save_strategy": "steps", "save_steps": 3}
    whole = trained(tmp_path / "whole", tokenizer, **settings)
    checkpoint = str(tmp_path / "whole" / "run" / "checkpoint-3")
    resumed = trained(tmp_path / "resumed", tokenizer, resume=checkpoint, **settings)
    assert logged(resumed, "dpop/lambda") == logged(whole, "dpop/lambda")
    assert logged(whole, "dpop/lambda") == pytest.approx([50 * min(1, step / 6) for step in range(8)], rel=1e-12)
    assert logged(resumed, "loss") == logged(whole, "loss")
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_pairs_that_keep_a_rank_in_step_count_for_nothing_in_a_loss_of_a_batch(tmp_path, tokenizer):
    """A batch of them gives no loss and no gradient; the batches that count are sorted among themselves."""
    run = DPOPTrainer(
        tiny_llama(),
        args=config(tmp_path, loss_type="aot", gradient_accumulation_steps=1),
        train_dataset=Dataset.from_list(token_pairs(4)),
        processing_class=tokenizer,
    )
    batch = run.data_collator([run.train_dataset[i] for i in range(4)])
    for is_filler, expected in ((True, 0.0), (False, math.log(2))):  # policy and reference are the same
        run.model.zero_grad()
        loss = run.compute_loss(run.model, Batch(batch, is_filler=is_filler), num_items_in_batch=4)
        loss.backward()
        assert loss.item() == pytest.approx(expected)
        assert all(bool(p.grad.any()) != is_filler for p in run.model.parameters() if p.grad is not None)


def test_a_loss_of_ones_own_is_one_function(tmp_path, tokenizer):
    @register_loss("test_only")
    def squared_margin(pair, options):
        return (1 - options.beta * pair.margins).square()

    try:
        run = trained(tmp_path, tokenizer, max_steps=2, loss_type="test_only")
        assert logged(run, "loss")[0] == pytest.approx(1.0)
        assert logged(run, "loss")[1] < 1.0
    finally:
        del LOSSES["test_only"]


def test_losses_by_flags_and_by_yaml_and_again_from_what_the_run_wrote(tmp_path):
    def parse(*argv):
        return parse_arguments(DPOPConfig, ["--output_dir", str(tmp_path), *argv], "dpop train")

    path = tmp_path / "run.yaml"
    parts = parse("--loss_type", "dpop", "sft", "--loss_weights", "1", "0.1", "--label_smoothing", "0.1")
    assert (parts[2].loss_type, parts[2].loss_weights) == (["dpop", "sft"], [1.0, 0.1])
    path.write_text(yaml.safe_dump(run_config(*parts)))
    assert run_config(*parse("--config", str(path))) == run_config(*parts)
    for text, names, weights in (
        ("loss_type: hinge", ["slic"], None),
        ("loss_type: [sigmoid, sft]\nloss_weights: [1, 1e-1]", ["dpo", "sft"], [1.0, 0.1]),  # YAML 1.1: 1e-1 is text
        ("dpop_dead_zone: 0.01", ["dpop"], None),
    ):
        path.write_text(text)
        args = parse("--config", str(path))[2]
        assert (args.loss_type, args.loss_weights) == (names, weights)


def test_a_run_s_configuration_file_holds_its_losses(tmp_path, tokenizer):
    trained(tmp_path, tokenizer, max_steps=1, loss_type=["dpop", "sft"], loss_weights=[1, 0.1])
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (written["loss_type"], written["loss_weights"]) == (["dpop", "sft"], [1.0, 0.1])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("loss/sft" in line for line in lines)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"loss_type": ["dpop", "aot"]},
            "gradient_accumulation_steps: expected 1 with 'aot', which compares the pairs of a batch .* got 2: a step",
        ),
        (
            {"loss_type": "beta_dpo", "gradient_accumulation_steps": 1, "max_tokens_per_batch": 64},
            "max_tokens_per_batch: expected None with 'beta_dpo', which compares .* got 64",
        ),
        (
            {"loss_type": "aot", "gradient_accumulation_steps": 1, "auto_find_batch_size": True},
            "auto_find_batch_size: expected False with 'aot', .* got True: a smaller batch is another loss",
        ),
        (
            {"loss_type": "dpo", "dpop_dead_zone": 0.1},
            r"dpop_dead_zone: expected 0 with loss_type \['dpo'\], which has",
        ),
        ({"loss_type": "ipo", "dpop_lambda_warmup_steps": 3}, "dpop_lambda_warmup_steps: expected 0 with loss_type"),
        ({"loss_type": "sigmoid", "simpo_gamma": 1.0}, r"simpo_gamma: expected 0.5 with loss_type \['dpo'\], which"),
        (
            {"loss_type": "apo_zero", "f_divergence_type": "forward_kl"},
            "f_divergence_type: expected 'reverse_kl' with 'apo_zero'",
        ),
        ({"f_alpha_divergence_coef": 0.2}, "f_alpha_divergence_coef: expected 0.5 with f_divergence_type 'reverse_kl'"),
        ({"loss_type": ["dpop", "sft"], "loss_weights": [1.0]}, "loss_weights: expected one for each loss, 2 for"),
        ({"dpop_dead_zone": -1.0}, "dpop_dead_zone: expected a finite value >= 0, in nats, got -1.0"),
        ({"dpop_lambda_warmup_steps": -1}, "dpop_lambda_warmup_steps: expected a whole number of steps, or a fraction"),
        ({"dpop_lambda_warmup_steps": 2.5}, "dpop_lambda_warmup_steps: expected .* got 2.5"),
        ({"label_smoothing": 0.7}, r"label_smoothing: expected a value in \[0, 0.5\), got 0.7"),
        ({"loss_type": "slic", "label_smoothing": 0.1}, "label_smoothing: expected 0.0 with loss_type"),
        ({"loss_type": "exo_pair"}, "label_smoothing: expected a value > 0 with 'exo_pair'"),
    ],
)
def test_bad_configuration_is_named(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **overrides)
