"""The head's log-probs from tiles of its logits: a row's running sums, its results, its gradient.

    u = h Wᵀ + bias [N, V]                  never whole: one tile [R, C] at a time
    z = softcap * tanh(logit_scale * u / softcap)
    E[n, v] = exp(z[n, v] - m[n]) for v != y, 0 for v == y               y = target_ids[n], m the other columns' maximum
    S[n] = sum over v of E[n, v]            so that 1 - p = S / (S + exp(z_y - m)), without a difference

    d logp[n] / d h[n] = (1 - p) * unit_grad[n]
    unit_grad[n] = dz/du(y) * W[y] - (E * dz/du) W / S

unit_grad is a target's row of W minus an average of the others: of W's own size however small 1 - p is, so it can be
kept in 16 bits and (1 - p) beside it in fp32. m is carried from tile to tile; where a tile raises it, S and the
products E W so far are rescaled.
"""

import triton
import triton.language as tl

from dpop_kernels.kernels.elementary import expm1
from dpop_kernels.kernels.softmax import FAR, at_least, entropy, log_prob, log_sum_squares, slope, transform


@triton.jit
def head_tile_fwd_kernel(
    logits_ptr,  # [R, C] in, fp32: columns vocab_start .. vocab_start + C of u, rows contiguous
    target_ids_ptr,  # [R] in, int64, counted in the whole vocabulary
    maxima_ptr,  # [R] in and out: m, from LOWEST
    sums_ptr,  # [R] in and out: S, from 0
    target_logits_ptr,  # [R] out where the target's column is in this tile: z_y
    moments_ptr,  # [R] in and out, if HAS_STATS: sum of E (z - m)
    totals_ptr,  # [R] in and out, if HAS_STATS: sum of z, the target's own too
    squares_ptr,  # [R] in and out, if HAS_STATS: sum of E²
    exps_ptr,  # [R, C] out, if HAS_EXPS: E * dz/du; may be logits_ptr
    products_ptr,  # [R, H] in and out, fp32, if HAS_EXPS: the earlier tiles' (E * dz/du) W, rescaled to the new m
    C,
    H,
    vocab_start,
    logit_scale,
    softcap,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_STATS: tl.constexpr,
    HAS_EXPS: tl.constexpr,
    BLOCK_C: tl.constexpr,  # >= C: a row is in registers as a whole, read once
    BLOCK_H: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    logits = tl.load(logits_ptr + r * C + c, mask=c < C, other=float("-inf"))
    z = transform(logits, logit_scale, softcap, HAS_SCALE, HAS_SOFTCAP)
    target = tl.load(target_ids_ptr + r) - vocab_start
    # asked as int64: a bad id of 2**32 must not wrap round to a column
    has_target = (target >= 0) & (target < C)
    target_c = tl.where(has_target, target, -1).to(tl.int32)
    if has_target:
        tl.store(target_logits_ptr + r, tl.sum(tl.where(c == target_c, z, 0.0), axis=0))

    others = tl.where((c < C) & (c != target_c), z, float("-inf"))
    m = tl.load(maxima_ptr + r)
    new_m = tl.maximum(m, tl.max(others, axis=0))
    exps = tl.exp(others - new_m)
    rescale = tl.exp(m - new_m)
    S = tl.load(sums_ptr + r)
    if HAS_STATS:
        moment = rescale * (tl.load(moments_ptr + r) + at_least(m - new_m, -FAR) * S)
        tl.store(moments_ptr + r, moment + tl.sum(exps * at_least(others - new_m, -FAR), axis=0))
        tl.store(totals_ptr + r, tl.load(totals_ptr + r) + tl.sum(tl.where(c < C, z, 0.0), axis=0))
        squares = rescale * rescale * tl.load(squares_ptr + r)
        tl.store(squares_ptr + r, squares + tl.sum(exps * exps, axis=0))
    tl.store(maxima_ptr + r, new_m)
    tl.store(sums_ptr + r, rescale * S + tl.sum(exps, axis=0))

    if HAS_EXPS:
        weighted = exps * slope(z, logit_scale, softcap, HAS_SCALE, HAS_SOFTCAP)
        tl.store(exps_ptr + r * C + c, weighted.to(exps_ptr.dtype.element_ty), mask=c < C)
        # seldom after the first tiles: the k-th tile holds the maximum so far in one row of k
        if rescale != 1.0:
            for start in range(0, H, BLOCK_H):
                h = start + tl.arange(0, BLOCK_H)
                products = tl.load(products_ptr + r * H + h, mask=h < H)
                tl.store(products_ptr + r * H + h, products * rescale, mask=h < H)


@triton.jit
def head_rows_fwd_kernel(
    maxima_ptr,  # [R] in: m
    sums_ptr,  # [R] in: S
    target_logits_ptr,  # [R] in: z_y, NaN where no tile had the target
    moments_ptr,  # [R] in, if HAS_STATS
    totals_ptr,  # [R] in, if HAS_STATS
    squares_ptr,  # [R] in, if HAS_STATS
    target_ids_ptr,  # [R] in, int64
    products_ptr,  # [R, H] in, fp32, if HAS_GRAD: (E * dz/du) W relative to m
    weight_ptr,  # [V, H] in, if HAS_GRAD
    logps_ptr,  # [R] out, fp32
    lse_ptr,  # [R] out, fp64
    entropy_ptr,  # [R] out, fp32, if HAS_STATS
    mean_logit_ptr,  # [R] out, fp32, if HAS_STATS
    is_top1_ptr,  # [R] out, uint8, if HAS_STATS
    log_sum_sq_probs_ptr,  # [R] out, fp32, if HAS_STATS
    other_mass_ptr,  # [R] out, fp32, if HAS_GRAD: 1 - p
    unit_grads_ptr,  # [R, H] out, if HAS_GRAD
    V,
    H,
    stride_weight_v,
    stride_weight_h,
    logit_scale,
    softcap,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_STATS: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    m = tl.load(maxima_ptr + r)
    S = tl.load(sums_ptr + r)
    z_target = tl.load(target_logits_ptr + r)
    logp, lse, log_sum, is_top1 = log_prob(z_target, m, S)
    tl.store(logps_ptr + r, logp)
    tl.store(lse_ptr + r, lse)
    if HAS_STATS:
        tl.store(entropy_ptr + r, entropy(z_target, m, S, tl.load(moments_ptr + r), log_sum, is_top1))
        tl.store(mean_logit_ptr + r, tl.load(totals_ptr + r) / V)
        tl.store(is_top1_ptr + r, is_top1.to(tl.uint8))
        log_squares = log_sum_squares(z_target, m, tl.load(squares_ptr + r), log_sum, is_top1)
        tl.store(log_sum_sq_probs_ptr + r, log_squares)

    if HAS_GRAD:
        tl.store(other_mass_ptr + r, -expm1(logp))
        target_slope = slope(z_target, logit_scale, softcap, HAS_SCALE, HAS_SOFTCAP)
        target = tl.load(target_ids_ptr + r)
        num_weights = tl.where((target >= 0) & (target < V), H, 0)  # a target outside has none
        weight_ptr += target * stride_weight_v
        # nobody but the target has any mass: the products are zero, and so is 1 - p
        inverse = 1.0 / tl.where(S == 0.0, 1.0, S)
        for start in range(0, H, BLOCK_H):
            h = start + tl.arange(0, BLOCK_H)
            weights = tl.load(weight_ptr + h * stride_weight_h, mask=h < num_weights, other=0.0).to(tl.float32)
            products = tl.load(products_ptr + r * H + h, mask=h < H, other=0.0)
            unit_grads = target_slope * weights - products * inverse
            out_ptr = unit_grads_ptr + r * H + h
            tl.store(out_ptr, unit_grads.to(unit_grads_ptr.dtype.element_ty), mask=h < H)


@triton.jit
def head_rows_bwd_kernel(
    unit_grads_ptr,  # [N, H] in
    other_mass_ptr,  # [N] in, fp32
    grad_logps_ptr,  # [N] in, fp32
    grad_hidden_ptr,  # [N, H] out
    H,
    BLOCK_H: tl.constexpr,
):
    num_blocks = tl.cdiv(H, BLOCK_H)
    n = (tl.program_id(0) // num_blocks).to(tl.int64)
    h = (tl.program_id(0) % num_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
    grad_logp = tl.load(grad_logps_ptr + n)
    # a row of weight zero is not read: its gradient is zero whatever its logits were, NaN included
    has_weight = grad_logp != 0.0
    factor = tl.where(has_weight, grad_logp * tl.load(other_mass_ptr + n), 0.0)
    num_read = tl.where(has_weight, H, 0)
    unit_grads = tl.load(unit_grads_ptr + n * H + h, mask=h < num_read, other=0.0).to(tl.float32)
    grad_hidden = factor * unit_grads
    tl.store(grad_hidden_ptr + n * H + h, grad_hidden.to(grad_hidden_ptr.dtype.element_ty), mask=h < H)
