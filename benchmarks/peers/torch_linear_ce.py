"""torch.nn.functional.linear_cross_entropy, chunked: what torch itself offers from 2.13 on."""

import torch
from torch import Tensor

from benchmarks.peers import Peer


def linear_logps(hidden_states: Tensor, weight: Tensor, target_ids: Tensor, softcap: float | None) -> Tensor:
    # without options it is the unchunked reference; LinearCrossEntropyOptions() picks chunks and accumulation itself
    options = torch.nn.LinearCrossEntropyOptions()
    losses = torch.nn.functional.linear_cross_entropy(
        hidden_states, weight, target_ids, reduction="none", options=options
    )
    return -losses


PEERS = (
    Peer(
        "torch linear_cross_entropy",
        "LinearCrossEntropyOptions() with every field at auto, reduction none",
        module="torch.nn.modules.linear_cross_entropy_options",
        has_fp32_logits=False,  # the returned losses are in the inputs' dtype
        takes_softcap=False,
        linear_logps=linear_logps,
    ),
)
