"""evaluate() on pairs that the trainer was not built with: in any form, streamed, and with the reference let go."""

import copy

import pytest
import torch
from datasets import Dataset, IterableDatasetDict
from dpop_trainer import DPOPTrainer
from dpop_trainer.settings.config import SFTConfig
from dpop_trainer.training.sft import SFTTrainer
from peft import LoraConfig
from tiny import text_pairs, tiny_llama, token_pairs, word_tokenizer
from torch.nn.functional import logsigmoid
from trainers import adapted, answer_logp, config

NEW = token_pairs(3, seed=8)
STARTS = {
    "all weights": ({}, lambda: tiny_llama()),
    "second model": ({"ref_model": 7}, lambda: tiny_llama(seed=7)),
    "new adapter": (
        {"peft_config": LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")},
        lambda: tiny_llama(),
    ),
    "trained adapter": ({"model": "adapter"}, lambda: adapted(seed=5)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models by seed, as from a hub."""
    path = tmp_path_factory.mktemp("models")
    for seed in (0, 7):
        tiny_llama(seed=seed).save_pretrained(path / str(seed))
        word_tokenizer().save_pretrained(path / str(seed))
    return path


def build(tmp_path, folders, *, model=None, ref_model=None, peft_config=None, records=None, **options):
    settings = {"precompute_ref_log_probs": True, "ref_cache_dir": "none", "loss_type": "dpo", "beta": 0.1}
    return DPOPTrainer(
        adapted(seed=5) if model == "adapter" else model if model is not None else str(folders / "0"),
        ref_model=str(folders / str(ref_model)) if isinstance(ref_model, int) else ref_model,
        args=config(tmp_path, **{**settings, "learning_rate": 1e-2, "max_steps": 3, **options}),
        train_dataset=Dataset.from_list(records if records is not None else token_pairs()),
        processing_class=word_tokenizer(),
        peft_config=peft_config,
    )


def dpo_by_hand(policy, reference):
    policy, losses = copy.deepcopy(policy).eval(), []
    for pair in NEW:
        with torch.no_grad():
            chosen, rejected = (
                answer_logp(policy, pair["prompt_ids"], pair[key])
                - answer_logp(reference, pair["prompt_ids"], pair[key])
                for key in ("chosen_ids", "rejected_ids")
            )
        losses.append(-logsigmoid(0.1 * (chosen - rejected)).item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("kind", STARTS)
def test_the_reference_of_new_pairs_is_the_run_s(tmp_path, folders, kind):
    options, reference = STARTS[kind]
    run, reference = build(tmp_path, folders, **options), reference().eval()
    before = run.evaluate(Dataset.from_list(NEW))
    # log-probs of some 30 nats, in fp32
    assert before["eval_loss"] == pytest.approx(dpo_by_hand(run.model, reference), abs=1e-5)
    run.train()
    after = run.evaluate(Dataset.from_list(NEW))
    assert after["eval_loss"] == pytest.approx(dpo_by_hand(run.model, reference), abs=1e-5)
    assert abs(after["eval_loss"] - before["eval_loss"]) > 1e-4
    if kind in ("all weights", "second model"):
        assert not run.reference.has_model  # loaded for as long as it took


@pytest.mark.parametrize("precompute", [True, False])
def test_streams_and_several_of_them(tmp_path, folders, precompute):
    run = build(tmp_path, folders, records=text_pairs(), precompute_ref_log_probs=precompute)
    run.train()
    whole = Dataset.from_list(text_pairs(4))
    expected = run.evaluate(whole)["eval_loss"]
    assert run.evaluate(whole.to_iterable_dataset())["eval_loss"] == pytest.approx(expected, rel=1e-6)
    several = run.evaluate(IterableDatasetDict({"a": whole.to_iterable_dataset(), "b": whole.to_iterable_dataset()}))
    assert several["eval_a_loss"] == several["eval_b_loss"] == pytest.approx(expected, rel=1e-6)


def test_a_reference_that_cannot_be_had_again(tmp_path, folders):
    run = build(tmp_path / "a", folders, model=tiny_llama())
    run.train()
    with pytest.raises(
        ValueError, match=r"let the model as it was at the start go, and where it came from is not known"
    ):
        run.evaluate(Dataset.from_list(NEW))
    other = tmp_path / "model"
    tiny_llama().save_pretrained(other)
    run = build(tmp_path / "b", folders, model=str(other))
    run.train()
    tiny_llama(seed=3).save_pretrained(other)
    with pytest.raises(
        ValueError, match=r"eval_dataset: .*has other weights\. Give these pairs to the trainer's constr"
    ):
        run.evaluate(Dataset.from_list(NEW))


def test_a_run_on_given_columns_says_what_helps(tmp_path, folders):
    columns = [{**pair, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for pair in token_pairs()]
    run = build(tmp_path, folders, records=columns, precompute_ref_log_probs=False)
    with pytest.raises(ValueError, match=r"brought them and it has no reference model.* constructor as eval_dataset"):
        run.evaluate(Dataset.from_list(NEW))
    # and so it does
    helped = DPOPTrainer(
        str(folders / "0"),
        args=config(tmp_path),
        train_dataset=Dataset.from_list(columns),
        eval_dataset=Dataset.from_list(NEW),
    )
    assert helped.evaluate()["eval_dpop/chosen_logratio"] == 0.0


def test_supervised_runs_evaluate_raw_data_too(tmp_path):
    args = SFTConfig(str(tmp_path), max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True)
    data = Dataset.from_list([{"prompt": "w1 w2", "completion": " w3 w4"}] * 2)
    run = SFTTrainer(tiny_llama(), args, data, data, processing_class=word_tokenizer())
    expected = run.evaluate()["eval_loss"]
    assert run.evaluate(data)["eval_loss"] == run.evaluate({"a": data.to_iterable_dataset()})["eval_a_loss"] == expected
