"""Which versions a result was made with."""

import platform

import torch
import transformers

import dpop_kernels


def versions() -> dict[str, str]:
    """Names and versions of what decides a run's numbers."""
    return {
        "dpop-kernels": dpop_kernels.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
