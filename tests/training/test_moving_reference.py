"""A reference that follows the policy, held against loops by hand, and found again by a run that is resumed."""

import copy
import logging
import math

import pytest
import torch
from datasets import Dataset
from dpop_trainer.batches.scoring import forward_inputs
from dpop_trainer.reference.moving import MOVED_FILE, move
from dpop_trainer.reference.pair_reference import _check_not_sharded
from dpop_trainer.reference.source import adapter_off
from peft import LoraConfig
from tiny import tiny_llama, token_pairs, word_tokenizer
from torch.nn.functional import logsigmoid
from trainers import adapted, answer_logp, config, logged, trainer

ALPHA, STEPS = 0.4, 3
MOVING = {"sync_ref_model": True, "ref_model_mixup_alpha": ALPHA, "ref_model_sync_steps": STEPS}
POLICIES = {"copy": tiny_llama, "new_adapter": adapted, "trained_adapter": lambda: adapted(seed=5)}


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def weights(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def ten_steps_by_hand(policy, *, beta, dpop_lambda, learning_rate):
    """Full batches, SGD, DPOP by its equation; the reference is a model of its own -> losses, it."""
    policy, reference = policy.eval(), copy.deepcopy(policy).eval()
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.SGD(trained, lr=learning_rate), []
    for step in range(1, 11):
        loss = torch.zeros((), dtype=torch.float64)
        for pair in token_pairs():
            of = {
                name: answer_logp(policy, pair["prompt_ids"], pair[f"{name}_ids"])
                - answer_logp(reference, pair["prompt_ids"], pair[f"{name}_ids"]).detach()
                for name in ("chosen", "rejected")
            }
            penalty = dpop_lambda * torch.relu(-of["chosen"])
            loss = loss - logsigmoid(beta * (of["chosen"] - of["rejected"] - penalty)) / len(token_pairs())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % STEPS == 0:
            with torch.no_grad():
                for held, followed in zip(reference.parameters(), policy.parameters(), strict=True):
                    if followed.requires_grad:
                        held.mul_(1 - ALPHA).add_(followed, alpha=ALPHA)
    return losses, reference


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("copy", "rows"), ("new_adapter", "rows"), ("new_adapter", "tree"), ("trained_adapter", "rows")],
)
def test_ten_steps_are_those_of_a_loop_by_hand(tmp_path, tokenizer, kind, layout):
    options = {"beta": 0.1, "dpop_lambda": 5.0, "learning_rate": 2e-2}
    run = trainer(
        tmp_path,
        tokenizer,
        POLICIES[kind]().double(),
        optim="sgd",
        max_steps=10,
        per_device_train_batch_size=5,
        gradient_accumulation_steps=1,
        layout=layout,
        **MOVING,
        **options,
    )
    run.train()
    losses, reference = ten_steps_by_hand(POLICIES[kind]().double(), **options)
    assert logged(run, "loss") == pytest.approx(losses, rel=1e-6)  # the log has fp32's
    assert max(losses) - min(losses) > 1e-2
    assert logged(run, "dpop/step_0_max_logratio") == [0.0]
    expected = [answer_logp(reference, pair["prompt_ids"], pair["chosen_ids"]).item() for pair in token_pairs()]
    # the model's own norms and rotary angles are in fp32
    assert chosen_logps_of_reference(run) == pytest.approx(expected, rel=1e-6)


def chosen_logps_of_reference(run):
    batch = run.data_collator([run.train_dataset[i] for i in range(5)])
    shared, chosen, _ = run._reference_logps(batch, forward_inputs(batch, run.model)).T
    return (shared + chosen).tolist()


@pytest.mark.parametrize("kind", POLICIES)
def test_a_reference_that_becomes_the_policy_leaves_no_log_ratio(tmp_path, tokenizer, kind):
    run = trainer(
        tmp_path,
        tokenizer,
        POLICIES[kind](),
        sync_ref_model=True,
        ref_model_mixup_alpha=1.0,
        ref_model_sync_steps=1,
        loss_type="dpo",
        max_steps=3,
    )
    run.train()
    assert logged(run, "dpop/chosen_logratio") == logged(run, "dpop/rejected_logratio") == [0.0] * 3
    assert logged(run, "loss") == pytest.approx([math.log(2)] * 3, rel=1e-6)
    assert max(logged(run, "grad_norm")) > 0


def test_a_new_adapters_reference_begins_as_the_base(tmp_path, tokenizer):
    policy = adapted()
    run = trainer(tmp_path, tokenizer, policy, learning_rate=1e-2, max_steps=2, **MOVING)
    run.train()  # and has not moved yet
    with adapter_off(policy), torch.no_grad():
        expected = [answer_logp(policy, pair["prompt_ids"], pair["chosen_ids"]).item() for pair in token_pairs()]
    assert chosen_logps_of_reference(run) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_is_equal_stays_and_a_share_of_one_is_exact(dtype):
    generator = torch.Generator().manual_seed(0)
    policy, reference = (torch.randn(50, 50, generator=generator).to(dtype) for _ in range(2))
    reference[:25] = policy[:25]
    held = reference.clone()
    move([held], [policy], 0.3)
    assert torch.equal(held[:25], policy[:25])
    between = torch.minimum(policy, reference) <= held, held <= torch.maximum(policy, reference)
    assert all(bool(side.all()) for side in between)
    move([held], [policy], 1.0)
    assert torch.equal(held, policy)


@pytest.mark.parametrize("kind", POLICIES)
def test_a_resumed_run_finds_the_reference_where_it_was(tmp_path, tokenizer, kind):
    settings = {**MOVING, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 4, "max_steps": 8}
    whole = trainer(tmp_path, tokenizer, POLICIES[kind](), **settings)
    whole.train()
    checkpoint = tmp_path / "run" / "checkpoint-4"  # one step after a move
    assert (checkpoint / MOVED_FILE).exists()
    resumed = trainer(tmp_path, tokenizer, POLICIES[kind](), **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert logged(resumed, "loss") == logged(whole, "loss")
    for name, value in weights(whole.model).items():
        assert torch.equal(value, resumed.model.get_parameter(name)), name
    (checkpoint / MOVED_FILE).unlink()
    with pytest.raises(ValueError, match=MOVED_FILE):
        trainer(tmp_path, tokenizer, POLICIES[kind](), **settings).train(resume_from_checkpoint=str(checkpoint))


def test_a_move_that_never_comes_is_said(tmp_path, tokenizer, caplog):
    trainer(tmp_path, tokenizer, adapted(), sync_ref_model=True, max_steps=1).train()
    assert "sync_ref_model=True has no effect: the reference moves every 512 steps, and the run has 1." in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        config(tmp_path, ref_model_mixup_alpha=0.5)
    assert "ref_model_mixup_alpha=0.5 has no effect: it belongs to sync_ref_model" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precompute_ref_log_probs": True}, "sync_ref_model: expected False with precompute_ref_log_probs, which"),
        ({"ref_model_offload": True}, "sync_ref_model: expected False with ref_model_offload, which keeps"),
        ({"loss_type": "sft"}, "sync_ref_model: expected False with loss_type sft, which has no reference"),
        ({"ref_model_mixup_alpha": 0.0}, r"ref_model_mixup_alpha: expected .*, in \(0, 1\], got 0.0"),
        ({"ref_model_mixup_alpha": 1.5}, r"ref_model_mixup_alpha: expected .*, in \(0, 1\], got 1.5"),
        ({"ref_model_sync_steps": 0}, "ref_model_sync_steps: expected at least 1 optimizer step, got 0"),
    ],
)
def test_options_that_contradict_it(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **{"sync_ref_model": True, **options})


def test_references_that_cannot_follow(tmp_path, tokenizer, monkeypatch):
    columns = [{**pair, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for pair in token_pairs(2)]
    with pytest.raises(ValueError, match="sync_ref_model: expected pairs without the columns ref_chosen_logps"):
        trainer(tmp_path, tokenizer, eval_dataset=Dataset.from_list(columns), **MOVING)
    lora = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="ref_model: expected a model with the policy's own parameters"):
        trainer(tmp_path, tokenizer, ref_model=tiny_llama(seed=7), peft_config=lora, **MOVING)
    run = trainer(tmp_path, tokenizer, adapted(), **MOVING)
    monkeypatch.setattr("dpop_trainer.reference.pair_reference.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="sync_ref_model: expected an adapter on weights that every process has whole"):
        _check_not_sharded(run.accelerator, run.model, run.reference.plan)


def test_a_second_model_follows(tmp_path, tokenizer):
    run = trainer(tmp_path, tokenizer, ref_model=tiny_llama(seed=7), max_steps=3, **MOVING)
    run.train()
    began, policy = weights(tiny_llama(seed=7)), weights(run.model)
    for name, value in run.ref_model.named_parameters():
        expected = ALPHA * policy[name].double() + (1 - ALPHA) * began[name].double()
        # a difference, a product and a sum of numbers of up to about 1, each rounded to fp32
        torch.testing.assert_close(value.detach().double(), expected, rtol=0, atol=4 * 2.0**-24 * 2)
