"""Log-softmax then gather: per-token log-probs without an [N, V] softmax.

    logps[n]          = logits[n, y] - lse[n]                                    y = target_ids[n]
    grad_logits[n, v] = grad_logps[n] * ((v == y) - exp(z[n, v] - lse[n])) * dz/dlogits
    z[n, v]           = softcap * tanh(logit_scale * logits[n, v] / softcap)     of a head; the logits themselves else

Forward reads the logits once, carrying the maximum m of the blocks seen and S = sum of exp(z - m) rescaled to it;
`softmax.log_prob` makes the log-prob of them.

Backward reads and writes them once. The target's column takes 1 - p = -expm1(logps), which keeps the same accuracy.
Where an entropy is trained on as well, with p = exp(z - lse),

    grad_logits[n, v] -= grad_entropies[n] * p[n, v] * (log p[n, v] + entropies[n]) * dz/dlogits
"""

import triton
import triton.language as tl

from dpop_kernels.kernels.elementary import expm1
from dpop_kernels.kernels.softmax import FAR, LOWEST, at_least, entropy, log_prob, log_sum_squares, slope, transform


@triton.jit
def log_softmax_gather_fwd_kernel(
    logits_ptr,  # [N, V] in, last dimension contiguous
    target_ids_ptr,  # [N] in, int64; an id outside [0, V) gives NaN
    logps_ptr,  # [N] out, fp32
    lse_ptr,  # [N] out, fp64, kept for backward: at |z| = 1e4 fp32 would be off by 5e-4 nat
    entropy_ptr,  # [N] out, fp32, if HAS_STATS
    mean_logit_ptr,  # [N] out, fp32, if HAS_STATS
    is_top1_ptr,  # [N] out, uint8, if HAS_STATS
    log_sum_sq_probs_ptr,  # [N] out, fp32, if HAS_STATS
    V,
    stride_logits_n,
    HAS_STATS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    # int64: n * stride overflows int32 once N * V reaches 2**31
    n = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + n * stride_logits_n
    target = tl.load(target_ids_ptr + n)
    target_logit = tl.load(row_ptr + target, mask=(target >= 0) & (target < V), other=float("nan"))
    z_target = target_logit.to(tl.float32)
    target_v = target.to(tl.int32)

    m = tl.full([], LOWEST, tl.float32)
    # one partial sum per lane: only the maximum needs a reduction in every step
    sums = tl.zeros([BLOCK_V], tl.float32)  # of exp(z - m)
    moments = tl.zeros([BLOCK_V], tl.float32)  # of exp(z - m) * (z - m)
    totals = tl.zeros([BLOCK_V], tl.float32)  # of z
    squares = tl.zeros([BLOCK_V], tl.float32)  # of exp(z - m)²
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        z = tl.load(row_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32)
        if HAS_STATS:
            totals += tl.where(v < V, z, 0.0)
        z = tl.where((v < V) & (v != target_v), z, float("-inf"))
        new_m = tl.maximum(m, tl.max(z, axis=0))
        exps = tl.exp(z - new_m)
        rescale = tl.exp(m - new_m)
        if HAS_STATS:
            moments = rescale * (moments + at_least(m - new_m, -FAR) * sums) + exps * at_least(z - new_m, -FAR)
            squares = rescale * rescale * squares + exps * exps
        sums = rescale * sums + exps
        m = new_m

    S = tl.sum(sums, axis=0)
    logp, lse, log_sum, is_top1 = log_prob(z_target, m, S)
    tl.store(logps_ptr + n, logp)
    tl.store(lse_ptr + n, lse)
    if HAS_STATS:
        tl.store(entropy_ptr + n, entropy(z_target, m, S, tl.sum(moments, axis=0), log_sum, is_top1))
        tl.store(mean_logit_ptr + n, tl.sum(totals, axis=0) / V)
        tl.store(is_top1_ptr + n, is_top1.to(tl.uint8))
        log_squares = log_sum_squares(z_target, m, tl.sum(squares, axis=0), log_sum, is_top1)
        tl.store(log_sum_sq_probs_ptr + n, log_squares)


@triton.jit
def log_softmax_gather_bwd_kernel(
    logits_ptr,  # [N, V] in, columns vocab_start .. vocab_start + V of the vocabulary
    target_ids_ptr,  # [N] in, int64, counted in the whole vocabulary
    logps_ptr,  # [N] in, fp32
    lse_ptr,  # [N] in, fp64 or fp32, of the whole vocabulary
    grad_logps_ptr,  # [N] in, fp32
    entropies_ptr,  # [N] in, fp32, if HAS_ENTROPY
    grad_entropies_ptr,  # [N] in, fp32, if HAS_ENTROPY
    grad_logits_ptr,  # [N, V] out, any floating dtype; may be logits_ptr
    V,
    vocab_start,
    stride_logits_n,
    stride_grad_logits_n,
    logit_scale,
    softcap,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    num_blocks = tl.cdiv(V, BLOCK_V)
    n = (tl.program_id(0) // num_blocks).to(tl.int64)
    v = (tl.program_id(0) % num_blocks) * BLOCK_V + tl.arange(0, BLOCK_V)
    grad_logp = tl.load(grad_logps_ptr + n)
    logp = tl.load(logps_ptr + n)
    lse = tl.load(lse_ptr + n).to(tl.float64)
    # two fp32 parts, so that the fp64 stays with the scalars
    lse_high = lse.to(tl.float32)
    lse_low = (lse - lse_high.to(tl.float64)).to(tl.float32)

    # a row of weight zero is not read: its gradient is zero whatever its logits are, NaN included
    has_weight = grad_logp != 0.0
    if HAS_ENTROPY:
        grad_entropy = tl.load(grad_entropies_ptr + n)
        has_weight |= grad_entropy != 0.0
        entropy_n = tl.where(has_weight, tl.load(entropies_ptr + n), 0.0)
    lse_high = tl.where(has_weight, lse_high, float("inf"))
    lse_low = tl.where(has_weight, lse_low, 0.0)
    logp = tl.where(has_weight, logp, 0.0)
    num_read = tl.where(has_weight, V, 0)

    logits = tl.load(logits_ptr + n * stride_logits_n + v, mask=v < num_read, other=float("-inf"))
    z = transform(logits.to(tl.float32), logit_scale, softcap, HAS_SCALE, HAS_SOFTCAP)
    target_v = (tl.load(target_ids_ptr + n) - vocab_start).to(tl.int32)
    log_p = (z - lse_high) - lse_low
    grad_z = grad_logp * tl.where(v == target_v, -expm1(logp), -tl.exp(log_p))
    if HAS_ENTROPY:
        log_p = tl.where(v == target_v, logp, log_p)
        grad_z -= grad_entropy * tl.exp(log_p) * (at_least(log_p, -FAR) + entropy_n)
    grad_logits = grad_z * slope(z, logit_scale, softcap, HAS_SCALE, HAS_SOFTCAP)
    out_ptr = grad_logits_ptr + n * stride_grad_logits_n + v
    tl.store(out_ptr, grad_logits.to(grad_logits_ptr.dtype.element_ty), mask=v < V)
