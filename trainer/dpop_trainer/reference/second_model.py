"""A reference model of its own by name: loaded as the policy was unless told otherwise, and offloaded if wanted."""

from typing import Any

import torch
from accelerate import cpu_offload
from torch import nn

from dpop_trainer.batches.scoring import attention_of
from dpop_trainer.models.adapters import base_model
from dpop_trainer.models.loading import load_model
from dpop_trainer.models.quantised import check_bitsandbytes
from dpop_trainer.models.tensor_parallel import parallel_kwargs, parallel_size


def load_reference(name_or_path: str, policy: Any, init_kwargs: dict[str, Any] | str | None = None) -> Any:
    """A frozen reference from a hub id or a local folder, in the policy's dtype and with its attention, which keeps
    their rounding alike, and over as many ranks, where `init_kwargs` do not say otherwise.

    Args:
        name_or_path: of a causal LM, or of an adapter, which is loaded on its base.
        policy: the model that is trained.
        init_kwargs: for from_pretrained: dtype, attn_implementation, device_map, quantization_config (also as a
            mapping, such as {"load_in_4bit": true}: nf4, products in the policy's dtype), ...

    Raises:
        ValueError: nothing can be loaded from there, or it is to be quantised by bitsandbytes, which is not installed.
    """
    base: Any = base_model(policy)
    own = dict(check_init_kwargs(init_kwargs) or {})
    quantization = own.get("quantization_config")
    if isinstance(quantization, dict) and quantization.keys() & {"load_in_4bit", "load_in_8bit"}:
        # nf4 is made for weights; bitsandbytes' own defaults are fp4 and products in fp32
        defaults = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": base.dtype}
        own["quantization_config"] = {"quant_method": "bitsandbytes", **defaults, **quantization}
    alike = {"dtype": base.dtype, "attn_implementation": attention_of(policy), **parallel_kwargs(parallel_size(policy))}
    kwargs = {**alike, **own}
    return load_model(name_or_path, kwargs).eval().requires_grad_(False)


def check_init_kwargs(init_kwargs: Any) -> dict[str, Any] | None:
    """
    Raises:
        ValueError: neither a mapping nor None; or bitsandbytes is asked for and not installed.
    """
    if init_kwargs is None:
        return None
    if not isinstance(init_kwargs, dict):
        raise ValueError(
            f"ref_model_init_kwargs: expected a mapping of from_pretrained's arguments, or its JSON, got "
            f"{init_kwargs!r}."
        )
    quantization = init_kwargs.get("quantization_config")
    asked = quantization if isinstance(quantization, dict) else getattr(quantization, "to_dict", dict)()
    if any(asked.get(key) or init_kwargs.get(key) for key in ("load_in_4bit", "load_in_8bit")):
        check_bitsandbytes("ref_model_init_kwargs")
    return init_kwargs


def check_reference(reference: Any, policy: Any, *, num_tokens: int) -> None:
    """
    Args:
        reference: the second model.
        policy: the model that is trained, with its adapter.
        num_tokens: of the tokenizer.

    Raises:
        ValueError: training would change the reference too, or it does not know all tokens.
    """
    if reference is policy:
        raise ValueError(
            "ref_model: expected a model of its own, got the policy itself, which would train the reference too. "
            "Pass None for a frozen copy."
        )
    if reference is base_model(policy):
        raise ValueError(
            "ref_model: expected a model of its own, got the base under the policy's adapter, in whose layers the "
            "adapter is: it would be trained too. Pass None: the reference is then this base, with the adapter off; or "
            "load the model a second time."
        )
    ours = {id(module): name for name, module in policy.named_modules() if _has_own_weights(module)}
    shared = [ours[id(module)] for module in reference.modules() if id(module) in ours]
    trained = {id(parameter): name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    shared = shared or [trained[id(parameter)] for parameter in reference.parameters() if id(parameter) in trained]
    if shared:
        raise ValueError(
            f"ref_model: expected a model of its own, got one that has {len(shared)} parts in common with the policy "
            f"({shared[0]} is the first): what training does to the one reaches the other. Load it a second time, or "
            "pass a copy.deepcopy of it."
        )
    rows, needed = (int(model.get_input_embeddings().weight.shape[0]) for model in (reference, policy))
    needed = min(needed, num_tokens)
    if 0 < rows < needed:
        raise ValueError(
            f"ref_model: expected an embedding for all {needed} tokens, got one of {rows} rows: a model with another "
            "tokenizer, or from before tokens were added. Pass the model that the policy started from, resized alike."
        )


def _has_own_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def offload_reference(model: Any, device: torch.device) -> None:
    """Keep a frozen model's weights in the host's memory; each layer's are on `device` only while it runs.

    The device holds one layer of the reference at a time, and every forward sends the whole model over the bus.
    """
    model.to("cpu")
    cpu_offload(model, execution_device=device)
