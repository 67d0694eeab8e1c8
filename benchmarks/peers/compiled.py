"""The plain PyTorch functions under torch.compile with its defaults."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.peers import Peer, eager


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled at the first call, not when this module is imported."""

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        return _compile(function)(*arguments)

    return call


@functools.cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


PEERS = (
    Peer(
        "torch.compile",
        "torch.compile(function), default mode, of the plain PyTorch functions; compilation is not timed",
        has_fp32_logits=False,  # the product's result is in the inputs' dtype
        logits_logps=compiled(eager.logits_logps),
        linear_logps=compiled(eager.linear_logps),
        pair_loss=compiled(eager.pair_loss),
    ),
)
