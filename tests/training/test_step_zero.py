"""The step-0 report: how far policy and reference are apart before the first update, and each cause that is named."""

import math

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from dpop_trainer.models.loading import disable_dropout
from dpop_trainer.reference.step_zero import Setting, StepZero, active_dropout, explanation
from tiny import tiny_llama, token_pairs, word_tokenizer
from trainers import adapted, answer_logp, logged, trainer
from transformers import LlamaForCausalLM, TrainerControl, TrainerState


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def first_step(tmp_path, tokenizer, model=None, **options):
    run = trainer(tmp_path, tokenizer, model, max_steps=1, **options)
    run.train()
    return run


def test_nothing_is_reported_where_nothing_differs(tmp_path, tokenizer, caplog):
    run = first_step(tmp_path, tokenizer)
    for key in ("max_logratio", "max_chosen_logratio", "mean_chosen_logratio", "mean_rejected_logratio"):
        assert logged(run, f"dpop/step_0_{key}") == [0.0]
    assert "differ before the first update" not in caplog.text


def test_all_pairs_of_the_first_step_are_measured(tmp_path, tokenizer, caplog):
    # five pairs in two micro-batches; the expected log-ratios are an eager model's in fp64
    run = first_step(tmp_path, tokenizer, ref_model=tiny_llama(seed=7))
    policy, reference = tiny_llama().double(), tiny_llama(seed=7).double()
    for side in ("chosen", "rejected"):
        apart = [_apart(policy, reference, pair["prompt_ids"], pair[f"{side}_ids"]) for pair in token_pairs()]
        assert logged(run, f"dpop/step_0_max_{side}_logratio") == pytest.approx([max(apart)], rel=1e-4)
        assert logged(run, f"dpop/step_0_mean_{side}_logratio") == pytest.approx([math.fsum(apart) / 5], rel=1e-4)
    assert "the reference is another model" in caplog.text
    assert "first weight that differs: model.embed_tokens.weight" in caplog.text


def test_an_evaluation_does_not_take_the_report_away(tmp_path, tokenizer):
    run = trainer(
        tmp_path,
        tokenizer,
        max_steps=2,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        eval_dataset=Dataset.from_list(token_pairs(2)),
    )
    run.train()
    (line,) = [line for line in run.state.log_history if "dpop/step_0_max_logratio" in line]
    assert "loss" in line


def test_micro_batches_are_taken_together_by_hand():
    report = StepZero(Accelerator(cpu=True), lambda: Setting(tiny_llama(), None, True, None, "no"))
    report.add(torch.tensor([1e-3, -4e-3]), torch.tensor([0.0, 2e-3]))
    report.add(torch.tensor([1e-3]), torch.tensor([-7e-3]))
    report.on_pre_optimizer_step(None, TrainerState(), TrainerControl())
    assert report.pop_metrics() == pytest.approx(
        {
            "dpop/step_0_max_logratio": 7e-3,
            "dpop/step_0_max_chosen_logratio": 4e-3,
            "dpop/step_0_mean_chosen_logratio": 2e-3,
            "dpop/step_0_max_rejected_logratio": 7e-3,
            "dpop/step_0_mean_rejected_logratio": 3e-3,
        }
    )
    assert report.pop_metrics() == {}


def llama_with_attention_dropout(p=0.4):
    config = tiny_llama().config
    config.attention_dropout = p
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def test_dropout_is_named(tmp_path, tokenizer, caplog):
    first_step(tmp_path / "a", tokenizer, llama_with_attention_dropout(), disable_dropout=False)
    assert "dropout is on in the policy (model.layers.0.self_attn.attention_dropout = 0.4)" in caplog.text
    caplog.clear()
    first_step(tmp_path / "b", tokenizer, llama_with_attention_dropout())
    assert "differ before the first update" not in caplog.text


def test_every_dropout_is_disabled():
    model = adapted(model=llama_with_attention_dropout(), lora_dropout=0.2).train()
    assert active_dropout(model) == "base_model.model.model.layers.0.self_attn.attention_dropout = 0.4"
    assert active_dropout(model.eval()) is None
    disable_dropout(model.train())
    assert active_dropout(model) is None


def test_dropout_of_an_adapter_is_named(tmp_path, tokenizer, caplog):
    # an adapter that does something: dropout before a B of zero changes nothing
    first_step(tmp_path, tokenizer, adapted(seed=5, lora_dropout=0.5), disable_dropout=False)
    assert "lora_dropout.default: Dropout(0.5)); set disable_dropout" in caplog.text


def test_another_dtype_is_named(tmp_path, tokenizer, caplog):
    first_step(tmp_path, tokenizer, ref_model=tiny_llama().to(torch.float16), layout="rows")
    message = _message(caplog)
    assert "the reference's weights are float16, the policy's float32" in message
    assert "another model" not in message  # the same weights, rounded


def test_an_adapter_that_is_not_zero_is_named(tmp_path, tokenizer, caplog):
    first_step(tmp_path, tokenizer, adapted(seed=5), ref_model=tiny_llama())
    message = _message(caplog)
    assert "the policy's adapter is not zero at the start" in message
    assert "the reference is another model (" not in message  # its base is the same


def test_stale_columns_are_named(tmp_path, tokenizer, caplog):
    records = [{**record, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for record in token_pairs()]
    first_step(tmp_path, tokenizer, records=records)
    assert "the data set's own ref_chosen_logps and ref_rejected_logps are another model's, or stale" in _message(
        caplog
    )


def test_another_attention_is_named():
    eager = tiny_llama()
    eager.set_attn_implementation("eager")
    setting = Setting(tiny_llama(), eager, False, None, "no")
    assert explanation(setting) == (
        "Probable cause: attn_implementation is 'sdpa' in the policy and 'eager' in the reference; load both with one."
    )
    cached = Setting(tiny_llama(), None, True, "computed", "no", cached_attention="eager")
    assert "the cached reference log-probs were computed with 'eager'" in explanation(cached)


def test_a_quantised_reference_is_named():
    quantised = tiny_llama()
    quantised.is_quantized = True
    setting = Setting(tiny_llama(), quantised, False, None, "no")
    assert "the reference is quantised, the policy is not" in explanation(setting)
    assert "the policy is quantised, the reference is not" in explanation(
        setting._replace(policy=quantised, reference=tiny_llama())
    )


def test_rounding_of_16_bits_in_other_batches_is_named():
    setting = Setting(tiny_llama(), None, True, "computed", "bf16")
    assert "16-bit rounding, which depends on the batch" in explanation(setting)
    assert explanation(setting._replace(mixed_precision="no")).startswith("No cause was found")


@torch.no_grad()
def _apart(policy, reference, prompt_ids, answer_ids):
    return abs(answer_logp(policy, prompt_ids, answer_ids) - answer_logp(reference, prompt_ids, answer_ids)).item()


def _message(caplog):
    (message,) = [r.getMessage() for r in caplog.records if "differ before the first update" in r.getMessage()]
    return message
