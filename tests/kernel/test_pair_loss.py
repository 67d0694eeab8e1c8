"""pair_loss in torch: segments, layouts, metrics, gradients. The fused kernel has test_fused_pairs."""

import math

import pytest
import torch
from backends import IN_FP64

from dpop_kernels import dpo_loss, dpop_loss, ipo_loss, pair_loss, slic_loss
from dpop_kernels.losses.pair_loss import segment_sums
from dpop_kernels.losses.weighing import length_desensitised, wpo_weights

LOSSES = {"dpop": dpop_loss, "dpo": dpo_loss, "ipo": ipo_loss, "slic": slic_loss}


def pack(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.mark.parametrize("backend", IN_FP64)
def test_by_hand(backend):
    # one pair: shared [-1, -2], chosen tail [-3], rejected tail [-4, -5]
    token_logps = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0], requires_grad=True)
    ref = torch.tensor([[-2.5, -2.0, -10.0]])
    out = pair_loss(token_logps, pack([2, 1, 2]), ref, beta=0.1, dpop_lambda=5.0, backend=backend)
    # shared -0.5, chosen -1, rejected +1: Δw = -1.5, Δl = 0.5, m = -2, penalty 7.5, z = 0.1 · (-2 - 7.5) = -0.95
    assert out.chosen_logps.tolist() == [-6.0]
    assert out.rejected_logps.tolist() == [-12.0]
    assert out.chosen_logratios.tolist() == [-1.5]
    assert out.rejected_logratios.tolist() == [0.5]
    assert out.margins.tolist() == [-2.0]
    assert out.penalties.tolist() == [7.5]
    z = torch.tensor(-0.95)
    torch.testing.assert_close(out.losses, torch.log1p(torch.exp(-z)).unsqueeze(0))
    out.losses.sum().backward()
    pull = 0.1 * torch.sigmoid(-z)
    # shared tokens: chosen and rejected pulls cancel, the penalty's stays: -β σ(-z) λ
    expected = torch.stack([-5 * pull, -5 * pull, -6 * pull, pull, pull])
    torch.testing.assert_close(token_logps.grad, expected)


@pytest.mark.parametrize("backend", IN_FP64)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_equals_the_losses_of_whole_answers(backend, loss_type):
    lengths = [3, 2, 4, 0, 5, 1, 2, 0, 3, 4, 6, 0]  # without shared tokens, without a chosen, without a rejected tail
    token_logps = -torch.rand(sum(lengths), dtype=torch.float64) * 3
    ref = torch.randn(4, 3, dtype=torch.float64)
    out = pair_loss(token_logps, pack(lengths), ref, loss_type=loss_type, backend=backend)
    parts = torch.stack([part.sum() for part in token_logps.split(lengths)]).view(4, 3)
    whole = [parts[:, 0] + parts[:, 1], parts[:, 0] + parts[:, 2], ref[:, 0] + ref[:, 1], ref[:, 0] + ref[:, 2]]
    torch.testing.assert_close(out.losses, LOSSES[loss_type](*whole, reduction="none"))
    torch.testing.assert_close(out.chosen_logps, whole[0])
    torch.testing.assert_close(out.rejected_logratios, whole[1] - whole[3])


@pytest.mark.parametrize("backend", IN_FP64)
def test_weights_by_hand(backend):
    """Three pairs with plain DPO: log-ratios 1 and 0, 0 and 2, -1 and -1; weights 1, 2, 0.5."""
    token_logps = torch.tensor([-1.0, -2.0, -3.0, -1.0, -4.0, -2.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([[0.0, -2.0, -2.0], [0.0, -3.0, -3.0], [0.0, -3.0, -1.0]], dtype=torch.float64)
    weights = torch.tensor([1.0, 2.0, 0.5])
    options = {"loss_type": "dpo", "beta": 0.5, "backend": backend}
    out = pair_loss(token_logps, pack([0, 1, 1] * 3), ref, pair_weights=weights, **options)
    # β · margin: 0.5, -1, 0
    plain = [math.log1p(math.exp(-z)) for z in (0.5, -1.0, 0.0)]
    expected = [1.0 * plain[0], 2.0 * plain[1], 0.5 * plain[2]]
    assert out.losses.tolist() == pytest.approx(expected, rel=1e-15)
    assert out.margins.tolist() == [1.0, -2.0, 0.0]  # nothing but the loss is weighted
    (out.losses.sum() / weights.sum()).backward()
    pulls = [w * 0.5 / (1 + math.exp(z)) / 3.5 for w, z in ((1.0, 0.5), (2.0, -1.0), (0.5, 0.0))]
    assert token_logps.grad.tolist() == pytest.approx([s * p for p in pulls for s in (-1, 1)], rel=1e-15)
    unweighted = pair_loss(token_logps, pack([0, 1, 1] * 3), ref, **options)
    ones = pair_loss(token_logps, pack([0, 1, 1] * 3), ref, pair_weights=torch.ones(3), **options)
    assert torch.equal(ones.losses, unweighted.losses)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, -0.5], r"expected finite numbers >= 0, got -0\.5"),
        ([math.nan, 1.0], "expected finite numbers >= 0, got nan"),
        ([1.0, math.inf], "expected finite numbers >= 0, got inf"),
        ([1.0], "expected one for each of 2 pairs, got 1"),
        ([[1.0, 1.0]], r"expected shape \[B\], got \[1, 2\]"),
    ],
)
def test_weights_that_are_none_are_refused(weights, message):
    with pytest.raises(ValueError, match="pair_weights: " + message):
        pair_loss(torch.zeros(4), pack([0, 1, 1] * 2), torch.zeros(2, 3), pair_weights=torch.tensor(weights))


LD_LENGTHS = [1, 1, 3, 0, 2, 0, 2, 2, 2]  # rejected longer by two; no rejected tail; equally long


def test_tokens_beyond_the_shorter_answer_by_hand():
    token_logps = -torch.arange(1.0, 14.0, dtype=torch.float64)
    weighted = length_desensitised(token_logps, pack(LD_LENGTHS), 0.25)
    factors = [1, 1, 1, 0.25, 0.25, 0.25, 0.25, 1, 1, 1, 1, 1, 1]
    assert torch.equal(weighted, token_logps * torch.tensor(factors, dtype=torch.float64))
    for nothing_to_do in (None, 1.0):
        assert length_desensitised(token_logps, pack(LD_LENGTHS), nothing_to_do) is token_logps
    impossible = token_logps.clone()
    impossible[3] = -torch.inf
    assert length_desensitised(impossible, pack(LD_LENGTHS), 0.0).tolist()[2:5] == [-3.0, 0.0, 0.0]


@pytest.mark.parametrize("backend", IN_FP64)
@pytest.mark.parametrize("loss_type", [["dpop"], ["dpo_norm"], ["slic", "sft"]])
def test_length_desensitised_losses(backend, loss_type):
    """The same loss of weighted sums; but lengths are whole, and so is what is no log-ratio: sft."""
    token_logps, ref_logps = (-torch.rand(13, dtype=torch.float64) for _ in range(2))
    factors = torch.tensor([1, 1, 1, 0.25, 0.25, 0.25, 0.25, 1, 1, 1, 1, 1, 1], dtype=torch.float64)
    cu_seqlens = pack(LD_LENGTHS)
    ref = segment_sums(factors * ref_logps, cu_seqlens).view(3, 3)
    out = pair_loss(token_logps, cu_seqlens, ref, loss_type=loss_type, ld_alpha=0.25, backend=backend)
    expected = pair_loss(factors * token_logps, cu_seqlens, ref, loss_type=loss_type[0], backend=backend)
    sft = 0.0
    if len(loss_type) == 2:
        sft = torch.stack([-token_logps[start : start + n].mean() for start, n in ((0, 2), (5, 2), (7, 4))])
    torch.testing.assert_close(out.losses, expected.losses + sft)
    torch.testing.assert_close(out.chosen_logps, expected.chosen_logps)
    torch.testing.assert_close(out.chosen_logratios, expected.chosen_logratios)


@pytest.mark.parametrize("ld_alpha", [-0.1, 1.5, math.nan])
def test_alpha_outside_its_range_is_refused(ld_alpha):
    with pytest.raises(ValueError, match=r"ld_alpha: expected None or a number in \[0, 1\], got"):
        pair_loss(torch.zeros(2), pack([0, 1, 1]), torch.zeros(1, 3), ld_alpha=ld_alpha)
    with pytest.raises(ValueError, match=r"ld_alpha: expected None with loss_type \['sft'\]"):
        pair_loss(torch.zeros(2), pack([0, 1, 1]), None, loss_type="sft", ld_alpha=0.5)


def test_wpo_weights_by_hand():
    """Answers of 1 + 2 and 1 + 1 tokens: exp((-1 - 2) / 3) exp((-1 - 4) / 2); an answer without tokens weighs 1."""
    sums = torch.tensor([[-1.0, -2.0, -4.0], [0.0, 0.0, -3.0]], requires_grad=True)
    weights = wpo_weights(sums, pack([1, 2, 1, 0, 0, 2]))
    assert weights.tolist() == pytest.approx([math.exp(-3.5), math.exp(-1.5)], rel=1e-6)
    assert not weights.requires_grad


@pytest.mark.parametrize("backend", IN_FP64)
def test_whole_reference_sums_give_the_same_losses(backend):
    token_logps, ref = -torch.rand(9, dtype=torch.float64), torch.randn(1, 3, dtype=torch.float64)
    whole = torch.stack([torch.zeros(1), ref[:, 0] + ref[:, 1], ref[:, 0] + ref[:, 2]], dim=-1).double()
    cu_seqlens = pack([4, 3, 2])
    by_segment = pair_loss(token_logps, cu_seqlens, ref, backend=backend)
    by_answer = pair_loss(token_logps, cu_seqlens, whole, backend=backend)
    for ours, theirs in zip(by_segment, by_answer, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", IN_FP64)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_gradcheck(backend, loss_type):
    token_logps = torch.randn(14, dtype=torch.float64, requires_grad=True)
    # the first token and the last two belong to no segment
    cu_seqlens = 1 + pack([2, 0, 3, 0, 4, 2])
    ref = torch.randn(2, 3, dtype=torch.float64)

    def function(token_logps):
        return pair_loss(token_logps, cu_seqlens, ref, loss_type=loss_type, backend=backend).losses

    assert torch.autograd.gradcheck(function, token_logps)


@pytest.mark.parametrize("backend", IN_FP64)
def test_shared_tokens_cancel_exactly(backend):
    # log-probs of a size where fp32 sums of whole answers would lose the difference of the tails
    shared = torch.full((2000,), -7.3)
    tails = torch.tensor([-1e-4, -3e-4])
    out = pair_loss(torch.cat([shared, tails]), pack([2000, 1, 1]), torch.zeros(1, 3), backend=backend)
    assert out.margins.item() == (tails[0] - tails[1]).item()


@pytest.mark.parametrize("backend", IN_FP64)
def test_step_zero_is_exactly_the_tie(backend):
    token_logps = (-torch.rand(300) * 5).requires_grad_()
    cu_seqlens = pack([100, 90, 110])
    ref = segment_sums(token_logps.detach(), cu_seqlens, backend=backend).view(1, 3)
    out = pair_loss(token_logps, cu_seqlens, ref, backend=backend)
    assert out.chosen_logratios.item() == 0.0
    out.losses.sum().backward()
    # slope 0 at the tie: DPO's first gradient, not 51 times that
    assert torch.equal(token_logps.grad[:100], torch.zeros(100))
    assert torch.equal(token_logps.grad[100:190], torch.full((90,), -0.15))


@pytest.mark.parametrize("backend", IN_FP64)
def test_no_pairs(backend):
    out = pair_loss(torch.zeros(0), torch.zeros(1, dtype=torch.int32), torch.zeros(0, 3), backend=backend)
    assert all(value.shape == (0,) for value in out)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"token_logps": torch.zeros(5).bfloat16()}, "token_logps: expected float32 or float64, got torch.bfloat16"),
        ({"cu_seqlens": torch.tensor([0, 2, 1, 5])}, "cu_seqlens: expected non-decreasing bounds"),
        ({"cu_seqlens": torch.tensor([0, 2, 3, 6])}, r"cu_seqlens: expected non-decreasing bounds within \[0, 5\]"),
        (
            {"cu_seqlens": torch.tensor([0, 2, 5])},
            r"ref_segment_logps: expected shape \[B, 3\] with cu_seqlens \[3B \+ 1\]",
        ),
        ({"ref_segment_logps": torch.zeros(1, 2)}, r"ref_segment_logps: expected shape \[B, 3\]"),
        ({"loss_type": "sigmoids"}, "loss_type: expected one of .* Did you mean .sigmoid.\\?"),
        ({"beta": -1.0}, "beta: expected"),
    ],
)
def test_bad_input_is_named(kwargs, message):
    arguments = {
        "token_logps": torch.zeros(5),
        "cu_seqlens": torch.tensor([0, 2, 3, 5]),
        "ref_segment_logps": torch.zeros(1, 3),
        **kwargs,
    }
    with pytest.raises(ValueError, match=message):
        pair_loss(**arguments)
