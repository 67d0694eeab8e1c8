"""What candidates are held against: the reference backend in fp64, and how much eager itself errs in their dtype."""

import dataclasses
import sys

import torch
from rounding import CONTRACT_NATS

from dpop_kernels.backends import bounds, reference
from dpop_kernels.logps.head import Adapter, Head, LogitTransform


def peaked_logits(num_tokens, vocab_size, dtype=torch.float32, *, generator=None):
    """Logits as a language model has them, and targets drawn so that 1 - p spans from 1 to about 1e-7."""
    logits = torch.randn(num_tokens, vocab_size, generator=generator, dtype=torch.float32) * 2
    target_ids = torch.randint(vocab_size, (num_tokens,), generator=generator)
    boost = torch.linspace(0, 28, num_tokens)  # exp(28) against a sum of about V · exp(2)
    logits[torch.arange(num_tokens), target_ids] += boost
    return logits.to(dtype), target_ids


def head_inputs(num_tokens, vocab_size, hidden_size, dtype=torch.float32, *, generator=None):
    """Hidden states, weight and targets whose logits are peaked at the target for most tokens.

    Drawn on the CPU, so that they are the same on every device, and moved to torch's default device.
    """
    hidden_states = torch.randn(num_tokens, hidden_size, generator=generator, device="cpu")
    weight = torch.randn(vocab_size, hidden_size, generator=generator, device="cpu") / hidden_size**0.5
    target_ids = torch.randint(vocab_size, (num_tokens,), generator=generator, device="cpu")
    direction = weight[target_ids] / weight[target_ids].square().sum(-1, keepdim=True)
    hidden_states = hidden_states + direction * torch.linspace(0, 32, num_tokens, device="cpu").unsqueeze(-1)
    device = torch.get_default_device()
    return hidden_states.to(device, dtype), weight.to(device, dtype), target_ids.to(device)


def value_and_grads(function, inputs, grad_output):
    """function(*inputs) and the gradients of its inputs for a given output gradient."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    return output.detach(), torch.autograd.grad(output, leaves, grad_output.to(output.dtype))


def reference_logps(logits, target_ids):
    return reference.token_logps(logits, target_ids)[0]


def true_head_logps(
    hidden_states,
    weight,
    target_ids,
    *,
    bias=None,
    states=None,
    low_rank_weight=None,
    logit_scale=1.0,
    softcap=None,
    with_stats=False,
):
    """The definition: log-probs and statistics, or None."""
    adapter = None if states is None else Adapter(states, low_rank_weight)
    head = Head(weight, bias, LogitTransform(logit_scale, softcap), adapter)
    return reference.head_token_logps(hidden_states, head, target_ids, with_stats=with_stats)


def assert_statistics(stats, truth):
    """`TokenStats` within the contract of `truth`, in fp64. The derivative of log Σ p² by a logit, 2 (p² / Σ p² - p),
    is up to twice a log-prob's, and so is its error."""
    assert not any(value.requires_grad for value in stats)
    assert stats.is_top1.dtype == torch.bool
    assert torch.equal(stats.is_top1, truth.is_top1)
    for name, bound in (("entropy", 1), ("mean_logit", 1), ("log_sum_sq_probs", 2)):
        error = (getattr(stats, name) - getattr(truth, name)).abs().max()
        assert error <= bound * CONTRACT_NATS, (name, error)


def set_tiles(monkeypatch, rows, columns, *, gradient_rows=None, pair_bytes=64 << 20):
    """Tiles so small that every loop turns, for torch's tiles and (columns to a power of two) for Triton's."""
    gradient_rows = gradient_rows or rows
    small = bounds.TileBounds(rows, columns, gradient_rows, gradient_bytes=1, pair_bytes=pair_bytes)
    monkeypatch.setattr(bounds, "CPU", small)
    launch = dataclasses.replace(
        bounds.LAUNCH,
        head_rows=rows,
        head_columns=1 << (columns.bit_length() - 1),
        block_h=32,
        grad_rows=gradient_rows,
        grad_tile_bytes=1,
        pair_tile_bytes=pair_bytes,
    )
    monkeypatch.setattr(bounds, "LAUNCH", launch)
    if "dpop_kernels.backends.fused_tiles" in sys.modules:
        monkeypatch.setattr(sys.modules["dpop_kernels.backends.fused_tiles"], "LAUNCH", launch)


def relative_error(candidate, truth):
    """‖candidate - truth‖ / ‖truth‖ in fp64; NaN never passes a bound."""
    truth = truth.double()
    return float((candidate.double() - truth).norm() / truth.norm().clamp_min(1e-300))
