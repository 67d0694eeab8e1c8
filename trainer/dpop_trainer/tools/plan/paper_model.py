"""A run's model without its weights: whole, to count parameters, and a few layers deep, to run a step on paper."""

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedConfig

from dpop_trainer.models.adapters import base_model
from dpop_trainer.models.auto_class import auto_class
from dpop_trainer.models.loading import disable_dropout
from dpop_trainer.settings.renamed import without_renaming_warnings
from dpop_trainer.tools.plan.flash_on_paper import attention_on_paper
from dpop_trainer.tools.plan.paper_tensor import paper
from dpop_trainer.tools.plan.stand_ins import quantise

LONGEST_PERIOD = 8
"""Layers after which a model's pattern of layers begins again, at most."""


@dataclass(frozen=True)
class ModelSetting:
    """How a run loads its model."""

    dtype: torch.dtype
    """Of the weights."""
    bits: int | None = None
    """4 or 8 for linear layers quantised by bitsandbytes."""
    nested: bool = False
    """The scales of 4 bits are quantised too."""
    lora: LoraConfig | None = None
    attention: str | None = None
    """attn_implementation, where it is not transformers' choice."""


@dataclass(frozen=True)
class Sizes:
    """What a whole model holds, in bytes, and how its layers follow each other."""

    num_parameters: int
    """As published: packed weights count as the weights they stand for, adapters not at all."""
    num_trained: int
    num_active: int
    """Parameters that one token meets: of a mixture's experts those that it is sent to."""
    embedding_bytes: int
    """Outside of the layers: embeddings, head, last norm. Frozen or trained in full."""
    layer_bytes: int
    """In the layers, without adapters."""
    largest_layer_bytes: int
    adapter_bytes: int
    largest_layer_trained: int
    """Trained parameters of a layer, at most."""
    trained_bytes: int
    frozen_bytes: int
    buffer_bytes: int
    num_packed: int
    """Weights that are packed into 4 or 8 bits."""
    num_layers: int
    num_leading: int
    """Layers at the beginning that are unlike all others."""
    period: int
    """After so many layers their pattern begins again."""

    @property
    def weight_bytes(self) -> int:
        """All that the model holds, adapters too."""
        return self.trained_bytes + self.frozen_bytes + self.buffer_bytes


def build(config: PreTrainedConfig, setting: ModelSetting, *, num_layers: int | None = None) -> Any:
    """The model on the meta device, with its adapter, as a trainer prepares it.

    Args:
        config: of the model.
        setting: how it is loaded.
        num_layers: of so many layers; None for all.

    Raises:
        ValueError: transformers has no causal LM of this configuration.
    """
    config = _shortened(config, num_layers) if num_layers is not None else copy.deepcopy(config)
    attention = attention_on_paper(setting.attention)
    more = {} if attention is None else {"attn_implementation": attention}
    with torch.device("meta"):
        model: Any = auto_class(config).from_config(config, dtype=setting.dtype, **more)
        if setting.bits is not None:
            quantise(model, bits=setting.bits, nested=setting.nested, compute_dtype=torch.bfloat16)
        if setting.lora is not None:
            with without_renaming_warnings():
                model = get_peft_model(model, copy.deepcopy(setting.lora))
    disable_dropout(model)
    return model


def count(model: nn.Module) -> Sizes:
    """The sizes of a whole model, from `build`."""
    layers = decoder_layers(model)
    in_layers = {id(p) for layer in layers for p in layer.parameters()}
    num_leading, period = _pattern(layer_kinds(model))
    parameters = _unique(model.named_parameters())
    adapters = {id(p) for name, p in parameters if _is_adapter(name)}
    base = [(name, p) for name, p in parameters if id(p) not in adapters]
    return Sizes(
        num_parameters=sum(_num_weights(model, name, p) for name, p in base),
        num_trained=sum(p.numel() for _, p in parameters if p.requires_grad),
        num_active=round(sum(_num_weights(model, name, p) * _share_used(model, name, p) for name, p in base)),
        embedding_bytes=sum(p.nbytes for _, p in base if id(p) not in in_layers),
        layer_bytes=sum(p.nbytes for _, p in base if id(p) in in_layers),
        largest_layer_bytes=max((_layer_bytes(layer) for layer in layers), default=0),
        adapter_bytes=sum(p.nbytes for _, p in parameters if id(p) in adapters),
        largest_layer_trained=max(
            (sum(p.numel() for p in layer.parameters() if p.requires_grad) for layer in layers), default=0
        ),
        trained_bytes=sum(p.nbytes for _, p in parameters if p.requires_grad),
        frozen_bytes=sum(p.nbytes for _, p in parameters if not p.requires_grad),
        buffer_bytes=sum(buffer.nbytes for _, buffer in _unique(model.named_buffers())),
        num_packed=sum(_num_weights(model, name, p) for name, p in base if p.dtype == torch.uint8),
        num_layers=len(layers),
        num_leading=num_leading,
        period=period,
    )


def layer_kinds(model: Any) -> list[Any]:
    """Of each of its layers, what makes it cost what it costs."""
    layers = decoder_layers(model)
    return [_signature(model, layers, i) for i in range(len(layers))]


def sizes_of(config: PreTrainedConfig, setting: ModelSetting, kinds: list[Any]) -> Sizes:
    """What `count` says of the whole model; from a few of its layers where those that follow are known to be alike.

    An adapter on 80 layers takes seconds to build. Two models that differ by one period of layers give what a period
    adds, and whole periods are added, so that every number is exact.

    Args:
        config: of the model.
        setting: how it is loaded.
        kinds: `layer_kinds` of the whole model without adapter and packed weights.
    """
    num_leading, period = _pattern(kinds)
    more = num_leading + (len(kinds) - num_leading) % period + 2 * period
    bare = replace(setting, bits=None, lora=None)
    if (
        len(kinds) <= more
        or _names_layers(setting.lora)
        or layer_kinds(build(config, bare, num_layers=more)) != kinds[:more]
    ):
        return count(build(config, setting))
    low, high = (count(build(config, setting, num_layers=num)) for num in (more - period, more))
    share = (len(kinds) - more) // period
    whole = {name: value + share * (value - getattr(low, name)) for name, value in asdict(high).items()}
    of_a_layer = ("largest_layer_bytes", "largest_layer_trained")
    whole |= {name: getattr(high, name) for name in of_a_layer}
    return Sizes(**(whole | {"num_layers": len(kinds), "num_leading": num_leading, "period": period}))


def _names_layers(lora: LoraConfig | None) -> bool:
    """Whether an adapter may treat layers of one kind differently, by their numbers."""
    if lora is None:
        return False
    numbered = ("layers_to_transform", "layer_replication", "rank_pattern", "exclude_modules", "target_parameters")
    if any(getattr(lora, name, None) for name in numbered):
        return True
    names = lora.target_modules or ()
    if isinstance(names, str):
        return names != "all-linear"
    return any(part.isdigit() for name in names for part in name.split("."))


def decoder_layers(model: Any) -> list[nn.Module]:
    """The text decoder's layers.

    Raises:
        ValueError: they are not found.
    """
    base = base_model(model)
    expected = base.config.get_text_config().num_hidden_layers
    lists = [module for module in base.modules() if isinstance(module, nn.ModuleList) and len(module) == expected]
    if not lists:
        raise ValueError(
            f"model: expected a decoder with its {expected} layers in a list, found none in {type(base).__name__}. "
            "dpop plan does not know this architecture."
        )
    return list(max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters())))


def on_paper(model: nn.Module) -> None:
    """Turn a model of the meta device into one on a CPU whose tensors have no data."""
    made: dict[int, Tensor] = {}

    def put(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            empty = paper(tensor.shape, tensor.dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
        return made[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = put(tensor)  # type: ignore[assignment]


def _shortened(config: PreTrainedConfig, num_layers: int) -> PreTrainedConfig:
    """The configuration with fewer layers; what it lists layer by layer is cut to match."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    whole = text.num_hidden_layers
    text.num_hidden_layers = num_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == whole:
            setattr(text, name, value[:num_layers])
    return config


def _signature(model: Any, layers: list[nn.Module], index: int) -> tuple[Any, ...]:
    """What makes a layer cost what it costs."""
    base = base_model(model)
    kinds = getattr(base.config.get_text_config(), "layer_types", None)
    shapes = tuple((name, tuple(p.shape)) for name, p in layers[index].named_parameters())
    return type(layers[index]), shapes, None if not kinds else kinds[index]


def _pattern(signatures: list[Any]) -> tuple[int, int]:
    """-> layers at the beginning that are unlike the rest, the period of the rest."""
    for num_leading in range(len(signatures)):
        rest = signatures[num_leading:]
        for period in range(1, min(LONGEST_PERIOD, max(1, len(rest) // 3)) + 1):
            if all(rest[i] == rest[i - period] for i in range(period, len(rest))):
                return num_leading, period
    return 0, max(1, len(signatures))


def _unique(named: Iterator[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    return list({id(tensor): (name, tensor) for name, tensor in named}.values())


def _is_adapter(name: str) -> bool:
    return "lora_" in name or ".modules_to_save." in name


def _layer_bytes(layer: nn.Module) -> int:
    return sum(p.nbytes for name, p in layer.named_parameters() if not _is_adapter(name))


def _num_weights(model: nn.Module, name: str, parameter: Tensor) -> int:
    """Weights that a parameter holds; a packed one those that were packed."""
    owner: Any = model.get_submodule(name.rpartition(".")[0])
    if name.endswith("weight") and hasattr(owner, "compute_dtype"):
        return owner.in_features * owner.out_features
    return parameter.numel()


def _share_used(model: Any, name: str, parameter: Tensor) -> float:
    """The part of a parameter that one token meets: k of E experts where it stacks experts, else all."""
    base = base_model(model)
    text = base.config.get_text_config()
    chosen = getattr(text, "num_experts_per_tok", None)
    owner: Any = model.get_submodule(name.rpartition(".")[0])
    num_experts = getattr(owner, "num_experts", None)
    if chosen and num_experts and parameter.dim() == 3 and parameter.shape[0] == num_experts:
        return chosen / num_experts
    return 1.0
