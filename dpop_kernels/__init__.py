"""Fused kernels for preference fine-tuning with DPOP (arXiv:2402.13228).

dpop_loss, dpo_loss, ipo_loss, slic_loss     summed log-probs [B]            -> loss
token_logps                                  logits [N, V]                   -> token log-probs [N]
linear_token_logps                           hidden states [N, H], W [V, H]  -> token log-probs [N], no logits
kto_loss                                     summed log-probs [B], liked? [B] -> loss of answers without pairs
logits_dpop_loss, linear_dpop_loss           logits or hidden states         -> loss
pair_loss                                    token log-probs, segments       -> per-pair losses and metrics, any loss
needs_reference                              names of losses                 -> whether a reference model is to run
ScoringHead                                  the above behind a Hugging Face model's own lm_head
"""

from dpop_kernels.logps.linear import linear_token_logps
from dpop_kernels.logps.logits import token_logps
from dpop_kernels.losses.on_sums import dpo_loss, dpop_loss, ipo_loss, slic_loss
from dpop_kernels.losses.pair_loss import pair_loss
from dpop_kernels.losses.unpaired import kto_loss
from dpop_kernels.losses.weights import needs_reference
from dpop_kernels.model_head.head import ScoringHead
from dpop_kernels.outputs import PairLosses, TokenStats
from dpop_kernels.padded import linear_dpop_loss, logits_dpop_loss

__version__ = "0.1.0"

__all__ = [
    "PairLosses",
    "ScoringHead",
    "TokenStats",
    "dpo_loss",
    "dpop_loss",
    "ipo_loss",
    "kto_loss",
    "linear_dpop_loss",
    "linear_token_logps",
    "logits_dpop_loss",
    "needs_reference",
    "pair_loss",
    "slic_loss",
    "token_logps",
]
