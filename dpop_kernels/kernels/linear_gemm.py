"""The head's logits made and used up inside one matrix product: a persistent kernel on Hopper's tensor-memory loads.

Each program walks over tiles [BLOCK_R, BLOCK_V] of z = logit_scale * (h Wᵀ + bias); the accumulator never leaves the
registers. Of a tile remain a maximum and a sum per row and half, for `head_rows_fwd_kernel` to put together, and on
demand the exponentials. The alternative to `linear_logps.head_tile_fwd_kernel` behind a library's product. No softcap:
its tanh would spill.
"""

import triton
import triton.language as tl

from dpop_kernels.kernels.softmax import LOWEST


@triton.jit
def head_gemm_fwd_kernel(
    hidden_ptr,  # [R, H] in, rows contiguous and aligned to 16 bytes
    weight_ptr,  # [C, H] in, likewise: rows vocab_start .. vocab_start + C of W
    bias_ptr,  # [C] in, if HAS_BIAS
    target_ids_ptr,  # [R] in, int64, counted in the whole vocabulary
    offsets_ptr,  # [R] in, if HAS_EXPS: m is given, E = exp(z - m)
    maxima_ptr,  # [R, P] out, columns part_start and on: m of each BLOCK_V / 2 columns, the target's left out
    sums_ptr,  # [R, P] out, likewise: S relative to that m
    target_logits_ptr,  # [R] out where the target's column is among these: z_y
    exps_ptr,  # [R, C] out, if HAS_EXPS: E * dz/du
    R,
    C,
    H,
    P,
    part_start,
    vocab_start,
    stride_hidden_r,
    stride_weight_c,
    logit_scale,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_EXPS: tl.constexpr,
    EXP_RANGE: tl.constexpr,  # z further than this above a given m makes the row NaN
    NUM_PROGRAMS: tl.constexpr,
    GROUP_R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    hidden = tl.make_tensor_descriptor(hidden_ptr, [R, H], [stride_hidden_r, 1], [BLOCK_R, BLOCK_H])
    weight = tl.make_tensor_descriptor(weight_ptr, [C, H], [stride_weight_c, 1], [BLOCK_V, BLOCK_H])
    num_r = tl.cdiv(R, BLOCK_R)
    num_v = tl.cdiv(C, BLOCK_V)
    for tile in range(tl.program_id(0), num_r * num_v, NUM_PROGRAMS):
        # programs that run at the same time share GROUP_R blocks of rows and a few of W, which so stay in L2
        first_r = tile // (GROUP_R * num_v) * GROUP_R
        rows_in_group = tl.minimum(num_r - first_r, GROUP_R)
        tile_in_group = tile % (GROUP_R * num_v)
        r_start = (first_r + tile_in_group % rows_in_group) * BLOCK_R
        part = tile_in_group // rows_in_group
        c_start = part * BLOCK_V

        u = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
        for h_start in range(0, H, BLOCK_H):
            hidden_block = hidden.load([r_start, h_start])
            weight_block = weight.load([c_start, h_start])
            # "ieee": fp32 operands are not cut to tf32
            u = tl.dot(hidden_block, weight_block.T, u, input_precision="ieee")

        # by halves: the exponentials of all columns at once would not fit in the registers beside the accumulator
        left, right = u.reshape(BLOCK_R, 2, BLOCK_V // 2).permute(0, 2, 1).split()
        for half in tl.static_range(2):
            _use_up(
                left if half == 0 else right,
                bias_ptr,
                target_ids_ptr,
                offsets_ptr,
                maxima_ptr,
                sums_ptr,
                target_logits_ptr,
                exps_ptr,
                r_start,
                c_start + half * (BLOCK_V // 2),
                R,
                C,
                P,
                part_start + 2 * part + half,
                vocab_start,
                logit_scale,
                HAS_BIAS,
                HAS_SCALE,
                HAS_EXPS,
                EXP_RANGE,
                BLOCK_R,
                BLOCK_V // 2,
            )


@triton.jit
def _use_up(
    u,  # [BLOCK_R, BLOCK_C]
    bias_ptr,
    target_ids_ptr,
    offsets_ptr,
    maxima_ptr,
    sums_ptr,
    target_logits_ptr,
    exps_ptr,
    r_start,
    c_start,
    R,
    C,
    P,
    part,
    vocab_start,
    logit_scale,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_EXPS: tl.constexpr,
    EXP_RANGE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Part `part` of the rows' sums from its raw logits; the pointers are the kernel's."""
    r = (r_start + tl.arange(0, BLOCK_R)).to(tl.int64)
    c = c_start + tl.arange(0, BLOCK_C)
    if HAS_BIAS:
        u += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    z = u * logit_scale if HAS_SCALE else u
    target = tl.load(target_ids_ptr + r, mask=r < R, other=-1) - vocab_start
    # asked as int64: a bad id of 2**32 must not wrap round to a column
    has_target = (target >= c_start) & (target < tl.minimum(c_start + BLOCK_C, C)) & (r < R)
    target_c = tl.where(has_target, target, -1).to(tl.int32)
    is_target = c[None, :] == target_c[:, None]
    tl.store(target_logits_ptr + r, tl.sum(tl.where(is_target, z, 0.0), axis=1), mask=has_target)

    others = tl.where(is_target | (c >= C)[None, :], float("-inf"), z)
    if HAS_EXPS:
        m = tl.load(offsets_ptr + r, mask=r < R, other=0.0)
        distances = others - m[:, None]
        exps = tl.where(distances > EXP_RANGE, float("nan"), tl.exp(distances))
        weighted = exps * logit_scale if HAS_SCALE else exps
        out_ptr = exps_ptr + r[:, None] * C + c[None, :]
        tl.store(out_ptr, weighted.to(exps_ptr.dtype.element_ty), mask=(r < R)[:, None] & (c < C)[None, :])
    else:
        m = tl.maximum(tl.max(others, axis=1), LOWEST)
        exps = tl.exp(others - m[:, None])
    tl.store(maxima_ptr + r * P + part, m, mask=r < R)
    tl.store(sums_ptr + r * P + part, tl.sum(exps, axis=1), mask=r < R)
