"""The DPOP loss of a pair from its three segments in one launch.

With s, c, r the sums over the shared tokens and the two tails, policy minus reference:

    Δw = s + c,   m = c - r,   p = λ max(0, -Δw - τ),   z = β (m - p),   loss = -log σ(z)
    ∂loss/∂s = -β σ(-z) λ [Δw < -τ]    ∂loss/∂c = -β σ(-z) (1 + λ [Δw < -τ])    ∂loss/∂r = β σ(-z)

(Pal et al. 2024, arXiv:2402.13228, equation 3, where the dead zone τ is 0.) The margin m takes the tails alone: the
shared tokens cancel exactly. At Δw = -τ the penalty has slope 0, as relu has.

With smoothed labels, ε > 0, a wrong label turns the margin round and leaves the penalty: with z' = β (-m - p)

    loss = -(1-ε) log σ(z) - ε log σ(z')    ∂loss/∂m = -β ((1-ε) σ(-z) - ε σ(-z'))
                                            ∂loss/∂p =  β ((1-ε) σ(-z) + ε σ(-z'))
"""

import triton
import triton.language as tl

from dpop_kernels.kernels.elementary import log1p
from dpop_kernels.kernels.segments import segment_sum


@triton.jit(do_not_specialize=["B"])
def pair_dpop_fwd_kernel(
    token_logps_ptr,  # [N] in
    cu_seqlens_ptr,  # [3B + 1] in, int32 or int64
    ref_segment_logps_ptr,  # [B, 3] in: shared, chosen tail, rejected tail
    losses_ptr,  # [B] out, fp32
    slopes_ptr,  # [B, 3] out, fp32: d loss / d segment sum
    metrics_ptr,  # [6, B] out, fp32: the fields of PairLosses after `losses`
    B,
    beta,
    dpop_lambda,
    dead_zone,
    label_smoothing,
    HAS_SMOOTHING: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    b = tl.program_id(0)
    shared = segment_sum(token_logps_ptr, cu_seqlens_ptr, 3 * b, BLOCK_N)
    chosen = segment_sum(token_logps_ptr, cu_seqlens_ptr, 3 * b + 1, BLOCK_N)
    rejected = segment_sum(token_logps_ptr, cu_seqlens_ptr, 3 * b + 2, BLOCK_N)
    ref_ptr = ref_segment_logps_ptr + 3 * b
    shared_ratio = shared - tl.load(ref_ptr).to(tl.float32)
    chosen_ratio = chosen - tl.load(ref_ptr + 1).to(tl.float32)
    rejected_ratio = rejected - tl.load(ref_ptr + 2).to(tl.float32)

    chosen_logratio = shared_ratio + chosen_ratio
    margin = chosen_ratio - rejected_ratio
    # asked this way round so that NaN is penalised and reaches the loss
    excess = chosen_logratio + dead_zone
    is_penalised = ~(excess >= 0.0)
    penalty = dpop_lambda * tl.where(is_penalised, -excess, 0.0)
    hinge_slope = tl.where(is_penalised, dpop_lambda, 0.0)

    loss, pull = _nll_and_pull(margin - penalty, beta)
    if HAS_SMOOTHING:
        flipped_loss, flipped_pull = _nll_and_pull(-margin - penalty, beta)
        loss = (1.0 - label_smoothing) * loss + label_smoothing * flipped_loss
        true_pull, flipped_pull = (1.0 - label_smoothing) * pull, label_smoothing * flipped_pull
        pull = true_pull - flipped_pull
        shared_slope = (true_pull + flipped_pull) * hinge_slope
        chosen_slope = pull + shared_slope
    else:
        shared_slope = pull * hinge_slope
        chosen_slope = pull * (1.0 + hinge_slope)
    tl.store(losses_ptr + b, loss)
    tl.store(slopes_ptr + 3 * b, -shared_slope)
    tl.store(slopes_ptr + 3 * b + 1, -chosen_slope)
    tl.store(slopes_ptr + 3 * b + 2, pull)

    tl.store(metrics_ptr + b, shared + chosen)
    tl.store(metrics_ptr + B + b, shared + rejected)
    tl.store(metrics_ptr + 2 * B + b, chosen_logratio)
    tl.store(metrics_ptr + 3 * B + b, shared_ratio + rejected_ratio)
    tl.store(metrics_ptr + 4 * B + b, margin)
    tl.store(metrics_ptr + 5 * B + b, penalty)


@triton.jit
def _nll_and_pull(score, beta):
    """-log σ(z) for z = beta * score, and β σ(-z)."""
    z = beta * score
    # max(0, -z) + log1p(exp(-|z|)): no overflow, and full relative accuracy for large z
    tail = tl.exp(-tl.abs(z))
    return tl.maximum(-z, 0.0) + log1p(tail), beta * tl.where(z >= 0.0, tail, 1.0) / (1.0 + tail)
