"""DPOPTrainer on a tiny random Llama: equal to an eager loop written here, resumable, and stopped by bad numbers."""

import json
import math

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from dpop_trainer import DPOPTrainer
from dpop_trainer.training.non_finite import NonFiniteError
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import UNUSED_ID, tiny_llama, token_pairs, word_tokenizer
from trainers import answer_logp, config, logged, trainer
from transformers import AutoModelForCausalLM, TrainingArguments

TRL_METRICS = {
    "entropy",
    "num_tokens",
    "logits/chosen",
    "logits/rejected",
    "mean_token_accuracy",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
}


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def eager_losses(loss_type, records, num_steps, learning_rate, beta=0.3, dpop_lambda=50.0):
    """The same training as a plain loop: full batch, AdamW, no kernel, no padding, no trainer."""
    policy, reference = tiny_llama(), tiny_llama().eval()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate, weight_decay=0.0)
    losses = []
    for _ in range(num_steps):
        total = 0.0
        for record in records:
            prompt_ids, deltas = record["prompt_ids"], []
            for answer_ids in (record["chosen_ids"], record["rejected_ids"]):
                with torch.no_grad():
                    ref_logp = answer_logp(reference, prompt_ids, answer_ids)
                deltas.append(answer_logp(policy, prompt_ids, answer_ids) - ref_logp)
            margin = deltas[0] - deltas[1]
            if loss_type == "dpop":
                z = beta * (margin - dpop_lambda * torch.relu(-deltas[0]))
                loss = torch.nn.functional.softplus(-z)
            elif loss_type == "dpo":
                loss = torch.nn.functional.softplus(-beta * margin)
            elif loss_type == "ipo":
                loss = (margin - 1 / (2 * beta)) ** 2
            else:
                loss = torch.relu(1 - beta * margin)
            total = total + loss / len(records)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    return losses, policy


@pytest.mark.parametrize("prefix_sharing", [True, False], ids=["shared_scored_once", "scored_twice"])
@pytest.mark.parametrize("loss_type", ["dpop", "dpo", "ipo", "slic"])
def test_training_equals_an_eager_loop(tmp_path, tokenizer, loss_type, prefix_sharing):
    # five pairs in micro-batches of three and two, one optimizer step an epoch: the mean must be over all five
    expected, expected_policy = eager_losses(loss_type, token_pairs(), num_steps=6, learning_rate=2e-3)
    run = trainer(tmp_path, tokenizer, loss_type=loss_type, prefix_sharing=prefix_sharing)
    run.train()
    # fp32 sums differ by about 1e-6 nat; βλ = 15 and six AdamW steps amplify that
    assert logged(run, "loss") == pytest.approx(expected, rel=2e-4, abs=2e-5)
    for ours, theirs in zip(run.model.parameters(), expected_policy.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-4)


def test_adapter_off_is_the_reference_a_frozen_copy_would_be(tmp_path, tokenizer):
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    by_adapter = trainer(tmp_path / "a", tokenizer, peft_config=lora, learning_rate=1e-2)
    assert by_adapter.ref_model is None
    by_adapter.train()
    by_copy = trainer(tmp_path / "b", tokenizer, peft_config=lora, ref_model=tiny_llama(), learning_rate=1e-2)
    by_copy.train()
    assert logged(by_adapter, "loss") == pytest.approx(logged(by_copy, "loss"), rel=1e-6)
    assert logged(by_adapter, "loss")[-1] != pytest.approx(math.log(2), rel=1e-3)  # it did move


def test_adapter_is_restored_when_the_reference_forward_fails(tmp_path, tokenizer):
    run = trainer(tmp_path, tokenizer, peft_config=LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    batch = run.data_collator([run.train_dataset[i] for i in range(2)])
    hook = run.model.base_model.model.model.layers[0].register_forward_pre_hook(lambda *_: 1 / 0)
    run.model.train()
    with pytest.raises(ZeroDivisionError):
        run._reference_logps(batch, {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]})
    hook.remove()
    assert not run.model.base_model.model.model.layers[0].self_attn.q_proj.disable_adapters
    assert run.model.training


@pytest.mark.parametrize("with_lora", [True, False], ids=["adapter", "full"])
def test_precomputed_reference_gives_the_same_losses(tmp_path, tokenizer, with_lora):
    # with DPO: at step 0 DPOP sits on its hinge, where the 1e-7 nat by which another batch's rounding
    # differs decides whether the first gradient is multiplied by 1 + λ
    def run(folder, **overrides):
        peft_config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if with_lora else None
        run = trainer(tmp_path / folder, tokenizer, peft_config=peft_config, loss_type="dpo", **overrides)
        run.train()
        return run

    online, cached = run("online"), run("cached", precompute_ref_log_probs=True)
    assert {"ref_chosen_logps", "ref_rejected_logps"} <= set(cached.train_dataset.column_names)
    assert logged(cached, "loss") == pytest.approx(logged(online, "loss"), rel=1e-4, abs=1e-5)


def test_given_reference_columns_are_used(tmp_path, tokenizer):
    reference = tiny_llama(seed=7).eval()
    records = token_pairs()
    with torch.no_grad():
        for record in records:
            for side in ("chosen", "rejected"):
                logp = answer_logp(reference, record["prompt_ids"], record[f"{side}_ids"])
                record[f"ref_{side}_logps"] = float(logp)
    by_column = trainer(tmp_path / "a", tokenizer, records=records)  # another model, so that no pair is at the tie
    assert by_column.ref_model is None
    by_column.train()
    by_model = trainer(tmp_path / "b", tokenizer, ref_model=reference)
    by_model.train()
    assert logged(by_column, "loss") == pytest.approx(logged(by_model, "loss"), rel=1e-4)


def test_metrics_are_trls_and_dpops(tmp_path, tokenizer):
    run = trainer(
        tmp_path, tokenizer, eval_dataset=Dataset.from_list(token_pairs(4, seed=9)), eval_strategy="steps", eval_steps=3
    )
    run.train()
    first = next(line for line in run.state.log_history if "loss" in line)
    assert first.keys() >= TRL_METRICS | {"dpop/penalty", "dpop/active_fraction", "dpop/chosen_deficit"}
    # before the first update policy and reference agree: every reward is zero, no hinge is active, the loss is log 2
    assert first["loss"] == pytest.approx(math.log(2))
    assert first["rewards/chosen"] == first["rewards/margins"] == first["dpop/active_fraction"] == 0.0
    assert first["dpop/step_0_max_logratio"] == 0.0
    records = token_pairs()
    tokens = sum(2 * len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in records)
    assert logged(run, "num_tokens") == [tokens * step for step in range(1, 7)]
    model = tiny_llama()
    logps = [answer_logp(model, r["prompt_ids"], r["chosen_ids"]).item() for r in records]
    assert first["logps/chosen"] == pytest.approx(sum(logps) / 5, rel=1e-5)
    evaluated = next(line for line in run.state.log_history if "eval_loss" in line)
    assert evaluated.keys() >= {f"eval_{key}" for key in TRL_METRICS - {"num_tokens"}}


def test_token_metrics_by_hand(tmp_path, tokenizer):
    run = trainer(tmp_path, tokenizer, max_steps=1)
    run.train()
    model, records = tiny_llama().requires_grad_(False), token_pairs()
    entropies, top1, logits_chosen = [], [], []
    for record in records:
        for side in ("chosen_ids", "rejected_ids"):
            ids = torch.tensor([*record["prompt_ids"], *record[side]])
            logits = model(input_ids=ids[None]).logits[0, len(record["prompt_ids"]) - 1 : -1].double()
            entropies.append(torch.distributions.Categorical(logits=logits).entropy())
            if side == "chosen_ids":
                top1.append(logits.argmax(-1) == torch.tensor(record[side]))
                logits_chosen.append(logits.mean(-1))
    assert logged(run, "entropy")[0] == pytest.approx(float(torch.cat(entropies).mean()), rel=1e-5)
    assert logged(run, "mean_token_accuracy")[0] == pytest.approx(float(torch.cat(top1).double().mean()), rel=1e-6)
    assert logged(run, "logits/chosen")[0] == pytest.approx(float(torch.cat(logits_chosen).mean()), rel=1e-4)


def test_resumed_run_is_the_uninterrupted_run_bit_for_bit(tmp_path, tokenizer):
    records = token_pairs(8)
    settings = {"records": records, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 8}
    whole = trainer(tmp_path / "whole", tokenizer, **settings)
    of_whole = whole.train()
    first_half = trainer(tmp_path / "half", tokenizer, **settings, save_strategy="steps", save_steps=5)
    first_half.train()  # saves at step 5, then goes on; what follows starts over from the checkpoint
    resumed = trainer(tmp_path / "half", tokenizer, **settings, save_strategy="steps", save_steps=5)
    of_resumed = resumed.train(resume_from_checkpoint=str(tmp_path / "half" / "run" / "checkpoint-5"))
    assert of_resumed.training_loss == of_whole.training_loss == pytest.approx(sum(logged(whole, "loss")) / 8, rel=1e-6)
    assert logged(resumed, "train_loss")[-1] == of_whole.training_loss
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert logged(resumed, "loss") == logged(whole, "loss")
    assert logged(resumed, "num_tokens") == logged(whole, "num_tokens")
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "half" / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == sorted(steps)
    assert steps.count(6) == 1


def test_saved_model_loads_and_generates(tmp_path, tokenizer):
    run = trainer(tmp_path, tokenizer)
    run.train()
    run.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    for ours, theirs in zip(loaded.parameters(), run.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    ids = torch.tensor([[5, 6, 7]])
    output = loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert output.shape[1] > 3

    adapted = trainer(
        tmp_path / "lora", tokenizer, peft_config=LoraConfig(r=4, target_modules="all-linear"), learning_rate=1e-2
    )
    adapted.train()
    adapted.save_model()
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora" / "run")
    torch.testing.assert_close(loaded(input_ids=ids).logits, adapted.model(input_ids=ids).logits)


def test_run_leaves_its_files(tmp_path, tokenizer):
    trainer(tmp_path, tokenizer).train()
    folder = tmp_path / "run"
    assert yaml.safe_load((folder / "config.yaml").read_text())["dpop_lambda"] == 50.0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["train_data/num_pairs"] == 5
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert "Change of the answers" in (folder / "run.html").read_text()


def test_training_stops_before_a_nan_is_trained_on(tmp_path, tokenizer):
    records = token_pairs(8)
    records[3]["prompt_ids"][0] = UNUSED_ID
    model = tiny_llama()
    model.model.embed_tokens.weight.data[UNUSED_ID] = float("nan")
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": 8}
    run = trainer(tmp_path, tokenizer, model, records=records, **settings)
    with pytest.raises(NonFiniteError, match=r"step \d: expected finite values, got a NaN .* pair ids \[3\]"):
        run.train()
    clean = [parameter for name, parameter in model.named_parameters() if "embed_tokens" not in name]
    assert all(torch.isfinite(parameter).all() for parameter in clean)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_reference_logps_are_named(tmp_path, tokenizer, value):
    records = [{**record, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for record in token_pairs()]
    records[2]["ref_chosen_logps"] = value
    with pytest.raises(ValueError, match=r"ref_chosen_logps.*2|2.*ref_chosen_logps"):
        trainer(tmp_path, tokenizer, records=records).train()


def test_text_data_is_counted_and_identical_pairs_left_out(tmp_path, tokenizer):
    records = [
        {"prompt": "w1 w2", "chosen": " w3 w4", "rejected": " w3 w5"},
        {"prompt": "w1 w2", "chosen": " w6", "rejected": " w6"},
        {"prompt": "w7", "chosen": " w8 w9 w10", "rejected": " w8"},
    ]
    run = trainer(tmp_path, tokenizer, records=records, max_steps=2)
    run.train()
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["train_data/num_pairs_in"] == 3
    assert first["train_data/num_pairs"] == 2
    assert first["train_data/dropped_identical"] == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"beta": 0.0}, "beta: expected a finite value > 0"),
        ({"dpop_lambda": -5.0}, "dpop_lambda: expected a finite value >= 0"),
        ({"loss_type": "sigmoids"}, r"loss_type: expected one of .* Did you mean 'sigmoid'\?"),
        ({"truncation_mode": "middle"}, "truncation_mode: expected 'keep_start' or 'keep_end', got 'middle'"),
        ({"max_length": 1}, "max_length: expected None or at least 2 tokens, got 1"),
    ],
)
def test_bad_configuration_is_named(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **overrides)


def test_bad_arguments_are_named(tmp_path, tokenizer):
    model = tiny_llama()
    with pytest.raises(ValueError, match="ref_model: expected a model of its own, got the policy itself"):
        trainer(tmp_path, tokenizer, model, ref_model=model)
    with pytest.raises(ValueError, match="train_dataset: expected a data set"):
        DPOPTrainer(tiny_llama(), args=config(tmp_path), processing_class=tokenizer)
    peft_model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="peft_config: expected None"):
        trainer(tmp_path, tokenizer, peft_model, peft_config=LoraConfig())
    with pytest.raises(ValueError, match=r"train_dataset: expected one data set, got several: \['test', 'train'\]"):
        DPOPTrainer(
            tiny_llama(),
            args=config(tmp_path),
            train_dataset=DatasetDict(train=Dataset.from_list(token_pairs()), test=Dataset.from_list(token_pairs())),
            processing_class=tokenizer,
        )
    with pytest.raises(ValueError, match="args: expected a DPOPConfig, got TrainingArguments"):
        DPOPTrainer(tiny_llama(), args=TrainingArguments(), train_dataset=Dataset.from_list(token_pairs()))
    with pytest.raises(ValueError, match="model: expected a causal LM, or a name or path to load one, got int"):
        DPOPTrainer(3, args=config(tmp_path), train_dataset=Dataset.from_list(token_pairs()))
