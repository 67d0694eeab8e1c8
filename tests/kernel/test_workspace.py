"""What a head holds while it works is what `TileBounds` says, which plans of memory are made from."""

import pytest
import torch

from benchmarks.measure import peak_bytes
from dpop_kernels import linear_token_logps
from dpop_kernels.backends import bounds
from dpop_kernels.logps.head import LogitTransform

TRANSFORMS = {
    "plain": LogitTransform(),
    "scaled": LogitTransform(scale=0.5),
    "softcapped": LogitTransform(softcap=30.0),
}
# two blocks of 512 rows, two of columns, groups of 64 rows and more
NUM_TOKENS, VOCAB_SIZE, HIDDEN_SIZE = 1024, 5000, 64
# sums, ids, masks and results: a dozen numbers of a row, none larger than eight bytes
ROW_BYTES = 12 * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("with_stats", [False, True], ids=["logps", "stats"])
@pytest.mark.parametrize("with_gradient", [False, True], ids=["reference", "frozen"])
def test_forward_holds_what_is_planned(dtype, transform, with_stats, with_gradient):
    of_logits = TRANSFORMS[transform]
    hidden_states = torch.randn(NUM_TOKENS, HIDDEN_SIZE).to(dtype).requires_grad_(with_gradient)
    weight, target_ids = torch.randn(VOCAB_SIZE, HIDDEN_SIZE).to(dtype), torch.randint(VOCAB_SIZE, (NUM_TOKENS,))
    kept = []

    def forward():
        kept[:] = []
        logps = linear_token_logps(
            hidden_states,
            weight,
            target_ids,
            logit_scale=of_logits.scale,
            softcap=of_logits.softcap,
            return_stats=with_stats,
        )
        kept.append(logps)

    planned = bounds.CPU.forward_bytes(
        NUM_TOKENS,
        VOCAB_SIZE,
        HIDDEN_SIZE,
        dtype.itemsize,
        with_gradient=with_gradient,
        with_stats=with_stats,
        transform=of_logits,
    )
    if with_gradient:
        planned += NUM_TOKENS * HIDDEN_SIZE * dtype.itemsize  # the unit gradients, which stay
    forward()
    kept.clear()
    assert 0 <= peak_bytes(forward, torch.device("cpu")) - planned <= NUM_TOKENS * ROW_BYTES


def test_one_gradient_of_the_weight_is_made():
    """Of 64 rows the workspace is about a megabyte; W's gradient is ten, and a second one would show."""
    hidden_states, weight = torch.randn(64, 128, requires_grad=True), torch.randn(20000, 128, requires_grad=True)
    logps = linear_token_logps(hidden_states, weight, torch.randint(20000, (64,)))

    def backward():
        torch.autograd.grad(logps, (hidden_states, weight), torch.ones(64), retain_graph=True)

    planned = bounds.CPU.backward_bytes(64, 20000, 128, 4)
    gradients = (64 + 20000) * 128 * 4
    assert 0 <= peak_bytes(backward, torch.device("cpu")) - planned - gradients <= 64 * ROW_BYTES


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_backward_of_a_trainable_head_holds_what_is_planned(transform):
    of_logits = TRANSFORMS[transform]
    hidden_states = torch.randn(NUM_TOKENS, HIDDEN_SIZE, requires_grad=True)
    weight = torch.randn(VOCAB_SIZE, HIDDEN_SIZE, requires_grad=True)
    logps = linear_token_logps(
        hidden_states,
        weight,
        torch.randint(VOCAB_SIZE, (NUM_TOKENS,)),
        logit_scale=of_logits.scale,
        softcap=of_logits.softcap,
    )
    grad_logps = torch.randn(NUM_TOKENS)

    def backward():
        torch.autograd.grad(logps, (hidden_states, weight), grad_logps, retain_graph=True)

    planned = bounds.CPU.backward_bytes(NUM_TOKENS, VOCAB_SIZE, HIDDEN_SIZE, 4, transform=of_logits)
    gradients = (NUM_TOKENS + VOCAB_SIZE) * HIDDEN_SIZE * 4
    backward()
    assert 0 <= peak_bytes(backward, torch.device("cpu")) - planned - gradients <= NUM_TOKENS * ROW_BYTES
