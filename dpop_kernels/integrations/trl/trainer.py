"""DPOP inside TRL's own DPOTrainer, for scripts that have to stay there.

TRL computes its losses inline, in one method that no loss can be added to from outside. What it computes them from
passes through three doors, though: the policy is called, the reference is called (or its log-probs come with the
batch), and the losses asked for are a list. So TRL runs with "dpop" taken off that list, which leaves its metrics and
its other losses as they are; the token log-probs are kept as they pass the doors, and DPOP's loss is added to TRL's.

    from dpop_kernels.integrations.trl import TRLDPOPConfig, TRLDPOPTrainer

    trainer = TRLDPOPTrainer(model, args=TRLDPOPConfig(dpop_lambda=50.0, ...), train_dataset=dataset)

`dpop_trainer.DPOPTrainer` has the same interface, the fused kernels and shared prefixes: prefer it where you can.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from trl import DPOConfig, DPOTrainer

from dpop_kernels.losses.formulas import dpop_penalties
from dpop_kernels.losses.on_sums import dpop_loss
from dpop_kernels.losses.options import LossOptions, check_hyperparameters


@dataclass
class TRLDPOPConfig(DPOConfig):
    """TRL's DPOConfig with the loss "dpop", alone by default or among others by `loss_weights`.

    Raises:
        ValueError: β or λ outside its range, or "dpop" together with a field that changes the log-probs it is made of.
    """

    loss_type: list[str] = field(
        default_factory=lambda: ["dpop"], metadata={"help": "dpop, or any of TRL's, or several with loss_weights."}
    )
    beta: float = field(default=0.3, metadata={"help": "β > 0: strength of the log-ratios, 1/nat. The paper: 0.3."})
    dpop_lambda: float = field(
        default=50.0, metadata={"help": "λ >= 0: weight of DPOP's penalty. The paper: 50, range 5 to 500. 0 is DPO."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if "dpop" not in self.loss_type:
            return
        check_hyperparameters(LossOptions(self.beta, self.dpop_lambda))
        for name, needed in (("ld_alpha", None), ("use_weighting", False), ("f_divergence_type", "reverse_kl")):
            value = getattr(self, name)
            if value != needed:
                raise ValueError(
                    f"{name}: expected {needed!r} with the loss 'dpop', which is defined on plain log-probs, got "
                    f"{value!r}. Leave it out, or choose another loss_type."
                )


class TRLDPOPTrainer(DPOTrainer):
    """TRL's DPOTrainer that knows the loss "dpop": arguments, data, reference and metrics are TRL's.

    Logged besides: dpop/penalty (βλ · max(0, -Δw), mean over pairs) and dpop/active_fraction (pairs with Δw < 0).

    Source:
        Pal et al. 2024, arXiv:2402.13228, equation 3; see `dpop_kernels.dpop_loss`.
    """

    args: TRLDPOPConfig  # type: ignore[assignment]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        config = kwargs["args"] if "args" in kwargs else (args[2] if len(args) > 2 else None)
        if not isinstance(config, TRLDPOPConfig):
            raise ValueError(f"args: expected a TRLDPOPConfig, got {type(config).__name__}.")
        super().__init__(*args, **kwargs)
        terms = list(zip(self.loss_types, self.loss_weights, strict=True))
        self._dpop_weight = sum(weight for name, weight in terms if name == "dpop")
        self._has_dpop = any(name == "dpop" for name, _ in terms)
        # what TRL's own method is left to compute; it goes through an empty list without complaint
        self.loss_types = [name for name, _ in terms if name != "dpop"]
        self.loss_weights = [weight for name, weight in terms if name != "dpop"]

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if not self._has_dpop:
            return super()._compute_loss(model, inputs, return_outputs)
        policy = _Recorded(model)
        reference_outputs: list[Any] = []
        reference: Any = self.ref_model if self.ref_model is not None else self.model
        hook = reference.register_forward_hook(lambda module, arguments, output: reference_outputs.append(output))
        try:
            result = super()._compute_loss(policy, inputs, return_outputs)
        finally:
            hook.remove()
        loss, outputs = result if return_outputs else (result, None)
        loss = loss + self._dpop_weight * self._dpop_loss(policy.outputs, reference_outputs, inputs)
        return (loss, outputs) if return_outputs else loss

    def _dpop_loss(self, policy_outputs: list[Any], reference_outputs: list[Any], inputs: dict[str, Any]) -> Tensor:
        """DPOP's mean over the micro-batch -> scalar."""
        chosen_logps, rejected_logps = _sequence_logps(policy_outputs[:1], inputs).chunk(2)
        if self.precompute_ref_logps:
            ref_chosen_logps, ref_rejected_logps = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:
            # without a reference model the policy's own module was called twice: for itself, then with its adapter off
            ref_chosen_logps, ref_rejected_logps = _sequence_logps(reference_outputs, inputs).chunk(2)
        losses = dpop_loss(
            chosen_logps,
            rejected_logps,
            ref_chosen_logps.to(chosen_logps),
            ref_rejected_logps.to(chosen_logps),
            beta=self.beta,
            dpop_lambda=self.args.dpop_lambda,
            reduction="none",
        )
        self._log_penalty((chosen_logps - ref_chosen_logps.to(chosen_logps)).detach())
        return losses.mean()

    def _log_penalty(self, chosen_logratios: Tensor) -> None:
        model: Any = self.model
        metrics: Any = self._metrics["train" if model.training else "eval"]
        values = {
            "dpop/penalty": self.beta * dpop_penalties(chosen_logratios, self.args.dpop_lambda),
            "dpop/active_fraction": (chosen_logratios < 0).float(),
        }
        for name, value in values.items():
            gathered: Any = self.accelerator.gather(value)
            metrics[name].append(gathered.mean().item())


class _Recorded:
    """A model that is called as ever, and whose outputs are kept."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.outputs: list[Any] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._model(*args, **kwargs)
        self.outputs.append(output)
        return output


def _sequence_logps(outputs: list[Any], inputs: dict[str, Any]) -> Tensor:
    """Log-probs of the completions [2B], chosen rows first, from the last output that has any per token [2B, T]."""
    found = [output.log_probs for output in outputs if getattr(output, "log_probs", None) is not None]
    if not found:
        raise RuntimeError(
            "trl: expected its model calls to return log_probs per token, got none. This TRL computes its losses in "
            "another way; install 'trl==1.16.*', or use dpop_trainer.DPOPTrainer."
        )
    # prompt-learning adapters put virtual tokens before the others; all but completions are zero
    log_probs: Tensor = found[-1][:, -(inputs["completion_mask"].shape[1] - 1) :]
    return torch.sum(log_probs, dim=1)
