"""ScoringHead on tiny random models of every family that does something of its own around the head.

The truth is the model's own logits, in fp32: log-probs to 1e-5 nat, every parameter's gradient to 1e-4 of its norm.
"""

import pytest
import torch
import transformers
from families import MODELS, VOCAB_SIZE, batch, build, grads_of
from rounding import CONTRACT_NATS, MODEL_GRADIENT, SIGMAS, TWO_ROADS_NATS, UNIT

from dpop_kernels import ScoringHead
from dpop_kernels.backends import reference
from dpop_kernels.model_head.transforms import logit_transform


@pytest.mark.parametrize("name", MODELS)
def test_log_probs_and_all_gradients_are_the_models_own(name):
    model = build(name)
    input_ids, positions, target_ids = batch()
    weights = torch.linspace(-1, 1, len(positions))
    logits = model(input_ids=input_ids, use_cache=False).logits.flatten(0, 1)[positions]
    expected = reference.token_logps(logits, target_ids)[0]
    (expected * weights).sum().backward()
    expected_grads = grads_of(model)

    head = ScoringHead(model)
    head.check(model)
    logps = head.token_logps(model, positions, target_ids, input_ids=input_ids)
    (logps * weights).sum().backward()
    grads = grads_of(model)
    # and what rounding takes of larger ones: Mamba's logits of ±69 make one of -72 nats, whose last place is 7.6e-6
    torch.testing.assert_close(logps, expected, rtol=SIGMAS * UNIT[torch.float32], atol=TWO_ROADS_NATS)
    assert grads.keys() == expected_grads.keys()
    largest = max(float(grad.norm()) for grad in expected_grads.values())
    for key, expected_grad in expected_grads.items():
        # the second term: gradients that are zero up to rounding (attention key biases)
        error, length = float((grads[key] - expected_grad).norm()), float(expected_grad.norm())
        assert error <= MODEL_GRADIENT * length + 1e-7 * largest, key


@pytest.mark.parametrize("name", MODELS)
def test_transform_is_what_the_modelling_code_applies(name):
    scale, softcap = MODELS[name][2]
    assert logit_transform(build(name)) == (scale, softcap)


@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite", "falcon_h1", "recurrent_gemma"])
def test_a_wrong_idea_of_the_transform_is_noticed_however_small_the_logits(name):
    model = build(name)
    model.get_output_embeddings().weight.data.zero_()
    head = ScoringHead(model)
    head.check(model)
    head._transform = head._transform._replace(scale=head._transform.scale * 1.01)
    with pytest.raises(ValueError, match="transforms its logits in a way that is not supported"):
        head.check(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "mamba_casts_to_the_weight"])
def test_16_bit_models_agree_within_the_rounding_of_their_own_logits(name, dtype):
    model = build(name, dtype)
    input_ids, positions, target_ids = batch()
    logits = model(input_ids=input_ids, use_cache=False).logits.flatten(0, 1)[positions]
    head = ScoringHead(model)
    head.check(model)
    logps = head.token_logps(model, positions, target_ids, input_ids=input_ids)
    assert logps.dtype == torch.float32
    # target and normaliser are each off by the logits' rounding: up to three roundings of half an eps of their size
    bound = 2 * 3 * torch.finfo(dtype).eps / 2 * float(logits.detach().abs().max())
    error = (logps - reference.token_logps(logits, target_ids)[0]).detach().abs().max()
    assert float(error) <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_the_states_and_the_weight_are_rounded_and_nothing_else(dtype):
    model = build("llama").to(dtype)
    input_ids, positions, target_ids = batch()
    states = []
    model.lm_head.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0]))
    head = ScoringHead(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps = head.token_logps(model, positions, target_ids, input_ids=input_ids)
    rows = states[0].reshape(-1, 32)[positions].bfloat16().double()
    truth = reference.token_logps(rows @ model.lm_head.weight.bfloat16().double().T, target_ids)[0]
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps.double(), truth, rtol=0, atol=CONTRACT_NATS)
    logps.sum().backward()
    assert model.lm_head.weight.grad.dtype == dtype


def test_encoder_decoder_is_refused():
    config = transformers.T5Config(vocab_size=97, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match=r"encoder-decoder T5ForConditionalGeneration.*token_logps"):
        ScoringHead(transformers.T5ForConditionalGeneration(config))


def test_several_heads_are_refused():
    class Choir(transformers.LlamaForCausalLM):
        def get_output_embeddings(self):
            return torch.nn.ModuleList([torch.nn.Linear(32, 97) for _ in range(3)])

    with pytest.raises(ValueError, match=r"expected one lm_head, got 3 of them in Choir.*token_logps"):
        ScoringHead(Choir(build("llama").config))


def test_head_that_is_called_twice_is_refused():
    class Twice(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            super().forward(*args, **kwargs)
            return super().forward(*args, **kwargs)

    model = Twice(build("llama").config)
    input_ids, positions, target_ids = batch()
    with pytest.raises(RuntimeError, match="expected one call of the head per forward"):
        ScoringHead(model).token_logps(model, positions, target_ids, input_ids=input_ids)


class Rounded(torch.nn.Linear):
    """A quantised layer as libraries build them: a linear layer whose forward is not one."""

    def forward(self, hidden_states):
        return torch.nn.functional.linear(hidden_states, self.weight.round())


def test_quantised_heads_are_refused():
    model = build("llama")
    model.set_output_embeddings(Rounded(32, 97))
    with pytest.raises(ValueError, match=r"floating-point linear lm_head, got Rounded.*Leave the head out of quant"):
        ScoringHead(model)
    integer = torch.nn.Linear(32, 97, bias=False)
    integer.weight = torch.nn.Parameter(torch.zeros(97, 32, dtype=torch.uint8), requires_grad=False)
    model.set_output_embeddings(integer)
    with pytest.raises(ValueError, match=r"with a weight of torch\.uint8"):
        ScoringHead(model)
    model.set_output_embeddings(torch.nn.Linear(32, 97).to(torch.float8_e4m3fn))
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        ScoringHead(model)


def test_part_of_the_vocabulary_is_refused():
    model = build("llama")
    model.config.unpadded_vocab_size = 90
    with pytest.raises(ValueError, match="unpadded_vocab_size = 90"):
        ScoringHead(model)


def test_virtual_tokens_are_noticed():
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(build("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="virtual tokens"):
        ScoringHead(model).check(model)


def test_accelerates_offloading_hooks_still_bring_the_weight():
    from accelerate import cpu_offload

    model = build("llama")
    input_ids, positions, target_ids = batch()
    head = ScoringHead(model)
    with torch.no_grad():
        expected = head.token_logps(model, positions, target_ids, input_ids=input_ids)
    head.remove()
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.lm_head.weight.device.type == "meta"
    head = ScoringHead(model)
    head.check(model)
    with torch.no_grad():
        logps = head.token_logps(model, positions, target_ids, input_ids=input_ids)
        assert torch.equal(logps, expected)
        assert model(input_ids=input_ids).logits.shape == (2, 10, VOCAB_SIZE)
    own = model.lm_head._old_forward
    head.remove()
    assert model.lm_head._old_forward is not own
    with torch.no_grad():
        assert model(input_ids=input_ids).logits.shape == (2, 10, VOCAB_SIZE)
