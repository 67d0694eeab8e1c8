"""Losses under other divergences than the reverse KL: by hand, by fp64 differences, where TRL overflows, to the bit."""

import math

import pytest
import torch
from backends import IN_FP64, ON_CPU
from loss_pairs import batch_of, bounds, nll, one_pair, read_by

from dpop_kernels import pair_loss
from dpop_kernels.losses.divergences import DIVERGENCES
from dpop_kernels.losses.formulas import LOSSES


@pytest.mark.parametrize(
    ("divergence", "alpha", "margin"),
    [
        # Δw = log 2, Δl = -log 2: probabilities twice and half the reference's
        ("reverse_kl", 0.5, 2 * math.log(2)),
        ("forward_kl", 0.5, (1 - 1 / 2) - (1 - 2)),
        ("js_divergence", 0.5, math.log(4 / 3) - math.log(1 / 1.5)),
        ("alpha_divergence", 0.5, ((2**-0.5 - 1) - (2**0.5 - 1)) / -0.5),
        ("alpha_divergence", 2.0, (2 - 1) - (1 / 2 - 1)),
        ("alpha_divergence", 0.0, (1 - 1 / 2) - (1 - 2)),  # the forward KL
        ("alpha_divergence", 1.0, 2 * math.log(2)),  # the reverse KL
        ("alpha_divergence", 1 + 1e-12, 2 * math.log(2)),  # near which (t^a - 1) / a would lose its digits
    ],
)
@pytest.mark.parametrize("backend", ON_CPU)
def test_by_hand(divergence, alpha, margin, backend):
    """The margin is of f', the penalty and what is logged are of nats."""
    options = {"f_divergence_type": divergence, "f_alpha_divergence_coef": alpha, "beta": 0.5, "backend": backend}
    # in fp32 a log-ratio is the difference of two numbers of up to 5 nats, rounded to 2^-22: some 1e-6 of log 2
    dtype, tolerance = (torch.float64, 1e-11) if backend in IN_FP64 else (torch.float32, 1e-5)
    dpo = pair_loss(*one_pair(math.log(2), -math.log(2), dtype), loss_type="dpo", **options)
    assert dpo.losses.item() == pytest.approx(nll(0.5 * margin), rel=tolerance)
    assert dpo.margins.item() == pytest.approx(2 * math.log(2), rel=tolerance)
    dpop = pair_loss(*one_pair(-math.log(2), math.log(2), dtype), loss_type="dpop", dpop_lambda=3.0, **options)
    assert dpop.losses.item() == pytest.approx(nll(0.5 * (-margin - 3 * math.log(2))), rel=tolerance)
    assert dpop.penalties.item() == pytest.approx(3 * math.log(2), rel=tolerance)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("loss_type", ["dpop", "ipo_norm"])
def test_gradcheck(loss_type, divergence):
    token_logps, lengths, ref = batch_of(3, torch.Generator().manual_seed(5))
    options = read_by(loss_type, f_divergence_type=divergence, dpop_lambda=3.0)

    def function(token_logps):
        return pair_loss(token_logps, bounds(lengths), ref, loss_type=loss_type, **options).losses

    assert torch.autograd.gradcheck(function, token_logps.requires_grad_())


@pytest.mark.parametrize("backend", ON_CPU)
def test_the_reverse_kl_by_another_name_is_the_same_to_the_bit(backend):
    """Also where kernels compute it: the margin is then of the tails alone."""
    token_logps, lengths, ref = batch_of(6, torch.Generator().manual_seed(7))
    leaf = token_logps.float().requires_grad_()
    results = []
    for given in ({}, {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0}):
        losses = pair_loss(leaf, bounds(lengths), ref.float(), backend=backend, **given).losses
        results.append((losses, torch.autograd.grad(losses.sum(), leaf)[0]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("divergence", ["forward_kl", "alpha_divergence"])
def test_a_far_pair_is_still_pulled_back(divergence):
    """A chosen answer 200 nats below the reference, where TRL's fp32 is infinite or has slope 0: beyond an exponent of
    30 the score goes on along its tangent, e^30 (1 + x - 30) - 1 for an exponent x of 200 (and of 100 with α = 0.5)."""
    exponent, rate = (200, 1.0) if divergence == "forward_kl" else (100, 0.5)
    token_logps, *rest = one_pair(-200.0, 0.0)
    pairs = pair_loss(token_logps, *rest, loss_type="slic", beta=0.5, f_divergence_type=divergence)
    score = -(math.exp(30) * (1 + exponent - 30) - 1) / rate
    assert pairs.losses.item() == pytest.approx(1 - 0.5 * score, rel=1e-12)
    pairs.losses.sum().backward()
    assert token_logps.grad[0].item() == pytest.approx(-0.5 * math.exp(30), rel=1e-12)


@pytest.mark.parametrize("loss_type", sorted(LOSSES))
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_extremes_are_finite_in_fp32(loss_type, divergence):
    """Log-probs of 0 and -10000, each under a reference of 0 and of -10000."""
    if divergence != "reverse_kl" and not LOSSES[loss_type].takes_divergence:
        return
    far = -1e4
    token_logps = torch.tensor([far, 0, 0, far, far, far, 0, 0], requires_grad=True)
    ref = torch.tensor([[0, 0, far], [0, far, 0], [0, 0, 0], [0, far, far]])
    options = read_by(loss_type, label_smoothing=0.1, f_divergence_type=divergence)
    cu_seqlens = bounds(torch.tensor([0, 1, 1]).repeat(4))
    losses = pair_loss(token_logps, cu_seqlens, ref, loss_type=loss_type, **options).losses
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(token_logps.grad).all()
