"""log1p, expm1 and tanh to fp32 accuracy, from the exp and log that every Triton target and its interpreter have.

The vendors' libraries have them too, but Triton's interpreter cannot call those. Where a branch is not taken its
argument is replaced by a harmless one, so that no operand is ever invalid.
"""

import triton
import triton.language as tl


@triton.jit
def log1p(x):
    """log(1 + x) for x >= -1: log of the rounded 1 + x, corrected by the ratio of x to what was rounded in.

    log(u) / (u - 1) varies slowly near u = 1, so u's rounding error cancels from x * log(u) / (u - 1).
    Source: Goldberg 1991, "What Every Computer Scientist Should Know About Floating-Point Arithmetic", theorem 4.
    """
    u = 1.0 + x
    rounded_x = u - 1.0
    vanishes = rounded_x == 0.0
    return tl.where(vanishes, x, tl.log(u) * (x / tl.where(vanishes, 1.0, rounded_x)))


@triton.jit
def expm1(x):
    """exp(x) - 1: near zero by the inverse of `log1p`'s identity, x * (u - 1) / log(u) with u = exp(x) rounded.

    Source: Higham 2002, "Accuracy and Stability of Numerical Algorithms", section 1.14.1.
    """
    u = tl.exp(x)
    vanishes = u == 1.0
    is_near = (tl.abs(x) < 1.0) & (u != 1.0)
    log_u = tl.log(tl.where(is_near, u, 2.0))
    return tl.where(vanishes, x, tl.where(is_near, (u - 1.0) * (x / log_u), u - 1.0))


@triton.jit
def tanh(x):
    """tanh(x) as one quotient: Lambert's continued fraction up to |x| = 5/8, beyond it (e - 1) / (e + 1).

    The fraction x / (1 + x² / (3 + x² / (5 + x² / (7 + x² / 9)))) errs by about x¹⁰ / 945² / 11 relative, below
    1e-9 here. Beyond, e = exp(2|x|) > 3.4 and e - 1 loses less than a bit. At |x| = 15 the result is 1 in fp32.
    """
    magnitude = tl.abs(x)
    # a comparison and no minimum: NaN fails it and stays NaN
    magnitude = tl.where(magnitude > 15.0, 15.0, magnitude)
    x2 = magnitude * magnitude
    e = tl.exp(2.0 * magnitude)
    is_small = magnitude < 0.625
    numerator = tl.where(is_small, magnitude * (945.0 + x2 * (105.0 + x2)), e - 1.0)
    denominator = tl.where(is_small, 945.0 + x2 * (420.0 + 15.0 * x2), e + 1.0)
    result = numerator / denominator
    return tl.where(x < 0.0, -result, result)
