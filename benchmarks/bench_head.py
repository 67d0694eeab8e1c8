"""Hidden states x head -> token log-probs, forward and backward: ours against eager PyTorch and its own two GEMMs.

    make bench                          every case
    pytest benchmarks -k frozen         some

Logits are peaked as a language model's are, never zeros. A candidate whose log-probs or gradients are off is not timed.
"""

import pytest
import torch

from dpop_kernels import linear_token_logps
from dpop_kernels.backends import reference

# tokens, hidden size, vocabulary; the device decides which are run
SHAPES = {
    "cpu": {"small": (512, 512, 32000)},
    "cuda": {"llama-3-8b": (8192, 4096, 128256), "gemma-2-9b": (4096, 3584, 256000)},
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def inputs(shape):
    num_tokens, hidden_size, vocab_size = SHAPES[DEVICE][shape]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocab_size, hidden_size, generator=generator) / hidden_size**0.5
    target_ids = torch.randint(vocab_size, (num_tokens,), generator=generator)
    hidden_states = torch.randn(num_tokens, hidden_size, generator=generator)
    # from hopeless to all but certain: 1 - p from 1 to about 1e-6
    hidden_states += weight[target_ids] * torch.linspace(0, 24, num_tokens).unsqueeze(-1)
    return hidden_states.to(DEVICE, DTYPE), weight.to(DEVICE, DTYPE), target_ids.to(DEVICE)


def eager(hidden_states, weight, target_ids):
    return reference.token_logps(hidden_states @ weight.T, target_ids)[0]


def two_gemms(hidden_states, weight, target_ids):
    """The floor of a frozen head: its two matrix products and nothing else."""
    return ((hidden_states @ weight.T) @ weight).sum(dim=-1)


CANDIDATES = {"ours": linear_token_logps, "eager": eager, "two_gemms": two_gemms}


def step(function, hidden_states, weight, target_ids):
    hidden_states = hidden_states.detach().requires_grad_()
    logps = function(hidden_states, weight, target_ids)
    if function is not two_gemms:
        logps.sum().backward()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return logps.detach(), hidden_states.grad


@pytest.mark.parametrize("candidate", CANDIDATES)
@pytest.mark.parametrize("shape", SHAPES[DEVICE])
def test_frozen_forward_backward(benchmark, shape, candidate):
    hidden_states, weight, target_ids = inputs(shape)
    function = CANDIDATES[candidate]
    if function is not two_gemms:
        check(function, hidden_states[::64], weight, target_ids[::64])
    else:
        weight = weight.detach()
    with torch.set_grad_enabled(function is not two_gemms):
        benchmark.pedantic(step, (function, hidden_states, weight, target_ids), rounds=5, warmup_rounds=1)


def check(function, hidden_states, weight, target_ids):
    """
    Raises:
        AssertionError: log-probs or gradient differ from fp64 by more than eager's rounding in this dtype explains.
    """
    logps, grad = step(function, hidden_states, weight, target_ids)
    truth, true_grad = step(
        lambda h, w, y: reference.linear_token_logps(h, w, y)[0], hidden_states.double(), weight.double(), target_ids
    )
    bound = 5e-2 if torch.bfloat16 == DTYPE else 1e-4
    assert (logps - truth).abs().max() <= bound
    assert (grad - true_grad).norm() <= bound * true_grad.norm()
