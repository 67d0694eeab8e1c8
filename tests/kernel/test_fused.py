"""token_logps of the fused backend: the Triton kernels, on a GPU where there is one, else in Triton's interpreter.

Truth is the reference in fp64 on the same inputs, or a closed form; the baseline is eager in the same dtype.
"""

import math

import numpy as np
import pytest
import torch
from rounding import CONTRACT_NATS, GRADIENT, UNIT, stored
from truth import assert_statistics, peaked_logits, reference_logps, value_and_grads

from dpop_kernels.backends import fused, fused_tiles, reference
from dpop_kernels.backends.protocol import RowResults, RowSums
from dpop_kernels.kernels.launch import LAUNCH
from dpop_kernels.logps.head import PLAIN, Head, LogitTransform

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INF, NAN = math.inf, math.nan
LOWEST = torch.finfo(torch.float32).min

SHAPES = {  # N, V
    "ragged_v": (7, 1003),  # a masked tail, and rows that start at any alignment
    "one_token": (1, 513),
    "one_column": (3, 1),  # a vocabulary of one: log-prob 0, gradient 0
    "exact_block": (2, LAUNCH.block_v),  # no masked lane at all
    "one_over": (2, LAUNCH.block_v + 1),  # a block with a single live lane
    "wide_vocab": (3, 2 * LAUNCH.block_v + 809),  # the running maximum is rescaled between blocks
    "many_rows": (24, 40),
}


@pytest.fixture
def _numpy_like_a_gpu():
    """The interpreter computes with numpy, which warns of the infs and NaNs that a GPU yields silently."""
    with np.errstate(all="ignore"):
        yield


def logits_and_targets(shape="ragged_v", dtype=torch.float32):
    logits, target_ids = peaked_logits(*SHAPES[shape], dtype)
    return logits.to(DEVICE), target_ids.to(DEVICE)


def weights(num_tokens):
    """Output gradients of both signs and several sizes; none is zero (a zero has its own test)."""
    return torch.linspace(-2, 3, num_tokens, device=DEVICE) + 0.01


def on_device(values, **options):
    return torch.tensor(values, device=DEVICE, **options)


def fused_logps(logits, target_ids, **options):
    return fused.token_logps(logits, target_ids, **options)[0]


def fused_value_and_grad(logits, target_ids, grad_logps=None, **options):
    grad_logps = weights(len(logits)) if grad_logps is None else grad_logps
    logps, (grad,) = value_and_grads(lambda logits: fused_logps(logits, target_ids, **options), [logits], grad_logps)
    return logps, grad


def reference_value_and_grad(logits, target_ids):
    return value_and_grads(lambda logits: reference_logps(logits, target_ids), [logits], weights(len(logits)))


def as_stored(values, dtype):
    """Round as a kernel's store does: to the nearest on a GPU, but Triton's interpreter cuts fp32 off to bf16."""
    if dtype == torch.bfloat16 and DEVICE.type == "cpu":
        values = (values.view(torch.int32) & -(2**16)).view(torch.float32)
    return values.to(dtype)


def assert_errs_as_eager(candidate, eager, truth):
    """Both in fp32. Compares the largest errors over all elements.

    Two largest of some hundred errors of one size differ by chance, by less than a factor of four. Where eager is lucky
    the rest is allowed: four roundings (maximum off, sum, logarithm, difference) of a value of up to 16 nats, and 16
    units of numbers of size 1.
    """
    size = float(truth.abs().nan_to_num(0.0, posinf=0.0).max().clamp_max(16))
    error = (candidate.double() - truth).abs().max()
    assert error <= 4 * (eager.double() - truth).abs().max() + UNIT[torch.float32] * (4 * size + 16)


def assert_stored_from_fp32(candidate, eager, truth):
    """A guarantee for every element: what eager makes in fp32, rounded once (the interpreter cuts bf16 off)."""
    dtype = candidate.dtype
    cut = dtype == torch.bfloat16 and DEVICE.type == "cpu"
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # below the normal numbers places are spaced so
    computed = (eager.double() - truth).abs().max() + 1e-6
    rounded = (truth.abs() + computed) * UNIT[dtype] * (2 if cut else 1) + tiny
    assert ((candidate.double() - truth).abs() - computed <= rounded).all()


def assert_equal_but_for_order(values, expected):
    """Another alignment or stride may sum in another order: fp32 rounding, which may move a 16-bit store by one."""
    rtol = 1e-6 if values.dtype == torch.float32 else torch.finfo(values.dtype).eps
    torch.testing.assert_close(values, expected, rtol=rtol, atol=1e-6)


def assert_holds_against_fp64(logits, target_ids):
    truth, (true_grad,) = reference_value_and_grad(logits.double(), target_ids)
    eager, (eager_grad,) = reference_value_and_grad(logits.float(), target_ids)
    logps, grad = fused_value_and_grad(logits, target_ids)
    assert logps.dtype == torch.float32
    assert grad.dtype == logits.dtype
    assert_errs_as_eager(logps, eager, truth)
    if logits.dtype == torch.float32:
        assert_errs_as_eager(grad, eager_grad, true_grad)
    else:
        assert_stored_from_fp32(grad, eager_grad, true_grad)
    return logps, truth


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, dtype):
    logps, truth = assert_holds_against_fp64(*logits_and_targets(shape, DTYPES[dtype]))
    assert (logps - truth).abs().max() <= CONTRACT_NATS


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_of_ten_thousand(dtype):
    """No overflow, and no more error than eager: a normaliser rounded to fp32 would be off by 5e-4 here."""
    logits = (torch.randn(6, 1003) * 3).clamp(-9, 9) * 1e3
    logits[:3] = logits[:3].sign() * 1e4  # many equal maxima
    logits[4:] = torch.randn(2, 1003) + 1e4  # a softmax of many terms, far from zero
    target_ids = torch.randint(1003, (6,))
    assert_holds_against_fp64(logits.to(DEVICE, DTYPES[dtype]), target_ids.to(DEVICE))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_confident_tokens_keep_their_relative_accuracy(dtype):
    """1 - p from 1e-2 to 1e-13, where 1 - exp(logp) in fp32 is noise below 1e-7."""
    logits = torch.randn(12, 2000).to(DTYPES[dtype])
    target_ids = torch.arange(12) * 150
    rows = torch.arange(12)
    logits[rows, target_ids] = torch.linspace(13, 38, 12).to(logits.dtype)
    # closed form in fp64: log p = -log1p(Σ exp(z_v - z_y)) over the other columns
    distances = logits.double() - logits[rows, target_ids].double().unsqueeze(-1)
    distances[rows, target_ids] = -INF
    truth = -torch.log1p(distances.exp().sum(-1))
    assert -torch.expm1(truth[0]) > 1e-3
    assert -torch.expm1(truth[-1]) < 1e-12

    logps, grad = fused_value_and_grad(logits.to(DEVICE), target_ids.to(DEVICE), torch.ones(12, device=DEVICE))
    assert (logps.cpu().double() / truth - 1).abs().max() <= CONTRACT_NATS
    target_grads = grad.cpu()[rows, target_ids].double()
    stored_with = {"fp32": GRADIENT, "bf16": stored(torch.bfloat16, cut=True)}[dtype]
    assert (target_grads / -torch.expm1(truth) - 1).abs().max() <= stored_with


def test_shift_invariance():
    """Logits on a grid of 2**-8 shift by 1024 without rounding, so the log-probs are the same bits."""
    logits, target_ids = logits_and_targets()
    logits = (logits * 256).round() / 256
    logps, grad = fused_value_and_grad(logits, target_ids)
    shifted_logps, shifted_grad = fused_value_and_grad(logits + 1024, target_ids)
    assert torch.equal(logps, shifted_logps)
    assert (grad - shifted_grad).abs().max() <= 1e-6


@pytest.mark.parametrize("shape", ["ragged_v", "wide_vocab"])
def test_gradient_rows_sum_to_zero(shape):
    _, grad = fused_value_and_grad(*logits_and_targets(shape))
    assert grad.double().sum(-1).abs().max() <= 3e-6  # weights of up to 3, times a few roundings of Σ p = 1


def masked(rows, width=1003):
    """Normal logits whose rows are overwritten by pairs (column or slice, value)."""
    logits = torch.randn(len(rows), width)
    for n, values in enumerate(rows):
        for columns, value in values:
            logits[n, columns] = value
    return logits.to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [-INF, LOWEST], ids=["-inf", "lowest"])
def test_masked_vocabulary(dtype, hidden):
    """-inf, or the lowest finite number as attention masks use it: a first block, a last block, a scattered half."""
    width = 2 * LAUNCH.block_v + 100
    first, last = slice(0, LAUNCH.block_v), slice(2 * LAUNCH.block_v, width)
    rows = [[(first, hidden)], [(last, hidden)], [(first, hidden), (last, hidden)], [(slice(0, width, 2), hidden)]]
    logits = masked(rows, width).clamp_min(torch.finfo(DTYPES[dtype]).min if hidden == LOWEST else -INF)
    logits = logits.to(DTYPES[dtype])
    target_ids = on_device([LAUNCH.block_v + 7] * 4)
    logps, truth = assert_holds_against_fp64(logits, target_ids)
    assert (logps - truth).abs().max() <= CONTRACT_NATS
    _, grad = fused_value_and_grad(logits, target_ids)
    assert (grad[logits <= torch.finfo(DTYPES[dtype]).min] == 0).all()


@pytest.mark.usefixtures("_numpy_like_a_gpu")
def test_infinities_and_nan():
    """What log_softmax says of each row, derived: p(target) is 1, 0, undefined; NaN is never lost."""
    everything = slice(None)
    cases = [
        ([(everything, -INF), (5, 2.0)], 0.0),  # only the target is left
        ([(5, -INF)], -INF),  # the target itself is masked
        ([(everything, -INF), (9, 1.0)], -INF),  # all probability is elsewhere
        ([(everything, -INF)], NAN),
        ([(5, INF)], NAN),
        ([(9, INF)], NAN),
        ([(9, INF), (700, INF)], NAN),
        ([(5, NAN)], NAN),
        ([(9, NAN)], NAN),
        ([(everything, NAN)], NAN),
    ]
    logits = masked([values for values, _ in cases])
    target_ids = on_device([5] * len(cases))
    expected = on_device([value for _, value in cases])
    grad_logps = torch.ones(len(cases), device=DEVICE)
    logps, grad = fused_value_and_grad(logits, target_ids, grad_logps)
    assert torch.allclose(logps, expected, rtol=0, atol=0, equal_nan=True)
    assert (grad[0] == 0).all()
    assert grad[1, 5] == 1
    assert grad[2, 5] == 1
    assert grad[2, 9] == -1
    assert grad[3:].isnan().any(-1).all()
    others = torch.arange(1003, device=DEVICE) != 5
    assert (grad[1, others] + logits[1, others].softmax(-1)).abs().max() <= 1e-6


def test_target_id_outside_the_vocabulary_gives_nan_and_reads_nothing():
    logits, target_ids = logits_and_targets()
    expected = fused_logps(logits, target_ids)
    bad_ids = target_ids.clone()
    bad_ids[[0, 2, 4]] = on_device([-100, 1003, 2**40])
    logps = fused_logps(logits, bad_ids)
    assert logps[[0, 2, 4]].isnan().all()
    assert torch.equal(logps[[1, 3, 5, 6]], expected[[1, 3, 5, 6]])


@pytest.mark.usefixtures("_numpy_like_a_gpu")
def test_row_of_weight_zero_has_gradient_zero_whatever_it_holds():
    logits, target_ids = logits_and_targets()
    logits[2], logits[3, 5], logits[4] = NAN, INF, -INF
    grad_logps = weights(7)
    grad_logps[2:5] = 0
    _, grad = fused_value_and_grad(logits, target_ids, grad_logps)
    assert (grad[2:5] == 0).all()
    assert (grad[[0, 1, 5, 6]] != 0).any(-1).all()


def sliced_columns(logits):
    """Rows that start one element past an aligned address, with a stride that is no multiple of anything."""
    wide = torch.full((logits.shape[0], logits.shape[1] + 4), NAN, dtype=logits.dtype, device=DEVICE)
    wide[:, 1:-3] = logits
    return wide[:, 1:-3]


def strided_rows(logits):
    return torch.stack([logits, torch.full_like(logits, NAN)], dim=1).flatten(0, 1)[::2]


def strided_columns(logits):
    return torch.stack([logits, torch.full_like(logits, NAN)], dim=2).flatten(1, 2)[:, ::2]


def transposed(logits):
    return logits.T.contiguous().T


LAYOUTS = [sliced_columns, strided_rows, strided_columns, transposed]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_the_logits_does_not_matter(layout, dtype):
    logits, target_ids = logits_and_targets(dtype=DTYPES[dtype])
    expected, expected_grad = fused_value_and_grad(logits, target_ids)
    view = layout(logits).detach().requires_grad_()
    assert not view.is_contiguous()
    logps = fused_logps(view, target_ids)
    (grad,) = torch.autograd.grad(logps, view, weights(7))
    assert_equal_but_for_order(logps, expected)
    assert_equal_but_for_order(grad, expected_grad)


def test_layout_of_ids_and_gradients_does_not_matter():
    logits, target_ids = logits_and_targets()
    expected, expected_grad = fused_value_and_grad(logits, target_ids, torch.ones(7, device=DEVICE))
    spread_ids = torch.stack([target_ids, target_ids * 0 - 1], dim=1).int()[:, 0]
    leaf = logits.clone().requires_grad_()
    logps = fused_logps(leaf, spread_ids)
    logps.sum().backward()  # the gradient of a sum is one value with stride 0
    assert torch.equal(logps, expected)
    assert torch.equal(leaf.grad, expected_grad)


def test_one_row_for_all_targets():
    """Logits of stride zero, as `expand` makes them."""
    row = torch.randn(1, 500, device=DEVICE)
    target_ids = torch.arange(0, 500, 50, device=DEVICE)
    expected = row.double().log_softmax(-1)[0, target_ids]
    assert (fused_logps(row.expand(10, 500), target_ids) - expected).abs().max() <= CONTRACT_NATS


@pytest.mark.parametrize("dtype", DTYPES)
def test_inplace_backward_writes_the_gradient_over_the_logits(dtype):
    logits, target_ids = logits_and_targets("wide_vocab", DTYPES[dtype])
    expected, expected_grad = fused_value_and_grad(logits, target_ids)
    source = logits.clone().requires_grad_()
    computed = source * 1  # logits as a model hands them on: not a leaf
    logps = fused_logps(computed, target_ids, inplace_backward=True)
    (grad,) = torch.autograd.grad(logps, computed, weights(3))
    assert grad.data_ptr() == computed.data_ptr()
    assert torch.equal(logps, expected)
    assert torch.equal(grad, expected_grad)
    assert torch.equal(computed.detach(), expected_grad)


def test_inplace_backward_stays_within_its_columns():
    logits, target_ids = logits_and_targets(dtype=torch.bfloat16)
    _, expected_grad = fused_value_and_grad(logits, target_ids)
    view = sliced_columns(logits).requires_grad_()
    (grad,) = torch.autograd.grad(fused_logps(view, target_ids, inplace_backward=True), view, weights(7))
    assert grad.data_ptr() == view.data_ptr()
    assert_equal_but_for_order(grad, expected_grad)
    padded = torch.as_strided(view.detach(), (7, 1007), (1007, 1), 0)
    assert padded[:, [0, 1004, 1005, 1006]].isnan().all()


def test_backward_leaves_the_logits_alone_unless_told():
    logits, target_ids = logits_and_targets()
    leaf = logits.clone().requires_grad_()
    fused_logps(leaf, target_ids).sum().backward()
    assert torch.equal(leaf.detach(), logits)


def test_inplace_backward_lets_nobody_use_the_logits_again():
    logits, target_ids = logits_and_targets()
    computed = logits.clone().requires_grad_() * 1
    logps = fused_logps(computed, target_ids, inplace_backward=True)
    squares = computed.square()  # saved the logits too
    torch.autograd.grad(logps.sum(), computed, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(logps.sum(), computed)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(squares.sum(), computed)


@pytest.mark.parametrize("layout", [strided_columns, transposed, lambda logits: logits[:1].expand(7, -1)])
def test_inplace_backward_refuses_rows_it_cannot_write(layout):
    logits, target_ids = logits_and_targets()
    with pytest.raises(ValueError, match="inplace_backward: expected logits with contiguous rows"):
        fused_logps(layout(logits), target_ids, inplace_backward=True)


def test_a_row_has_the_same_bits_in_any_batch_and_any_run():
    logits, target_ids = logits_and_targets("wide_vocab", torch.bfloat16)
    logps, grad = fused_value_and_grad(logits, target_ids)
    again, grad_again = fused_value_and_grad(logits, target_ids)
    assert torch.equal(logps, again)
    assert torch.equal(grad, grad_again)
    alone, grad_alone = fused_value_and_grad(logits[1:2].clone(), target_ids[1:2], weights(3)[1:2])
    assert torch.equal(alone, logps[1:2])
    assert torch.equal(grad_alone, grad[1:2])


@pytest.mark.parametrize("with_stats", [False, True])
def test_no_tokens(with_stats):
    logits = torch.zeros(0, 300, device=DEVICE, requires_grad=True)
    logps, stats = fused.token_logps(logits, on_device([], dtype=torch.int64), with_stats=with_stats)
    assert logps.shape == (0,)
    assert (stats is not None) == with_stats
    logps.sum().backward()
    assert logits.grad.shape == (0, 300)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_statistics(shape, dtype):
    logits, target_ids = logits_and_targets(shape, DTYPES[dtype])
    logits.requires_grad_()
    logps, stats = fused.token_logps(logits, target_ids, with_stats=True)
    _, truth = reference.token_logps(logits.double(), target_ids, with_stats=True)
    assert torch.equal(logps, fused_logps(logits, target_ids))
    assert_statistics(stats, truth)


@pytest.mark.usefixtures("_numpy_like_a_gpu")  # the mean of many lowest numbers overflows to -inf, in eager too
def test_statistics_of_derived_rows():
    """Uniform, one-hot, two equal logits, and 500 of them after two blocks of masked ones."""
    width = 2 * LAUNCH.block_v + 1000
    hidden, shown = slice(0, width - 500), slice(width - 500, width)
    zeros = (slice(0, width), 0.0)
    rows = [
        [zeros],
        [zeros, (7, 1e4)],
        [zeros, (7, 100.0), (4500, 100.0)],
        [(hidden, -INF), (shown, 3.0)],
        [(hidden, LOWEST), (shown, 3.0)],
    ]
    targets = [7, 7, 4500, width - 1, width - 1]
    _, stats = fused.token_logps(masked(rows, width), on_device(targets), with_stats=True)
    entropies = [math.log(width), 0.0, math.log(2), math.log(500), math.log(500)]
    assert (stats.entropy - on_device(entropies)).abs().max() <= CONTRACT_NATS
    # k equal probabilities: Σ p² = 1 / k
    assert (stats.log_sum_sq_probs + on_device(entropies)).abs().max() <= CONTRACT_NATS
    assert torch.allclose(stats.mean_logit[:3], on_device([0.0, 1e4 / width, 200.0 / width]))
    assert (stats.mean_logit[3:] == -INF).all()
    assert stats.is_top1.tolist() == [True] * 5
    _, stats = fused.token_logps(masked(rows, width), on_device([8, 8, 8, width - 1, 0]), with_stats=True)
    assert stats.is_top1.tolist() == [True, False, False, True, False]


def test_autocast_changes_nothing():
    logits, target_ids = logits_and_targets()
    expected, expected_grad = fused_value_and_grad(logits, target_ids)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        logps, grad = fused_value_and_grad(logits, target_ids)
    assert torch.equal(logps, expected)
    assert torch.equal(grad, expected_grad)


def test_no_grad_records_nothing():
    logits, target_ids = logits_and_targets()
    with torch.no_grad():
        assert not fused_logps(logits.requires_grad_(), target_ids).requires_grad


def test_offsets_beyond_int32():
    """Three rows 2**30 elements apart: the last starts at element 2**31. Only the rows' own pages are touched."""
    num_elements = 2**31 + 64
    storage = torch.UntypedStorage(2 * num_elements, device=DEVICE)
    spread = torch.tensor([], dtype=torch.bfloat16, device=DEVICE).set_(storage, 0, (3, 50), (2**30, 1))
    logits, target_ids = peaked_logits(3, 50, torch.bfloat16)
    logits, target_ids = logits.to(DEVICE), target_ids.to(DEVICE)
    spread.copy_(logits)
    expected, expected_grad = fused_value_and_grad(logits, target_ids)
    spread.requires_grad_()
    logps = fused_logps(spread, target_ids, inplace_backward=True)
    (grad,) = torch.autograd.grad(logps, spread, weights(3))
    assert grad.data_ptr() == spread.data_ptr()
    assert_equal_but_for_order(logps, expected)
    assert_equal_but_for_order(grad, expected_grad)


TRANSFORMS = {
    "plain": PLAIN,
    "scaled": LogitTransform(0.0625),
    "softcapped": LogitTransform(softcap=12.0),
    "both": LogitTransform(1.5, softcap=30.0),
}


def transformed(logits, options):
    z = logits * options.scale
    return z if options.softcap is None else torch.tanh(z / options.softcap) * options.softcap


def tile_truth(tile, target_ids, options):
    logps, (grad,) = value_and_grads(
        lambda tile: reference_logps(transformed(tile, options), target_ids), [tile.double()], weights(len(tile))
    )
    _, stats = reference.token_logps(transformed(tile.double(), options), target_ids, with_stats=True)
    return logps, grad, transformed(tile.double(), options).logsumexp(-1), stats


def tiles_forward(tile, target_ids, transform):
    """Log-probs, log-normaliser and statistics of whole rows, in tiles of 3000 columns."""
    (num_rows, vocab_size), results = (
        tile.shape,
        RowResults.empty(tile, tile.dtype, with_stats=True, with_gradient=False),
    )
    sums = RowSums.empty(num_rows, tile.dtype, tile.device, with_stats=True)
    for start in range(0, vocab_size, 3000):
        part = tile[:, start : start + 3000].contiguous()
        fused_tiles.tile_forward(part, target_ids, sums, transform, vocab_start=start)
    head = Head(torch.empty(vocab_size, 1, device=tile.device), transform=transform)
    fused_tiles.rows_forward(sums, target_ids, None, head, results, vocab_size=vocab_size)
    return results.logps, results.lse, results.stats


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_tiles(transform):
    """Whole rows, then the gradient in column tiles of the vocabulary, in place and to another dtype."""
    options = TRANSFORMS[transform]
    tile, target_ids = logits_and_targets("wide_vocab")
    vocab_size = tile.shape[1]
    true_logps, true_grad, true_lse, true_stats = tile_truth(tile, target_ids, options)
    logps, lse, stats = tiles_forward(tile, target_ids, options)
    assert lse.dtype == torch.float64
    for value, truth in [(logps, true_logps), (lse, true_lse)]:
        assert (value - truth).abs().max() <= CONTRACT_NATS
    assert_statistics(stats, true_stats)

    grad = torch.empty_like(tile)
    out = fused_tiles.tile_backward(tile, target_ids, logps, lse, weights(3), options, out=grad)
    assert out is grad
    assert (grad - true_grad).abs().max() <= CONTRACT_NATS

    for start in range(0, vocab_size, 3000):
        columns = slice(start, min(start + 3000, vocab_size))
        part = tile[:, columns].contiguous()
        fused_tiles.tile_backward(part, target_ids, logps, lse, weights(3), options, vocab_start=start, out=part)
        assert torch.equal(part, grad[:, columns])

    short = torch.empty_like(tile, dtype=torch.bfloat16)
    fused_tiles.tile_backward(tile, target_ids, logps, lse, weights(3), options, out=short)
    assert torch.equal(short, as_stored(grad, torch.bfloat16))
    fused_tiles.tile_backward(tile, target_ids, logps, lse.float(), weights(3), options, out=tile)
    assert (tile - true_grad).abs().max() <= CONTRACT_NATS


def test_masked_logits_under_a_softcap():
    """tanh(-inf) = -1: the entry becomes -softcap, a finite logit, and its slope is zero."""
    tile, target_ids = logits_and_targets()
    tile[:, 100:200] = -INF
    target_ids[target_ids < 200] = 300
    options = LogitTransform(softcap=5.0)
    finite = tile.clamp_min(-1e3)  # tanh(-200) is -1 in fp64 as well
    true_logps, true_grad, *_ = tile_truth(finite, target_ids, options)
    logps, lse, _ = tiles_forward(tile, target_ids, options)
    grad = fused_tiles.tile_backward(tile, target_ids, logps, lse, weights(7), options, out=torch.empty_like(tile))
    assert (logps - true_logps).abs().max() <= CONTRACT_NATS
    assert (grad[:, 100:200] == 0).all()
    assert (grad - true_grad).abs().max() <= CONTRACT_NATS
