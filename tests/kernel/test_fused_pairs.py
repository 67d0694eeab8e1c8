"""The fused backend's segment_sums, and the fused DPOP loss: on a GPU where there is one, else in Triton's interpreter.

Token log-probs are multiples of 2**-6 wherever sums should be exact: then fp32 adds them without rounding in any order,
and what is left to compare is the loss.
"""

import math

import numpy as np
import pytest
import torch
from truth import value_and_grads

from dpop_kernels.backends import fused, reference
from dpop_kernels.kernels.launch import LAUNCH
from dpop_kernels.losses.fused import pair_dpop_loss
from dpop_kernels.losses.on_sums import terms_of_segments
from dpop_kernels.losses.options import LossOptions

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INF, NAN = math.inf, math.nan

BATCHES = {  # lengths of shared, chosen tail, rejected tail; tokens before the first and after the last segment
    "plain": ([3, 5, 4, 2, 7, 1], 0, 0),
    "no_sharing": ([0, 5, 4, 0, 7, 1], 0, 0),  # empty shared segments: prefix sharing is off
    "one_pair": ([2, 2, 2], 0, 0),
    "all_empty": ([0, 0, 0, 0, 0, 0], 0, 0),  # log-ratios of zero, whatever the tokens are
    "only_shared": ([6, 0, 0], 0, 0),  # chosen equals rejected
    "long": (
        [LAUNCH.block_n, 2 * LAUNCH.block_n + 17, LAUNCH.block_n + 1],
        0,
        0,
    ),  # several blocks, a full one, one lane
    "gaps": ([3, 5, 4, 2, 7, 1], 3, 5),  # tokens that belong to no segment
}


def pairs(batch, dtype=torch.int64):
    """Token log-probs [N] and reference sums [B, 3] on a grid of 2**-6, cu_seqlens [3B + 1]."""
    lengths, before, after = BATCHES[batch]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0) + before
    token_logps = -torch.randint(1, 200, (sum(lengths) + before + after,)) / 64
    noise = torch.randint(-60, 60, (len(lengths),)) / 64
    ref_segment_logps = reference.segment_sums(token_logps.double(), cu_seqlens) + noise
    ref_segment_logps = ref_segment_logps.float().view(-1, 3)
    return token_logps.to(DEVICE), cu_seqlens.to(DEVICE, dtype), ref_segment_logps.to(DEVICE)


def on_device(values, **options):
    return torch.tensor(values, device=DEVICE, **options)


def fused_loss(token_logps, cu_seqlens, ref_segment_logps, **options):
    return pair_dpop_loss(token_logps, cu_seqlens, ref_segment_logps, LossOptions(**options))


def true_loss(token_logps, cu_seqlens, ref_segment_logps, *, loss_type="dpop", **options):
    sums = reference.segment_sums(token_logps, cu_seqlens).view(-1, 3)
    lengths = torch.full_like(sums, NAN)
    return terms_of_segments({loss_type: 1.0}, sums, ref_segment_logps, lengths, LossOptions(**options))[0]


def losses_and_grad(loss, token_logps, cu_seqlens, ref_segment_logps, grad_losses=None, **options):
    """PairLosses and the gradient of token_logps."""
    leaf = token_logps.detach().clone().requires_grad_()
    out = loss(leaf, cu_seqlens, ref_segment_logps, **options)
    grad_losses = torch.linspace(0.5, 2, len(out.losses)) if grad_losses is None else grad_losses
    (grad,) = torch.autograd.grad(out.losses, leaf, grad_losses.to(out.losses))
    return out, grad


def close(value, truth, rtol=1e-6, atol=0.0):
    torch.testing.assert_close(value.double(), truth.double(), rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("beta", "dpop_lambda"), [(0.3, 50.0), (0.1, 5.0), (0.3, 0.0), (0.05, 500.0)])
def test_equals_fp64(batch, beta, dpop_lambda, dtype):
    token_logps, cu_seqlens, ref = pairs(batch, dtype)
    options = {"beta": beta, "dpop_lambda": dpop_lambda}
    out, grad = losses_and_grad(fused_loss, token_logps, cu_seqlens, ref, **options)
    truth, true_grad = losses_and_grad(true_loss, token_logps.double(), cu_seqlens, ref.double(), **options)
    exact = ("chosen_logps", "rejected_logps", "chosen_logratios", "rejected_logratios", "margins")
    for name, value, expected in zip(out._fields, out, truth, strict=True):
        assert value.dtype == torch.float32, name
        assert value.is_contiguous(), name
        if name in exact:
            assert torch.equal(value.double(), expected), name
    close(out.penalties, truth.penalties)
    # z is rounded to fp32, and σ(-z) = exp(-z) turns its absolute error into a relative one
    z_error = 4 * 2.0**-24 * beta * (truth.margins.abs() + truth.penalties).max().item()
    close(out.losses, truth.losses, rtol=1e-6 + z_error)
    close(grad, true_grad, rtol=1e-6 + z_error)
    assert out.losses.requires_grad
    assert not any(value.requires_grad for value in out[1:])


OPTIONS = {
    "dead_zone": {"beta": 0.3, "dpop_lambda": 50.0, "dead_zone": 0.5},
    "smoothed": {"beta": 0.3, "dpop_lambda": 50.0, "label_smoothing": 0.125},
    "both": {"beta": 0.1, "dpop_lambda": 5.0, "dead_zone": 0.25, "label_smoothing": 0.25},
    "smoothed_dpo": {"beta": 0.1, "dpop_lambda": 0.0, "label_smoothing": 0.125},
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("options", OPTIONS)
def test_dead_zone_and_smoothed_labels_equal_fp64(batch, options):
    token_logps, cu_seqlens, ref = pairs(batch)
    options = OPTIONS[options]
    out, grad = losses_and_grad(fused_loss, token_logps, cu_seqlens, ref, **options)
    truth, true_grad = losses_and_grad(true_loss, token_logps.double(), cu_seqlens, ref.double(), **options)
    close(out.penalties, truth.penalties)
    # as above; and the pulls of the two labels, each at most β, may cancel
    z_error = 4 * 2.0**-24 * options["beta"] * (truth.margins.abs() + truth.penalties).max().item()
    close(out.losses, truth.losses, rtol=1e-6 + z_error)
    close(grad, true_grad, rtol=1e-6 + z_error, atol=2 * options["beta"] * (1e-6 + z_error))


def test_smoothed_labels_by_hand():
    """Δw = -1, Δl = -3, β = 0.1, λ = 5, τ = 0.5: p = 2.5, z = 0.1 · (2 - 2.5), z' = 0.1 · (-2 - 2.5); ε = 0.25."""
    token_logps, cu_seqlens = on_device([-1.0, -10.0, -14.0]), on_device([0, 1, 2, 3])
    ref = on_device([[-0.5, -9.5, -11.5]])
    options = {"beta": 0.1, "dpop_lambda": 5.0, "dead_zone": 0.5, "label_smoothing": 0.25}
    out, grad = losses_and_grad(fused_loss, token_logps, cu_seqlens, ref, grad_losses=torch.ones(1), **options)
    z, flipped_z = -0.05, -0.45
    close(out.losses, on_device([0.75 * math.log1p(math.exp(-z)) + 0.25 * math.log1p(math.exp(-flipped_z))]))
    pull, flipped_pull = 0.75 * 0.1 / (1 + math.exp(z)), 0.25 * 0.1 / (1 + math.exp(flipped_z))
    of_penalty, of_margin = 5 * (pull + flipped_pull), pull - flipped_pull
    close(grad, on_device([-of_penalty, -of_penalty - of_margin, of_margin]))


def test_infinite_tokens_stay_in_their_pair_with_smoothed_labels():
    """Such a pair's loss is not finite, which the trainer stops at; the others' are as without it."""
    token_logps, cu_seqlens, ref = one_token_pairs([1.0] * 3)
    token_logps[2] = -INF  # chosen of the second pair
    token_logps[5] = -INF  # rejected of the third: its label is certainly right, and one in four says it is not
    options = {"beta": 1.0, "dpop_lambda": 5.0, "label_smoothing": 0.25}
    with np.errstate(all="ignore"):
        out, grad = losses_and_grad(fused_loss, token_logps, cu_seqlens, ref, grad_losses=torch.ones(3), **options)
    sure = 0.75 * math.log1p(math.exp(-1)) + 0.25 * math.log1p(math.exp(1))
    close(out.losses[:1], on_device([sure]))
    assert not torch.isfinite(out.losses[1:]).any()
    pull = 0.75 / (1 + math.e) - 0.25 / (1 + math.exp(-1))
    close(grad[:2], on_device([-pull, pull]), atol=2e-6)  # the pulls of the two labels cancel


def test_derived_example():
    """Δw = -1, Δl = -2, β = 0.1, λ = 5: z = 0.1 · (1 - 5) = -0.4; then Δw = +1, Δl = -1: z = 0.2."""
    token_logps = on_device([-1.0, -4.0, -6.0, -5.0, -9.0, -2.0, -3.0])
    cu_seqlens = on_device([0, 1, 3, 5, 5, 6, 7])
    ref = on_device([[-1.5, -8.5, -11.5], [0.0, -3.0, -2.0]])
    out, grad = losses_and_grad(
        fused_loss, token_logps, cu_seqlens, ref, grad_losses=torch.ones(2), beta=0.1, dpop_lambda=5.0
    )
    close(out.losses, on_device([math.log1p(math.exp(0.4)), math.log1p(math.exp(-0.2))]))
    for name, expected in {
        "chosen_logps": [-11.0, -2.0],
        "rejected_logps": [-15.0, -3.0],
        "chosen_logratios": [-1.0, 1.0],
        "rejected_logratios": [-2.0, -1.0],
        "margins": [1.0, 2.0],
        "penalties": [5.0, 0.0],
    }.items():
        assert getattr(out, name).tolist() == expected, name
    pulls = [0.1 / (1 + math.exp(-0.4)), 0.1 / (1 + math.exp(0.2))]  # β σ(-z)
    first, second = pulls
    expected = [-5 * first, -6 * first, -6 * first, first, first, -second, second]
    close(grad, on_device(expected))


@pytest.mark.parametrize("batch", ["plain", "long"])
def test_policy_equals_reference(batch):
    """The tie: log-ratios are exactly zero, the loss is log 2, and the penalty has slope 0 there, not 1 or λ."""
    _, cu_seqlens, _ = pairs(batch)
    token_logps = -torch.rand(int(cu_seqlens[-1]), device=DEVICE) * 9  # sums that do round
    ref = fused.segment_sums(token_logps, cu_seqlens).view(-1, 3)
    grad_losses = torch.ones(len(ref))
    out, grad = losses_and_grad(
        fused_loss, token_logps, cu_seqlens, ref, grad_losses=grad_losses, beta=0.3, dpop_lambda=50.0
    )
    for values in (out.chosen_logratios, out.rejected_logratios, out.margins, out.penalties):
        assert (values == 0).all()
    close(out.losses, torch.full_like(out.losses, math.log(2)))
    slopes = on_device([0.0, -0.15, 0.15]).repeat(len(ref))
    close(grad, slopes.repeat_interleave(cu_seqlens.diff()))


def test_lambda_zero_is_dpo():
    token_logps, cu_seqlens, ref = pairs("plain")
    out, grad = losses_and_grad(fused_loss, token_logps, cu_seqlens, ref, beta=0.3, dpop_lambda=0.0)
    dpo = true_loss(token_logps.double(), cu_seqlens, ref.double(), loss_type="dpo", beta=0.3, dpop_lambda=50.0)
    assert (dpo.chosen_logratios < 0).any()
    close(out.losses, dpo.losses)
    assert (out.penalties == 0).all()
    shared = [slice(cu_seqlens[i], cu_seqlens[i + 1]) for i in range(0, 6, 3)]
    assert all((grad[tokens] == 0).all() for tokens in shared)


def test_lambda_does_not_touch_pairs_that_gain():
    token_logps, cu_seqlens, ref = pairs("plain")
    ref = ref - on_device([20.0, 0.0, 0.0])  # Δw ≥ 20 - 1.9
    expected, expected_grad = losses_and_grad(fused_loss, token_logps, cu_seqlens, ref, beta=0.3, dpop_lambda=0.0)
    out, grad = losses_and_grad(fused_loss, token_logps, cu_seqlens, ref, beta=0.3, dpop_lambda=50.0)
    assert torch.equal(out.losses, expected.losses)
    assert torch.equal(grad, expected_grad)


def one_token_pairs(margins):
    """Pairs whose Δw is 0 and whose margin is given: nothing is penalised and z = β · margin."""
    num_pairs = len(margins)
    token_logps = torch.zeros(2 * num_pairs, device=DEVICE)
    token_logps[1::2] = -on_device(margins)
    lengths = on_device([0, 1, 1]).repeat(num_pairs)
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return token_logps, cu_seqlens, torch.zeros(num_pairs, 3, device=DEVICE)


def test_far_margins_keep_their_relative_accuracy():
    """z from -1e4 to 80, where the loss is exp(-80); with β = 1 there is no rounding on the way to z."""
    margins = [-1e4, -100.0, -1.0, 1.0, 20.0, 40.0, 80.0]
    out, grad = losses_and_grad(
        fused_loss, *one_token_pairs(margins), grad_losses=torch.ones(7), beta=1.0, dpop_lambda=50.0
    )
    z = torch.tensor(margins, dtype=torch.float64, device=DEVICE)
    losses = torch.log1p(torch.exp(-z.abs())) + (-z).clamp_min(0)
    pulls = torch.exp(-z.clamp_min(0)) / (1 + torch.exp(-z.abs()))  # σ(-z) without a difference
    close(out.losses, losses, rtol=1e-5)  # the GPU's exp takes its argument with 2**-23 of 115
    close(grad, torch.stack([-pulls, pulls], dim=1).flatten(), rtol=1e-5)


def test_infinite_and_undefined_tokens_stay_in_their_pair():
    token_logps, cu_seqlens, ref = one_token_pairs([1.0] * 4)
    token_logps[2] = -INF  # chosen of the second pair
    token_logps[5] = -INF  # rejected of the third
    token_logps[6] = NAN  # chosen of the fourth
    with np.errstate(all="ignore"):  # the interpreter computes with numpy, which warns of what a GPU does silently
        out, grad = losses_and_grad(
            fused_loss, token_logps, cu_seqlens, ref, grad_losses=torch.ones(4), beta=1.0, dpop_lambda=5.0
        )
    close(out.losses, on_device([math.log1p(math.exp(-1)), INF, 0.0, NAN]))
    pull = 1 / (1 + math.e)
    close(grad, on_device([-pull, pull, -6.0, 1.0, 0.0, 0.0, NAN, NAN]), atol=0)


def test_nan_in_the_shared_tokens_reaches_the_loss():
    token_logps = on_device([NAN, -1.0, -2.0])
    out = fused_loss(token_logps, on_device([0, 1, 2, 3]), torch.zeros(1, 3, device=DEVICE), beta=0.3, dpop_lambda=50.0)
    assert out.losses.isnan().all()


def test_tokens_outside_all_segments_have_gradient_zero():
    token_logps, cu_seqlens, ref = pairs("gaps")
    _, grad = losses_and_grad(fused_loss, token_logps, cu_seqlens, ref, beta=0.3, dpop_lambda=50.0)
    _, (sums_grad,) = value_and_grads(
        lambda logps: fused.segment_sums(logps, cu_seqlens), [token_logps], torch.ones(6, device=DEVICE)
    )
    outside = torch.ones_like(token_logps, dtype=torch.bool)
    outside[3:-5] = False
    assert (grad[outside] == 0).all()
    assert torch.equal(sums_grad, (~outside).float())


def test_gradient_of_a_sum_and_strided_inputs():
    """What a training loop hands in: an expanded gradient, log-probs and references that are columns of something."""
    token_logps, cu_seqlens, ref = pairs("plain")
    options = {"beta": 0.3, "dpop_lambda": 50.0}
    expected, expected_grad = losses_and_grad(
        fused_loss, token_logps, cu_seqlens, ref, grad_losses=torch.ones(2), **options
    )
    leaf = torch.stack([token_logps, token_logps * NAN], dim=1).requires_grad_()
    spread_seqlens = torch.stack([cu_seqlens, cu_seqlens * 0 - 1], dim=1)[:, 0]
    out = fused_loss(leaf[:, 0], spread_seqlens, ref.T.contiguous().T, **options)
    out.losses.sum().backward()
    assert torch.equal(out.losses, expected.losses)
    assert torch.equal(leaf.grad[:, 0], expected_grad)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_segment_sums(batch, dtype):
    token_logps, cu_seqlens, _ = pairs(batch, dtype)
    grad_sums = torch.arange(1.0, len(cu_seqlens), device=DEVICE)

    def sums(module):
        return lambda logps: module.segment_sums(logps, cu_seqlens)

    truth, (true_grad,) = value_and_grads(sums(reference), [token_logps.double()], grad_sums)
    values, (grad,) = value_and_grads(sums(fused), [token_logps], grad_sums)
    assert values.dtype == torch.float32
    assert torch.equal(values.double(), truth)
    assert torch.equal(grad.double(), true_grad)


def test_sum_of_a_long_segment_errs_by_its_tree_only():
    """n tokens: n / block additions in each lane, then log2(block) levels; each rounds by at most 2**-24 of Σ|x|."""
    num_tokens = 5 * LAUNCH.block_n + 100
    token_logps = -torch.rand(num_tokens, device=DEVICE) * 9
    (value,) = fused.segment_sums(token_logps, on_device([0, num_tokens]))
    truth = token_logps.double().sum()
    depth = num_tokens // LAUNCH.block_n + 1 + math.log2(LAUNCH.block_n)
    assert (value - truth).abs() <= depth * 2.0**-24 * truth.abs()


def test_a_segment_has_the_same_bits_wherever_it_lies():
    answer = -torch.rand(LAUNCH.block_n + 300, device=DEVICE) * 9
    length = len(answer)
    alone = fused.segment_sums(answer, on_device([0, length]))
    moved = fused.segment_sums(torch.cat([answer[:77], answer, answer]), on_device([77, 77 + length, 77 + 2 * length]))
    assert torch.equal(moved, alone.expand(2))
    bounds = on_device([0, 0, length, length])
    out = fused_loss(answer, bounds, torch.zeros(1, 3, device=DEVICE), beta=0.3, dpop_lambda=50.0)
    assert torch.equal(out.chosen_logps, alone)
    again = fused_loss(answer, bounds, torch.zeros(1, 3, device=DEVICE), beta=0.3, dpop_lambda=50.0)
    assert torch.equal(out.losses, again.losses)


def test_no_pairs():
    token_logps = torch.zeros(4, device=DEVICE, requires_grad=True)
    bounds = on_device([2])
    out = fused_loss(token_logps, bounds, torch.zeros(0, 3, device=DEVICE), beta=0.3, dpop_lambda=50.0)
    assert all(values.shape == (0,) for values in out)
    (out.losses.sum() + fused.segment_sums(token_logps, bounds).sum()).backward()
    assert torch.equal(token_logps.grad, torch.zeros_like(token_logps))
    nothing = torch.zeros(0, device=DEVICE)
    assert fused.segment_sums(nothing, on_device([0])).shape == (0,)
    assert fused.segment_sums(nothing, on_device([0, 0])).tolist() == [0.0]
