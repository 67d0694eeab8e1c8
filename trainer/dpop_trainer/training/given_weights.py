"""Optimizers that train other weights than they give: schedule-free ones compute gradients at y and give the average x.

What is saved, measured or handed back is x. Such an optimizer has eval(), which puts x into the model, and train(),
which transformers calls before every step; both do nothing when called twice.
"""

from typing import Any

from transformers import TrainerCallback


def use_given_weights(optimizer: Any) -> None:
    """Put the weights that the optimizer gives into the model; nothing where they are those that it trains."""
    if callable(getattr(optimizer, "eval", None)):
        optimizer.eval()


class GivenWeights(TrainerCallback):
    """At the end of every epoch, so that the best checkpoint is loaded over them, and of training."""

    def on_epoch_end(self, args, state, control, optimizer=None, **kwargs):
        use_given_weights(optimizer)

    def on_train_end(self, args, state, control, optimizer=None, **kwargs):
        use_given_weights(optimizer)
