"""What a trainer is about to train, looked at before anything is computed: it learns, and what it learns is saved."""

import logging
import warnings
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from dpop_trainer.models.adapters import check_adapters
from dpop_trainer.models.tensor_parallel import lora_state, parallel_size

logger = logging.getLogger(__name__)

_NUM_LISTED = 4  # names that a message lists


def check_trainable(model: Any, optimizers: tuple[Any, Any] = (None, None), *, trains: bool = True) -> None:
    """
    Args:
        model: the policy, with its adapter.
        optimizers: optimizer and scheduler that the trainer was given.
        trains: there is a data set to train on; without one nothing is looked at.

    Raises:
        ValueError: nothing would be trained, or not by this optimizer, or what is trained would not be saved: what was
            found, and the remedy.
    """
    if not trains:
        return
    _check_adapter_is_on(model)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise ValueError(
            "model: expected parameters to train, got a model in which all are frozen. Load an adapter with "
            "PeftModel.from_pretrained(..., is_trainable=True)."
        )
    if isinstance(model, PeftModel):
        check_adapters(model.peft_config)
        _check_saved(model, trained)
    _check_optimizer(trained, *optimizers)


def _check_adapter_is_on(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if getattr(module, "merged", False) is True and hasattr(module, "merged_adapters"):
            raise ValueError(
                f"model: expected an adapter beside its base, got one that is merged into it ({path}): no gradient "
                "would reach it. Call model.unmerge_adapter() first, or merge_and_unload() to train all weights."
            )
        if getattr(module, "disable_adapters", False) is True and hasattr(module, "active_adapters"):
            raise ValueError(
                f"model: expected an adapter that is switched on, got one that is off ({path}): the base would be "
                "trained on in its place. Call model.base_model.enable_adapter_layers() first."
            )


def _check_saved(model: PeftModel, trained: dict[str, nn.Parameter]) -> None:
    """peft saves what belongs to its adapters, and no other parameter, whoever made it trainable."""
    if any(config.is_prompt_learning for config in model.peft_config.values()):
        return
    if parallel_size(model) > 1:  # peft would put the base together too, on every rank
        lost = sorted(trained.keys() - lora_state(model).keys())
    else:
        lost = _lost_in_state_dict(model, trained)
    if lost:
        raise ValueError(
            f"model: expected all trained parameters to be the adapter's, whose file is what is saved, got {len(lost)} "
            f"others: {_listed(lost)}. Name their modules in the adapter's modules_to_save, or freeze them."
        )


def _lost_in_state_dict(model: PeftModel, trained: dict[str, nn.Parameter]) -> list[str]:
    lost: list[str] = []
    saved: set[tuple[int, tuple[int, ...]]] = set()
    for save_embeddings in (False, "auto"):  # the second may look for the base's configuration
        for name in model.peft_config:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # saving gives the same ones
                kept = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=save_embeddings)
            saved |= {_place(tensor) for tensor in kept.values() if isinstance(tensor, Tensor)}
        lost = [name for name, value in trained.items() if not value.is_meta and _place(value) not in saved]
        if not lost:
            break
    return lost


def _check_optimizer(trained: dict[str, nn.Parameter], optimizer: Any, scheduler: Any) -> None:
    if scheduler is not None and hasattr(scheduler, "optimizer") and scheduler.optimizer is not optimizer:
        got = "none" if optimizer is None else "another"
        raise ValueError(
            f"optimizers: expected a scheduler of the optimizer beside it, got one of an optimizer that is not trained "
            f"with, and {got} beside it. Pass both: (optimizer, scheduler)."
        )
    if optimizer is None or not hasattr(optimizer, "param_groups"):
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    left_out = [name for name, parameter in trained.items() if id(parameter) not in held]
    if len(left_out) == len(trained):
        raise ValueError(
            "optimizers: expected an optimizer of the parameters that are trained, got one that holds none of these "
            f"{len(trained)}: made before the adapter was put on, or of another model. Wrap the model first "
            "(peft.get_peft_model), make the optimizer of the parameters with requires_grad, and pass both; or set "
            "optim and learning_rate instead."
        )
    if left_out:
        logger.warning(
            "optimizers: the optimizer holds %d of the %d parameters that take a gradient; these stay as they are: %s.",
            len(trained) - len(left_out),
            len(trained),
            _listed(left_out),
        )


def _place(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    return tensor.data_ptr(), tuple(tensor.shape)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NUM_LISTED} more" if len(names) > _NUM_LISTED else ""
    return ", ".join(names[:_NUM_LISTED]) + more
