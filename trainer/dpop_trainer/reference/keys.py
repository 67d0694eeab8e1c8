"""What reference log-probs are known by: each pair by its tokens, a reference by all that its numbers depend on.

Truncation, template and tokenizer are in the tokens. Loss, hyper-parameters, batch size and layout are in neither, and
change nothing but the last bits of rounding.
"""

import hashlib
import inspect
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import xxhash
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dpop_trainer.data.records import TOKEN_COLUMNS
from dpop_trainer.models.adapters import base_model
from dpop_trainer.reference.adapters import adapter_parameters

# to be raised whenever the same tokens and weights are to give other log-probs than before, or in another form
NUMERICS_VERSION = 1

KEY_BYTES = 16

# of a model's configuration: what its log-probs in eval mode do not depend on, or what is hashed with the weights
_INERT = {
    "_name_or_path",
    "architectures",
    "attn_implementation",
    "chunk_size_feed_forward",
    "distributed_config",
    "dtype",
    "id2label",
    "initializer_range",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    *(f"{name}_token_id" for name in ("bos", "eos", "pad", "sep", "decoder_start")),
}


def pair_keys(dataset: Dataset) -> list[bytes]:
    """A key of 16 bytes for every tokenised pair, made of its three lists of token ids alone."""
    keys: list[bytes] = []
    for table in dataset.select_columns(list(TOKEN_COLUMNS)).with_format("arrow").iter(batch_size=1000):
        columns = [_flat(table[name].combine_chunks()) for name in TOKEN_COLUMNS]  # type: ignore[index]
        for i in range(len(table)):
            pair = [ids[bounds[i] : bounds[i + 1]] for ids, bounds in columns]
            digest = hashlib.blake2b(np.array([len(ids) for ids in pair], dtype="<i8").tobytes(), digest_size=KEY_BYTES)
            for ids in pair:
                digest.update(ids.tobytes())
            keys.append(digest.digest())
    return keys


def describe_reference(model: Any, weights: str, *, with_adapter: bool, mixed_precision: str) -> dict[str, Any]:
    """All that a reference's log-probs depend on, as plain values; equal exactly where they are the same reference.

    Args:
        model: a causal LM, or a peft model around one.
        weights: their `weights_digest`.
        with_adapter: False for a peft model whose adapter is off: the same as its base without peft.
        mixed_precision: accelerate's name of the autocast that it runs under.
    """
    base: Any = base_model(model)
    adapters = {}
    if isinstance(model, PeftModel) and with_adapter:
        adapters = {name: _plain(model.peft_config[name].to_dict(), _ADAPTER_INERT) for name in model.active_adapters}
    return {
        "numerics_version": NUMERICS_VERSION,
        "weights": weights,
        "config": plain_config(base),
        "adapters": adapters,
        "code": _code_digest(type(base)),
        "mixed_precision": mixed_precision,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def plain_config(base: Any) -> dict[str, Any]:
    """What of a causal LM's configuration its numbers depend on, as plain values."""
    config = getattr(base, "config", None)
    return {} if config is None else _plain(config.to_dict(), _INERT)


def reference_key(description: dict[str, Any]) -> str:
    """The description as 32 hex digits."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:32]


def weights_digest(model: nn.Module, *, with_adapter: bool) -> str:
    """XXH3 of a model's weights, persistent buffers included: names, dtypes, shapes, every byte, some gigabytes per
    second and core. It tells models apart; whoever wanted to could make two alike.

    A base under an adapter that is off has the digest of the base alone. Of a model that is spread over ranks they are
    put together one by one: all ranks call together, and get what one process would.

    Args:
        model: a causal LM, or a peft model around one.
        with_adapter: False leaves adapters out.

    Raises:
        ValueError: a weight is not there to be read: it is sharded, or on no device.
    """
    named = [(name, tensor) for name, tensor in _state(model, with_adapter) if isinstance(tensor, Tensor)]
    absent = next((name for name, tensor in named if tensor.is_meta or hasattr(tensor, "ds_id")), None)
    if absent is not None:
        raise ValueError(f"weights: expected all of them to be readable, got {absent!r} sharded or on no device.")
    seen: dict[tuple, Any] = {}  # tied weights are read once
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:  # xxhash lets go of the interpreter
        for _, tensor in named:
            identity = _identity(tensor)
            if identity not in seen:
                is_spread = isinstance(tensor, DTensor)
                seen[identity] = pool.submit(_tensor_digest, tensor.full_tensor() if is_spread else tensor)
                if is_spread:  # one is whole at a time
                    seen[identity].result()
        lines = [
            f"{name} {tensor.dtype} {list(tensor.shape)} {seen[_identity(tensor)].result()}" for name, tensor in named
        ]
    return xxhash.xxh3_128_hexdigest("\n".join(sorted(lines)).encode())


# each holds one weight in the host's memory
_HASHING_THREADS = 4

_ADAPTER_INERT = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "init_lora_weights",
    "lora_dropout",
    "peft_version",
    "revision",
    "task_type",
}


def _flat(lists: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """A column of lists as all its ids [N] int32 and where each list begins and ends [rows + 1]."""
    # flatten() honours a slice's own beginning, and offsets do not
    offsets = np.asarray(lists.offsets)
    return np.asarray(lists.flatten()).astype("<i4", copy=False), offsets - offsets[0]


def _state(model: nn.Module, with_adapter: bool) -> Iterator[tuple[str, Tensor]]:
    if with_adapter or not isinstance(model, PeftModel):
        yield from model.state_dict(keep_vars=True).items()  # a sharded parameter is known by its attributes
        return
    base = model.get_base_model()
    left_out = {
        f"{path}.{name}"
        for path, module in base.named_modules()
        if hasattr(module, "adapter_layer_names")
        for name, _ in adapter_parameters(module)
    }
    for name, tensor in base.state_dict(keep_vars=True).items():
        if name not in left_out:
            yield name.replace(".base_layer.", ".").replace(".original_module.", "."), tensor


def _identity(tensor: Tensor) -> tuple:
    storage = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return tensor.device, storage.data_ptr(), tensor.dtype, tuple(tensor.shape), tuple(tensor.stride())


def _tensor_digest(tensor: Tensor) -> str:
    values: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
    return xxhash.xxh3_128_hexdigest(values)


def _plain(config: dict[str, Any], inert: set[str]) -> dict[str, Any]:
    """The entries that matter, as JSON can hold them, in an order of their own."""
    kept = {
        key: value
        for key, value in config.items()
        if key not in inert and "dropout" not in key and "pdrop" not in key and value is not None
    }
    return json.loads(json.dumps(kept, sort_keys=True, default=_json_value))


def _json_value(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


def _code_digest(kind: type) -> str:
    """The model class's name and a hash of the file that it is written in."""
    try:
        source = Path(inspect.getfile(kind)).read_bytes()
    except (OSError, TypeError):  # made in an interactive session
        source = b""
    return f"{kind.__qualname__} {hashlib.sha256(source).hexdigest()}"
