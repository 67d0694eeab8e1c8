"""TRL: the chunked log-prob kernel behind DPOTrainer's head, and the function its trainers take logits through."""

from typing import Any

from torch import Tensor

from benchmarks.peers import Peer


def logits_logps(logits: Tensor, target_ids: Tensor) -> Any:
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax(logits, target_ids)


def linear_logps(hidden_states: Tensor, weight: Tensor, target_ids: Tensor, softcap: float | None) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    temperature, logit_scale, statistics = 1.0, 1.0, ()
    return ChunkedLogProbFunction.apply(
        hidden_states,
        weight,
        None,
        target_ids,
        temperature,
        _CHUNKED_LOGPROB_CHUNK_SIZE,
        softcap,
        logit_scale,
        statistics,
    )[0]


PEERS = (
    Peer(
        "TRL",
        "ChunkedLogProbFunction with the chunk size of TRL's trainers, its statistics off; selective_log_softmax",
        package="trl",
        module="trl",
        has_fp32_logits=False,  # its tiles of logits are in the inputs' dtype
        logits_logps=logits_logps,
        linear_logps=linear_logps,
    ),
)
