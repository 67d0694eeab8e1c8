"""Which reference a run has, decided once: every kind by what the run was given, and what follows from it."""

import json

import pytest
import torch
from datasets import Dataset
from dpop_trainer import DPOPConfig, DPOPTrainer
from dpop_trainer.models.loading import Policy
from dpop_trainer.reference import choose
from dpop_trainer.reference.choose import Kind, ReferencePlan, plan_reference, reference_model
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama, token_pairs, word_tokenizer


def pairs(*, with_columns=False):
    columns = {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} if with_columns else {}
    return Dataset.from_list([{**record, **columns, "pair_id": i} for i, record in enumerate(token_pairs(2))])


def adapted(*, trained=False):
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    if trained:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.5)
    return model


def planned(policy=None, ref_model=None, *, train=None, evaluate=None, is_new_adapter=False, **options):
    return plan_reference(
        policy if policy is not None else tiny_llama(),
        ref_model,
        DPOPConfig("unused", report_to=[], **options),
        train_dataset=pairs() if train is None else train,
        eval_dataset=evaluate,
        is_new_adapter=is_new_adapter,
    )


BY_COLUMN = pairs(with_columns=True)


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (Kind.COPY, {}),
        (Kind.BEFORE_TRAINING, {"precompute_ref_log_probs": True}),
        (Kind.ADAPTER_OFF, {"policy": adapted(), "is_new_adapter": True}),
        (Kind.ADAPTER_OFF, {"policy": adapted(), "precompute_ref_log_probs": True}),
        (Kind.START_WEIGHTS, {"policy": adapted(trained=True)}),
        (Kind.BEFORE_TRAINING, {"policy": adapted(trained=True), "precompute_ref_log_probs": True}),
        (Kind.SECOND_MODEL, {"ref_model": tiny_llama(seed=7)}),
        (Kind.SECOND_MODEL, {"ref_model": "a/name", "policy": adapted(), "precompute_ref_log_probs": True}),
        (Kind.COLUMNS, {"train": BY_COLUMN}),
        (Kind.COLUMNS, {"train": BY_COLUMN, "evaluate": {"a": BY_COLUMN}}),
        (Kind.COPY, {"train": BY_COLUMN, "evaluate": {"a": BY_COLUMN, "b": pairs()}}),  # for b's sake
        (Kind.NONE, {"loss_type": "sft"}),
    ],
)
def test_the_kind_by_what_is_given(kind, given):
    plan = planned(**given)
    assert plan.kind is kind
    assert plan.is_precomputed == bool(given.get("precompute_ref_log_probs"))
    assert plan.is_start_of_policy == (kind is not Kind.SECOND_MODEL)
    assert plan.is_the_policy == (kind in (Kind.ADAPTER_OFF, Kind.START_WEIGHTS, Kind.BEFORE_TRAINING))
    assert plan.trains_on_given_columns == (given.get("train") is BY_COLUMN)


def test_nothing_is_precomputed_where_no_model_is_needed():
    assert planned(train=BY_COLUMN, precompute_ref_log_probs=True) == ReferencePlan(
        Kind.COLUMNS, is_precomputed=False, trains_on_given_columns=True
    )


@pytest.mark.parametrize("kind", Kind)
def test_a_model_is_made_for_two_kinds_alone(kind):
    policy, second = tiny_llama(), tiny_llama(seed=7)
    of_run = Policy(policy, word_tokenizer(), 64)
    model = reference_model(ReferencePlan(kind), of_run, second, DPOPConfig("unused", report_to=[]), [pairs()])
    if kind is Kind.SECOND_MODEL:
        assert model is second
    elif kind is Kind.COPY:
        assert model is not policy
        assert all(map(torch.equal, model.state_dict().values(), policy.state_dict().values()))
    else:
        assert model is None
        return
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_model_that_is_not_used_is_said_and_neither_loaded_nor_kept(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(choose, "load_reference", lambda *_: pytest.fail("loaded"))
    args = DPOPConfig(str(tmp_path), report_to=[], use_cpu=True)
    for ref_model in ("a/name", tiny_llama(seed=7)):
        run = DPOPTrainer(tiny_llama(), ref_model, args, train_dataset=BY_COLUMN, processing_class=word_tokenizer())
        assert run.ref_model is None
        assert not run.reference.has_model
    assert caplog.text.count("ref_model is not used") == 2


def test_the_record_of_a_run_names_the_plan_s_kind(tmp_path):
    args = DPOPConfig(str(tmp_path), report_to=[], use_cpu=True, max_steps=1, save_strategy="no")
    run = DPOPTrainer(tiny_llama(), args=args, train_dataset=pairs(), processing_class=word_tokenizer())
    run.train()
    record = json.loads((tmp_path / "reference.json").read_text())
    assert record["reference"] == run.reference.plan.kind.value == "a copy of the model as it was at the start"
