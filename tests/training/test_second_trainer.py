"""Models that a trainer shares with another trainer, or with its own reference: taken over, or refused by name."""

import copy

import pytest
import torch
from datasets import Dataset
from dpop_trainer import DPOPTrainer
from dpop_trainer.settings.config import SFTConfig
from dpop_trainer.training.sft import SFTTrainer
from peft import LoraConfig, get_peft_model
from tiny import VOCAB_SIZE, tiny_llama, token_pairs, word_tokenizer
from trainers import answer_logp, config, logged, trainer
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def mean_chosen(model):
    with torch.no_grad():
        logps = [answer_logp(model, r["prompt_ids"], r["chosen_ids"]).item() for r in token_pairs()]
    return sum(logps) / len(logps)


@pytest.mark.parametrize("copied", [False, True], ids=["same", "deepcopy"])
@pytest.mark.parametrize("with_lora", [True, False], ids=["adapter", "full"])
def test_a_second_trainer_takes_the_model_over(tmp_path, tokenizer, with_lora, copied):
    model = tiny_llama()
    if with_lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
    first = trainer(tmp_path / "a", tokenizer, model, max_steps=2, layout="rows")
    first.train()
    expected = mean_chosen(model.eval())
    model = copy.deepcopy(model) if copied else model
    second = trainer(tmp_path / "b", tokenizer, model, max_steps=1, layout="rows")
    second.train()
    assert logged(second, "logps/chosen")[0] == pytest.approx(expected, rel=1e-5)
    assert logged(second, "dpop/step_0_max_logratio") == [0.0]  # its reference is the model as it then was
    batch = first.data_collator([first.train_dataset[0]])
    if not copied:
        with pytest.raises(RuntimeError, match="another trainer was built on it since"):
            first.head.token_logps(
                first.model, batch["score_positions"], batch["target_ids"], input_ids=batch["input_ids"]
            )


def test_sft_then_dpop_on_one_model_and_its_reference_again(tmp_path, tokenizer):
    model, reference = tiny_llama(), tiny_llama(seed=7)
    sft = SFTTrainer(
        model,
        SFTConfig(str(tmp_path / "sft"), max_steps=1, report_to="none", use_cpu=True, gradient_checkpointing=False),
        train_dataset=Dataset.from_list(token_pairs()),
        processing_class=tokenizer,
    )
    sft.train()
    for name in ("a", "b"):  # the reference is the first one's too
        run = trainer(tmp_path / name, tokenizer, model, ref_model=reference, max_steps=1, beta=1.0, loss_type="dpo")
        expected = mean_chosen(model.eval()) - mean_chosen(reference.eval())
        run.train()
        assert logged(run, "rewards/chosen")[0] == pytest.approx(expected, rel=1e-4)


def peft_model():
    return get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


def sharing(model):
    other = tiny_llama(seed=3)
    other.model.layers[1] = model.model.layers[1]
    return other


def tied(model):
    other = tiny_llama(seed=3)
    other.model.norm.weight = model.model.norm.weight
    return other


@pytest.mark.parametrize(
    ("policy", "reference", "message"),
    [
        (tiny_llama, lambda model: model, "got the policy itself"),
        (peft_model, lambda model: model.get_base_model(), "got the base under the policy's adapter"),
        (tiny_llama, sharing, r"got one that has \d+ parts in common with the policy \(model.layers.1"),
        (tiny_llama, tied, r"got one that has 1 parts in common with the policy \(model.norm.weight"),
    ],
    ids=["itself", "base", "module", "weight"],
)
def test_a_reference_that_is_not_its_own(tmp_path, tokenizer, policy, reference, message):
    model = policy()
    with pytest.raises(ValueError, match=f"ref_model: expected a model of its own, {message}"):
        trainer(tmp_path, tokenizer, model, ref_model=reference(model))


def test_the_model_that_peft_config_wraps_is_no_reference(tmp_path, tokenizer):
    model = tiny_llama()
    with pytest.raises(ValueError, match="ref_model: expected a model of its own, got the base under the policy's"):
        trainer(tmp_path, tokenizer, model, ref_model=model, peft_config=LoraConfig(target_modules=["q_proj"]))


def test_a_reference_with_a_smaller_vocabulary(tmp_path, tokenizer):
    values = {**tiny_llama().config.to_dict(), "vocab_size": VOCAB_SIZE - 1}
    small = LlamaForCausalLM(LlamaConfig(**values))
    with pytest.raises(
        ValueError, match=rf"ref_model: expected an embedding for all {VOCAB_SIZE} tokens, got one of 60"
    ):
        trainer(tmp_path, tokenizer, ref_model=small)
    larger = LlamaForCausalLM(LlamaConfig(**{**values, "vocab_size": VOCAB_SIZE + 3}))  # rows of padding
    assert (
        DPOPTrainer(
            tiny_llama(),
            ref_model=larger,
            args=config(tmp_path),
            train_dataset=Dataset.from_list(token_pairs()),
            processing_class=tokenizer,
        ).ref_model
        is larger
    )
