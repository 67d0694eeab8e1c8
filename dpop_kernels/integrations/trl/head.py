"""This package's products behind the head of TRL's own trainers.

TRL computes every log-prob of its trainers (SFT, DPO, KTO, GRPO, RLOO and what is derived from them) in one autograd
function, which the forward that it puts on a model looks up whenever it runs. `use_dpop_head` lets it find this
package's. All around it stays TRL's: the model's own layers and images, labels and masks, PEFT, the loss, the metrics.

    from dpop_kernels.integrations.trl import use_dpop_head

    use_dpop_head()                      # before or after the trainers are made
    SFTTrainer(model, args, ...).train()

TRL divides the logits by a temperature after its softcap, which is a softcap and a scale again:

    softcap · tanh(scale · u / softcap) / T = c · tanh(s · u / c)      with c = softcap / T, s = scale / T
"""

from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor
from trl.kernels import ChunkedLogProbFunction
from trl.kernels.chunked_logprob import OPTIONAL_OUTPUTS
from trl.trainer import utils

from dpop_kernels.backends.protocol import TrainsEntropy
from dpop_kernels.logps.head import Head
from dpop_kernels.logps.linear import as_autocast, head_token_logps, transform_of
from dpop_kernels.validate import check_ids

_SLOT = "_ChunkedLogProbFunction"
# TRL's names, in the order in which it returns them -> ours
_STATS = {
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_probs",
    "mean_logits": "mean_logit",
    "is_top1": "is_top1",
}


def use_dpop_head(enabled: bool = True) -> AbstractContextManager[object]:
    """Let TRL's trainers compute their log-probs with this package's products; those that exist already, too.

    With a frozen head (LoRA and its kin) a step takes two matrix products of the head's size instead of three, with a
    trainable one as many as TRL's, four; logits are in fp32 where TRL rounds them to the model's dtype. A gradient of
    the entropy (GRPO's bonus) adds none to a trainable head's four, and makes a frozen one's three, as in TRL.

    Args:
        enabled: False gives TRL its own head back.

    Returns:
        A context manager, to be used or left: its end puts back what was there before the call.

    Example:
        >>> with use_dpop_head():           # doctest: +SKIP
        ...     trainer.train()
    """
    before = getattr(utils, _SLOT)
    if enabled != isinstance(before, _DPOPFunction):
        setattr(utils, _SLOT, _DPOPFunction() if enabled else ChunkedLogProbFunction)
    undo = ExitStack()
    undo.callback(setattr, utils, _SLOT, before)
    return undo


class _DPOPFunction:
    """Stands in for TRL's `ChunkedLogProbFunction`: `apply` takes and returns what that one's does."""

    def __init__(self) -> None:
        self._trains_entropy: TrainsEntropy = "perhaps"

    @torch.compiler.disable  # the hooks below
    def apply(
        self,
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V, H], any floating dtype
        bias: Tensor | None,  # [V]
        targets: Tensor,  # [N]
        temperature: float,
        chunk_size: int,  # of TRL's tiles; those here have bounds of their own
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OPTIONAL_OUTPUTS,
    ) -> tuple[Tensor | None, ...]:
        """Log-probs, entropy, log Σ p², mean logit, is-top-1 [N]; None for what is not among `outputs`."""
        (hidden,) = as_autocast(hidden)
        check_ids("labels", targets, (hidden.shape[0],), weight.shape[0])
        softcap = None if final_logit_softcapping is None else final_logit_softcapping / temperature
        has_entropy = "entropy" in outputs
        logps, stats = head_token_logps(
            hidden,
            Head(weight, bias, transform_of(logit_scale / temperature, softcap)),
            targets,
            with_stats=any(name in outputs for name in _STATS),
            trains_entropy=self._trains_entropy if has_entropy else "never",
        )
        if logps.grad_fn is not None:
            self._watch(logps.grad_fn, weight, bias, has_entropy=has_entropy)
        return logps, *(getattr(stats, ours) if name in outputs else None for name, ours in _STATS.items())

    def _watch(self, node: Any, *head: Any, has_entropy: bool) -> None:
        """Be there when the gradient comes: DeepSpeed's ZeRO-3 has to gather the weight again, and whether the entropy
        has a gradient tells the next forward which products to make."""
        gathered = ExitStack()

        def before(grads: tuple[Tensor | None, ...]) -> None:
            if has_entropy:
                self._trains_entropy = "perhaps" if grads[1] is None else "always"
            gathered.enter_context(utils.maybe_gather_lm_head_ctx(*head))

        node.register_prehook(before)
        node.register_hook(lambda *_: gathered.close())
