"""What every backend of the registry owes by logits and on sums of segments, through the public functions.

By a head they are held to it in `test_linear_logps`, with an adapter in `test_lora_head`, under the losses in
`test_pair_loss` and `test_loss_formulas`.
"""

import math

import pytest
import torch
from backends import EVERY, IN_FP64, WITHOUT_TILES, module_of
from rounding import CONTRACT_NATS, GRADIENT, stored
from truth import assert_statistics, peaked_logits, reference_logps, relative_error, value_and_grads

from dpop_kernels import token_logps
from dpop_kernels.backends import chunked_tiles, reference
from dpop_kernels.logps.vocab_parallel import vocab_parallel_token_logps
from dpop_kernels.losses.pair_loss import segment_sums
from dpop_kernels.outputs import TokenStats

pytestmark = pytest.mark.usefixtures("on_its_device")


@pytest.mark.parametrize("backend", EVERY)
def test_logits_by_hand(backend):
    """log p + c has the softmax p: 2, 5, 1 and 4, 1, 3 eighths. The gradient is g (1[y] - p)."""
    probs = torch.tensor([[2.0, 5.0, 1.0], [4.0, 1.0, 3.0]]).double() / 8
    logits = (probs.log() + torch.tensor([[3.0], [-1.0]])).float().requires_grad_()
    logps, stats = token_logps(logits, torch.tensor([0, 0]), return_stats=True, backend=backend)
    expected = [math.log(2 / 8), math.log(4 / 8)]
    assert logps.dtype == torch.float32
    assert logps.tolist() == pytest.approx(expected, rel=0, abs=CONTRACT_NATS)
    assert_statistics(
        stats,
        TokenStats(
            entropy=-(probs * probs.log()).sum(-1),
            mean_logit=torch.tensor([3 + math.log(10 / 8**3) / 3, -1 + math.log(12 / 8**3) / 3]),
            is_top1=torch.tensor([False, True]),
            log_sum_sq_probs=torch.tensor([math.log((4 + 25 + 1) / 64), math.log((16 + 1 + 9) / 64)]),
        ),
    )
    logps.backward(torch.tensor([-2.0, 3.0]))
    expected_grad = torch.tensor([[-1.5, 1.25, 0.25], [1.5, -0.375, -1.125]])
    assert relative_error(logits.grad, expected_grad) <= GRADIENT


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_equal_fp64(backend, dtype, monkeypatch):
    """Rows of no round length, in torch taken four at a time; also where the gradient may replace the logits."""
    monkeypatch.setattr(chunked_tiles, "GROUP_ELEMENTS", 4 * 307)
    logits, target_ids = peaked_logits(11, 307, dtype)
    grad_output = torch.linspace(-2, 3, 11) + 0.01
    expected, (expected_grad,) = value_and_grads(
        lambda logits: reference_logps(logits, target_ids), [logits.double()], grad_output
    )
    _, stats = token_logps(logits, target_ids, return_stats=True, backend=backend)
    assert_statistics(stats, reference.token_logps(logits.double(), target_ids, with_stats=True)[1])
    # what Triton's interpreter cuts off, a GPU rounds
    bound = stored(dtype, cut=module_of(backend).RUNS_TRITON) if dtype != torch.float32 else GRADIENT
    for inplace_backward in (False, True):

        def function(logits, inplace=inplace_backward):
            # a product is nobody's leaf: its storage may be taken
            return token_logps(1 * logits, target_ids, inplace_backward=inplace, backend=backend)

        logps, (grad,) = value_and_grads(function, [logits], grad_output)
        assert logps.dtype == torch.float32
        assert (logps - expected).abs().max() <= CONTRACT_NATS
        assert grad.dtype == dtype
        assert relative_error(grad, expected_grad) <= bound


@pytest.mark.parametrize("backend", IN_FP64)
def test_fp64_stays_fp64(backend):
    logits, target_ids = peaked_logits(4, 11, torch.float64)
    token = -torch.rand(9, dtype=torch.float64)
    for function, tensor in (
        (lambda logits: token_logps(logits, target_ids, backend=backend), logits),
        (lambda token: segment_sums(token, torch.tensor([1, 3, 3, 8]), backend=backend), token),
    ):
        assert function(tensor).dtype == torch.float64
        assert torch.autograd.gradcheck(function, tensor.requires_grad_())


@pytest.mark.parametrize("backend", EVERY)
def test_no_tokens(backend):
    logits = torch.zeros(0, 7, requires_grad=True)
    logps, stats = token_logps(logits, torch.zeros(0, dtype=torch.int64), return_stats=True, backend=backend)
    logps.sum().backward()
    assert all(values.shape == (0,) for values in (logps, *stats))
    assert logits.grad.shape == (0, 7)


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_segment_sums_by_hand(backend, dtype):
    """The first token and the last two belong to no segment, and the second segment is empty: 2 + 3, 0, 4 + 5 + 6."""
    token = -torch.arange(1.0, 9.0).requires_grad_()
    sums = segment_sums(token, torch.tensor([1, 3, 3, 6], dtype=dtype), backend=backend)
    assert sums.dtype == torch.float32
    assert sums.tolist() == [-5.0, 0.0, -15.0]
    (grad,) = torch.autograd.grad(sums, token, torch.tensor([2.0, 7.0, -3.0]))
    assert grad.tolist() == [0.0, 2.0, 2.0, -3.0, -3.0, -3.0, 0.0, 0.0]
    assert segment_sums(token, torch.tensor([4], dtype=dtype), backend=backend).shape == (0,)


@pytest.mark.parametrize("backend", WITHOUT_TILES)
def test_a_slice_of_a_head_needs_tiles(backend):
    """A softmax over the slice alone would look like one over the vocabulary."""
    inputs = torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=f"one with tiles for a sliced head, got '{backend}'.* slices put together"):
        vocab_parallel_token_logps(*inputs, vocab_start=0, backend=backend)
