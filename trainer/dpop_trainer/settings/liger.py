"""`use_liger_kernel` and its configuration: kernels for layers, and none in the place of the head."""

import importlib.util
import os

import torch

# of `liger_kernel_config`: what takes the place of a head or a loss
_HEADS = ("fused_linear_cross_entropy", "cross_entropy")


def layers_alone(config: dict[str, bool] | None, *, use_cpu: bool) -> dict[str, bool]:
    """`liger_kernel_config` for layers and without a head.

    Args:
        config: as the user gave it.
        use_cpu: of the run.

    Raises:
        ValueError: liger-kernel is not installed, its head is asked for, or there is nothing that its kernels run on.
    """
    asked = [name for name in _HEADS if (config or {}).get(name)]
    if asked:
        raise ValueError(
            f"liger_kernel_config: expected {asked[0]} to be false, got true: it takes the place of the model's head, "
            "where this package's stands. Leave it out; the layers' kernels are used."
        )
    if importlib.util.find_spec("liger_kernel") is None:
        raise ValueError(
            "use_liger_kernel: expected liger-kernel to be installed, and it is not. pip install liger-kernel, or use "
            "model_init_kwargs={'use_kernels': True}."
        )
    if (use_cpu or not torch.accelerator.is_available()) and not os.environ.get("TRITON_INTERPRET"):
        raise ValueError(
            "use_liger_kernel: expected a GPU, which its kernels are for, found none. Leave it out here: it changes no "
            "more than rounding."
        )
    return {**(config or {}), **dict.fromkeys(_HEADS, False)}
