"""Until an update moves the policy it is its own reference, whatever another batch rounded the reference's sums to.

That rounding is played here: columns that were computed before training are raised by a thousandth of a nat, so that
every chosen answer seems to have lost, and DPOP would penalise it.
"""

import pytest
from tiny import tiny_llama, token_pairs, word_tokenizer
from trainers import adapted, logged, trainer

RAISED = 1e-3  # nats


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def raised(tmp_path, tokenizer, model=None, **options):
    run = trainer(tmp_path, tokenizer, model, precompute_ref_log_probs=True, ref_cache_dir=None, **options)
    above = [value + RAISED for value in run.train_dataset["ref_chosen_logps"]]
    run.train_dataset = run.train_dataset.remove_columns("ref_chosen_logps").add_column("ref_chosen_logps", above)
    return run


def trained(run):
    run.train()
    return run


@pytest.mark.parametrize("loss_type", ["dpop", ["dpop", "sft"]], ids=["one kernel's", "a sum"])
@pytest.mark.parametrize("layout", ["rows", "flat"])
def test_the_first_gradient_is_that_of_a_reference_in_the_same_batch(tmp_path, tokenizer, layout, loss_type, caplog):
    options = {"max_steps": 1, "layout": layout, "loss_type": loss_type}
    online = trained(trainer(tmp_path / "online", tokenizer, **options))
    run = trained(raised(tmp_path / "raised", tokenizer, **options))
    for key in ("loss", "grad_norm", "dpop/active_fraction", "rewards/chosen"):
        assert logged(run, key)[0] == logged(online, key)[0], key
    assert logged(run, "dpop/active_fraction") == [0.0]
    # what the columns are off by is told all the same; fp32 sums of ten log-probs of about -4 round by 1e-5
    assert logged(run, "dpop/step_0_max_chosen_logratio") == pytest.approx([RAISED], abs=1e-5)
    assert logged(run, "dpop/step_0_mean_rejected_logratio") == pytest.approx([0.0], abs=1e-5)
    assert "differ before the first update" not in caplog.text


def test_a_warm_up_s_first_step_moves_nothing(tmp_path, tokenizer):
    run = trained(
        raised(
            tmp_path, tokenizer, max_steps=3, lr_scheduler_type="linear", warmup_steps=1, learning_rate=1e-9, beta=0.1
        )
    )
    assert logged(run, "learning_rate")[:2] == [0.0, 1e-9]
    # an update of 1e-9 a weight, some thousand weights, is a thousandth of what the columns are off by
    assert logged(run, "dpop/active_fraction") == [0.0, 0.0, 1.0]


def test_a_run_that_is_resumed_knows(tmp_path, tokenizer):
    settings = {
        "max_steps": 3,
        "lr_scheduler_type": "linear",
        "warmup_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    whole = trained(raised(tmp_path / "whole", tokenizer, **settings))
    assert logged(whole, "dpop/active_fraction")[:2] == [0.0, 0.0]
    for step in (1, 2):
        resumed = raised(tmp_path / "whole", tokenizer, **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "run" / f"checkpoint-{step}"))
        for key in ("loss", "grad_norm", "dpop/active_fraction"):
            assert logged(resumed, key) == logged(whole, key), (step, key)


def test_no_other_reference_is_the_policy(tmp_path, tokenizer):
    noisy = tiny_llama()
    noisy.config.attention_dropout = 0.5
    for layer in noisy.model.layers:
        layer.self_attn.attention_dropout = 0.5
    columns = [
        {**pair, "ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0} for pair in token_pairs()
    ]  # certain of both answers, which the policy is not
    others = {
        "dropout": raised(tmp_path / "a", tokenizer, noisy, max_steps=1, disable_dropout=False),
        "a second model": raised(tmp_path / "b", tokenizer, max_steps=1, ref_model=tiny_llama(seed=7)),
        "columns": trainer(tmp_path / "c", tokenizer, records=columns, max_steps=1),
    }
    for name, run in others.items():
        trained(run)
        assert logged(run, "rewards/chosen")[0] != 0.0, name


@pytest.mark.parametrize("seed", [None, 5], ids=["new adapter", "trained before"])
def test_adapters(tmp_path, tokenizer, seed):
    run = trained(raised(tmp_path, tokenizer, adapted(seed), max_steps=2))
    assert logged(run, "dpop/active_fraction")[0] == 0.0
    assert logged(run, "rewards/chosen")[0] == 0.0
    assert logged(run, "rewards/chosen")[1] != 0.0
