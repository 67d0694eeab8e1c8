"""log1p, expm1 and tanh of the kernels against numpy in fp64, over all magnitudes that fp32 has."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from rounding import Guarantee

from dpop_kernels.kernels import elementary

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# eight times fp32's rounding error: three or four roundings, and a GPU's exp and division of two ulp each
BOUND = Guarantee(8 * 2.0**-24)


@triton.jit
def _apply_kernel(x_ptr, y_ptr, size, function: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.arange(0, BLOCK)
    tl.store(y_ptr + n, function(tl.load(x_ptr + n, mask=n < size, other=0.0)), mask=n < size)


def apply(function, x):
    y = torch.empty_like(x)
    _apply_kernel[(1,)](x, y, x.numel(), function, BLOCK=triton.next_power_of_2(x.numel()))
    return y.cpu().numpy().astype(np.float64)


def magnitudes(low, high, num=2000):
    return np.geomspace(low, high, num).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "arguments"),
    {
        "log1p": magnitudes(1e-30, 1e6),  # exp(-distance) of a confident token, and a whole vocabulary's sum
        "expm1": -magnitudes(1e-30, 80.0),  # log-probs
        "tanh": np.concatenate([magnitudes(1e-30, 20.0), -magnitudes(1e-30, 20.0)]),
    }.items(),
)
def test_relative_error(name, arguments):
    truth = getattr(np, name)(arguments.astype(np.float64))
    values = apply(getattr(elementary, name), torch.from_numpy(arguments).to(DEVICE))
    assert np.abs(values / truth - 1).max() <= BOUND


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        ("log1p", 0.0, 0.0),
        ("expm1", 0.0, 0.0),
        ("expm1", -np.inf, -1.0),
        ("tanh", 0.0, 0.0),
        ("tanh", np.inf, 1.0),
        ("tanh", -np.inf, -1.0),
        ("tanh", np.nan, np.nan),
        ("expm1", np.nan, np.nan),
        ("log1p", np.nan, np.nan),
    ],
)
def test_limits(name, argument, value):
    result = apply(getattr(elementary, name), torch.full((2,), argument, device=DEVICE))
    np.testing.assert_array_equal(result, [value, value])
