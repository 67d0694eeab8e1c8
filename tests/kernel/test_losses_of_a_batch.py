"""Losses that compare the pairs of a batch with each other, by hand; and what they leave no sense to."""

import pytest
import torch
from loss_pairs import nll, sigmoid, three_pairs

from dpop_kernels import pair_loss
from dpop_kernels.losses.formulas import LOSSES
from dpop_kernels.losses.weights import losses_of_batch


def test_aot_compares_the_sorted_margins_of_policy_and_reference():
    """Policy: 1, 2, 4. Reference: 4 - 2, 1 + 5, 2 - 0.5, so 1.5, 2, 6."""
    token_logps, *rest = three_pairs()
    losses = pair_loss(token_logps, *rest, loss_type="aot", beta=0.5).losses
    assert losses.tolist() == pytest.approx([nll(0.5 * (1 - 1.5)), nll(0.0), nll(0.5 * (4 - 6))], rel=1e-12)
    losses.sum().backward()
    slopes = [-0.5 * sigmoid(1.0), -0.5 * sigmoid(0.25), -0.5 * sigmoid(0.0)]  # of the pairs, whose ranks are 3, 1, 2
    assert token_logps.grad.tolist() == pytest.approx([part for slope in slopes for part in (slope, -slope)], rel=1e-12)


def test_aot_unpaired_compares_the_sorted_log_ratios_of_both_answers():
    """Chosen: -2, 0.5, 1. Rejected: -1, 0, 3."""
    losses = pair_loss(*three_pairs(), loss_type="aot_unpaired", beta=0.5).losses
    assert losses.tolist() == pytest.approx([nll(0.5 * -1), nll(0.5 * 0.5), nll(0.5 * -2)], rel=1e-12)


@pytest.mark.parametrize("loss_type", losses_of_batch(list(LOSSES)))
def test_a_loss_of_a_batch_has_no_pairs_to_weigh(loss_type):
    with pytest.raises(ValueError, match=f"pair_weights: expected None with '{loss_type}', whose values"):
        pair_loss(*three_pairs(), loss_type=["dpo", loss_type], pair_weights=torch.ones(3))


def test_beta_dpo_is_dpo_with_a_beta_of_the_batch_s_mean_margin():
    """Margins 2, -5, 0.5: on average -2.5 / 3, so β' = 0.5 (1 + 0.6 (-2.5 / 3 + 1)), and a constant to the gradient."""
    token_logps, *rest = three_pairs()
    losses = pair_loss(token_logps, *rest, loss_type="beta_dpo", beta=0.5, beta_dpo_threshold=-1.0).losses
    (grad,) = torch.autograd.grad(losses.sum(), token_logps)
    dpo = pair_loss(token_logps, *rest, loss_type="dpo", beta=0.5 * (1 + 0.6 * (1 - 2.5 / 3))).losses
    torch.testing.assert_close(losses, dpo, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, torch.autograd.grad(dpo.sum(), token_logps)[0], rtol=1e-12, atol=0)
    # and never below 1e-3, however bad the batch
    least = pair_loss(*three_pairs(), loss_type="beta_dpo", beta=0.5, beta_dpo_threshold=99.0).losses
    torch.testing.assert_close(least, pair_loss(*three_pairs(), loss_type="dpo", beta=1e-3).losses)
