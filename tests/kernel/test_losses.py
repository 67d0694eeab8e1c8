"""The losses on summed log-probs: values by hand, gradients by the paper's formula, the tie, λ = 0, bad input."""

import doctest
import math

import pytest
import torch

import dpop_kernels.losses.on_sums
from dpop_kernels import dpo_loss, dpop_loss, ipo_loss, slic_loss

LOSSES = [dpop_loss, dpo_loss, ipo_loss, slic_loss]


def test_the_docstrings_example():
    assert doctest.testmod(dpop_kernels.losses.on_sums).attempted > 0
    assert doctest.testmod(dpop_kernels.losses.on_sums).failed == 0


def logps(chosen, rejected, ref_chosen, ref_rejected, dtype=torch.float64):
    return [torch.tensor([value], dtype=dtype) for value in (chosen, rejected, ref_chosen, ref_rejected)]


def test_dpop_by_hand():
    # Δw = -1, Δl = -2: m = 1, penalty 5, z = 0.1 · (1 - 5) = -0.4
    loss = dpop_loss(*logps(-11.0, -14.0, -10.0, -12.0), beta=0.1, dpop_lambda=5.0)
    assert loss.item() == pytest.approx(math.log1p(math.exp(0.4)), rel=1e-12)


def test_lambda_is_inside_beta_and_sigmoid():
    # the three misreadings of equation 3 in public code give other values here: Δw = -2, Δl = -3, β = 0.5, λ = 4
    loss = dpop_loss(*logps(-12.0, -13.0, -10.0, -10.0), beta=0.5, dpop_lambda=4.0).item()
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    assert loss == pytest.approx(-math.log(sigmoid(0.5 * (1 - 4 * 2))))
    assert loss != pytest.approx(-math.log(sigmoid(0.5 * 1 - 4 * 2)))  # λ not times β
    assert loss != pytest.approx(-math.log(sigmoid(0.5 * 1)) + 4 * 2)  # outside the sigmoid
    assert loss != pytest.approx(-math.log(sigmoid(0.5 * (1 + 4 * 2))))  # sign inverted


def test_no_penalty_where_the_chosen_answer_gained():
    arguments = logps(-9.0, -14.0, -10.0, -12.0)
    assert torch.equal(dpop_loss(*arguments, dpop_lambda=500.0), dpo_loss(*arguments))


def test_baselines_by_hand():
    arguments = logps(-11.0, -14.0, -10.0, -12.0)  # margin 1
    assert dpo_loss(*arguments, beta=0.5).item() == pytest.approx(math.log1p(math.exp(-0.5)))
    assert ipo_loss(*arguments, beta=0.25).item() == pytest.approx((1 - 2) ** 2)
    assert slic_loss(*arguments, beta=0.25).item() == pytest.approx(0.75)
    assert slic_loss(*arguments, beta=2.0).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lambda_zero_is_dpo_bit_for_bit(dtype):
    arguments = [torch.randn(257, dtype=dtype).mul_(20).requires_grad_() for _ in range(4)]
    dpop, dpo = dpop_loss(*arguments, dpop_lambda=0.0), dpo_loss(*arguments)
    assert torch.equal(dpop, dpo)
    for of_dpop, of_dpo in zip(torch.autograd.grad(dpop, arguments), torch.autograd.grad(dpo, arguments), strict=True):
        assert torch.equal(of_dpop, of_dpo)


@pytest.mark.parametrize(("chosen_logratio", "hinge"), [(-0.5, 1), (0.0, 0), (0.5, 0)], ids=["below", "tie", "above"])
def test_gradient_is_the_papers(chosen_logratio, hinge):
    beta, dpop_lambda, rejected_logratio = 0.3, 50.0, -0.25
    chosen, rejected, ref_chosen, ref_rejected = logps(-10 + chosen_logratio, -12 + rejected_logratio, -10.0, -12.0)
    chosen.requires_grad_()
    rejected.requires_grad_()
    dpop_loss(chosen, rejected, ref_chosen, ref_rejected, beta=beta, dpop_lambda=dpop_lambda).backward()
    z = beta * (chosen_logratio - rejected_logratio - dpop_lambda * max(0.0, -chosen_logratio))
    pull = beta / (1 + math.exp(z))  # β σ(-z)
    assert chosen.grad.item() == pytest.approx(-pull * (1 + dpop_lambda * hinge), rel=1e-12)
    assert rejected.grad.item() == pytest.approx(pull, rel=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(loss):
    arguments = [torch.randn(5, dtype=torch.float64).mul_(3).requires_grad_() for _ in range(4)]
    for reduction in ("mean", "sum", "none"):
        assert torch.autograd.gradcheck(lambda *logps, r=reduction: loss(*logps, reduction=r), arguments)


def test_reductions():
    arguments = [torch.randn(6, dtype=torch.float64) for _ in range(4)]
    per_pair = dpop_loss(*arguments, reduction="none")
    assert per_pair.shape == (6,)
    assert torch.equal(dpop_loss(*arguments), per_pair.mean())
    assert torch.equal(dpop_loss(*arguments, reduction="sum"), per_pair.sum())


def test_extreme_margins_stay_finite():
    arguments = logps(-1e4, 0.0, 0.0, -1e4, dtype=torch.float32)
    arguments[0].requires_grad_()
    loss = dpop_loss(*arguments)
    loss.backward()
    # z = 0.3 · (-2e4 - 50 · 1e4) = -156000, and -log σ(z) = -z there
    assert loss.item() == pytest.approx(156000.0)
    assert arguments[0].grad.item() == pytest.approx(-0.3 * 51)


def test_16_bit_input_is_computed_in_fp32():
    arguments = [torch.randn(9).mul_(30).bfloat16() for _ in range(4)]
    loss = dpop_loss(*arguments)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, dpop_loss(*(tensor.float() for tensor in arguments)))


def _replaced(i, tensor):
    arguments = [torch.zeros(3) for _ in range(4)]
    arguments[i] = tensor
    return arguments


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (_replaced(0, torch.zeros(3, 1)), r"chosen_logps: expected shape \[B\], got \[3, 1\]"),
        (_replaced(1, torch.zeros(2)), r"rejected_logps: expected shape \[3\] as chosen_logps has, got \[2\]"),
        (_replaced(2, torch.zeros(3, dtype=torch.float64)), "ref_chosen_logps: expected dtype torch.float32"),
        (_replaced(3, torch.zeros(3, dtype=torch.int64)), "ref_rejected_logps: expected a floating-point dtype"),
        (_replaced(3, torch.zeros(3, device="meta")), "ref_rejected_logps: expected device cpu"),
    ],
    ids=["rank", "length", "dtype", "integer", "device"],
)
def test_bad_tensors_are_named(loss, arguments, message):
    with pytest.raises(ValueError, match=message):
        loss(*arguments)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"beta": 0.0}, "beta: expected a finite value > 0, got 0.0"),
        ({"beta": math.nan}, "beta: expected"),
        ({"dpop_lambda": -1.0}, "dpop_lambda: expected a finite value >= 0, got -1.0"),
        ({"dpop_lambda": math.inf}, "dpop_lambda: expected"),
        ({"reduction": "average"}, "reduction: expected 'mean', 'sum' or 'none', got 'average'"),
    ],
)
def test_bad_hyperparameters_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        dpop_loss(*logps(0.0, 0.0, 0.0, 0.0), **kwargs)
