"""Bases in 4 and 8 bits (bitsandbytes): how they are asked for, and what training needs of them beyond loading.

    w ≈ scale[block] · code[index]      4 bits per weight, one scale per 64 of them, the scales in 8 bits if nested

The frozen base is rounded once, when it is loaded; every product is computed with the widened weights, in the dtype
given here. On a GPU and on a CPU alike.
"""

import importlib.util
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import nn

from dpop_trainer.models.dtypes import autocast_dtype, named_dtype


def check_bitsandbytes(name: str) -> None:
    """
    Args:
        name: the argument that asks for it.

    Raises:
        ValueError: it is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"{name}: expected bitsandbytes, which quantises, to be installed; it is not. "
            "pip install 'dpop-kernels[trainer,qlora]', or leave it out: the base is then loaded in `dtype`."
        )


def four_bit_config(
    compute_dtype: torch.dtype, *, quant_type: str = "nf4", nested: bool = False, storage: str | None = None
) -> Any:
    """A BitsAndBytesConfig for a base in 4 bits.

    Args:
        compute_dtype: of the products with widened weights; the dtype that the rest of the model computes in.
        quant_type: nf4 or fp4.
        nested: the scales are quantised as well: 4.13 bits per weight instead of 4.5.
        storage: dtype in which the packed weights lie; None: uint8.
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage=storage,
    )


def as_trained(run_config: Mapping[str, Any]) -> Any:
    """The quantisation that a run's config.yaml tells of, to load its base as training saw it; None where it had none.
    Products are in the weights' dtype, whatever autocast made of them in training.

    Args:
        run_config: config.yaml of a run, as a mapping.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    if not run_config.get("load_in_4bit"):
        return None
    check_bitsandbytes("load_in_4bit")
    return four_bit_config(
        compute_dtype(run_config.get("dtype")),
        quant_type=run_config.get("bnb_4bit_quant_type") or "nf4",
        nested=bool(run_config.get("use_bnb_nested_quant")),
        storage=run_config.get("bnb_4bit_quant_storage"),
    )


def as_arguments(model: Any) -> dict[str, Any]:
    """A model's 4-bit quantisation as arguments of a run, for `as_trained`; empty where it has none."""
    config = getattr(model.config, "quantization_config", None)
    if not getattr(model, "is_loaded_in_4bit", False) or config is None:
        return {}
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": config.bnb_4bit_quant_type,
        "use_bnb_nested_quant": config.bnb_4bit_use_double_quant,
        "bnb_4bit_quant_storage": str(config.bnb_4bit_quant_storage).removeprefix("torch."),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def compute_dtype(dtype: str | None, run: Any = None) -> torch.dtype:
    """What products with widened weights are computed in: autocast's dtype where a run has it, else the weights'.

    Args:
        dtype: of the weights, as an argument of the run; "auto", which is the checkpoint's, is taken for bfloat16.
        run: its configuration, with `bf16` and `fp16`; None: without autocast.
    """
    autocast = autocast_dtype(getattr(run, "bf16", False), getattr(run, "fp16", False))
    if autocast is not None:
        return autocast
    named = named_dtype(dtype or "float32")
    return torch.bfloat16 if named == "auto" else named


def computed_in(model: nn.Module) -> set[torch.dtype]:
    """The dtypes that quantised layers of a model compute in; empty where none is quantised."""
    dtypes = (getattr(module, "compute_dtype", None) for module in model.modules())
    return {dtype for dtype in dtypes if isinstance(dtype, torch.dtype)}


def widened(model: Any) -> Any:
    """A 4-bit model as an ordinary one with the same, rounded, weights; in its own dtype. Changed in place.

    Args:
        model: from `load_model` with a quantisation.
    """
    model = model.dequantize(dtype=model.dtype)
    model.is_loaded_in_4bit = False  # by which peft and transformers know
    return model.requires_grad_(False)


def make_trainable(model: nn.Module) -> None:
    """See to it that 4-bit layers on a CPU give the right values, and the same ones in training and in evaluation.

    On a CPU with bf16 instructions bitsandbytes repacks a layer's weights, in place, at the first forward in eval mode:
    into a form whose products have no gradient and round otherwise, and that layers of some widths cannot take. A
    trainer evaluates between its steps, and its reference is the same layers in eval mode.

    Args:
        model: changed in place; one without such layers stays as it is.

    Raises:
        ValueError: a layer's weights would be widened wrongly: names it.
    """
    for path, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            if getattr(state, "packing_format_for_cpu", False):
                module.state_dict()  # which unpacks it
        if state is None or state.absmax.device.type != "cpu":
            continue
        width = state.shape[-1]
        if width % state.blocksize and not _widens_rightly(width, state.blocksize):
            raise ValueError(
                f"load_in_4bit: expected layers whose inputs are a multiple of {state.blocksize} on a CPU, got "
                f"{width} in {path}: this bitsandbytes scales such weights wrongly there. Train the model on a GPU, or "
                "without load_in_4bit."
            )


@cache
def _widens_rightly(width: int, blocksize: int) -> bool:
    """Whether blocks that go over the end of a row keep their own scale.

    Blocks of one value each are exact in 4 bits: 1, 2, 3, ... in blocks of `blocksize`, in rows of `width`.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    values = torch.arange(1.0, width + 1).repeat_interleave(blocksize).view(blocksize, width)
    return torch.equal(dequantize_4bit(*quantize_4bit(values, blocksize=blocksize, quant_type="nf4")), values)
