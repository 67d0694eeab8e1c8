"""ScoringHead on tiny random models of many families: log-probs and gradients equal the model's own logits path."""

import copy

import pytest
import torch
from families import SMALL
from peft import IA3Config, LoraConfig, get_peft_model
from rounding import GRADIENT, MODEL_GRADIENT, TWO_ROADS_NATS
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    Qwen2Config,
)

from dpop_kernels import ScoringHead
from dpop_kernels.backends import reference

CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "llama_tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SMALL),
    "gemma2_softcap": Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=3.0),
    "cohere_logit_scale": CohereConfig(**SMALL, logit_scale=0.25),
    "granite_logits_scaling": GraniteConfig(**SMALL, logits_scaling=4.0),
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2),
}


def build(name):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager").eval()
    # initialised logits are close to zero: spread them, so that scale and softcap matter
    model.get_output_embeddings().weight.data.mul_(20)
    return model


def batch():
    input_ids = torch.randint(3, 97, (3, 12))
    score_positions = torch.tensor([3, 4, 5, 12, 20, 21, 33])  # rows of [3 * 12, H]
    target_ids = input_ids.flatten()[score_positions + 1]
    return input_ids, score_positions, target_ids


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_models_own_logits(name):
    model = build(name)
    input_ids, positions, target_ids = batch()
    grad = torch.linspace(-1, 1, len(positions))
    logits = model(input_ids=input_ids, use_cache=False).logits.flatten(0, 1)[positions]
    expected = reference.token_logps(logits, target_ids)[0]
    (expected * grad).sum().backward()
    expected_grads = {key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()

    head = ScoringHead(model)
    head.check(model)
    logps = head.token_logps(model, positions, target_ids, input_ids=input_ids)
    (logps * grad).sum().backward()
    torch.testing.assert_close(logps, expected, rtol=GRADIENT, atol=TWO_ROADS_NATS)
    grads = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
    assert grads.keys() == expected_grads.keys()
    for key, expected_grad in expected_grads.items():
        scale = float(expected_grad.abs().max())
        torch.testing.assert_close(
            grads[key], expected_grad, rtol=MODEL_GRADIENT, atol=1e-5 * scale, msg=lambda m, k=key: k + m
        )


def test_generate_and_plain_forward_are_untouched_and_removal_leaves_no_trace():
    model = build("llama")
    before = copy.deepcopy(model.state_dict())
    input_ids, positions, target_ids = batch()
    expected = model(input_ids=input_ids).logits
    prompt, mask = input_ids[:1], torch.ones_like(input_ids[:1])
    generated = model.generate(prompt, attention_mask=mask, max_new_tokens=5, do_sample=False)
    head = ScoringHead(model)
    head.token_logps(model, positions, target_ids, input_ids=input_ids)
    assert torch.equal(model(input_ids=input_ids).logits, expected)
    assert torch.equal(model.generate(prompt, attention_mask=mask, max_new_tokens=5, do_sample=False), generated)
    assert model.state_dict().keys() == before.keys()
    head.remove()
    assert "forward" not in model.lm_head.__dict__
    assert torch.equal(model(input_ids=input_ids).logits, expected)


def test_module_hooks_on_the_head_still_fire():
    model = build("llama")
    calls = []
    model.lm_head.register_forward_pre_hook(lambda module, args: calls.append("before"))
    model.lm_head.register_forward_hook(lambda module, args, output: calls.append("after"))
    input_ids, positions, target_ids = batch()
    ScoringHead(model).token_logps(model, positions, target_ids, input_ids=input_ids)
    assert calls == ["before", "after"]


def test_a_failed_forward_leaves_the_head_ready():
    model = build("llama")
    head = ScoringHead(model)
    input_ids, positions, target_ids = batch()
    expected = head.token_logps(model, positions, target_ids, input_ids=input_ids)
    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        head.token_logps(model, positions, target_ids, input_ids=input_ids)
    hook.remove()
    assert model(input_ids=input_ids).logits.shape == (3, 12, 97)
    assert torch.equal(head.token_logps(model, positions, target_ids, input_ids=input_ids), expected)


def test_another_model_is_noticed():
    input_ids, positions, target_ids = batch()
    head = ScoringHead(build("llama"))
    with pytest.raises(RuntimeError, match=r"did not\. Pass the same model"):
        head.token_logps(build("llama"), positions, target_ids, input_ids=input_ids)


def test_trained_copy_of_the_head_under_peft():
    model = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    input_ids, positions, target_ids = batch()
    trained = model.base_model.model.lm_head.modules_to_save["default"].weight
    trained.data.add_(torch.randn_like(trained))
    with_adapter = model(input_ids=input_ids).logits.flatten(0, 1)[positions]
    with model.disable_adapter():
        without = model(input_ids=input_ids).logits.flatten(0, 1)[positions]
    head = ScoringHead(model)
    logps = head.token_logps(model, positions, target_ids, input_ids=input_ids)
    torch.testing.assert_close(
        logps, reference.token_logps(with_adapter, target_ids)[0], rtol=GRADIENT, atol=TWO_ROADS_NATS
    )
    logps.sum().backward()
    assert trained.grad.abs().sum() > 0
    with model.disable_adapter(), torch.no_grad():
        logps = head.token_logps(model, positions, target_ids, input_ids=input_ids)
    torch.testing.assert_close(logps, reference.token_logps(without, target_ids)[0], rtol=GRADIENT, atol=TWO_ROADS_NATS)


def test_adapter_other_than_lora_on_the_head_is_refused_by_name():
    model = get_peft_model(build("llama"), IA3Config(target_modules=["lm_head"], feedforward_modules=[]))
    with pytest.raises(ValueError, match=r"an adapter on the head.*Leave lm_head out of target_modules"):
        ScoringHead(model)


def test_second_head_is_refused():
    model = build("llama")
    ScoringHead(model)
    with pytest.raises(ValueError, match="without a ScoringHead"):
        ScoringHead(model)


def test_unknown_transform_of_the_logits_is_refused():
    class Shifted(type(build("llama"))):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            return type(output)(**{**output, "logits": output.logits * torch.linspace(0, 1, 97)})

    model = build("llama")
    model.__class__ = Shifted
    with pytest.raises(ValueError, match="transforms its logits in a way that is not supported"):
        ScoringHead(model).check(model)


def test_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="expected a causal LM with an output embedding"):
        ScoringHead(build("llama").model)
