"""What the log-softmax kernels share: the head's transform of a logit, and a row's results from its running sums.

    z = softcap * tanh(logit_scale * u / softcap)      either transform may be absent

A row carries the maximum m of the other columns' z and S = sum of exp(z - m) over them. The target's own column stays
out of both. Then, with d = |z_y - m|,

    z_y >= m    logp = -log1p(S exp(-d))                    the confident token: no cancellation at any 1 - p
    z_y <  m    logp = z_y - m - log1p(S - 1 + exp(-d))     S >= 1, the maximum's own term
"""

import triton
import triton.language as tl

from dpop_kernels.kernels.elementary import log1p, tanh

# The lowest finite fp32. A running maximum that starts here and not at -inf stays finite over blocks of -inf logits,
# so that exp(-inf - m) is 0 where exp(-inf + inf) would be NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)

# exp(-200) is 0 in fp32. Distances are cut there before they multiply a sum: 0 * 200 is 0 where 0 * inf is NaN.
FAR = tl.constexpr(200.0)


@triton.jit
def transform(logits, logit_scale, softcap, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """z = softcap * tanh(logit_scale * logits / softcap), in fp32."""
    z = logits
    if HAS_SCALE:
        z = z * logit_scale
    if HAS_SOFTCAP:
        z = softcap * tanh(z * (1.0 / softcap))
    return z


@triton.jit
def slope(z, logit_scale, softcap, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """dz/dlogits = logit_scale * (1 - (z / softcap)**2)."""
    result = 1.0
    if HAS_SOFTCAP:
        capped = z * (1.0 / softcap)
        result = 1.0 - capped * capped
    if HAS_SCALE:
        result = result * logit_scale
    return result


@triton.jit
def log_prob(z_target, m, S):
    """-> log-prob fp32, log-normaliser fp64 (at |z| = 1e4 fp32 would be off by 5e-4 nat), log_sum = its distance to
    the row's maximum, whether the target is that maximum."""
    is_top1 = z_target >= m
    near = tl.exp(-tl.abs(z_target - m))
    log_sum = log1p(tl.where(is_top1, S * near, (S - 1.0) + near))
    # a target of +inf leaves no trace in S; the other columns' +inf and NaN have made it NaN
    log_sum = tl.where(z_target == float("inf"), float("nan"), log_sum)
    logp = tl.where(is_top1, 0.0, z_target - m) - log_sum
    lse = tl.where(is_top1, z_target, m).to(tl.float64) + log_sum.to(tl.float64)
    return logp, lse, log_sum, is_top1


@triton.jit
def entropy(z_target, m, S, moment, log_sum, is_top1):
    """lse - sum of p z, both about the row's maximum; `moment` is the other columns' sum of exp(z - m) (z - m)."""
    distance = tl.abs(z_target - m)
    distance = tl.where(distance > FAR, FAR, distance)
    m_shift = tl.where(is_top1, -distance, 0.0)
    target_shift = tl.where(is_top1, 0.0, -distance)
    m_exp = tl.exp(m_shift)
    target_exp = tl.exp(target_shift)
    moment = m_exp * (moment + m_shift * S) + target_exp * target_shift
    return log_sum - moment / (m_exp * S + target_exp)


@triton.jit
def log_sum_squares(z_target, m, squares, log_sum, is_top1):
    """log of the sum of p² = log sum of exp(z - max)² - 2 log_sum; `squares` is the other columns' sum of
    exp(z - m)². As in `log_prob` the maximum's own term, 1, stays out of the log1p, which keeps the relative accuracy
    of a confident row: 2 log_sum is at least twice as large as what is added to it."""
    near = tl.exp(-tl.abs(z_target - m))
    near_square = near * near
    return log1p(tl.where(is_top1, squares * near_square, (squares - 1.0) + near_square)) - 2.0 * log_sum


@triton.jit
def at_least(x, bound):
    """max(x, bound) that hands NaN through."""
    return tl.where(x < bound, bound, x)
