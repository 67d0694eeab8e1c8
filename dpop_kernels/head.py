"""`linear_token_logps` behind a Hugging Face causal LM's own `lm_head`.

The model's forward runs as its authors wrote it. Only when a scoring call is under way does the head's `forward`, which
every model calls with the last hidden states [.., H], pick the scored rows and compute their log-probs instead of
logits. Hooks on the module (FSDP, DeepSpeed, accelerate) fire as ever, `generate` and `save_pretrained` see an
ordinary head, and `remove()` leaves no trace.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dpop_kernels.linear_logps import linear_token_logps
from dpop_kernels.outputs import TokenStats
from dpop_kernels.token_logps import token_logps


class ScoringHead:
    """Token log-probs of any causal LM without its logits.

    Args:
        model: a Hugging Face causal LM, or a peft model around one. Its output embedding must be a plain linear
            layer (a `modules_to_save` copy of one included).
        backend: "auto", "reference", "chunked" or "fused".

    Raises:
        ValueError: the model has no output embedding, or it is not a linear layer (a LoRA adapter on the head, a
            quantised head): what was found, and what to do instead.

    Example:
        >>> head = ScoringHead(model)                                                       # doctest: +SKIP
        >>> logps = head.token_logps(model, score_positions, target_ids, input_ids=ids)     # doctest: +SKIP
    """

    def __init__(self, model: nn.Module, *, backend: str = "auto") -> None:
        self._backend = backend
        self.logit_scale, self.softcap = _logit_transform(model)
        self._linears = _output_linears(model)
        self._request: tuple[Tensor, Tensor, bool] | None = None
        self._result: tuple[Tensor, TokenStats | None] | None = None
        for linear in self._linears:
            linear.forward = _ScoringForward(self, linear)  # type: ignore[method-assign]

    def token_logps(
        self,
        model: nn.Module,
        score_positions: Tensor,
        target_ids: Tensor,
        *,
        return_stats: bool = False,
        **model_inputs: Any,
    ) -> Any:
        """One forward of the model -> log-probs of the scored tokens [N], differentiable.

        Args:
            model: the model this head was put on, or a wrapper around it (DDP, FSDP, DeepSpeed, compiled).
            score_positions: [N] int64: rows of hidden_states.reshape(-1, H) that predict the scored tokens.
            target_ids: [N] int64: the tokens they predict.
            return_stats: also return `TokenStats`.
            model_inputs: what the model's forward takes: input_ids, attention_mask, position_ids, ...

        Returns:
            [N] log-probs in nats, fp32 (fp64 for an fp64 model); with return_stats a tuple (log-probs, TokenStats).

        Raises:
            RuntimeError: the model's forward did not call its head, or called it more than once.
        """
        self._request, self._result = (score_positions, target_ids, return_stats), None
        try:
            model(**model_inputs, use_cache=False)
            result = self._result
        finally:
            self._request = self._result = None
        if result is None:
            raise RuntimeError(
                f"{type(model).__name__}: expected the forward to call the head that this ScoringHead was put on, "
                "and it did not. Pass the same model, or a wrapper around it."
            )
        return result if return_stats else result[0]

    def check(self, model: nn.Module) -> None:
        """Compare with the model's own logits on four tokens; cheap, without gradient.

        Raises:
            ValueError: the model does something to its logits that this head does not know.
        """
        device = self._linears[0].weight.device
        vocab_size = self._linears[0].weight.shape[0]
        input_ids = torch.arange(1, 5, device=device).unsqueeze(0) % vocab_size
        positions, target_ids = torch.arange(3, device=device), input_ids[0, 1:]
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                logits = model(input_ids=input_ids, use_cache=False).logits[0, :3]
                expected = token_logps(logits, target_ids, backend="reference")
                logps = self.token_logps(model, positions, target_ids, input_ids=input_ids)
        finally:
            model.train(was_training)
        # 16-bit logits are rounded by the model itself, by up to 2⁻⁸ of their size
        tolerance = 1e-3 if logits.dtype in (torch.float32, torch.float64) else 2**-6 * float(logits.abs().max() + 1)
        error = float((logps - expected).abs().max())
        if not error <= tolerance:
            raise ValueError(
                f"model: expected {type(model).__name__}'s logits = softcap · tanh(scale · (h Wᵀ + bias) / softcap) "
                f"with scale {self.logit_scale} and softcap {self.softcap}, but its log-probs differ by {error:.2e} "
                "nats. The model transforms its logits in a way that is not supported; use its logits with token_logps."
            )

    def remove(self) -> None:
        """Give the model its own head back."""
        for linear in self._linears:
            if isinstance(linear.__dict__.get("forward"), _ScoringForward):
                del linear.forward
        self._linears = []

    def _score(self, linear: nn.Linear, hidden_states: Tensor) -> Tensor:
        assert self._request is not None
        if self._result is not None:
            raise RuntimeError("model: expected one call of the head per forward, got a second one.")
        score_positions, target_ids, return_stats = self._request
        rows = hidden_states.reshape(-1, hidden_states.shape[-1]).index_select(0, score_positions)
        scored: Any = linear_token_logps(
            rows,
            linear.weight,
            target_ids,
            bias=linear.bias,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            backend=self._backend,
            return_stats=return_stats,  # type: ignore[arg-type]
        )
        logps, stats = scored if return_stats else (scored, None)
        self._result = (logps, stats)
        # the model goes on with this as its "logits": whatever it does to them is discarded
        return logps.view(1, -1, 1)


class _ScoringForward:
    """Stands in for a linear layer's `forward`; hands through to it unless a scoring call is under way."""

    def __init__(self, head: ScoringHead, linear: nn.Linear) -> None:
        self._head, self._linear = head, linear
        self._own_forward = linear.forward

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._head._request is None:
            return self._own_forward(hidden_states, *args, **kwargs)
        return self._head._score(self._linear, hidden_states)


def _output_linears(model: nn.Module) -> list[nn.Linear]:
    """The linear layers that can act as the model's head: one, or the original and its `modules_to_save` copies."""
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    head = get_output_embeddings() if get_output_embeddings is not None else None
    if head is None:
        raise ValueError(
            f"model: expected a causal LM with an output embedding (lm_head), got {type(model).__name__} without one."
        )
    candidates = [head]
    if hasattr(head, "modules_to_save") and hasattr(head, "original_module"):
        candidates = [head.original_module, *head.modules_to_save.values()]
    for candidate in candidates:
        if hasattr(candidate, "base_layer"):
            raise ValueError(
                f"model: expected a plain linear lm_head, got {type(candidate).__name__} (an adapter on the head). "
                "Leave lm_head out of target_modules, or train a full copy of it with modules_to_save=['lm_head']."
            )
        if not isinstance(candidate, nn.Linear) or not candidate.weight.is_floating_point():
            raise ValueError(
                f"model: expected a plain floating-point linear lm_head, got {type(candidate).__name__}. Leave the "
                "head out of quantisation (llm_int8_skip_modules=['lm_head'])."
            )
        if isinstance(candidate.__dict__.get("forward"), _ScoringForward):
            raise ValueError("model: expected a model without a ScoringHead, got one that has it. Call remove() first.")
    return candidates


def _logit_transform(model: nn.Module) -> tuple[float, float | None]:
    """What the model's forward does to the head's output, read from its config: (scale, softcap)."""
    config: Any = getattr(model, "config", None)
    if config is None:
        return 1.0, None
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2, Gemma 3, Gemma 3n
    scale = 1.0
    if isinstance(getattr(config, "logit_scale", None), int | float):  # Cohere
        scale *= config.logit_scale
    if isinstance(getattr(config, "logits_scaling", None), int | float):  # Granite divides
        scale /= config.logits_scaling
    return scale, softcap
