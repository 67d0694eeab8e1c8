"""What candidates are held against: the reference backend in fp64, and how much eager itself errs in their dtype."""

import torch

from dpop_kernels.backends import reference


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


def relative_error(candidate, truth):
    """‖candidate - truth‖ / ‖truth‖ in fp64; NaN never passes a bound."""
    truth = truth.double()
    return float((candidate.double() - truth).norm() / truth.norm().clamp_min(1e-300))
