"""Apple's cut-cross-entropy (Triton): with its default filter of small softmax entries, and exact without."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from benchmarks.peers import Peer


def linear_logps(filter_eps: str | None) -> Callable[..., Any]:
    def call(hidden_states: Tensor, weight: Tensor, target_ids: Tensor, softcap: float | None) -> Any:
        from cut_cross_entropy import linear_cross_entropy

        return -linear_cross_entropy(
            hidden_states, weight, target_ids, softcap=softcap, reduction="none", filter_eps=filter_eps
        )

    return call


_SHARED: dict[str, Any] = {"package": "cut-cross-entropy", "module": "cut_cross_entropy", "needs_cuda": True}

PEERS = (
    Peer("CCE, exact", "linear_cross_entropy(filter_eps=None)", linear_logps=linear_logps(None), **_SHARED),
    Peer(
        "CCE, filtered",
        "linear_cross_entropy(filter_eps='high'), its default: gradient entries below eps / 32 are left out",
        filters_gradient=True,
        linear_logps=linear_logps("high"),
        **_SHARED,
    ),
)
