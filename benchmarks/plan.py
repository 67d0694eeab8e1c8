"""Which cases are measured on which device, the most telling first."""

from collections.abc import Iterator

import torch

from benchmarks.cases import Case, DpoCase, HeadCase, LogitsCase, PairLossCase
from benchmarks.shapes import HEADS, METAMATH, ULTRAFEEDBACK, HeadShape, head_shape

TINY_HEAD = HeadShape("tiny", 611, 128)
"""For rehearsals: V is no multiple of a block."""

SWEPT = "Llama-3-8B"
"""The head that is measured from 1k to 64k tokens."""


def cases(device: torch.device) -> list[Case]:
    """The cases of a device: published sizes in bf16 on a GPU, an eighth of them in fp32 on a CPU."""
    return list(_gpu(device) if device.type == "cuda" else _cpu(device))


def rehearsal(device: torch.device) -> list[Case]:
    """One tiny case of every level and task."""
    dtype = torch.float32
    tasks = ("reference", "frozen", "trainable")
    return [
        *(HeadCase(task=task, head=TINY_HEAD, num_tokens=24, device=device, dtype=dtype) for task in tasks),
        DpoCase(task="frozen", head=TINY_HEAD, pairs=METAMATH, num_pairs=2, scale=32, device=device, dtype=dtype),
        DpoCase(task="trainable", head=TINY_HEAD, pairs=METAMATH, num_pairs=2, scale=32, device=device, dtype=dtype),
        *(
            LogitsCase(task=task, name="tiny", vocab_size=611, num_tokens=9, device=device, dtype=dtype)
            for task in ("forward", "forward_backward")
        ),
        PairLossCase(pairs=ULTRAFEEDBACK, num_pairs=2, device=device),
    ]


def _gpu(device: torch.device) -> Iterator[Case]:
    dtype = torch.bfloat16
    swept = head_shape(SWEPT)
    for task in ("frozen", "reference", "trainable"):
        yield HeadCase(task=task, head=swept, num_tokens=8192, device=device, dtype=dtype)
    yield DpoCase(task="frozen", head=swept, pairs=METAMATH, num_pairs=16, device=device, dtype=dtype)
    for task in ("forward", "forward_backward"):
        yield LogitsCase(
            task=task, name=SWEPT, vocab_size=swept.vocab_size, num_tokens=8192, device=device, dtype=dtype
        )
    yield from _pair_losses(device)
    for num_tokens in (1024, 2048, 4096, 16384, 32768, 65536):
        yield HeadCase(task="frozen", head=swept, num_tokens=num_tokens, device=device, dtype=dtype)
    for head in HEADS:
        if head.name != SWEPT:
            yield HeadCase(task="frozen", head=head, num_tokens=8192, device=device, dtype=dtype)
    yield DpoCase(task="trainable", head=swept, pairs=METAMATH, num_pairs=16, device=device, dtype=dtype)
    yield DpoCase(task="frozen", head=swept, pairs=ULTRAFEEDBACK, num_pairs=16, device=device, dtype=dtype)


def _cpu(device: torch.device) -> Iterator[Case]:
    dtype = torch.float32
    swept = head_shape(f"{SWEPT}/8")
    for num_tokens in (512, 1024, 2048, 4096):
        yield HeadCase(task="frozen", head=swept, num_tokens=num_tokens, device=device, dtype=dtype)
    for task in ("reference", "trainable"):
        yield HeadCase(task=task, head=swept, num_tokens=2048, device=device, dtype=dtype)
    for head in HEADS:
        if head.name != SWEPT:
            yield HeadCase(
                task="frozen", head=head_shape(f"{head.name}/8"), num_tokens=1024, device=device, dtype=dtype
            )
    for task in ("frozen", "trainable"):
        yield DpoCase(task=task, head=swept, pairs=METAMATH, num_pairs=4, device=device, dtype=dtype)
    for task in ("forward", "forward_backward"):
        yield LogitsCase(
            task=task, name=swept.name, vocab_size=swept.vocab_size, num_tokens=1024, device=device, dtype=dtype
        )
    yield from _pair_losses(device)


def _pair_losses(device: torch.device) -> Iterator[Case]:
    yield PairLossCase(pairs=METAMATH, num_pairs=16, device=device)
    yield PairLossCase(pairs=ULTRAFEEDBACK, num_pairs=64, device=device)
