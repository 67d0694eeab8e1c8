"""Models whose layers are spread over ranks: transformers' own tensor parallelism, asked for, and what it cannot hold.

transformers shards a model while it loads it, by a plan of its family, and accelerate leaves it alone from then on.
Each rank has some heads of every attention, some columns of every MLP and some rows of the embedding and the head, and
runs the same batches as the others. Nothing here shards anything.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers import PreTrainedConfig
from transformers.distributed import DistributedConfig

from dpop_trainer.models.adapters import base_model


def knows_tensor_parallelism() -> bool:
    """Whether this transformers does: its Trainer from 5.19 on, and widths that do not go round from 5.21 on."""
    return tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 21)


def parallel_size(model: Any) -> int:
    """Over how many ranks a model's layers are spread; 1 where each has them whole."""
    return getattr(base_model(model), "tp_size", None) or 1


def parallel_kwargs(size: int) -> dict[str, Any]:
    """What `from_pretrained` is given to spread a model over so many ranks."""
    return {"distributed_config": DistributedConfig(tp_size=size)} if size > 1 else {}


def check_transformers() -> None:
    """
    Raises:
        ValueError: transformers is older than its support for it.
    """
    if not knows_tensor_parallelism():
        raise ValueError(
            f"parallelism_config_tp_size: expected transformers 5.21 or newer, got {transformers.__version__}. Upgrade "
            "it (pip install 'transformers>=5.21'), or use accelerate/fsdp2_8."
        )


def check_family(config: PreTrainedConfig, size: int) -> None:
    """Before a model's weights are read.

    Raises:
        ValueError: its family has no plan, or its heads do not go round.
    """
    text: Any = config.get_text_config()
    plan = getattr(text, "base_model_tp_plan", None)
    if not plan:
        raise ValueError(
            f"parallelism_config_tp_size: expected a model with a tensor-parallel plan in transformers, got "
            f"{type(text).__name__} without. Use FSDP2 (accelerate/fsdp2_8)."
        )
    if not any("attn" in name and style == "colwise" for name, style in plan.items()):
        return
    heads = text.num_attention_heads
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    if heads % size or key_heads % size:
        works = [str(n) for n in range(1, size) if heads % n == 0 and key_heads % n == 0]
        raise ValueError(
            f"parallelism_config_tp_size: expected a divisor of the {heads} attention heads and {key_heads} key heads "
            f"of {type(text).__name__}, got {size}. Use {' or '.join(works)}, or FSDP2 (accelerate/fsdp2_8)."
        )


def check_adapters_beside(configs: Iterable[PeftConfig], size: int, *, are_new: bool) -> None:
    """
    Args:
        configs: of the adapters.
        size: over so many ranks.
        are_new: they are still to be drawn.

    Raises:
        ValueError: an adapter is of a kind that peft does not spread over ranks as the layers that it is on.
    """
    for config in configs:
        refused = _refused_in(config, is_new=are_new)
        if refused is not None:
            raise ValueError(
                f"peft_config: expected plain LoRA on linear layers with parallelism_config_tp_size {size}, got "
                f"{refused}. Use LoraConfig(target_modules='all-linear'), or FSDP2 (accelerate/fsdp2_8)."
            )


def _refused_in(config: PeftConfig, *, is_new: bool) -> str | None:
    if not isinstance(config, LoraConfig):
        return type(config).__name__
    if config.modules_to_save:
        return f"modules_to_save {sorted(config.modules_to_save)}, whose copies would go on to the original's forward"
    if config.bias != "none":
        return f"bias {config.bias!r}"
    if is_new and config.init_lora_weights is not True:
        return f"init_lora_weights {config.init_lora_weights!r}"
    given = (name for name in ("use_dora", "lora_bias", "target_parameters") if getattr(config, name, None))
    return next(given, None)


@torch.no_grad()
def fit_adapter(model: Any, *, is_new: bool) -> None:
    """Make LoRA on a model that is spread over ranks what it is on a whole one.

    peft makes its layers as wide as a rank's part of the base; transformers reads the whole width there. And where it
    splits A it has drawn each part by itself: larger numbers, and the same ones on every rank.

    Args:
        model: a peft model.
        is_new: the adapter has just been put on, and is not one that was loaded.

    Raises:
        ValueError: peft has put LoRA on a layer that it does not spread as the layer is.
    """
    for name, module in model.named_modules():
        style = getattr(getattr(module, "base_layer", None), "_hf_tp_plan", None)
        if style not in (None, "colwise", "rowwise"):
            raise ValueError(
                f"peft_config: expected LoRA on layers that are spread by columns or rows, got it on {name}, of style "
                f"{style!r}. Leave it out of target_modules, or use FSDP2 (accelerate/fsdp2_8)."
            )
        if isinstance(module, nn.Linear) and isinstance(module.weight, DTensor):
            module.out_features, module.in_features = module.weight.shape
        if is_new and style == "rowwise":
            for lora_a in module.lora_A.values():
                _draw_whole(lora_a.weight)


def _draw_whole(weight: Any) -> None:
    """peft's default init, of the whole matrix, by the first rank."""
    whole = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    nn.init.kaiming_uniform_(whole, a=math.sqrt(5))
    weight.copy_(distribute_tensor(whole, weight.device_mesh, weight.placements))


def lora_state(model: nn.Module) -> dict[str, Any]:
    """What the file of an adapter that `check_adapters_beside` lets pass is made of, in parts."""
    return {name: value for name, value in model.state_dict(keep_vars=True).items() if ".lora_" in name}


def distributed(value: Tensor, like: Any) -> Any:
    """A whole tensor, equal on all ranks, as this rank's part of it, spread as `like` is. Nothing of the rest stays."""
    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None).clone()


def take_whole_weights(model: nn.Module) -> None:
    """Have `load_state_dict` take a checkpoint's whole tensors, as `save_pretrained` writes them."""

    def spread(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        for name, own in module.state_dict(keep_vars=True).items():
            whole = state_dict.get(prefix + name)
            if isinstance(own, DTensor) and whole is not None and not isinstance(whole, DTensor):
                state_dict[prefix + name] = distributed(whole, own)

    model.register_load_state_dict_pre_hook(spread)


def keep_whole_state(optimizer: Optimizer) -> None:
    """Have an optimizer's state dict hold whole tensors in the host's memory, and take such. Whoever asks for it, all
    others ask too, or `join_whole_state`."""

    def gather(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        state = state_dict["state"].items()
        whole = {key: {name: _whole(value) for name, value in values.items()} for key, values in state}
        return {**state_dict, "state": whole}

    def spread(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        state = dict(state_dict["state"])
        for key, parameter in zip(keys, parameters, strict=True):
            if key in state and isinstance(parameter, DTensor):
                state[key] = {
                    name: distributed(value, parameter)
                    if isinstance(value, Tensor) and value.shape == parameter.shape
                    else value
                    for name, value in state[key].items()
                }
        return {**state_dict, "state": state}

    optimizer.register_state_dict_post_hook(gather)
    optimizer.register_load_state_dict_pre_hook(spread)


def join_whole_state(optimizer: Any) -> None:
    """Take part in a state dict of `keep_whole_state` that another rank writes, one tensor at a time."""
    for values in optimizer.state.values():
        for value in values.values():
            if isinstance(value, DTensor):
                value.full_tensor()


def _whole(value: Any) -> Any:
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value
