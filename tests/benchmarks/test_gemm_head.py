"""The benchmark's alternative to the head's tiles: the same numbers as fp64, and where its range ends."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from rounding import CONTRACT_NATS, GRADIENT, HeadBounds, stored, worst
from truth import head_inputs, relative_error, set_tiles, true_head_logps, value_and_grads

from benchmarks import gemm_head
from dpop_kernels.logps.head import LogitTransform

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = (21, 275, 48)  # N, V, H: with the tiles below two blocks of rows, five of columns, the last ones ragged


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Tiles of 16 x 64, products in blocks of 16; numpy as silent of infs and NaNs as a GPU."""
    set_tiles(monkeypatch, rows=16, columns=64)
    small = dataclasses.replace(gemm_head.GEMM, block_r=16, block_v=32, block_h=16, group_r=2, rows=16)
    small = dataclasses.replace(small, block_v_with_exps=32)
    monkeypatch.setattr(gemm_head, "GEMM", small)
    with np.errstate(all="ignore"):
        yield


def both(hidden_states, weight, target_ids, bias, logit_scale=1.0):
    """Log-probs and the gradient of the hidden states, of the candidate and in fp64."""
    grad = torch.linspace(-2, 3, len(target_ids), dtype=torch.float64, device=DEVICE) + 0.01

    def candidate(hidden_states):
        transform = LogitTransform(logit_scale)
        return gemm_head.gemm_token_logps(hidden_states, weight, target_ids, bias=bias, transform=transform)

    def truth(hidden_states):
        return true_head_logps(hidden_states, weight.double(), target_ids, bias=bias.double(), logit_scale=logit_scale)[
            0
        ]

    return *value_and_grads(candidate, [hidden_states], grad), *value_and_grads(truth, [hidden_states.double()], grad)


def inputs(dtype=torch.float32):
    tensors = [tensor.to(DEVICE) for tensor in head_inputs(*SHAPE, dtype)]
    return *tensors, torch.randn(SHAPE[1], device=DEVICE).to(dtype)


@pytest.mark.parametrize("logit_scale", [1.0, 0.0625])
def test_equals_fp64_over_many_tiles(logit_scale):
    hidden_states, weight, target_ids, bias = inputs()
    logps, (grad,), expected, (expected_grad,) = both(hidden_states, weight, target_ids, bias, logit_scale)
    bounds = HeadBounds(hidden_states, weight, target_ids, bias=bias, logit_scale=logit_scale)
    assert worst(logps - expected, bounds.logps) <= 1
    assert (logps - expected).abs().max() <= CONTRACT_NATS
    assert relative_error(grad, expected_grad) <= GRADIENT
    with torch.no_grad():
        transform = LogitTransform(logit_scale)
        alone = gemm_head.gemm_token_logps(hidden_states, weight, target_ids, bias=bias, transform=transform)
    assert worst(alone - expected, bounds.logps) <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_over_many_tiles(dtype):
    logps, (grad,), expected, (expected_grad,) = both(*inputs(dtype))
    assert (logps - expected).abs().max() <= CONTRACT_NATS
    assert grad.dtype == dtype
    assert relative_error(grad, expected_grad) <= stored(dtype, times=2)


def test_it_says_nan_where_its_range_ends():
    """Exponentials are relative to the first 64 columns' maximum: 60 nats above is exact, 80 is refused by NaN."""
    hidden_states, weight, target_ids, bias = inputs()
    bias = torch.zeros_like(bias)
    bias[200] = 50
    logps, (grad,), expected, (expected_grad,) = both(hidden_states, weight, target_ids, bias)
    assert worst(logps - expected, HeadBounds(hidden_states, weight, target_ids, bias=bias).logps) <= 1
    assert relative_error(grad, expected_grad) <= GRADIENT
    bias[200] = 150
    logps, (grad,), *_ = both(hidden_states, weight, target_ids, bias)
    assert logps[target_ids != 200].isnan().all()
    assert grad[target_ids != 200].isnan().all()


def test_target_id_outside_the_vocabulary_gives_nan():
    hidden_states, weight, target_ids, bias = inputs()
    bad_ids = target_ids.clone()
    bad_ids[0], bad_ids[12], bad_ids[20] = -100, 275, 2**32 + 5
    logps = gemm_head.gemm_token_logps(hidden_states, weight, bad_ids, bias=bias)
    expected = gemm_head.gemm_token_logps(hidden_states, weight, target_ids, bias=bias)
    assert torch.equal(logps.isnan(), bad_ids != target_ids)
    assert torch.equal(logps[bad_ids == target_ids], expected[bad_ids == target_ids])
    assert not math.isnan(float(expected.sum()))
