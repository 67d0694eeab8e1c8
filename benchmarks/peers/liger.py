"""Liger: cross-entropy, fused linear cross-entropy, the per-token scaled one (CuTe on SM90), fused linear DPO."""

from typing import Any

from torch import Tensor

from benchmarks.peers import Peer


def logits_logps(logits: Tensor, target_ids: Tensor) -> Any:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return -liger_cross_entropy(logits, target_ids, reduction="none")  # type: ignore[operator]


def linear_logps(hidden_states: Tensor, weight: Tensor, target_ids: Tensor, softcap: float | None) -> Any:
    import torch
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    losses = liger_fused_linear_cross_entropy(
        hidden_states, weight, target_ids, reduction="none", softcap=softcap, accum_dtype=torch.float32
    )
    return -losses  # type: ignore[operator]


def scaled_linear_logps(hidden_states: Tensor, weight: Tensor, target_ids: Tensor, softcap: float | None) -> Any:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    return -LigerFusedLinearScaledCrossEntropyFunction.apply(hidden_states, weight, target_ids)  # type: ignore[operator]


def linear_dpo(hidden_states: Tensor, weight: Tensor, labels: Tensor, ref_hidden_states: Tensor, beta: float) -> Any:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = LigerFusedLinearDPOLoss(beta=beta, use_ref_model=True)
    # it takes labels that are shifted already, and a row length that fits them
    states, ref_states = hidden_states[:, :-1], ref_hidden_states[:, :-1]
    return loss(weight, states, labels[:, 1:], ref_input=ref_states, ref_weight=weight.detach())[0]


PEERS = (
    Peer(
        "Liger",
        "functional API; fused linear cross-entropy with fp32 accumulation, as its docs advise; reduction none",
        package="liger-kernel",
        module="liger_kernel",
        needs_cuda=True,
        has_fp32_logits=False,
        logits_logps=logits_logps,
        linear_logps=linear_logps,
    ),
    Peer(
        "Liger, scaled",
        "LigerFusedLinearScaledCrossEntropyFunction with its defaults: per token, for SM90; its fallback elsewhere",
        package="liger-kernel",
        module="liger_kernel",
        needs_cuda=True,
        takes_softcap=False,
        linear_logps=scaled_linear_logps,
    ),
    Peer(
        "Liger DPO",
        "LigerFusedLinearDPOLoss with its defaults (compiled, one pair per chunk)",
        package="liger-kernel",
        module="liger_kernel",
        has_fp32_logits=False,
        linear_dpo=linear_dpo,
    ),
)
