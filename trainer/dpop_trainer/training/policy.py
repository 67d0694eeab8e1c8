"""The policy of a trainer: what was passed becomes a model that learns."""

from typing import Any

from transformers import set_seed

from dpop_kernels.model_head.layers import take_off_heads
from dpop_trainer.models.loading import Policy, prepare_policy
from dpop_trainer.training.sequence_parallel import check_sequence_parallel
from dpop_trainer.training.tensor_parallel import check_tensor_parallel
from dpop_trainer.training.trainable import check_trainable


def policy_to_train(
    model: Any,
    processing_class: Any,
    args: Any,
    *,
    ref_model: Any = None,
    quantization_config: Any = None,
    peft_config: Any = None,
    optimizers: tuple[Any, Any] = (None, None),
    trains: bool = True,
) -> Policy:
    """The same steps for every trainer, in the order of their needs: the seed comes before peft draws.

    Args:
        model, processing_class, args, ref_model, quantization_config, peft_config, optimizers: the trainer's own.
        trains: there is a data set to train on.

    Raises:
        ValueError: as `check_sequence_parallel`, `check_tensor_parallel`, `prepare_policy` and `check_trainable`.
    """
    check_sequence_parallel(args)
    check_tensor_parallel(args, model, is_quantised=quantization_config is not None)
    for given in (model, ref_model):
        take_off_heads(given)  # another trainer's, whose model this was
    set_seed(args.seed)
    policy = prepare_policy(
        model, processing_class, args, quantization_config=quantization_config, peft_config=peft_config
    )
    check_trainable(policy.model, optimizers, trains=trains)
    return policy
