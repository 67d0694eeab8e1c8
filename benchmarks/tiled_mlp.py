"""MLPs over tiles of tokens against whole ones: what they hold by batch and width, on paper; and the time of a step.

    python -m benchmarks.tiled_mlp benchmarks/results/tiled_mlp.json             two minutes on one quiet core
    python -m benchmarks.tiled_mlp benchmarks/results/tiled_mlp.json --on_paper  what is held alone, seconds

What is held is counted on tensors without data, so that it is the same on any machine: a layer's MLP with the norm in
front of it, forward and backward, over the states that it is given and what it returns. The step is a small Llama's
under checkpointing, forward and backward; its gradients are compared before it is timed.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from dpop_trainer.models.tiled_mlp import TILE_BYTES, tile_mlps
from dpop_trainer.settings.renamed import enable_checkpointing
from dpop_trainer.tools.plan.paper_model import ModelSetting, build, on_paper
from dpop_trainer.tools.plan.paper_tensor import paper
from dpop_trainer.tools.plan.tape import Tape
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import records
from benchmarks.measure import spread, time_in_turns

HIDDEN_SIZE = 4096
WIDTHS = (8192, 14336, 28672)
NUM_TOKENS = (8192, 16384, 32768, 65536, 131072)
MIB = 1 << 20

STEP = LlamaConfig(
    vocab_size=512,
    hidden_size=512,
    intermediate_size=2048,
    num_hidden_layers=4,
    num_attention_heads=8,
    bos_token_id=None,
    eos_token_id=None,
)
STEP_TOKENS, TILE = 2048, 512
AGREEMENT = 1e-5
"""Largest relative difference of a gradient, in the norm, in fp32."""


def held_mib(width: int, num_tokens: int, *, tiled: bool) -> float:
    """A frozen MLP's worst moment in bf16 as on a GPU, over its input, its output and their gradients."""
    config = LlamaConfig(
        vocab_size=8, hidden_size=HIDDEN_SIZE, intermediate_size=width, num_hidden_layers=1, num_attention_heads=32
    )
    model: Any = build(config, ModelSetting(torch.bfloat16)).requires_grad_(False)
    on_paper(model)
    tile_mlps(model, "auto" if tiled else None, on_gpu=True)
    states = paper((1, num_tokens, HIDDEN_SIZE), torch.bfloat16).requires_grad_()
    grad = torch.empty_like(states)
    block = model.model.layers[0]
    with Tape([*model.parameters(), states, grad]) as tape:
        block.mlp(block.post_attention_layernorm(states)).backward(grad)
    peak = max(moment.total for moment in tape.moments().values())
    return (peak - 2 * states.nbytes) / MIB


def step_times(*, rounds: int, seconds: float, trained: str) -> dict[str, Any]:
    """Whole and tiled in turns, of all weights or of none but the embedding.

    Raises:
        AssertionError: their gradients differ.
    """
    steps, grads = {}, {}
    ids = torch.randint(STEP.vocab_size, (1, STEP_TOKENS))
    for name, tokens in (("whole", None), ("tiled", TILE)):
        torch.manual_seed(0)
        model = LlamaForCausalLM(STEP).train()
        if trained == "frozen layers":
            model.model.layers.requires_grad_(False)
        enable_checkpointing(model)
        tile_mlps(model, tokens)

        def step(model: Any = model) -> None:
            model.zero_grad()
            model(input_ids=ids, use_cache=False).logits.logsumexp(-1).mean().backward()

        step()
        grads[name] = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        steps[name] = step
    for whole, tiled in zip(grads["whole"], grads["tiled"], strict=True):
        assert (tiled - whole).norm() <= AGREEMENT * whole.norm(), "a wrong result is not timed"
    times = time_in_turns(steps, torch.device("cpu"), rounds=rounds, seconds=seconds)
    found: dict[str, Any] = {name: spread(values) for name, values in times.items()}
    return {**found, "ratio": found["tiled"]["median_s"] / found["whole"]["median_s"]}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.tiled_mlp", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the record, JSON")
    parser.add_argument("--on_paper", action="store_true", help="measure no time; a record's own is kept")
    parser.add_argument("--rounds", type=int, default=9, help="of each way, at least")
    parser.add_argument("--seconds", type=float, default=20.0, help="that rounds are begun for")
    options = parser.parse_args(argv)
    before = json.loads(options.out.read_text()) if options.out.exists() else {}
    held = {
        way: {str(width): [held_mib(width, n, tiled=way == "tiled") for n in NUM_TOKENS] for width in WIDTHS}
        for way in ("whole", "tiled")
    }
    record = {
        **before,
        "hidden_size": HIDDEN_SIZE,
        "num_tokens": NUM_TOKENS,
        "tile_mib": TILE_BYTES["gpu"] / MIB,
        "held_mib": held,
    }
    if not options.on_paper:
        record["step"] = {
            "num_tokens": STEP_TOKENS,
            "tile": TILE,
            "model": {key: getattr(STEP, key) for key in ("hidden_size", "intermediate_size", "num_hidden_layers")},
            **{
                trained: step_times(rounds=options.rounds, seconds=options.seconds, trained=trained)
                for trained in ("all weights", "frozen layers")
            },
            **records.environment(torch.device("cpu")),
        }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
