"""Evaluation sets that cannot be evaluated on, and metrics that no evaluation logs: named before a step is trained."""

import pytest
from datasets import Dataset
from dpop_trainer import DPOPTrainer
from dpop_trainer.settings.config import SFTConfig
from dpop_trainer.training.sft import SFTTrainer
from tiny import tiny_llama, token_pairs, word_tokenizer
from trainers import config
from transformers import TrainerCallback

PAIRS = Dataset.from_list(token_pairs())
IDENTICAL = Dataset.from_list([{"prompt_ids": [5], "chosen_ids": [6, 7], "rejected_ids": [6, 7]}] * 2)
EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def build(tmp_path, tokenizer, eval_dataset, *, callbacks=None, trainer_class=DPOPTrainer, **options):
    return trainer_class(
        tiny_llama(),
        args=config(tmp_path, **EVERY_STEP, **options),
        train_dataset=PAIRS,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        callbacks=callbacks,
    )


NONE_IS_USED = "expected at least one pair that can be used, got none. 0 of 2 pairs kept; dropped: 2"


@pytest.mark.parametrize(
    ("eval_dataset", "message"),
    [
        (PAIRS.select([]), "eval_dataset: expected at least one pair, got an empty data set"),
        (
            IDENTICAL,
            "eval_dataset: expected at least one pair that can be used, got none. 0 of 2 pairs kept; dropped: 2",
        ),
        ({"a": PAIRS, "b": PAIRS.select([])}, "eval_dataset 'b': expected at least one pair, got an empty data set"),
        (
            {"a": PAIRS, "b": IDENTICAL},
            "eval_dataset 'b': expected at least one pair that can be used, got none. 0 of 2",
        ),
    ],
    ids=["empty", "identical", "one of two empty", "one of two identical"],
)
def test_a_set_without_pairs_is_named(tmp_path, tokenizer, eval_dataset, message):
    with pytest.raises(ValueError) as error:
        build(tmp_path, tokenizer, eval_dataset)
    assert str(error.value).startswith(message)


def test_an_empty_training_set_is_named(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"^train_dataset: expected at least one pair, got an empty data set"):
        DPOPTrainer(tiny_llama(), args=config(tmp_path), train_dataset=PAIRS.select([]), processing_class=tokenizer)


@pytest.mark.parametrize(
    ("eval_dataset", "metric", "near"),
    [
        (PAIRS, "rewards/accuracy", "rewards/accuracies"),
        (PAIRS, "eval_accuracy", "mean_token_accuracy"),
        (PAIRS, "eval_a_loss", "loss"),
        ({"a": PAIRS, "b": PAIRS}, "loss", "a_loss"),
        ({"a": PAIRS, "b": PAIRS}, "eval_rewards/margins", "a_rewards/margins"),
    ],
)
def test_a_metric_that_no_evaluation_logs_is_named(tmp_path, tokenizer, eval_dataset, metric, near):
    with pytest.raises(ValueError, match="metric_for_best_model: expected a metric that evaluation logs") as error:
        build(tmp_path, tokenizer, eval_dataset, metric_for_best_model=metric)
    assert near in str(error.value).partition("Near it: ")[2].partition(". All: ")[0].split(", ")


def test_the_best_of_several_sets_without_a_metric_is_named(tmp_path, tokenizer):
    """transformers takes "loss" for it, and several sets have no such."""
    best = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1}
    with pytest.raises(ValueError, match=r"metric_for_best_model: .* got 'loss'\. Near it: .*a_loss"):
        build(tmp_path, tokenizer, {"a": PAIRS, "b": PAIRS}, **best)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_type": ["dpop", "sft"]},
        {"loss_type": "sft"},  # needs no reference
    ],
    ids=str,
)
def test_what_is_known_beforehand_is_what_evaluation_logs(tmp_path, tokenizer, options):
    """The sentence lists all: of each that an evaluation really logs, and no other."""
    with pytest.raises(ValueError) as error:
        build(tmp_path, tokenizer, PAIRS, metric_for_best_model="?", **options)
    known = set(str(error.value).partition("All: ")[2].rstrip(".").split(", "))
    run = build(tmp_path, tokenizer, PAIRS, **options)
    run.train()
    (line,) = [line for line in run.state.log_history if "eval_loss" in line]
    logged = {key.removeprefix("eval_") for key in line if key.startswith("eval_")}
    assert known == logged


def test_what_a_callback_may_add_is_told_and_not_refused(tmp_path, tokenizer, caplog):
    build(tmp_path, tokenizer, PAIRS, metric_for_best_model="own", callbacks=[TrainerCallback()])
    assert "metric_for_best_model: expected a metric that evaluation logs, got 'own'" in caplog.text
    assert "Unless a callback adds it, the first evaluation ends the run" in caplog.text


def test_a_metric_without_evaluations_is_told(tmp_path, tokenizer, caplog):
    args = config(tmp_path, metric_for_best_model="loss")
    DPOPTrainer(tiny_llama(), args=args, train_dataset=PAIRS, eval_dataset=PAIRS, processing_class=tokenizer)
    assert "metric_for_best_model='loss' has no effect: eval_strategy is 'no'" in caplog.text


def test_supervised_runs_are_looked_at_alike(tmp_path, tokenizer):
    args = SFTConfig(
        str(tmp_path), use_cpu=True, report_to="none", metric_for_best_model="rewards/margins", **EVERY_STEP
    )
    with pytest.raises(ValueError, match=r"got 'rewards/margins'.* All: entropy, loss, mean_token_accuracy, "):
        SFTTrainer(tiny_llama(), args, PAIRS, PAIRS, processing_class=tokenizer)


@pytest.mark.parametrize(
    "metric", ["dpop/penalty", "eval_dpop/active_fraction", "eval_a_dpop/chosen_deficit", "entropy"]
)
def test_the_smaller_the_better_has_to_be_said(tmp_path, metric):
    with pytest.raises(ValueError, match="greater_is_better: expected True or False with metric_for_best_model"):
        config(tmp_path, metric_for_best_model=metric)
    assert config(tmp_path, metric_for_best_model=metric, greater_is_better=False).greater_is_better is False
    assert config(tmp_path, metric_for_best_model="rewards/margins").greater_is_better is True
