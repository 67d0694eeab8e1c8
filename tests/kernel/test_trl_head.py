"""`use_dpop_head`: TRL's own trainers with this package's products, held to TRL's with its own.

Every run is made twice, with nothing but the one call between them. The optimiser is plain SGD, which hands a rounding
of the gradient on as it is; Adam's first steps would make ±1 of the sign of a gradient that is nothing but rounding.
"""

import re
from pathlib import Path

import pytest
import torch
from counted import CountedProducts
from datasets import Dataset
from peft import LoraConfig
from rounding import CONTRACT_NATS, GRADIENT, MODEL_GRADIENT, TWO_ROADS_NATS, UNIT
from tiny import VOCAB_SIZE, text_pairs, tiny_llama, word_tokenizer
from transformers import AutoModelForCausalLM
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.kernels import ChunkedLogProbFunction
from trl.trainer import utils
from truth import head_inputs, relative_error

from dpop_kernels.integrations.trl import use_dpop_head
from dpop_kernels.logps.head import Head
from dpop_kernels.logps.linear import head_token_logps

ROOT = Path(__file__).parents[2]
NUM_STEPS = 3
HIDDEN = 32  # of tiny_llama
ALL_OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
MACHINE = ("_runtime", "_per_second", "step_time")  # how this machine is, not what a run computes


@pytest.fixture(autouse=True)
def _trls_own_head_afterwards():
    yield
    use_dpop_head(False)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("trl_head") / "model"
    tiny_llama().save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return str(path)


def rewards_of(completions, **_):
    """How often an answer says w3, w13, w23, ...: nothing a trained model would know."""
    return [float(sum(word.endswith("3") for word in answer.split())) for answer in completions]


def settings(config_class, folder, **more):
    return config_class(
        output_dir=str(folder),
        **{
            "max_steps": NUM_STEPS,
            "per_device_train_batch_size": 2,
            "learning_rate": 0.05,
            "optim": "sgd",
            "logging_steps": 1,
            "bf16": False,
            "use_cpu": True,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            **more,
        },
    )


PAIRS = text_pairs(8)
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
OWN_HEAD = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
GENERATION = {"num_generations": 2, "max_completion_length": 5, "temperature": 0.7}


def sft(model, folder, peft_config=None, **more):
    data = Dataset.from_list([{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in PAIRS])
    return SFTTrainer(model, settings(SFTConfig, folder, **more), train_dataset=data, peft_config=peft_config)


def dpo(model, folder, peft_config=None, **more):
    args = settings(DPOConfig, folder, **more)
    return DPOTrainer(model, args=args, train_dataset=Dataset.from_list(PAIRS), peft_config=peft_config)


def kto(model, folder, peft_config=None, **more):
    answers = ("rejected", "chosen")
    records = [
        {"prompt": pair["prompt"], "completion": pair[answers[i % 2]], "label": bool(i % 2)}
        for i, pair in enumerate(PAIRS)
    ]
    args = settings(KTOConfig, folder, **more)
    return KTOTrainer(model, args=args, train_dataset=Dataset.from_list(records), peft_config=peft_config)


def online(trainer_class, config_class):
    def make(model, folder, peft_config=None, **more):
        return trainer_class(
            model,
            rewards_of,
            settings(config_class, folder, **GENERATION, **more),
            train_dataset=Dataset.from_list([{"prompt": pair["prompt"]} for pair in PAIRS]),
            peft_config=peft_config,
        )

    return make


grpo, rloo = online(GRPOTrainer, GRPOConfig), online(RLOOTrainer, RLOOConfig)

# a row of docs/from-trl.md: how its trainer is made, and the products of a micro-batch there and here
RUNS = {
    "SFT": (sft, {}, [4, 4]),
    "SFT, LoRA, accumulation": (sft, {"peft_config": LORA, "gradient_accumulation_steps": 2}, [3, 2]),
    'SFT, LoRA and `modules_to_save=["lm_head"]`': (sft, {"peft_config": OWN_HEAD}, [4, 4]),
    "DPO, `use_weighting`": (dpo, {"use_weighting": True}, [4, 4]),
    "DPO, LoRA": (dpo, {"peft_config": LORA, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}, [3, 2]),
    "KTO, LoRA": (kto, {"peft_config": LORA}, [3, 2]),
    "GRPO": (grpo, {"beta": 0.1}, [4, 4]),
    "GRPO, LoRA": (grpo, {"peft_config": LORA, "top_entropy_quantile": 0.5, "cast_lm_head_to_fp32": True}, [3, 2]),
    "GRPO, LoRA, entropy bonus": (grpo, {"peft_config": LORA, "entropy_coef": 0.1}, [3, 3]),
    "RLOO, LoRA": (rloo, {"peft_config": LORA, "beta": 0.1}, [3, 2]),
}


def test_the_table_in_the_docs_is_what_is_counted_here():
    table = re.findall(r"^\| (.*) \| (\d) \| (\d) \|$", (ROOT / "docs" / "from-trl.md").read_text(), re.MULTILINE)
    assert {run: [int(theirs), int(ours)] for run, theirs, ours in table} == {
        run: products for run, (*_, products) in RUNS.items()
    }


class Rows:
    """What stands behind TRL's name for its function: counts the rows that it scores, with and without gradient."""

    def __init__(self, function):
        self._function = function
        self.scored = {True: 0, False: 0}

    def apply(self, hidden, *rest):
        self.scored[torch.is_grad_enabled()] += len(hidden)
        return self._function.apply(hidden, *rest)


def trained(make, model_path, folder, monkeypatch, **more):
    """The log, the trained parameters, and products of the head's size per micro-batch, but for the reference's."""
    trainer = make(model_path, folder, **more)
    rows, products, counted = Rows(utils._ChunkedLogProbFunction), [], None
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", rows)
    compute_loss, backward = trainer.compute_loss, trainer.accelerator.backward

    def counted_loss(*args, **kwargs):
        nonlocal counted
        rows.scored = {True: 0, False: 0}
        with CountedProducts(1, HIDDEN, VOCAB_SIZE, of_head_alone=True) as counted:
            return compute_loss(*args, **kwargs)

    def counted_backward(*args, **kwargs):
        with counted:
            backward(*args, **kwargs)
        products.append((counted.products - rows.scored[False]) / rows.scored[True])

    monkeypatch.setattr(trainer, "compute_loss", counted_loss)
    monkeypatch.setattr(trainer.accelerator, "backward", counted_backward)
    trainer.train()
    monkeypatch.undo()
    log = [
        {key: value for key, value in line.items() if not key.endswith(MACHINE)} for line in trainer.state.log_history
    ]
    parameters = [parameter.detach() for parameter in trainer.model.parameters() if parameter.requires_grad]
    return log, parameters, products


@pytest.mark.parametrize("name", RUNS)
def test_a_trainer_s_log_is_the_same_and_its_products_are_fewer(name, model_path, tmp_path, monkeypatch):
    make, more, (theirs_expected, ours_expected) = RUNS[name]
    their_log, their_parameters, theirs = trained(make, model_path, tmp_path / "theirs", monkeypatch, **more)
    with use_dpop_head():
        our_log, our_parameters, ours = trained(make, model_path, tmp_path / "ours", monkeypatch, **more)
    assert len(our_log) == len(their_log) == NUM_STEPS + 1
    assert max(line.get("grad_norm", 0.0) for line in their_log) > 1e-3
    for our_line, their_line in zip(our_log, their_log, strict=True):
        assert our_line.keys() == their_line.keys()
        for key, value in their_line.items():
            assert our_line[key] == pytest.approx(value, rel=1e-4, abs=TWO_ROADS_NATS), key
    for our_parameter, their_parameter in zip(our_parameters, their_parameters, strict=True):
        torch.testing.assert_close(our_parameter, their_parameter, rtol=1e-4, atol=1e-6)
    assert set(theirs) == {theirs_expected}
    # whether the entropy is trained on, the first backward tells: until then both ways are kept open
    first = [4] if "entropy bonus" in name else [ours_expected]
    assert ours == first + [ours_expected] * (len(theirs) - 1)


TRANSFORMS = {  # temperature, softcap, scale
    "plain": (1.0, None, 1.0),
    "warm": (0.6, None, 0.5),
    "warm, softcapped": (1.7, 12.0, 1.5),
}


def function_inputs(dtype=torch.float32, shape=(19, 203, 48)):
    hidden, weight, targets = head_inputs(*shape, dtype)
    bias = torch.randn(shape[1]).to(dtype) / 4
    return [hidden, weight, bias], targets


def function_results(function, inputs, targets, transform, trained, *, outputs=ALL_OUTPUTS):
    """Every output, and the gradients of what is trained for a mixture of log-probs and entropies."""
    leaves = [tensor.detach().clone().requires_grad_(i in trained) for i, tensor in enumerate(inputs)]
    results = function.apply(*leaves, targets, transform[0], 128, *transform[1:], outputs)
    num_tokens = len(targets)
    score = results[0] @ torch.linspace(-2, 3, num_tokens) + results[1] @ torch.linspace(1, -1, num_tokens)
    return results, torch.autograd.grad(score, [leaves[i] for i in trained])


@pytest.mark.parametrize("trained", [[0], [0, 1, 2]], ids=["frozen", "trainable"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_function_is_trls(transform, trained):
    inputs, targets = function_inputs()
    theirs, their_grads = function_results(ChunkedLogProbFunction, inputs, targets, TRANSFORMS[transform], trained)
    use_dpop_head()
    ours, our_grads = function_results(utils._ChunkedLogProbFunction, inputs, targets, TRANSFORMS[transform], trained)
    for our_values, their_values in zip(ours[:4], theirs[:4], strict=True):
        assert our_values.dtype == torch.float32
        assert (our_values - their_values).abs().max() <= TWO_ROADS_NATS
    assert torch.equal(ours[4], theirs[4])
    assert [values.requires_grad for values in ours] == [values.requires_grad for values in theirs]
    for our_grad, their_grad in zip(our_grads, their_grads, strict=True):
        assert relative_error(our_grad, their_grad) <= 2 * GRADIENT


def test_only_what_is_asked_for_is_returned():
    inputs, targets = function_inputs()
    use_dpop_head()
    for outputs in (("log_probs",), ("log_probs", "mean_logits"), ALL_OUTPUTS):
        results = utils._ChunkedLogProbFunction.apply(*inputs, targets, 1.0, 128, None, 1.0, outputs)
        assert [result is not None for result in results] == [name in outputs for name in ALL_OUTPUTS]


def test_under_autocast_a_master_weight_keeps_its_gradient_and_logits_their_bits():
    """TRL rounds the logits to bf16. Truth: fp64 of the same inputs, rounded to bf16 as both round them."""
    inputs, targets = function_inputs()
    rounded = [tensor.to(torch.bfloat16).double() for tensor in inputs[:2]] + [inputs[2].double()]
    truth, _ = head_token_logps(rounded[0], Head(rounded[1], rounded[2]), targets, backend="reference")
    with torch.autocast("cpu", torch.bfloat16):
        theirs, _ = function_results(ChunkedLogProbFunction, inputs, targets, TRANSFORMS["plain"], [0, 1])
        use_dpop_head()
        ours, (grad_hidden, grad_weight) = function_results(
            utils._ChunkedLogProbFunction, inputs, targets, TRANSFORMS["plain"], [0, 1]
        )
    assert (ours[0] - truth).abs().max() <= CONTRACT_NATS < (theirs[0] - truth).abs().max()
    assert grad_hidden.dtype == grad_weight.dtype == torch.float32
    # not a number of bf16: the last 16 bits of fp32 are in use
    assert (grad_weight != grad_weight.to(torch.bfloat16)).float().mean() > 0.9


def test_a_run_under_autocast_starts_at_the_same_loss(model_path, tmp_path, monkeypatch):
    """The layers round as before; TRL's logits z are moved by up to u·|z| of bf16 once more, ours are not."""
    more = {"bf16": True, "max_steps": 1, "peft_config": LORA}
    (theirs, *_), *_ = trained(sft, model_path, tmp_path / "theirs", monkeypatch, **more)
    with use_dpop_head():
        (ours, *_), *_ = trained(sft, model_path, tmp_path / "ours", monkeypatch, **more)
    weight = AutoModelForCausalLM.from_pretrained(model_path).lm_head.weight
    largest = float(weight.detach().norm(dim=1).max()) * HIDDEN**0.5  # the last norm's rows have length √H
    assert abs(ours["loss"] - theirs["loss"]) <= 2 * UNIT[torch.bfloat16] * largest


def test_rows_that_are_not_scored_are_zero(model_path):
    """Padding and prompts, on either side of the answer; a micro-batch of nothing else still has a gradient."""
    model = AutoModelForCausalLM.from_pretrained(model_path)
    utils.add_fused_lm_head(model, outputs=ALL_OUTPUTS)
    input_ids = torch.arange(24).view(2, 12) + 3
    labels = input_ids.clone()
    labels[0, :5], labels[1, 8:] = -100, -100
    use_dpop_head()
    output = model(input_ids=input_ids, labels=labels, fused_lm_head=True)
    is_scored = labels[:, 1:] != -100
    for name in ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"):
        values = getattr(output, name)
        assert (values[~is_scored] == 0).all(), name
    expected = model(input_ids=input_ids).logits[:, :-1].log_softmax(-1).gather(-1, input_ids[:, 1:, None])[..., 0]
    assert (output.log_probs - expected)[is_scored].abs().max() <= TWO_ROADS_NATS
    nothing = model(input_ids=input_ids, labels=torch.full_like(labels, -100), fused_lm_head=True)
    nothing.loss.backward()
    assert float(nothing.loss.detach()) == 0
    assert not any(parameter.grad.any() for parameter in model.parameters())


def test_no_tokens_at_all():
    """On a GPU TRL scores the labelled positions alone, and there may be none."""
    (hidden, weight, bias), targets = function_inputs()
    use_dpop_head()
    hidden = hidden[:0].requires_grad_()
    logps, entropy, *_ = utils._ChunkedLogProbFunction.apply(hidden, weight, bias, targets[:0], 1.0, 128)
    (logps.sum() + entropy.sum()).backward()
    assert logps.shape == (0,)
    assert hidden.grad.shape == hidden.shape


def test_a_weight_that_is_spread_is_gathered_again_for_the_backward(monkeypatch):
    """As ZeRO-3 has it: outside of TRL's context the weight is empty."""
    inputs, targets = function_inputs()
    hidden, bias = inputs[0].requires_grad_(), inputs[2]
    whole, weight = inputs[1], torch.nn.Parameter(torch.empty(0))
    open_contexts = []

    class Gathered:
        def __enter__(self):
            open_contexts.append(self)
            weight.data = whole

        def __exit__(self, *_):
            open_contexts.remove(self)
            weight.data = torch.empty(0)

    monkeypatch.setattr(utils, "maybe_gather_lm_head_ctx", lambda *parameters: Gathered())
    use_dpop_head()
    with utils.maybe_gather_lm_head_ctx(weight, bias):
        logps, *_ = utils._ChunkedLogProbFunction.apply(hidden, weight, bias, targets, 1.0, 128)
    # the empty weight's gradient has its whole shape: seen here before autograd compares it with what it knows
    (grad_hidden,) = torch.autograd.grad(logps.sum(), hidden)
    z = (inputs[0].double() @ whole.double().T + bias.double()).detach()
    p = z.softmax(-1)
    expected = (torch.nn.functional.one_hot(targets, len(whole)) - p) @ whole.double()
    assert relative_error(grad_hidden, expected) <= GRADIENT
    assert not open_contexts


def test_images_go_the_model_s_own_way():
    """A vision-language model: the function is all that differs."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    text, vision = tiny_llama().config.to_dict(), {"model_type": "clip_vision_model", "hidden_size": 16}
    vision |= {
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "image_size": 8,
        "patch_size": 4,
    }
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=60, vision_feature_layer=-1)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    utils.add_fused_lm_head(model)
    input_ids = torch.tensor([[5, 60, 60, 60, 60, 7, 8, 9, 10]])  # 2 x 2 patches

    def loss_and_gradient():
        model.zero_grad()
        pixels = torch.linspace(-1, 1, 3 * 8 * 8).view(1, 3, 8, 8)
        output = model(input_ids=input_ids, pixel_values=pixels, labels=input_ids, fused_lm_head=True)
        output.loss.backward()
        grads = {name: parameter.grad for name, parameter in model.model.vision_tower.named_parameters()}
        return output.loss.detach(), {name: grad for name, grad in grads.items() if grad is not None}

    theirs, their_grads = loss_and_gradient()
    with use_dpop_head():
        ours, our_grads = loss_and_gradient()
    assert abs(ours - theirs) <= TWO_ROADS_NATS
    assert our_grads.keys() == their_grads.keys()
    assert any(grad.any() for grad in our_grads.values())
    for name, grad in our_grads.items():
        if name.endswith("k_proj.bias"):  # rounding alone, since a softmax does not see it
            torch.testing.assert_close(grad, their_grads[name], rtol=0, atol=1e-7)
        else:
            assert relative_error(grad, their_grads[name]) <= MODEL_GRADIENT, name


@pytest.mark.parametrize("make", [sft, dpo, kto, grpo, rloo], ids=["sft", "dpo", "kto", "grpo", "rloo"])
def test_an_adapter_on_the_head_stays_refused_by_trl(make, model_path, tmp_path):
    """It reads the weight alone; with another function behind it, too."""
    adapter = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    with use_dpop_head(), pytest.raises(ValueError, match="PEFT adapter to `lm_head` is not supported"):
        make(model_path, tmp_path, adapter)


def test_undone_nested_and_repeated():
    def is_ours():
        return utils._ChunkedLogProbFunction is not ChunkedLogProbFunction

    use_dpop_head()
    first = utils._ChunkedLogProbFunction
    use_dpop_head()
    assert utils._ChunkedLogProbFunction is first
    use_dpop_head(False)
    use_dpop_head(False)
    assert not is_ours()
    with use_dpop_head():
        with use_dpop_head(False):
            assert not is_ours()
            with use_dpop_head():
                assert is_ours()
            assert not is_ours()
        assert is_ours()
    assert not is_ours()
    with pytest.raises(ZeroDivisionError), use_dpop_head():
        1 / 0  # noqa: B018
    assert not is_ours()


def test_labels_outside_the_vocabulary_are_named():
    """TRL takes their logit for 0."""
    inputs, targets = function_inputs()
    targets[3] = len(inputs[1])
    use_dpop_head()
    with pytest.raises(ValueError, match=r"labels: expected ids in \[0, 203\), got 203"):
        utils._ChunkedLogProbFunction.apply(*inputs, targets, 1.0, 128)
