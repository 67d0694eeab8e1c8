"""`linear_token_logps` behind a Hugging Face causal LM's own `lm_head`.

The model's forward runs as its authors wrote it. Only when a scoring call is under way does the head's `forward`, which
every model calls with the last hidden states [.., H], pick the scored rows and compute their log-probs instead of
logits. Hooks on the module (FSDP, DeepSpeed, accelerate) fire as ever, `generate` and `save_pretrained` see an
ordinary head, and `remove()` leaves no trace.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpop_kernels.model_head.layers import StandIn, layer_token_logps, output_layers
from dpop_kernels.model_head.transforms import check_transform, logit_transform, probe_logits
from dpop_kernels.outputs import TokenStats


class ScoringHead:
    """Token log-probs of any causal LM without its logits.

    Args:
        model: a Hugging Face causal LM, or a peft model around one. Its output embedding must be a linear layer: plain,
            a `modules_to_save` copy, or one with peft's LoRA on it (any number of active adapters, dropout, a bias;
            merged and switched-off adapters are followed). Weights may be sharded (FSDP2, ZeRO-3), being read only
            inside the head's own call, or tensor-parallel (the rows of a plain head spread over a mesh). What the
            config says about logit scales and softcaps is applied.
        backend: "auto", or a name of `dpop_kernels.backends.BACKENDS`.

    Raises:
        ValueError: the model has no output embedding, several, an encoder, or one that is not such a linear layer
            (quantised, or with another kind of adapter): what was found, and what to do instead.

    Example:
        >>> head = ScoringHead(model)                                                       # doctest: +SKIP
        >>> logps = head.token_logps(model, score_positions, target_ids, input_ids=ids)     # doctest: +SKIP
    """

    def __init__(self, model: nn.Module, *, backend: str = "auto") -> None:
        self._backend = backend
        self._transform = logit_transform(model)
        self._request: _Request | None = None
        self._result: tuple[Tensor, TokenStats | None] | None = None
        self._stand_ins = [StandIn(layer, self._in_place_of_logits) for layer in output_layers(model)]

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
        output = self._forward(model, _Request(score_positions, target_ids, return_stats), model_inputs)
        logps, stats = self._take_result(model)
        logps = _AlsoThrough.apply(logps, output)
        return (logps, stats) if return_stats else logps

    def check(self, model: nn.Module) -> None:
        """Run the model on four tokens with a known head output, and see that it makes of it what is assumed here.

        Cheap and without gradient; the weights do not matter, so logits near zero hide nothing. Where weights are
        sharded, all ranks call it together.

        Raises:
            ValueError: the model does something to its logits that this head does not know.
        """
        parameters = [parameter.device for parameter in model.parameters() if parameter.device.type != "meta"]
        device = parameters[0] if parameters else torch.device("cpu")
        layer: Any = self._stand_ins[0].module
        input_ids = torch.arange(1, 5, device=device).unsqueeze(0) % layer.out_features
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                logits = self._forward(model, _Request(probe=True), {"input_ids": input_ids})
            raw_logits, _ = self._take_result(model)
        finally:
            model.train(was_training)
        check_transform(model, self._transform, raw_logits, logits, num_tokens=4)

    def remove(self) -> None:
        """Give the model its own head back."""
        for stand_in in self._stand_ins:
            stand_in.remove()
        self._stand_ins = []

    def _forward(self, model: nn.Module, request: "_Request", model_inputs: dict[str, Any]) -> Tensor:
        """The model's forward with `request` under way -> what it returns as its logits."""
        self._request, self._result = request, None
        try:
            output = model(**model_inputs, use_cache=False)
        except BaseException:
            self._result = None
            raise
        finally:
            self._request = None
        return output.logits if hasattr(output, "logits") else output[0]

    def _take_result(self, model: nn.Module) -> tuple[Tensor, TokenStats | None]:
        result, self._result = self._result, None
        if result is None:
            raise RuntimeError(
                f"{type(model).__name__}: expected the forward to call the head that this ScoringHead was put on, and "
                "it did not. Pass the same model, or a wrapper around it; where another trainer was built on it "
                "since, the head is that one's."
            )
        return result

    def _in_place_of_logits(self, stand_in: StandIn, hidden_states: Tensor) -> Tensor | None:
        request = self._request
        if request is None:
            return None
        if self._result is not None:
            raise RuntimeError("model: expected one call of the head per forward, got a second one.")
        if request.probe:
            raw_logits = probe_logits(hidden_states, stand_in.module)
            self._result = raw_logits, None
            return raw_logits.clone()
        rows = hidden_states.reshape(-1, hidden_states.shape[-1]).index_select(0, request.score_positions)
        self._result = layer_token_logps(
            stand_in.module,
            rows,
            request.target_ids,
            logit_scale=self._transform.scale,
            softcap=self._transform.softcap,
            return_stats=request.return_stats,
            backend=self._backend,
        )
        # the model goes on with this as its "logits": whatever it does to them is discarded. No view: FSDP's hooks and
        # a model that works in place want a tensor of its own
        return self._result[0].unsqueeze(0).unsqueeze(-1).clone()


class _Request(NamedTuple):
    """What the head's next call is to do: score these tokens, or return known logits."""

    score_positions: Any = None
    target_ids: Any = None
    return_stats: bool = False
    probe: bool = False


class _AlsoThrough(torch.autograd.Function):
    """Log-probs as they are, whose backward also visits the model's output, with a gradient of zero.

    Wrappers hang their backward hooks on what modules return: FSDP and ZeRO-3 gather a weight again when the gradient
    of its module's output arrives, DDP looks there for the parameters in use. The log-probs leave the head by another
    door; this makes their gradient knock at the front door first.
    """

    @staticmethod
    def forward(ctx, logps, output):
        ctx.save_for_backward(output)
        return logps.view_as(logps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps):
        (output,) = ctx.saved_tensors
        return grad_logps, torch.zeros_like(output)
