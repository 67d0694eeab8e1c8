"""Token log-probs behind a head with a LoRA adapter: the weight W + s·B A is never formed, nor [W, B] put together."""

from torch import Tensor

from dpop_kernels.logps.head import Adapter, Head
from dpop_kernels.logps.linear import as_autocast, check_linear, head_token_logps, transform_of
from dpop_kernels.outputs import TokenStats
from dpop_kernels.validate import check_float, check_same_device


def lora_token_logps(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    low_rank_states: Tensor,
    low_rank_weight: Tensor,
    target_ids: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    return_stats: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, TokenStats | None]:
    """`linear_token_logps` with logits [h, a]·[W, B]ᵀ + bias, where a = s·(h Aᵀ) is an adapter's low-rank state.

    With W frozen, as an adapter has it, forward and backward are three matrix products of W's size: B's gradient needs
    the loss's factor for every row, so the backward makes the logits once more. No gradient of W is formed or stored.

    Args:
        hidden_states: [N, H] float64, float32, bfloat16 or float16.
        lm_head_weight: W [V, H], same dtype and device.
        low_rank_states: a [N, R], any floating dtype (peft keeps adapters in fp32 beside a 16-bit model). Several
            adapters stand side by side: R is the sum of their ranks.
        low_rank_weight: B [V, R], any floating dtype.
        target_ids: [N] int64 or int32 in [0, V).
        bias, logit_scale, softcap, return_stats, backend: as in `linear_token_logps`.

    Returns:
        [N] log-probs in nats, fp32 (fp64 for fp64 hidden states), and `TokenStats` or None.

    Raises:
        ValueError: shapes, dtypes or devices disagree, an id is out of range, or the backend cannot run here.
    """
    hidden_states, lm_head_weight, bias, low_rank_states, low_rank_weight = as_autocast(
        hidden_states, lm_head_weight, bias, low_rank_states, low_rank_weight
    )
    check_linear(hidden_states, lm_head_weight, target_ids, bias)
    for name, tensor, rows in (
        ("low_rank_states", low_rank_states, hidden_states.shape[0]),
        ("low_rank_weight", low_rank_weight, lm_head_weight.shape[0]),
    ):
        check_float(name, tensor, "[N, R]" if name == "low_rank_states" else "[V, R]")
        check_same_device(name, tensor, "hidden_states", hidden_states)
        if tensor.shape != (rows, low_rank_weight.shape[-1]):
            raise ValueError(
                f"{name}: expected shape {[rows, low_rank_weight.shape[-1]]}, got {list(tensor.shape)}. "
                "low_rank_states is [N, R] and low_rank_weight [V, R] with the same rank R."
            )
    adapter = Adapter(low_rank_states, low_rank_weight)
    head = Head(lm_head_weight, bias, transform_of(logit_scale, softcap), adapter)
    return head_token_logps(hidden_states, head, target_ids, with_stats=return_stats, backend=backend)
