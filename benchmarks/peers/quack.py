"""QuACK's chunked linear cross-entropy (CuTe, Hopper and later): the mean loss alone."""

from typing import Any

from torch import Tensor

from benchmarks.peers import Peer


def linear_logps(hidden_states: Tensor, weight: Tensor, target_ids: Tensor, softcap: float | None) -> Any:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return -chunked_linear_cross_entropy(hidden_states, weight, target_ids)


PEERS = (
    Peer(
        "QuACK",
        "chunked_linear_cross_entropy with its defaults, tuned; it has no per-token result",
        package="quack-kernels",
        module="quack",
        needs_cuda=True,
        least_capability=(9, 0),
        has_fp32_logits=False,
        gives_mean_only=True,
        takes_softcap=False,
        linear_logps=linear_logps,
    ),
)
