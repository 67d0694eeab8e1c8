"""What a backend is: a module with these names. It knows no loss; arguments arrive validated."""

from typing import Protocol

from torch import Tensor

from dpop_kernels.outputs import TokenStats


class Backend(Protocol):
    """One implementation of the way from logits, or hidden states and a head, to sums of log-probs."""

    RUNS_TRITON: bool
    """Whether a loss's own Triton kernel may run on the same tensors."""

    def token_logps(
        self, logits: Tensor, target_ids: Tensor, *, inplace_backward: bool = ..., with_stats: bool = ...
    ) -> tuple[Tensor, TokenStats | None]:
        """log softmax(logits)[n, target_ids[n]]: [N, V], [N] -> [N] differentiable, statistics."""
        ...

    def linear_token_logps(
        self,
        hidden_states: Tensor,
        lm_head_weight: Tensor,
        target_ids: Tensor,
        *,
        bias: Tensor | None = ...,
        logit_scale: float = ...,
        softcap: float | None = ...,
        with_stats: bool = ...,
    ) -> tuple[Tensor, TokenStats | None]:
        """The same of a head's logits: [N, H], [V, H], [N] -> [N] differentiable, statistics."""
        ...

    def segment_sums(self, token_logps: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Sums over [cu_seqlens[i], cu_seqlens[i + 1]): [N], [S + 1] -> [S] differentiable, in a fixed order."""
        ...
