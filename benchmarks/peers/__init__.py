"""Who is measured: one file per library, each set up as its own documentation recommends.

A peer offers what it can do as functions with one signature per level; what it lacks stays None and is not measured.

    logits_logps(logits [N, V], target_ids [N])                         -> log-probs [N]
    linear_logps(hidden_states [N, H], weight [V, H], target_ids [N], softcap) -> log-probs [N], or their mean
    linear_dpo(hidden_states [2B, T, H], weight, labels [2B, T], ref_hidden_states, beta) -> mean DPO loss
    pair_loss(token_logps [N], cu_seqlens [3B + 1], ref_segment_logps [B, 3], beta, dpop_lambda) -> mean DPOP loss

Nothing of a library is imported before `available` has said that it can run.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import records


@dataclass(frozen=True)
class Peer:
    """One implementation, what it computes, and how it was set up."""

    name: str
    settings: str
    """How it is called, and why so."""
    package: str = "torch"
    """The distribution whose version is recorded."""
    module: str | None = None
    """What must be importable; None for torch alone."""
    needs_cuda: bool = False
    least_capability: tuple[int, int] = (0, 0)
    """CUDA compute capability."""
    has_fp32_logits: bool = True
    """Logits enter the softmax in fp32; else they are first rounded to the inputs' 16 bits."""
    filters_gradient: bool = False
    """Leaves small probabilities out of the gradient on purpose."""
    gives_mean_only: bool = False
    """`linear_logps` returns the mean: no per-token log-probs, and gradients that know their factor in the forward."""
    takes_softcap: bool = True
    logits_logps: Callable[..., Any] | None = None
    linear_logps: Callable[..., Any] | None = None
    linear_dpo: Callable[..., Any] | None = None
    pair_loss: Callable[..., Any] | None = None

    def why_not(self, device: torch.device) -> str | None:
        """Why it cannot run here; None where it can."""
        if self.needs_cuda and device.type != "cuda":
            return "needs CUDA"
        if self.needs_cuda and torch.cuda.get_device_capability(device) < self.least_capability:
            return f"needs compute capability {self.least_capability[0]}.{self.least_capability[1]}"
        if self.module is not None and not _can_import(self.module):
            return f"{self.package} is not installed"
        return None

    @property
    def version(self) -> str | None:
        return records.version(self.package)


def _can_import(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def all_peers() -> dict[str, Peer]:
    """By name, ours first."""
    from benchmarks.peers import apple_cce, compiled, eager, fla, liger, ours, quack, torch_linear_ce, trl

    modules = (ours, eager, compiled, torch_linear_ce, trl, liger, apple_cce, fla, quack)
    return {peer.name: peer for module in modules for peer in module.PEERS}
