"""Plain PyTorch, as one writes it: a linear layer, log_softmax in fp32, gather; sums and the loss from the formula."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers import Peer


def logits_logps(logits: Tensor, target_ids: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(-1, target_ids.unsqueeze(-1)).squeeze(-1)


def linear_logps(hidden_states: Tensor, weight: Tensor, target_ids: Tensor, softcap: float | None) -> Tensor:
    logits = F.linear(hidden_states, weight)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits_logps(logits, target_ids)


def linear_dpo(hidden_states: Tensor, weight: Tensor, labels: Tensor, ref_hidden_states: Tensor, beta: float) -> Tensor:
    scored, targets = labels[:, 1:] != -100, labels[:, 1:]

    def answers(states: Tensor, head: Tensor) -> Tensor:
        logps = linear_logps(states[:, :-1][scored], head, targets[scored], None)
        return logps.new_zeros(scored.shape).masked_scatter(scored, logps).sum(1)

    with torch.no_grad():
        ref_sums = answers(ref_hidden_states, weight)
    chosen, rejected = (answers(hidden_states, weight) - ref_sums).chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


def pair_loss(
    token_logps: Tensor, cu_seqlens: Tensor, ref_segment_logps: Tensor, beta: float, dpop_lambda: float
) -> Tensor:
    lengths = cu_seqlens.diff()
    owners = torch.repeat_interleave(
        torch.arange(len(lengths), device=lengths.device), lengths, output_size=len(token_logps)
    )
    sums = token_logps.new_zeros(len(lengths)).index_add(0, owners, token_logps).view(-1, 3)
    shared, chosen, rejected = (sums - ref_segment_logps).unbind(-1)
    penalties = dpop_lambda * torch.relu(-(shared + chosen))
    return -F.logsigmoid(beta * (chosen - rejected - penalties)).mean()


PEERS = (
    Peer(
        "PyTorch",
        "F.linear in the inputs' dtype, logits widened to fp32, log_softmax, gather",
        has_fp32_logits=False,
        logits_logps=logits_logps,
        linear_logps=linear_logps,
        linear_dpo=linear_dpo,
        pair_loss=pair_loss,
    ),
)
