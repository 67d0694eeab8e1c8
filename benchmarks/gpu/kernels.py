"""Each kernel by itself, beside what arithmetic makes of its machine code (`benchmarks/ahead`)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import measure, records
from benchmarks.ahead.table import PREDICTED_FOR, RECORDS, SHOWN
from benchmarks.ahead.work import BY_ROWS, ROWS
from benchmarks.gpu.work import Work
from dpop_kernels.kernels.launch import Launch

REHEARSED, REHEARSED_ROWS = ("tile -> bf16", "rows, bf16", "rows backward, bf16"), 2
"""Whole vocabularies take an interpreter long."""
ATTENTION = "Llama-3-8B"
COMPILATION_SECONDS = 15.0
"""Of FlexAttention's kernels, roughly: with less left they are not begun."""


def run(work: Work, name: str) -> None:
    """This package's kernels on a tile's rows, then flat attention forward and backward."""
    from dpop_kernels import aot

    launches = aot.all_launches()
    for item in REHEARSED if work.rehearse else SHOWN:
        if launches[item].kernel.__name__ in BY_ROWS:
            num_rows = REHEARSED_ROWS if work.rehearse else ROWS
            launch = with_data(launches[item], num_rows, work.device)
            work.measure(item, lambda launch=launch: timed(work, launch.run), predicted=expected(item))
    run_attention(work)


def run_attention(work: Work) -> None:
    """A layer's, as training has it: on a row of the second length that the process meets."""
    from benchmarks.ahead import flex

    items = {direction: f"{ATTENTION}, {direction}, any length" for direction in ("forward", "backward")}
    if work.left < COMPILATION_SECONDS and not work.rehearse:
        work.measure(items["forward"], dict, predicted={}, least=COMPILATION_SECONDS)
        return
    first, second, _ = flex.rows(scale=16 if work.rehearse else 1)
    heads = flex.Heads(4, 2, 16, torch.float32) if work.rehearse else flex.SHAPES[ATTENTION]
    forward, backward = attention(heads, second.to(work.device))
    backward(forward())
    forward, backward = attention(heads, first.to(work.device))
    work.measure(items["forward"], lambda: timed(work, forward), predicted=expected(items["forward"]))
    output = forward()
    work.measure(
        items["backward"], lambda: timed(work, lambda: backward(output)), predicted=expected(items["backward"])
    )


def attention(heads: Any, trie_ends: Tensor) -> tuple[Callable[[], Tensor], Callable[[Tensor], Any]]:
    """A layer's flat attention on random states: what computes it, and the gradients of its output."""
    from dpop_trainer.batches.flat_attention import flat_attention_forward, flat_mask

    generator = torch.Generator(trie_ends.device).manual_seed(0)

    def drawn(num_heads: int) -> Tensor:
        shape = (1, num_heads, trie_ends.shape[1], heads.size)
        return torch.randn(shape, device=trie_ends.device, generator=generator).to(heads.dtype).requires_grad_()

    query, key, value = drawn(heads.queries), drawn(heads.keys), drawn(heads.keys)
    module, mask = nn.Module(), flat_mask(trie_ends)
    module.num_key_value_groups, module.is_causal = heads.queries // heads.keys, True  # type: ignore[assignment]

    def forward() -> Tensor:
        return flat_attention_forward(module, query, key, value, mask, scaling=heads.size**-0.5)[0]

    def backward(output: Tensor) -> Any:
        return torch.autograd.grad(output, (query, key, value), output.detach(), retain_graph=True)

    return forward, backward


def with_data(launch: Launch, num_rows: int, device: torch.device) -> Launch:
    """A launch without data as one of so many rows: random numbers, ids of 0, maxima that no logit exceeds."""
    before = next(value for value in launch.arguments.values() if isinstance(value, Tensor)).shape[0]
    generator = torch.Generator(device).manual_seed(0)

    def filled(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        # a weight has a row for each id and not for each token
        shape = (num_rows if value.shape[0] == before else 1, *value.shape[1:])
        if not value.is_floating_point():
            return torch.zeros(shape, dtype=value.dtype, device=device)
        numbers = torch.randn(shape, device=device, generator=generator)
        # as after the first tiles, or the accumulator would be rescaled in every row; no exponential is negative
        least = {"maxima_ptr": 8.0, "sums_ptr": 1.0}.get(name)
        return (numbers if least is None else numbers.abs() + least).to(value.dtype)

    arguments = {name: filled(name, value) for name, value in launch.arguments.items()}
    return launch._replace(arguments=arguments, num_programs=launch.num_programs * num_rows // before)


def timed(work: Work, function: Callable[[], object]) -> dict[str, Any]:
    """Rounds of one function."""
    rounds, seconds = (1, 0.0) if work.rehearse else (20, 0.2)
    (times,) = measure.time_in_turns({"": function}, work.device, rounds=rounds, seconds=seconds).values()
    return measure.spread(times)


def expected(item: str) -> dict[str, float]:
    """What bounds a kernel, by the last record of it."""
    found = [r for r in records.read(RECORDS) if (r["name"], r["target"]) == (item, PREDICTED_FOR)]
    bounds = found[-1].get("predicted_s", {}) if found else {}
    return {"seconds": max(bounds.values()), **bounds} if bounds else {}
