"""A LoRA adapter on the head itself: logits = [h, s·A h]·[W, B]ᵀ, held against fp64 and against peft's own forward."""

import pytest
import torch
from backends import EVERY, IN_FP64, ON_CPU, device_of
from families import batch, build, grads_of
from peft import LoraConfig, get_peft_model
from rounding import CONTRACT_NATS, GRADIENT, TWO_ROADS_NATS, stored
from truth import assert_statistics, head_inputs, relative_error, set_tiles, true_head_logps, value_and_grads

from dpop_kernels import ScoringHead
from dpop_kernels.backends import reference
from dpop_kernels.logps.lora import lora_token_logps

OPTIONS = {"plain": {}, "scale_and_softcap": {"logit_scale": 0.5, "softcap": 4.0}}


def lora_inputs(num_tokens, vocab_size, hidden_size, rank, dtype=torch.float32):
    hidden_states, weight, target_ids = head_inputs(num_tokens, vocab_size, hidden_size, dtype)
    low_rank_states = torch.randn(num_tokens, rank, dtype=dtype)
    return hidden_states, weight, low_rank_states, torch.randn(vocab_size, rank, dtype=dtype) / 4, target_ids


def truth(hidden_states, weight, states, low_rank_weight, bias, target_ids, options):
    """The definition in fp64: K extended by R."""
    hidden_states, weight = torch.cat([hidden_states, states], 1), torch.cat([weight, low_rank_weight], 1)
    return true_head_logps(hidden_states, weight, target_ids, bias=bias, **options)[0]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", EVERY)
def test_values_and_all_gradients_against_fp64(backend, options, monkeypatch):
    set_tiles(monkeypatch, rows=4, columns=32)
    device = device_of(backend)
    *inputs, target_ids = (tensor.to(device) for tensor in lora_inputs(13, 101, 24, 3))
    inputs, grad = [*inputs, torch.randn(101, device=device)], torch.randn(13, device=device)

    def candidate(hidden_states, weight, states, low_rank_weight, bias):
        return lora_token_logps(
            hidden_states, weight, states, low_rank_weight, target_ids, bias=bias, backend=backend, **OPTIONS[options]
        )[0]

    logps, grads = value_and_grads(candidate, inputs, grad)
    expected, expected_grads = value_and_grads(
        lambda *tensors: truth(*tensors, target_ids, OPTIONS[options]), [tensor.double() for tensor in inputs], grad
    )
    torch.testing.assert_close(logps.double(), expected, rtol=0, atol=CONTRACT_NATS)
    for candidate_grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert relative_error(candidate_grad, expected_grad) <= GRADIENT


@pytest.mark.parametrize("backend", IN_FP64)
def test_gradcheck(backend):
    *inputs, target_ids = lora_inputs(5, 11, 6, 2, torch.float64)
    leaves = [tensor.requires_grad_() for tensor in [*inputs, torch.randn(11, dtype=torch.float64)]]
    torch.autograd.gradcheck(
        lambda h, w, a, b, bias: lora_token_logps(h, w, a, b, target_ids, bias=bias, softcap=5.0, backend=backend)[0],
        leaves,
    )


def test_16_bit_head_beside_an_fp32_adapter():
    hidden_states, weight, _, _, target_ids = lora_inputs(16, 200, 32, 4, torch.bfloat16)
    states, low_rank_weight, grad = torch.randn(16, 4), torch.randn(200, 4) / 4, torch.randn(16)
    inputs = [hidden_states, weight, states, low_rank_weight]
    logps, grads = value_and_grads(lambda *tensors: lora_token_logps(*tensors, target_ids)[0], inputs, grad)
    expected, expected_grads = value_and_grads(
        lambda *tensors: truth(*tensors, None, target_ids, {}), [tensor.double() for tensor in inputs], grad
    )
    torch.testing.assert_close(logps.double(), expected, rtol=0, atol=CONTRACT_NATS)
    for tensor, candidate_grad, expected_grad in zip(inputs, grads, expected_grads, strict=True):
        assert candidate_grad.dtype == tensor.dtype
        assert relative_error(candidate_grad, expected_grad) <= (
            stored(torch.bfloat16, times=2) if tensor.dtype == torch.bfloat16 else GRADIENT
        )


def test_frozen_weight_gets_no_gradient_and_none_is_allocated(monkeypatch):
    hidden_states, weight, states, low_rank_weight, target_ids = lora_inputs(12, 4096, 64, 4)
    leaves = [tensor.requires_grad_() for tensor in (hidden_states, states, low_rank_weight)]
    largest = []
    for name in ("empty_like", "zeros_like"):
        allocate = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda t, *a, f=allocate, **k: (largest.append(t.numel()), f(t, *a, **k))[1])
    set_tiles(monkeypatch, rows=512, columns=512)
    new_zeros = torch.Tensor.new_zeros
    monkeypatch.setattr(
        torch.Tensor, "new_zeros", lambda t, *a, **k: (largest.append((z := new_zeros(t, *a, **k)).numel()), z)[1]
    )
    lora_token_logps(hidden_states, weight, states, low_rank_weight, target_ids)[0].sum().backward()
    assert weight.grad is None
    assert all(leaf.grad is not None for leaf in leaves)
    assert max(largest) <= 4096 * 4  # B's own gradient, not [V, H]


def test_no_tokens():
    *inputs, target_ids = lora_inputs(0, 11, 6, 2)
    logps, grads = value_and_grads(lambda *t: lora_token_logps(*t, target_ids)[0], inputs, torch.zeros(0))
    assert logps.shape == (0,)
    assert all(float(grad.abs().sum()) == 0 for grad in grads)


@pytest.mark.parametrize("backend", ON_CPU)
def test_statistics_are_those_of_the_extended_head(backend):
    *inputs, target_ids = lora_inputs(9, 31, 8, 2)
    stats = lora_token_logps(*inputs, target_ids, return_stats=True, backend=backend)[1]
    hidden_states, weight, states, low_rank_weight = (tensor.double() for tensor in inputs)
    extended = torch.cat([hidden_states, states], 1), torch.cat([weight, low_rank_weight], 1)
    assert_statistics(stats, true_head_logps(*extended, target_ids, with_stats=True)[1])


def test_shapes_are_checked():
    hidden_states, weight, states, low_rank_weight, target_ids = lora_inputs(5, 11, 6, 2)
    with pytest.raises(ValueError, match=r"low_rank_states: expected shape \[5, 2\], got \[5, 3\]"):
        lora_token_logps(hidden_states, weight, torch.zeros(5, 3), low_rank_weight, target_ids)
    with pytest.raises(ValueError, match=r"low_rank_weight: expected shape \[11, 2\], got \[10, 2\]"):
        lora_token_logps(hidden_states, weight, states, low_rank_weight[:10], target_ids)


def with_adapter(name="llama", *, dtype=torch.float32, train=True, **arguments):
    """A model with LoRA on one projection and on its head, every adapter weight random."""
    arguments = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "lm_head"], **arguments}
    model = get_peft_model(build(name, dtype), LoraConfig(**arguments)).train(train)
    for key, value in model.named_parameters():
        if "lora_" in key:
            value.data.normal_(std=0.3)
    return model


def compare(model, *, seed=None):
    """Log-probs and the gradients of all trainable parameters against the model's own logits."""
    input_ids, positions, target_ids = batch()
    weights = torch.linspace(-1, 1, len(positions))

    logits = model(input_ids=input_ids, use_cache=False).logits.flatten(0, 1)[positions]
    expected = reference.token_logps(logits, target_ids)[0]
    (expected * weights).sum().backward()
    expected_grads = grads_of(model)
    head = ScoringHead(model)
    logps = head.token_logps(model, positions, target_ids, input_ids=input_ids)
    (logps * weights).sum().backward()
    grads = grads_of(model)
    head.remove()
    torch.testing.assert_close(logps, expected, rtol=0, atol=TWO_ROADS_NATS)
    assert grads.keys() == expected_grads.keys() == {k for k, v in model.named_parameters() if v.requires_grad}
    for key, expected_grad in expected_grads.items():
        assert relative_error(grads[key], expected_grad) <= 1e-4, key
    return grads


# peft warns that an adapter on a tied head complicates merging
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "phi"])
def test_peft_model_equals_its_own_forward(name):
    grads = compare(with_adapter(name))
    assert any("lm_head.lora_A" in key for key in grads)
    assert any("lm_head.lora_B" in key for key in grads)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")  # that it cannot be merged
def test_adapter_with_a_bias():
    compare(with_adapter("phi", lora_bias=True))
    compare(with_adapter("llama", lora_bias=True))


def test_several_active_adapters_add_up():
    model = with_adapter()
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=2, target_modules=["lm_head"]))
    for key, value in model.named_parameters():
        if "second" in key:
            value.data.normal_(std=0.3)
    model.base_model.set_adapter(["default", "second"])
    grads = compare(model)
    assert {key for key in grads if "lm_head.lora_B" in key} == {
        f"base_model.model.lm_head.lora_B.{name}.weight" for name in ("default", "second")
    }


def test_switched_off_and_merged_adapters_are_followed():
    model = with_adapter(train=False)
    plain = build("llama")
    input_ids, positions, target_ids = batch()

    def own(of):
        logits = of(input_ids=input_ids).logits.flatten(0, 1)[positions]
        return reference.token_logps(logits, target_ids)[0]

    head = ScoringHead(model)
    score = lambda: head.token_logps(model, positions, target_ids, input_ids=input_ids)  # noqa: E731
    with torch.no_grad():
        adapted = own(model)
        with model.disable_adapter():
            torch.testing.assert_close(score(), own(plain), rtol=0, atol=TWO_ROADS_NATS)
        torch.testing.assert_close(score(), adapted, rtol=0, atol=TWO_ROADS_NATS)
        model.merge_adapter()
        torch.testing.assert_close(score(), adapted, rtol=0, atol=TWO_ROADS_NATS)
        with model.disable_adapter():  # peft undoes the merge here
            torch.testing.assert_close(score(), own(plain), rtol=0, atol=TWO_ROADS_NATS)
        torch.testing.assert_close(score(), adapted, rtol=0, atol=TWO_ROADS_NATS)


def test_dropout_acts_on_the_adapters_input_only():
    model = with_adapter(target_modules=["lm_head"], lora_dropout=0.5)
    input_ids, positions, target_ids = batch()
    inputs = []
    model.base_model.model.lm_head.lora_A["default"].register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    head = ScoringHead(model)
    logps = head.token_logps(model, positions, target_ids, input_ids=input_ids)
    lora = model.base_model.model.lm_head
    hidden_states = model.base_model.model.model(input_ids).last_hidden_state.reshape(-1, 32)[positions]
    kept = inputs[0] != 0
    assert 0.3 < float(kept.float().mean()) < 0.7
    torch.testing.assert_close(inputs[0], torch.where(kept, hidden_states * 2, 0))  # divided by the share kept
    logits = lora.base_layer(hidden_states) + lora.lora_B["default"](lora.lora_A["default"](inputs[0])) * (7 / 3)
    torch.testing.assert_close(logps, reference.token_logps(logits, target_ids)[0], rtol=0, atol=TWO_ROADS_NATS)


def test_hooks_of_every_part_fire_and_weights_are_read_inside_them():
    model = with_adapter()
    lora = model.base_model.model.lm_head
    events = []
    for name, module in [("base", lora.base_layer), ("A", lora.lora_A["default"]), ("B", lora.lora_B["default"])]:
        module.register_forward_pre_hook(lambda module, args, n=name: events.append(f"{n} in"))
        module.register_forward_hook(lambda module, args, output, n=name: events.append(f"{n} out"))
    input_ids, positions, target_ids = batch()
    ScoringHead(model).token_logps(model, positions, target_ids, input_ids=input_ids)
    assert events == ["A in", "A out", "base in", "B in", "B out", "base out"]
    assert "forward" not in lora.base_layer.__dict__


def test_dora_is_refused_by_name():
    model = with_adapter(use_dora=True)
    with pytest.raises(ValueError, match=r"plain LoRA on lm_head, got .*DoraLinearVariant.*modules_to_save"):
        ScoringHead(model)
