"""KTO's loss on sums: values and gradients by hand."""

import math

import pytest
import torch

from dpop_kernels import kto_loss


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


LOGPS, REF_LOGPS = double(-4.0, -7.0, -3.0), double(-5.0, -6.5, -5.0)  # Δ = 1, -0.5, 2
IS_DESIRABLE = torch.tensor([True, True, False])


def test_by_hand():
    losses = kto_loss(
        LOGPS,
        REF_LOGPS,
        IS_DESIRABLE,
        kl=0.5,
        beta=0.2,
        desirable_weight=1.25,
        undesirable_weight=0.8,
        reduction="none",
    )
    # 0.2 · (Δ - 0.5) = 0.1, -0.2, 0.3
    expected = [1.25 * (1 - sigmoid(0.1)), 1.25 * (1 - sigmoid(-0.2)), 0.8 * (1 - sigmoid(-0.3))]
    assert losses.tolist() == pytest.approx(expected, rel=1e-12)
    assert float(kto_loss(LOGPS, REF_LOGPS, IS_DESIRABLE, kl=0.0)) == pytest.approx(
        (1 - sigmoid(0.1) + 1 - sigmoid(-0.05) + sigmoid(0.2)) / 3, rel=1e-12
    )


def test_the_gradient_leaves_the_kl_alone():
    """∂/∂Δ of w σ(-β (Δ - z0)) is -w β σ σ'; an undesirable answer's has the other sign."""
    logps, kl = LOGPS.clone().requires_grad_(), double(0.5).squeeze().requires_grad_()
    kto_loss(logps, REF_LOGPS, IS_DESIRABLE, kl=kl, beta=0.2, reduction="sum").backward()
    slopes = [0.2 * sigmoid(x) * sigmoid(-x) for x in (0.1, -0.2, 0.3)]
    assert logps.grad.tolist() == pytest.approx([-slopes[0], -slopes[1], slopes[2]], rel=1e-12)
    assert kl.grad is None


def test_a_loss_far_out_keeps_its_digits():
    """1 - σ(x) in fp32 is 0 from x = 17 on; σ(-x) is e^-x."""
    loss = kto_loss(torch.tensor([0.0]), torch.tensor([-300.0]), torch.tensor([True]), kl=0.0, beta=0.1)
    assert float(loss) == pytest.approx(math.exp(-30), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"logps": LOGPS[None]},
            r"logps: expected floating-point log-probs of shape \[B\], got torch.float64 of shape",
        ),
        ({"ref_logps": LOGPS[:2]}, r"ref_logps: expected shape \[3\] as logps has, got \[2\]"),
        ({"is_desirable": LOGPS}, r"is_desirable: expected bools of shape \[3\], got torch.float64"),
        ({"beta": 0.0}, "beta: expected a finite value > 0, got 0.0"),
        ({"undesirable_weight": 0.0}, "undesirable_weight: expected a finite value > 0, got 0.0"),
        ({"kl": -1.0}, "kl: expected a finite number of nats >= 0, got -1.0"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"logps": LOGPS, "ref_logps": REF_LOGPS, "is_desirable": IS_DESIRABLE, "kl": 0.0, **change}
    with pytest.raises(ValueError, match=message):
        kto_loss(**arguments)
