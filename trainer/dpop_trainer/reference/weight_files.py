"""A reference's weights in a safetensors file: written whole or not at all, read only into parameters that match."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_REMEDY = "Start the run anew in another output_dir, from the model that it began with."


def write_weights(values: Mapping[str, Tensor], path: Path) -> None:
    """Write weights by name."""
    partial = path.with_name(f"{path.name}.tmp")
    save_file({name: value.detach().contiguous() for name, value in values.items()}, partial)
    os.replace(partial, path)


@torch.no_grad()
def read_weights(values: Mapping[str, Tensor], path: Path, what: str) -> bool:
    """Copy what is stored into weights that are there -> whether they differed.

    Args:
        values: by name; changed in place.
        path: written by `write_weights`.
        what: of the weights, for messages: "the reference's start weights".

    Raises:
        ValueError: the file cannot be read, or holds other parameters.
    """
    try:
        stored: dict[str, Tensor] = load_file(path)
    except Exception as error:  # safetensors raises a class of its own for what it cannot parse
        raise ValueError(f"{path}: expected {what}, got {error}. {_REMEDY}") from error
    shapes = {name: value.shape for name, value in stored.items()}
    expected = {name: value.shape for name, value in values.items()}
    if shapes != expected:
        odd = sorted(name for name in {*shapes, *expected} if shapes.get(name) != expected.get(name))
        raise ValueError(
            f"{path}: expected {what}, got those of other parameters: {odd[0]} and {len(odd) - 1} more differ. "
            f"{_REMEDY}"
        )
    differs = False
    for name, value in values.items():
        new = stored[name].to(device=value.device, dtype=value.dtype)
        differs |= not torch.equal(new, value)
        value.copy_(new)
    return differs
