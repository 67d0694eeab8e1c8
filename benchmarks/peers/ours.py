"""dpop-kernels: as a training loop calls it, backend "auto"."""

from typing import Any

import torch
from torch import Tensor

import dpop_kernels
from benchmarks.peers import Peer

BACKEND: Any = "auto"
"""A rehearsal sets "fused", to run the GPU's path in Triton's interpreter."""


def logits_logps(logits: Tensor, target_ids: Tensor) -> Tensor:
    return dpop_kernels.token_logps(logits, target_ids, backend=BACKEND)


def logits_logps_in_place(logits: Tensor, target_ids: Tensor) -> Tensor:
    return dpop_kernels.token_logps(logits, target_ids, inplace_backward=True, backend=BACKEND)


def linear_logps(hidden_states: Tensor, weight: Tensor, target_ids: Tensor, softcap: float | None) -> Tensor:
    return dpop_kernels.linear_token_logps(hidden_states, weight, target_ids, softcap=softcap, backend=BACKEND)


def linear_dpo(hidden_states: Tensor, weight: Tensor, labels: Tensor, ref_hidden_states: Tensor, beta: float) -> Tensor:
    scored = labels[:, 1:] != -100
    with torch.no_grad():
        rows, weight_only = ref_hidden_states[:, :-1][scored], weight.detach()
        logps = dpop_kernels.linear_token_logps(rows, weight_only, labels[:, 1:][scored], backend=BACKEND)
        sums = logps.new_zeros(scored.shape).masked_scatter(scored, logps).sum(1)
    chosen, rejected = sums.chunk(2)
    return dpop_kernels.linear_dpop_loss(
        hidden_states, weight, labels, chosen, rejected, beta=beta, dpop_lambda=0.0, backend=BACKEND
    )


def pair_loss(
    token_logps: Tensor, cu_seqlens: Tensor, ref_segment_logps: Tensor, beta: float, dpop_lambda: float
) -> Tensor:
    result = dpop_kernels.pair_loss(
        token_logps, cu_seqlens, ref_segment_logps, beta=beta, dpop_lambda=dpop_lambda, backend=BACKEND
    )
    return result.losses.mean()


PEERS = (
    Peer(
        "dpop-kernels",
        "backend auto; DPO is dpop_lambda=0, with the reference pass before it",
        package="dpop-kernels",
        logits_logps=logits_logps,
        linear_logps=linear_logps,
        linear_dpo=linear_dpo,
        pair_loss=pair_loss,
    ),
    Peer(
        "dpop-kernels, in place",
        "inplace_backward: the gradient is written over the logits",
        package="dpop-kernels",
        logits_logps=logits_logps_in_place,
    ),
)
