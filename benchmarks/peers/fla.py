"""flash-linear-attention's fused linear cross-entropy (Triton): the mean loss alone."""

from typing import Any

from torch import Tensor

from benchmarks.peers import Peer


def linear_logps(hidden_states: Tensor, weight: Tensor, target_ids: Tensor, softcap: float | None) -> Any:
    from fla.modules import FusedLinearCrossEntropyLoss

    return -FusedLinearCrossEntropyLoss(logit_softcapping=softcap)(hidden_states, target_ids, weight)


PEERS = (
    Peer(
        "FLA",
        "FusedLinearCrossEntropyLoss() with its defaults; it has no per-token result",
        package="fla-core",
        module="fla",
        needs_cuda=True,
        has_fp32_logits=False,
        gives_mean_only=True,
        linear_logps=linear_logps,
    ),
)
