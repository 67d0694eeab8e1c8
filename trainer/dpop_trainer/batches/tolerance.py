"""How far rounding alone takes the log-probs of one model, computed in two ways, from each other."""

from typing import Any

import torch

from dpop_trainer.models.adapters import base_model
from dpop_trainer.models.quantised import computed_in

# Nats per token, root mean square. Rounding alone stays a decade below; a mask or a position that is not heeded changes
# a language model's log-probs by tenths of a nat and more.
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
# fp32 whose products are rounded to 10 bits of mantissa
_TF32_TOLERANCE = 0.02


def tolerance_of(model: Any) -> float:
    """Nats per token, root mean square, for a causal LM in its dtype, under an adapter or not."""
    base = base_model(model)
    widest = max(_TOLERANCES.values())
    if base.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        found = _TF32_TOLERANCE
    else:
        found = _TOLERANCES.get(base.dtype, widest)
    # quantised layers may compute in fewer bits than the others
    return max([found, *(_TOLERANCES.get(dtype, widest) for dtype in computed_in(base))])
