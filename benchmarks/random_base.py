"""A base in 4 bits with random weights, for measuring a training step of a size whose weights nobody has at hand.

The model is built without memory, as transformers' own quantiser builds it. Then layer by layer each weight is drawn on
the device and rounded to 4 bits there, before the next one is drawn: in 16 bits there is never more than one weight,
and on the host none.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from dpop_trainer.models.quantised import make_trainable
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.quantizers.auto import AutoHfQuantizer

from benchmarks.scale import ModelSize

# of every weight: GPT-2's and Llama's initializer_range
DEVIATION = 0.02


def random_base(
    size: ModelSize,
    quantization_config: Any,
    *,
    device: torch.device,
    dtype: torch.dtype,
    max_length: int,
    seconds: float = float("inf"),
    report: Callable[[str], None] = print,
) -> LlamaForCausalLM:
    """A Llama of some size whose linear maps are in 4 bits, all but the head.

    Args:
        size: its sizes.
        quantization_config: a BitsAndBytesConfig.
        device: where it is made and stays.
        dtype: of what is not rounded: embedding, head, norms.
        max_length: positions that it can take.
        seconds: gives up when the first layers tell that all of them will take longer.
        report: takes a line now and then.

    Raises:
        TimeoutError: it would take longer than `seconds`.
    """
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(llama_config(size, max_length))
        model = model.to(dtype)
    quantizer: Any = AutoHfQuantizer.from_config(quantization_config, pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map={"": str(device)})
    start, layers = time.monotonic(), model.model.layers
    for i, layer in enumerate(layers, start=1):
        materialise(layer, device=device, dtype=dtype)
        if i == 1:  # kernels are loaded, and the allocator gets its first blocks
            continue
        _wait(device)
        spent = time.monotonic() - start
        if spent / i * len(layers) > seconds:
            raise TimeoutError(f"{i} of {len(layers)} layers took {spent:.0f} s, all would take over {seconds:.0f} s")
        if i % 20 == 0 or i == len(layers):
            report(f"{i} of {len(layers)} layers, {spent:.1f} s")
    materialise(model, device=device, dtype=dtype)
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer
    make_trainable(model)
    return model.eval()


def llama_config(size: ModelSize, max_length: int) -> LlamaConfig:
    """The configuration of a Llama of some size."""
    return LlamaConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_kv_heads,
        max_position_embeddings=max_length,
        tie_word_embeddings=size.tied_embeddings,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


@torch.no_grad()
def materialise(root: nn.Module, *, device: torch.device, dtype: torch.dtype) -> None:
    """Give every parameter under `root` that is on no device yet random values there; norms get ones."""
    import bitsandbytes as bnb

    for path, module in list(root.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):  # rotary frequencies: computed, not drawn
            with device:
                root.set_submodule(path, type(module)(config=module.config))
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.is_meta:
                continue
            is_matrix = parameter.ndim == 2
            values = torch.empty(parameter.shape, device=device, dtype=dtype)
            values = values.normal_(std=DEVIATION) if is_matrix else values.fill_(1.0)
            if isinstance(module, bnb.nn.Linear4bit) and is_matrix:
                asked: Any = parameter
                round_to_4_bits: Any = bnb.nn.Params4bit
                module.weight = round_to_4_bits(
                    values,
                    requires_grad=False,
                    compress_statistics=asked.compress_statistics,
                    quant_type=asked.quant_type,
                    quant_storage=asked.quant_storage,
                    module=module,
                ).to(device)  # which rounds
            else:
                setattr(module, name, nn.Parameter(values, requires_grad=False))


def linear_bytes(size: ModelSize, *, nested: bool) -> float:
    """Bytes of the layers' weights in 4 bits, with a scale for every 64 of them: fp32, or 8 bits and an fp32 for 256.

    Args:
        size: the sizes.
        nested: the scales are in 8 bits.
    """
    scale_bytes = 1 + 4 / 256 if nested else 4
    return size.num_layers * size.layer_weights * (0.5 + scale_bytes / 64)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
