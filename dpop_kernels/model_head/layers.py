"""The layers that act as a model's head, and the log-probs behind each kind: a linear layer, peft's LoRA on one.

A weight is read inside the call of its own module, so that hooks which gather it (FSDP, DeepSpeed, accelerate's
offloading) have run; `StandIn` is how code gets there.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dpop_kernels.logps.linear import linear_token_logps
from dpop_kernels.logps.lora import lora_token_logps
from dpop_kernels.logps.vocab_parallel import vocab_parallel_token_logps
from dpop_kernels.outputs import TokenStats


class StandIn:
    """Takes the place of a module's `forward`, inside of all its hooks."""

    def __init__(self, module: nn.Module, handler: Callable[["StandIn", Tensor], Tensor | None]) -> None:
        """`handler` gets the module's input and returns its output, or None to let the module's own forward run."""
        self.module, self._handler = module, handler
        # accelerate keeps the forward that its own hooks surround under another name
        slot = "_old_forward" if "_old_forward" in module.__dict__ else "forward"
        self._own_forward = getattr(module, slot)
        setattr(module, slot, self)

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        inputs: Any = hidden_states
        is_dtensor = _is_dtensor(inputs)  # in a tensor-parallel layer; whole on every rank
        output = self._handler(self, inputs.to_local() if is_dtensor else inputs)
        if output is None:
            return self._own_forward(inputs, *args, **kwargs)
        return type(inputs).from_local(output, inputs.device_mesh) if is_dtensor else output

    def remove(self) -> None:
        """Give the module its own forward back."""
        is_class_forward = getattr(self._own_forward, "__func__", None) is type(self.module).forward
        for slot in ("forward", "_old_forward"):
            if self.module.__dict__.get(slot) is not self:
                continue
            if slot == "forward" and is_class_forward:
                del self.module.forward
            else:
                setattr(self.module, slot, self._own_forward)

    @staticmethod
    def is_on(module: nn.Module) -> bool:
        return any(isinstance(module.__dict__.get(slot), StandIn) for slot in ("forward", "_old_forward"))


def take_off_heads(model: Any) -> None:
    """Give a model its own head back, whoever put another behind it; that one scores nothing any more.

    Of a copy that goes for the forward that its original was given (TRL's fused head is one): it would compute with the
    original's weights.

    Args:
        model: a module, or anything else, which is left alone.
    """
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if _calls_another(module.__dict__.get("forward"), module):
            del module.forward
        for slot in ("forward", "_old_forward"):
            stand_in = module.__dict__.get(slot)
            if isinstance(stand_in, StandIn):
                stand_in.remove()


def _calls_another(forward: Any, module: nn.Module) -> bool:
    """Whether what was put in place of a module's forward goes on to a method that is bound to another of its kind."""
    closure = getattr(getattr(forward, "__func__", forward), "__closure__", None) or ()
    owners = (getattr(cell.cell_contents, "__self__", module) for cell in closure)
    return any(type(owner) is type(module) and owner is not module for owner in owners)


def output_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that can act as the model's head: one, or the original and its `modules_to_save` copies.

    Raises:
        ValueError: there is none, or one of them is of a kind whose log-probs cannot be computed here.
    """
    get_output_embeddings: Any = getattr(model, "get_output_embeddings", None)
    head: Any = get_output_embeddings() if get_output_embeddings is not None else None
    if head is None:
        raise ValueError(
            f"model: expected a causal LM with an output embedding (lm_head), got {type(model).__name__} without one."
        )
    if isinstance(head, nn.ModuleList | list | tuple):
        raise ValueError(
            f"model: expected one lm_head, got {len(head)} of them in {type(model).__name__}. "
            "Score each head's logits with token_logps."
        )
    layers: list[Any] = [head]
    if hasattr(head, "modules_to_save") and hasattr(head, "original_module"):
        layers = [head.original_module, *head.modules_to_save.values()]
    for layer in layers:
        if is_lora(layer):
            _check_lora(layer)
            _check_linear(layer.base_layer)
        elif hasattr(layer, "base_layer"):
            raise ValueError(
                f"model: expected a plain linear lm_head or one with peft's LoRA, got {type(layer).__name__} (an "
                "adapter on the head). Leave lm_head out of target_modules, or train a full copy of it with "
                "modules_to_save=['lm_head']."
            )
        else:
            _check_linear(layer)
        if StandIn.is_on(layer):
            raise ValueError("model: expected a model without a ScoringHead, got one that has it. Call remove() first.")
    return layers


def layer_token_logps(
    layer: Any,
    hidden_states: Tensor,  # [N, H]
    target_ids: Tensor,  # [N]
    **options: Any,  # logit_scale, softcap, return_stats, backend of `linear_token_logps`
) -> tuple[Tensor, TokenStats | None]:
    """Log-probs [N] and statistics behind `layer`, called from inside its forward."""
    if not is_lora(layer):
        return _linear_logps(layer, hidden_states, target_ids, **options)
    base = layer.base_layer
    adapters = _active_adapters(layer)
    if not adapters:
        return _inside([base], hidden_states, lambda: _linear_logps(base, hidden_states, target_ids, **options))
    states = [_low_rank_state(layer, name, hidden_states) for name in adapters]
    lora_b: list[Any] = [layer.lora_B[name] for name in adapters]

    def score() -> tuple[Tensor, TokenStats | None]:
        if _is_dtensor(base.weight):
            raise ValueError(
                "lm_head: expected a plain one where it is tensor-parallel, got one with LoRA on it. Leave lm_head out "
                "of target_modules."
            )
        bias = base.bias
        for name, b in zip(adapters, lora_b, strict=True):
            if b.bias is not None:
                bias = b.bias * layer.scaling[name] + (0 if bias is None else bias)
        return lora_token_logps(
            hidden_states,
            base.weight,
            torch.cat(states, dim=1),
            lora_b[0].weight if len(lora_b) == 1 else torch.cat([b.weight for b in lora_b], dim=1),
            target_ids,
            bias=None if bias is None else bias.to(base.weight.dtype),
            **options,
        )

    return _inside([base, *lora_b], hidden_states, score)


def _is_dtensor(tensor: Any) -> bool:
    """By its attributes: not every build of torch has the class."""
    return is_traceable_wrapper_subclass(tensor) and hasattr(tensor, "device_mesh")


def is_lora(layer: Any) -> bool:
    """Whether the layer is peft's LoRA on a linear layer, by name: peft need not be installed."""
    return any(
        kind.__module__ == "peft.tuners.lora.layer" and kind.__name__ == "Linear" for kind in type(layer).__mro__
    )


def _check_linear(layer: Any) -> None:
    weight = getattr(layer, "weight", None)
    if (
        not isinstance(layer, nn.Linear)
        or type(layer).forward is not nn.Linear.forward
        or not layer.weight.is_floating_point()
        or layer.weight.dtype.itemsize < 2
        or (is_traceable_wrapper_subclass(weight) and not _is_dtensor(weight))
    ):
        raise ValueError(
            f"model: expected a plain floating-point linear lm_head, got {type(layer).__name__} with a weight of "
            f"{getattr(weight, 'dtype', 'no dtype')}. Leave the head out of quantisation "
            "(llm_int8_skip_modules=['lm_head'])."
        )


def _check_lora(layer: Any) -> None:
    variants = {name: type(kind).__name__ for name, kind in layer.lora_variant.items()}
    if variants:
        raise ValueError(
            f"model: expected plain LoRA on lm_head, got {variants}: its logits are not [h, s·A h]·[W, B]ᵀ. Use plain "
            "LoRA there, or train a full copy of the head with modules_to_save=['lm_head']."
        )


def _active_adapters(layer: Any) -> list[str]:
    """The adapters that peft's own forward would add, in its order; as there, switching off undoes a merge."""
    if layer.disable_adapters:
        if layer.merged:
            layer.unmerge()
        return []
    if layer.merged:
        return []
    _check_lora(layer)
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _low_rank_state(layer: Any, name: str, hidden_states: Tensor) -> Tensor:
    """s·A·dropout(h) [N, r], in the adapter's dtype."""
    lora_a = layer.lora_A[name]
    inputs = layer.lora_dropout[name](hidden_states.to(lora_a.weight.dtype))
    return lora_a(inputs) * layer.scaling[name]


def _linear_logps(
    linear: Any, hidden_states: Tensor, target_ids: Tensor, *, return_stats: bool, **options: Any
) -> tuple[Tensor, TokenStats | None]:
    weight, bias = linear.weight, linear.bias
    score: Any = _tensor_parallel_logps if _is_dtensor(weight) else linear_token_logps
    result = score(hidden_states, weight, target_ids, bias=bias, return_stats=return_stats, **options)
    return result if return_stats else (result, None)


def _tensor_parallel_logps(hidden_states: Tensor, weight: Any, target_ids: Tensor, *, bias: Any, **options: Any) -> Any:
    """`linear_token_logps` behind a head that is still a DTensor inside its own call: each rank has some rows of it."""
    mesh = weight.device_mesh
    if mesh.ndim != 1 or not weight.placements[0].is_shard(0):
        raise ValueError(
            f"lm_head: expected a weight sharded by rows over one mesh dimension, got {weight.placements} on a mesh of "
            f"shape {tuple(mesh.shape)}. Parallelise lm_head with ColwiseParallel."
        )
    rows_per_rank = -(-weight.shape[0] // mesh.size())  # as DTensor splits: the last ranks may have fewer
    return vocab_parallel_token_logps(
        hidden_states,
        weight.to_local(),
        target_ids,
        vocab_start=min(mesh.get_local_rank() * rows_per_rank, weight.shape[0]),
        process_group=mesh.get_group(),
        bias_shard=None if bias is None else bias.to_local(),
        **options,
    )


def _inside(
    modules: list[nn.Module], hidden_states: Tensor, compute: Callable[[], tuple[Tensor, TokenStats | None]]
) -> tuple[Tensor, TokenStats | None]:
    """compute() called from within the forwards of all `modules`, one in another."""
    if not modules:
        return compute()
    results = []

    def nested(_: StandIn, inputs: Tensor) -> Tensor:
        results.append(_inside(modules[1:], inputs, compute))
        return results[0][0].clone()

    with _standing_in(modules[0], nested):
        modules[0](hidden_states)
    return results[0]


@contextmanager
def _standing_in(module: nn.Module, handler: Callable[[StandIn, Tensor], Tensor | None]) -> Iterator[None]:
    stand_in = StandIn(module, handler)
    try:
        yield
    finally:
        stand_in.remove()
