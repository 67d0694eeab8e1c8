"""What scripts and callbacks read of TRL's `DPOTrainer`, under the names that it has there."""

from typing import Any

from torch import Tensor

from dpop_trainer.batches.batch import as_batch
from dpop_trainer.batches.scoring import forward_inputs


def _argument(name: str) -> Any:
    """An attribute that is a field of the configuration; setting it sets the field."""

    def read(trainer: Any) -> Any:
        return getattr(trainer.args, name)

    def write(trainer: Any, value: Any) -> None:
        setattr(trainer.args, name, value)

    return property(read, write, doc=f"args.{name}")


class TRLNames:
    """Mixed into the trainer."""

    beta = _argument("beta")
    loss_types = _argument("loss_type")
    label_smoothing = _argument("label_smoothing")
    ld_alpha = _argument("ld_alpha")
    use_weighting = _argument("use_weighting")
    f_divergence_type = _argument("f_divergence_type")
    f_alpha_divergence_coef = _argument("f_alpha_divergence_coef")
    padding_free = _argument("padding_free")
    precompute_ref_logps = _argument("precompute_ref_log_probs")

    @property
    def loss_weights(self: Any) -> list[float]:
        """One for each of `loss_types`."""
        return list(self.args.weights_by_loss().values())

    @property
    def aux_loss_enabled(self: Any) -> bool:
        """A mixture of experts' load-balancing loss is added."""
        return self.router_aux_loss_coef != 0.0

    def compute_ref_log_probs(self: Any, model: Any, inputs: Any) -> tuple[Tensor, Tensor]:
        """The reference's log-probs of a batch's chosen and rejected answers, [B] each, in nats.

        Args:
            model: unused; which model it is, the trainer knows.
            inputs: a collated batch of the trainer's.
        """
        batch = as_batch(inputs).to(self.accelerator.device)
        model_inputs = forward_inputs(batch, self.accelerator.unwrap_model(self.model))
        shared, chosen, rejected = self.reference.segment_logps(batch, model_inputs).unbind(1)
        return shared + chosen, shared + rejected
