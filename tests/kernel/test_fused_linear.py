"""The fused head tile by tile: tiles so small that every loop turns, and what a running maximum meets on its way.

Truth is the reference in fp64 on the same inputs, or a closed form. `test_linear_logps.py` holds the same backend to
the contract at real tile sizes.
"""

import math

import numpy as np
import pytest
import torch
from rounding import CONTRACT_NATS, GRADIENT, HeadBounds, stored, worst
from truth import assert_statistics, head_inputs, relative_error, set_tiles, true_head_logps, value_and_grads

from dpop_kernels.backends import bounds, fused_tiles
from dpop_kernels.backends.products import row_blocks
from dpop_kernels.backends.protocol import RowResults, RowSums
from dpop_kernels.kernels.launch import LAUNCH
from dpop_kernels.logps.head import PLAIN, Head, LogitTransform
from dpop_kernels.logps.tiling import tiled_token_logps

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INF, NAN = math.inf, math.nan
SHAPE = (11, 275, 48)  # N, V, H: with the tiles below two blocks of rows, five of columns, the last ones ragged


@pytest.fixture
def _small_tiles(monkeypatch):
    """Tiles of 8 x 64; gradient tiles of 8 rows and one block of columns."""
    set_tiles(monkeypatch, rows=8, columns=64)


@pytest.fixture
def _numpy_like_a_gpu():
    """The interpreter computes with numpy, which warns of the infs and NaNs that a GPU yields silently."""
    with np.errstate(all="ignore"):
        yield


def grad_output(num_tokens):
    """Output gradients of both signs; none is zero (a zero has its own test)."""
    return torch.linspace(-2, 3, num_tokens, dtype=torch.float64, device=DEVICE) + 0.01


def inputs(shape=SHAPE, dtype=torch.float32):
    return [tensor.to(DEVICE) for tensor in head_inputs(*shape, dtype)]


def truth(hidden_states, weight, target_ids, bias, **options):
    leaves = [tensor.double() for tensor in (hidden_states, weight, bias)]

    def function(hidden_states, weight, bias):
        return true_head_logps(hidden_states, weight, target_ids, bias=bias, **options)[0]

    return value_and_grads(function, leaves, grad_output(len(target_ids)))


def head_logps(hidden_states, weight, target_ids, *, bias=None, logit_scale=1.0, softcap=None, with_stats=False):
    head = Head(weight, bias, LogitTransform(logit_scale, softcap))
    return tiled_token_logps(fused_tiles, hidden_states, head, target_ids, with_stats=with_stats)


def candidate(hidden_states, weight, target_ids, bias=None, *, trainable=False, **options):
    """Log-probs, and the gradients of the hidden states and with a trainable head of weight and bias."""

    def function(hidden_states, weight=weight, bias=bias):
        return head_logps(hidden_states, weight, target_ids, bias=bias, **options)[0]

    leaves = [hidden_states, weight, bias] if trainable else [hidden_states]
    return value_and_grads(function, leaves, grad_output(len(target_ids)))


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("options", [{}, {"logit_scale": 1.5, "softcap": 12.0}], ids=["plain", "transformed"])
def test_equals_fp64_over_many_tiles(options, trainable):
    hidden_states, weight, target_ids = inputs()
    bias = torch.randn(weight.shape[0], device=DEVICE)
    expected, expected_grads = truth(hidden_states, weight, target_ids, bias, **options)
    logps, grads = candidate(hidden_states, weight, target_ids, bias, trainable=trainable, **options)
    assert worst(logps - expected, HeadBounds(hidden_states, weight, target_ids, bias=bias, **options).logps) <= 1
    assert (logps - expected).abs().max() <= CONTRACT_NATS
    for grad, expected_grad in zip(grads, expected_grads, strict=False):
        assert relative_error(grad, expected_grad) <= GRADIENT


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_over_many_tiles(dtype):
    hidden_states, weight, target_ids = inputs(dtype=dtype)
    bias = torch.zeros(weight.shape[0], dtype=dtype, device=DEVICE)
    expected, expected_grads = truth(hidden_states, weight, target_ids, bias)
    for trainable in (False, True):
        logps, grads = candidate(hidden_states, weight, target_ids, bias, trainable=trainable)
        assert (logps - expected).abs().max() <= CONTRACT_NATS
        assert all(grad.dtype == dtype for grad in grads)
        for grad, expected_grad in zip(grads, expected_grads, strict=False):
            assert relative_error(grad, expected_grad) <= stored(dtype, times=2)  # a tile's gradient, and the sum


@pytest.mark.usefixtures("_small_tiles")
def test_reference_pass_saves_nothing_and_has_the_same_bits():
    hidden_states, weight, target_ids = inputs()
    with_gradient, _ = candidate(hidden_states, weight, target_ids)
    with torch.no_grad():
        logps, _ = head_logps(hidden_states.requires_grad_(), weight, target_ids)
    assert not logps.requires_grad
    assert torch.equal(logps, with_gradient)
    again, _ = candidate(hidden_states, weight, target_ids)
    assert torch.equal(again, with_gradient)


@pytest.mark.usefixtures("_small_tiles", "_numpy_like_a_gpu")
@pytest.mark.parametrize("order", ["rising", "falling", "one_far_out"])
def test_a_running_maximum_may_rise_by_any_step(order):
    """Tile after tile higher by 200 nats and more, where the earlier sums must vanish and not overflow."""
    hidden_states, weight, target_ids = inputs()
    steps = torch.arange(weight.shape[0], device=DEVICE) // 64 * 200.0 - 600
    bias = {"rising": steps, "falling": steps.flip(0), "one_far_out": torch.zeros_like(steps)}[order].clone()
    bias[250] += 1e4 if order == "one_far_out" else 0
    expected, expected_grads = truth(hidden_states, weight, target_ids, bias)
    head_bounds = HeadBounds(hidden_states, weight, target_ids, bias=bias)
    for trainable in (False, True):
        logps, grads = candidate(hidden_states, weight, target_ids, bias, trainable=trainable)
        assert worst(logps - expected, head_bounds.logps) <= 1
        for grad, expected_grad in zip(grads, expected_grads, strict=False):
            # a column's probability errs with its logit alone, and so do the three gradients
            assert relative_error(grad, expected_grad) <= head_bounds.gradient(grad_output(len(target_ids)))


@pytest.mark.usefixtures("_small_tiles", "_numpy_like_a_gpu")
def test_masked_vocabulary():
    """A bias of -inf takes columns out, whole tiles too; with the target alone left its log-prob is 0 to the bit."""
    hidden_states, weight, target_ids = inputs()
    bias = torch.zeros(weight.shape[0], device=DEVICE)
    bias[:70] = bias[130:200] = -INF
    target_ids = target_ids.clamp_min(200)
    expected, expected_grads = truth(hidden_states, weight, target_ids, bias)
    logps, (grad,) = candidate(hidden_states, weight, target_ids, bias)
    assert worst(logps - expected, HeadBounds(hidden_states, weight, target_ids, bias=bias).logps) <= 1
    assert relative_error(grad, expected_grads[0]) <= GRADIENT
    bias[:] = -INF
    bias[200] = 0
    logps, (grad,) = candidate(hidden_states, weight, torch.full_like(target_ids, 200), bias)
    assert (logps == 0).all()
    assert (grad == 0).all()


@pytest.mark.usefixtures("_small_tiles")
def test_target_id_outside_the_vocabulary_gives_nan():
    hidden_states, weight, target_ids = inputs()
    expected, (expected_grad,) = candidate(hidden_states, weight, target_ids)
    bad_ids = target_ids.clone()
    bad_ids[0], bad_ids[6], bad_ids[10] = -100, 275, 2**32 + 5
    logps, (grad,) = candidate(hidden_states, weight, bad_ids)
    is_bad = bad_ids != target_ids
    assert logps[is_bad].isnan().all()
    assert grad[is_bad].isnan().all()
    assert torch.equal(logps[~is_bad], expected[~is_bad])
    assert torch.equal(grad[~is_bad], expected_grad[~is_bad])


@pytest.mark.usefixtures("_numpy_like_a_gpu")
def test_row_of_weight_zero_has_gradient_zero_whatever_it_holds():
    hidden_states, weight, target_ids = inputs()
    hidden_states[3] = NAN
    hidden_states.requires_grad_()
    logps, _ = head_logps(hidden_states, weight, target_ids)
    weights = torch.ones_like(logps)
    weights[3] = weights[5] = 0
    (grad,) = torch.autograd.grad(logps, hidden_states, weights)
    assert logps[3].isnan()
    assert (grad[[3, 5]] == 0).all()
    assert torch.isfinite(grad).all()


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_statistics_over_many_tiles(softcap):
    hidden_states, weight, target_ids = inputs()
    _, expected = true_head_logps(hidden_states.double(), weight.double(), target_ids, softcap=softcap, with_stats=True)
    for requires_grad in (False, True):
        hidden_states.requires_grad_(requires_grad)
        _, stats = head_logps(hidden_states, weight, target_ids, softcap=softcap, with_stats=True)
        assert_statistics(stats, expected)


def test_unit_gradient_of_a_confident_token_fits_16_bits():
    """1 - p = e**-30 / (1 + e**-30) kept apart in fp32: what goes to fp16 is W[y] - W[other], whose size is W's own."""
    num_rows, hidden_size = 1, 40
    weight = torch.randn(5, hidden_size, device=DEVICE).half()
    sums = RowSums.empty(num_rows, torch.float32, DEVICE)
    sums.maxima.fill_(-10.0)
    sums.sums.fill_(1.0)  # one other column, at the maximum: E = 1
    sums.target_logits.fill_(20.0)
    like = torch.empty(1, hidden_size, dtype=torch.float16, device=DEVICE)
    results = RowResults.empty(like, torch.float32, with_stats=False, with_gradient=True)
    target_ids = torch.tensor([2], device=DEVICE)
    products = weight[4:].float()
    fused_tiles.rows_forward(sums, target_ids, products, Head(weight), results, vocab_size=5)
    other_mass = math.exp(-30) / (1 + math.exp(-30))
    assert float(results.other_mass) == pytest.approx(other_mass, rel=1e-6)
    assert float(results.logps) == pytest.approx(-math.log1p(math.exp(-30)), rel=1e-6)
    assert relative_error(results.unit_grads[0], weight[2].double() - weight[4].double()) <= stored(torch.float16)
    grad_hidden = torch.empty(1, hidden_size, device=DEVICE)
    weights = torch.full((1,), 1e9, device=DEVICE)
    fused_tiles.rows_backward(results.unit_grads, results.other_mass, weights, out=grad_hidden)
    assert relative_error(grad_hidden[0], 1e9 * other_mass * (weight[2].double() - weight[4].double())) <= stored(
        torch.float16
    )


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-11)])
def test_exponentials_in_16_bits(dtype, rounding):
    """E against its definition: the target's column 0, the others exp(z - max), rounded (or cut) once; S in fp32."""
    logits = torch.randn(4, 1000, device=DEVICE) * 4
    target_ids = torch.tensor([0, 999, 5, 5000], device=DEVICE)  # the last in another tile
    z = logits.double()
    z[range(3), target_ids[:3]] = -INF
    exps = torch.empty(4, 1000, dtype=dtype, device=DEVICE)
    sums = RowSums.empty(4, torch.float32, DEVICE)
    products = torch.zeros(4, 8, device=DEVICE)
    fused_tiles.tile_forward(logits, target_ids, sums, PLAIN, exps=exps, products=products)
    expected = (z - z.amax(dim=1, keepdim=True)).exp()
    smallest = 1e-4  # below it fp16 is subnormal: an absolute error of 6e-8 against the row's 1
    error = (exps.double() - expected).abs()
    assert (error <= rounding * expected.clamp_min(smallest)).all()
    assert (exps[range(3), target_ids[:3]] == 0).all()
    assert ((sums.sums - expected.sum(1)) / expected.sum(1)).abs().max() <= 1e-6
    assert torch.equal(sums.target_logits[:3], logits[range(3), target_ids[:3]])
    assert sums.target_logits[3].isnan()


def test_views_and_strides():
    hidden_states, weight, target_ids = inputs()
    expected, (expected_grad,) = candidate(hidden_states, weight, target_ids)
    wide = torch.full((SHAPE[0], 60), NAN, device=DEVICE)
    wide[:, 5:53] = hidden_states
    transposed = weight.T.contiguous().T
    logps, (grad,) = candidate(wide[:, 5:53], transposed, target_ids)
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("num_tokens", "size", "blocks"),
    [
        (0, 1024, []),
        (5, 1024, [5]),
        (1024, 1024, [1024]),
        (1030, 1024, [640, 390]),  # halves of 515, in steps of 128
        (16384, 1024, [1024] * 16),
    ],
)
def test_row_blocks_are_even(num_tokens, size, blocks):
    assert [rows.stop - rows.start for rows in row_blocks(num_tokens, size)] == blocks


@pytest.mark.parametrize(
    ("num_tokens", "num_columns"),
    [
        (4096, 32768),  # 256 MiB / (4096 · 2 bytes)
        (16384, 8192),
        (2**20, 8192),  # 64 blocks of 16384 rows
        (100, 128256),  # the whole vocabulary fits
    ],
)
def test_gradient_tile_fills_its_bytes(num_tokens, num_columns):
    num_rows = max(rows.stop - rows.start for rows in row_blocks(num_tokens, LAUNCH.grad_rows))
    columns = bounds.triton_bounds().gradient_columns(num_rows, 128256, itemsize=2)
    assert columns == num_columns
    assert num_rows * columns * 2 <= LAUNCH.grad_tile_bytes
