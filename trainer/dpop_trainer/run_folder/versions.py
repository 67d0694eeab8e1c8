"""Which versions a result was made with, and on what. Imports nothing to find out."""

import importlib.util
import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import TrainingArguments

_BESIDE = (
    "triton",
    "accelerate",
    "datasets",
    "peft",
    "tokenizers",
    "safetensors",
    "numpy",
    "bitsandbytes",
    "deepspeed",
)


def versions() -> dict[str, str]:
    """Names and versions of what decides a run's numbers."""
    return {
        "dpop-kernels": _version("dpop-kernels"),
        "torch": _version("torch"),
        "transformers": _version("transformers"),
        "python": platform.python_version(),
    }


def _version(distribution: str) -> str:
    """What the module says where it is there, which is what runs; else what is installed."""
    module = sys.modules.get(distribution.replace("-", "_"))
    told = getattr(module, "__version__", None) or (_build_of_torch() if distribution == "torch" else None)
    return str(told or metadata.version(distribution))


def _build_of_torch() -> str | None:
    """Its version with the build (2.15.0+cu132), which its metadata may leave out."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    told = re.search(r"^__version__ = '(.+)'$", Path(spec.origin).with_name("version.py").read_text(), re.MULTILINE)
    return told and told[1]


def environment(args: "TrainingArguments") -> dict[str, Any]:
    """What a run ran on: versions, device, threads, ranks. Nothing about the user, the folders or the network."""
    import torch

    found = {}
    for name in _BESIDE:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    is_cuda = args.device.type == "cuda"
    return {
        "versions": {**versions(), **found},
        "device": torch.cuda.get_device_name(args.device) if is_cuda else f"CPU ({platform.machine()})",
        "cuda": torch.version.cuda if is_cuda else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cpu_cores": os.cpu_count(),
        "num_processes": args.world_size,
        "parallel_mode": args.parallel_mode.value,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "system": platform.system(),
    }
