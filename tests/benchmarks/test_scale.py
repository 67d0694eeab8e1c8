"""The paper model of a training step against torch's own counters, and against times that are on record."""

import json
import statistics
from pathlib import Path

import pytest
import torch
from dpop_trainer.settings.renamed import enable_checkpointing
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import scale, shapes
from benchmarks.measure import peak_bytes
from benchmarks.peers import eager
from dpop_kernels import linear_token_logps
from dpop_kernels.backends import bounds

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
SIZES = {
    "grouped": scale.ModelSize(503, 128, 320, num_layers=3, num_heads=4, num_kv_heads=2),
    "wide_mlp": scale.ModelSize(503, 64, 512, num_layers=2, num_heads=4, num_kv_heads=4),
}


def llama(size, *, lora, checkpointing=False, attention="eager"):
    """The backbone of a Llama of this size, with LoRA or every weight trained."""
    config = LlamaConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_kv_heads,
        attn_implementation=attention,
    )
    model = LlamaForCausalLM(config)
    if lora:
        linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=16, target_modules=linear, task_type="CAUSAL_LM"))
    if checkpointing:
        enable_checkpointing(model)
        model.enable_input_require_grads()
    model.train()
    return model.get_base_model().model if lora else model.model


def step_of(backbone, num_rows, length):
    ids = torch.randint(503, (num_rows, length))
    return lambda: backbone(ids, use_cache=False).last_hidden_state.sum().backward()


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("lora", "checkpointing"), [(True, False), (True, True), (False, False), (False, True)])
def test_flop_are_those_that_torch_counts(size, lora, checkpointing):
    """Eager attention: torch's counter knows its products, forward and backward."""
    step = step_of(llama(size, lora=lora, checkpointing=checkpointing), 3, 40)
    with FlopCounterMode(display=False) as counter:
        step()
    training = scale.Training(lora_rank=16 if lora else None, checkpointing=checkpointing)
    predicted = scale.step_flop(size, training, scale.Batch(3, 40, num_scored=0), reference=False)
    assert predicted.head == 0
    assert predicted.total == pytest.approx(counter.get_total_flops(), rel=1e-3)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_torch_allocates(size, checkpointing):
    """In fp32, beside LoRA's gradients; the prediction holds at four times the tokens."""
    backbone = llama(size, lora=True, checkpointing=checkpointing, attention="sdpa")
    training = scale.Training(weight_bytes=4, activation_bytes=4, checkpointing=checkpointing)
    for num_rows in (4, 16):
        step = step_of(backbone, num_rows, 64)
        step()  # the gradients of the adapters are there from now on
        predicted = scale.step_memory(size, training, scale.Batch(num_rows, 64, num_scored=0))
        assert predicted.activations == pytest.approx(peak_bytes(step, torch.device("cpu")), rel=0.10)


def test_number_of_parameters_is_the_models():
    for name, size in SIZES.items():
        backbone = llama(size, lora=False)
        head = size.vocab_size * size.hidden_size
        assert size.num_parameters == sum(p.numel() for p in backbone.parameters()) + head, name
    lora = llama(SIZES["grouped"], lora=True)
    trained = sum(p.numel() for p in lora.parameters() if p.requires_grad)
    assert scale.num_trained(SIZES["grouped"], scale.Training()) == trained
    # 8.03 billion, as published
    assert shapes.model_size("Llama-3-8B").num_parameters == pytest.approx(8.03e9, rel=1e-3)


# a CPU widens the fused head's 16-bit tiles, a GPU does not: there the formula is a GPU's
@pytest.mark.parametrize(
    ("head", "dtype"), [("fused", torch.float32), ("logits", torch.float32), ("logits", torch.bfloat16)]
)
def test_head_memory_is_what_torch_allocates(head, dtype):
    # the fused head's of more than one block of rows
    num_tokens, vocab_size, hidden_size = (1024 if head == "fused" else 256), 20000, 128
    hidden_states = torch.randn(num_tokens, hidden_size).to(dtype).requires_grad_()
    weight, target_ids = torch.randn(vocab_size, hidden_size).to(dtype), torch.randint(vocab_size, (num_tokens,))

    def step():
        if head == "fused":
            logps = linear_token_logps(hidden_states, weight, target_ids)
        else:
            logps = eager.linear_logps(hidden_states, weight, target_ids, None)
        torch.autograd.grad(logps.mean(), hidden_states)

    step()
    size = scale.ModelSize(vocab_size, hidden_size, 320, 1, 4, 4)
    # the paper model's workspace is a bound for any device; this one's is known
    workspace = bounds.CPU.forward_bytes(num_tokens, vocab_size, hidden_size, dtype.itemsize, with_gradient=True)
    # of the two tensors of the states' size that it counts, the second comes when the workspace is gone
    workspace -= num_tokens * hidden_size * dtype.itemsize
    training = scale.Training(head=head, activation_bytes=dtype.itemsize, head_workspace_bytes=workspace)
    predicted = scale.head_bytes(size, training, num_tokens)
    assert predicted == pytest.approx(peak_bytes(step, torch.device("cpu")), rel=0.05)


def test_times_on_record_follow_the_flop():
    """Eight steps (four layouts, 4 and 16 layers) on one CPU: one rate explains each within a quarter."""
    rates, relative = [], []
    for path in sorted((RESULTS / "cpu_layouts").glob("*.json")):
        record = json.loads(path.read_text())
        layouts, config, num_batches = record["layouts"], record["model"], record["num_pairs"] / record["batch_size"]
        if config["hidden_size"] != 256:
            continue  # larger products run at another rate
        assert config["vocab_size"] == 50257
        size = scale.ModelSize(50257, 256, 688, config["num_hidden_layers"], 4, 4)
        tokens = {name: layouts[name]["computed_tokens"] for name in layouts}
        # rows hold prompt and shared tokens twice, the tree that shares prompts the latter, the tree neither
        shared = tokens["tree, prompt shared"] - tokens["tree"]
        scored_once = tokens["tree"] - (tokens["rows"] - tokens["tree, prompt shared"])
        rate = {}
        for name in ("rows, scored twice", "rows", "tree, prompt shared", "tree"):
            scored = scored_once + shared * (name in ("rows, scored twice", "tree, prompt shared"))
            positions = tokens[name] / (1 - layouts[name]["padding_share"]) / num_batches
            num_rows = record["batch_size"] * (1 if "tree" in name else 2)
            flop = scale.step_flop(
                size,
                scale.Training(lora_rank=None, checkpointing=False),
                scale.Batch(num_rows, positions / num_rows, scored / num_batches),  # type: ignore[arg-type]
            )
            rate[name] = flop.total / layouts[name]["median_step_seconds"]
        rates += rate.values()
        relative.append(rate["tree"] / rate["rows"])
    assert len(rates) == 8
    middle = statistics.median(rates)
    assert all(rate == pytest.approx(middle, rel=0.25) for rate in rates), [rate / middle for rate in rates]
    # what a planner wants to know, how much faster a tree is than rows, to a tenth
    assert relative == pytest.approx([1.0] * len(relative), rel=0.10)


def test_longest_pair_by_hand():
    """One layer's formula, solved for T: memory is linear in it."""
    size, training = SIZES["grouped"], scale.Training(head="logits")
    short, long = (
        scale.step_memory(size, training, scale.Batch(2, length, num_scored=2 * length)).total
        for length in (1000, 2000)
    )
    per_token = (long - short) / 1000
    fixed = short - 1000 * per_token
    budget = fixed + 12345.5 * per_token
    assert scale.longest_pair(size, training, budget, answer_share=1.0, free=0.0) == 12345
    assert scale.longest_pair(size, training, 0.5 * fixed, free=0.0) == 0


def test_a_fused_head_and_checkpointing_lengthen_pairs():
    budget = 80 * 2**30
    for size in (shapes.model_size("Llama-3-8B"), shapes.model_size("gemma-2-9b")):
        fused, logits, kept = (
            scale.longest_pair(size, training, budget)
            for training in (
                scale.Training(),
                scale.Training(head="logits"),
                scale.Training(checkpointing=False),
            )
        )
        assert fused > logits > 0
        assert fused > kept > 0
