"""Liger's kernels for a model's layers: norms, rotary angles, gated MLPs.

transformers puts them into the policy when training begins; what stands beside it gets the same, so that policy and
reference round alike.
"""

import logging
from typing import Any

from dpop_trainer.models.adapters import base_model

logger = logging.getLogger(__name__)


def use_layer_kernels(model: Any, config: dict[str, bool]) -> None:
    """Put them into a model's layers, in place; said where Liger has none for its kind.

    Args:
        model: a causal LM, or a peft model around one.
        config: `liger_kernel_config`, without a head.
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    base = base_model(model)
    if base.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        logger.warning("use_liger_kernel=True has no effect: Liger has no kernels for %s.", base.config.model_type)
        return
    _apply_liger_kernel_to_instance(model=base, **config)
