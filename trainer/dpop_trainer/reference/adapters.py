"""Whether a peft model still computes what its base computes, so that the base can stand for its start."""

from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn


def adapter_changes_nothing(model: PeftModel, *, is_new: bool = False) -> bool:
    """Whether switching the adapter off gives the model as it is now, and will still do so after training.

    True for LoRA whose B is zero (as it is made) and for `modules_to_save` equal to their originals, if nothing else is
    trainable. False for whatever it cannot tell: DoRA, PiSSA and other inits that move weights into the adapter, biases
    trained in the base, prompt tuning, adapters of other kinds.

    Args:
        model: the policy.
        is_new: what to assume of weights that cannot be looked at (sharded or on no device yet).
    """
    in_adapters: set[int] = set()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            if module.lora_magnitude_vector or not all(_is_zero(b, is_new) for b in _outer_factors(module)):
                return False
        elif isinstance(module, ModulesToSaveWrapper):
            if not _equals_original(module, is_new):
                return False
        elif isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            return False
        else:
            continue
        in_adapters |= {id(parameter) for _, parameter in adapter_parameters(module)}
    return all(id(parameter) in in_adapters for parameter in model.parameters() if parameter.requires_grad)


def adapter_parameters(module: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """What an adapter adds to one layer: parameters by their name within it."""
    prefixes = tuple(f"{name}." for name in module.adapter_layer_names)
    return ((name, parameter) for name, parameter in module.named_parameters() if name.startswith(prefixes))


def _outer_factors(layer: Any) -> Iterator[Tensor]:
    """B of every active adapter of a LoRA layer, and its bias: the factor that the output is linear in. Of AdaLoRA's
    three factors it is the one in the middle that begins at zero."""
    for adapter in layer.active_adapters:
        if adapter in getattr(layer, "lora_E", ()):
            yield layer.lora_E[adapter]
        elif adapter in layer.lora_B:
            yield from layer.lora_B[adapter].parameters()
        if adapter in layer.lora_embedding_B:
            yield layer.lora_embedding_B[adapter]


def _equals_original(wrapper: Any, is_new: bool) -> bool:
    original = dict(wrapper.original_module.named_parameters())
    return all(
        is_new if _is_absent(parameter) else torch.equal(parameter, original[name])
        for adapter in wrapper.active_adapters
        if adapter in wrapper.modules_to_save
        for name, parameter in wrapper.modules_to_save[adapter].named_parameters()
    )


def _is_zero(tensor: Tensor, is_new: bool) -> bool:
    return is_new if _is_absent(tensor) else not bool(tensor.any())


def _is_absent(tensor: Tensor) -> bool:
    return tensor.is_meta or not tensor.numel()
