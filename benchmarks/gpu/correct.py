"""Is it right on this device? The tests that need a GPU and those of the kernels, and flat attention against fp64."""

import importlib.util
import random
import subprocess
import sys
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu import predicted, runner
from benchmarks.gpu.work import Work
from benchmarks.truth import relative

KERNEL_TESTS = ("test_fused.py", "test_fused_linear.py", "test_fused_pairs.py")
SELECTIONS = {
    "tests marked gpu": ("tests/kernel", "-m", "gpu"),  # all tests together would take longer to collect
    "tests of the kernels": tuple(f"tests/kernel/{name}" for name in KERNEL_TESTS),
}
REHEARSED = {"tests of one kernel": ("tests/kernel/test_elementary.py",)}
SHAPES = {
    "Llama-3.2-1B": (32, 8, 64, torch.bfloat16),
    "Llama-3-8B": (32, 8, 128, torch.bfloat16),
    "Gemma-3-1B": (4, 1, 256, torch.bfloat16),
    "fp32": (4, 2, 64, torch.float32),
}
"""Heads of queries and keys, their size, dtype."""
TINY = {"tiny": (4, 2, 16, torch.float32)}
NAMES = ("output", "grad_query", "grad_key", "grad_value")


def run(work: Work, name: str) -> None:
    """Either half."""
    {"tests": run_tests, "attention": run_attention}[name](work)


def run_tests(work: Work) -> None:
    """pytest in the process that is being timed, its output in the log."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") is not None and not work.rehearse:
        command += ["-n", "8"]

    def passes(selection: tuple[str, ...]) -> dict[str, Any]:
        code = subprocess.run([*command, *selection], cwd=runner.ROOT, check=False).returncode
        return {"passed": True} if code == 0 else {"failed": f"pytest's exit code is {code}, see {runner.LOG}"}

    for item, selection in (REHEARSED if work.rehearse else SELECTIONS).items():
        work.measure(item, lambda selection=selection: passes(selection), predicted={})


def run_attention(work: Work) -> None:
    """Each shape's output and gradients, on a row that fills its blocks and on one that does not."""
    for shape, (heads, key_heads, size, dtype) in (TINY if work.rehearse else SHAPES).items():
        for multiple in (128, None):
            ends = flat_ends(multiple, scale=16 if work.rehearse else 1).to(work.device)
            item = f"flat attention, {shape}, {ends.shape[1]} positions"
            # scores of queries and keys, their product with values; twice that and a half backward
            flop = 3.5 * 4.0 * ends.shape[1] ** 2 * heads * size
            work.measure(
                item,
                lambda ends=ends, heads=heads, key_heads=key_heads, size=size, dtype=dtype: attention_errors(
                    ends, heads, key_heads, size, dtype
                ),
                predicted={"seconds": predicted.seconds(flop=flop)},
            )


def flat_ends(multiple: int | None, *, scale: int = 1) -> Tensor:
    """`trie_ends` [1, T] of a flat row of five pairs of random words, two of which have the same prompt."""
    from dpop_trainer.batches.layouts import flat_row
    from dpop_trainer.data.pair_tree import PairTree

    draw = random.Random(0)

    def ids(length: int) -> list[int]:
        return [draw.randrange(1, 1000) for _ in range(max(1, length // scale))]

    prompt = ids(90)
    trees = [PairTree(prompt, ids(70), ids(55), ids(57)) for _ in range(2)]
    trees += [PairTree(ids(length), ids(3 * length), ids(length), ids(2 * length)) for length in (33, 64, 129)]
    return flat_row(trees, pad_token_id=0, pad_to_multiple_of=multiple)["trie_ends"]


def attention_errors(ends: Tensor, heads: int, key_heads: int, size: int, dtype: torch.dtype) -> dict[str, Any]:
    """Relative errors against fp64 of flat attention, and of eager's in the same dtype; refused beyond twice these.

    Where eager happens to be exact to a few roundings, four are allowed.
    """
    from dpop_trainer.batches.flat_attention import flat_attention_forward, flat_mask
    from dpop_trainer.batches.layouts import trie_mask

    generator = torch.Generator(ends.device).manual_seed(0)
    length = ends.shape[1]

    def drawn(num_heads: int) -> Tensor:
        return torch.randn(1, num_heads, length, size, device=ends.device, generator=generator).to(dtype)

    inputs, grad_output = (drawn(heads), drawn(key_heads), drawn(key_heads)), drawn(heads).transpose(1, 2)
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = heads // key_heads, True  # type: ignore[assignment]
    seen = trie_mask(ends)

    def eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = (states.repeat_interleave(heads // key_heads, dim=1) for states in (key, value))
        scores = (query @ key.transpose(-1, -2) * size**-0.5).masked_fill(~seen, -torch.inf)
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        return (scores.softmax(-1, dtype=wide).to(query.dtype) @ value).transpose(1, 2)

    def flat(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return flat_attention_forward(module, query, key, value, flat_mask(ends), scaling=size**-0.5)[0]

    def results(attend: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [states.to(dtype).requires_grad_() for states in inputs]
        output = attend(*leaves)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad_output.to(dtype))]

    truth = results(eager, torch.float64)
    errors, baseline = (
        {name: relative(found, true) for name, found, true in zip(NAMES, results(attend, dtype), truth, strict=True)}
        for attend in (flat, eager)
    )
    bounds = {name: 2 * error + 4 * torch.finfo(dtype).eps for name, error in baseline.items()}
    beyond = [name for name in NAMES if not errors[name] <= bounds[name]]
    fields = {"errors": errors, "eager_errors": baseline}
    return fields | ({"refused": f"beyond twice eager's: {', '.join(beyond)}"} if beyond else {})
