"""Pairs whose losses can be worked out by hand, as `pair_loss` takes them, and what losses are made of."""

import math

import torch

from dpop_kernels.losses.formulas import LOSSES


def read_by(loss_type, **options):
    """Those of the options that the loss reads: the others would be refused."""
    return {name: value for name, value in options.items() if name == "beta" or name in LOSSES[loss_type].reads}


def one_pair(chosen_logratio, rejected_logratio, dtype=torch.float64):
    """A pair of one-token answers with these log-ratios -> token_logps (a leaf), cu_seqlens, ref_segment_logps."""
    token_logps = torch.tensor([-3.0, -4.0], dtype=dtype, requires_grad=True)
    ref = torch.tensor([[0.0, -3.0 - chosen_logratio, -4.0 - rejected_logratio]], dtype=dtype)
    return token_logps, torch.tensor([0, 0, 1, 2]), ref


def three_pairs():
    """One token each; Δw = 1, -2, 0.5 and Δl = -1, 3, 0; log π(y_w) - log π(y_l) = 4, 1, 2 -> as `one_pair`."""
    chosen, rejected = torch.tensor([-1.0, -3.0, -2.0]).double(), torch.tensor([-5.0, -4.0, -4.0]).double()
    ref = torch.stack([torch.zeros(3), chosen - torch.tensor([1, -2, 0.5]), rejected - torch.tensor([-1, 3, 0])], dim=1)
    token_logps = torch.stack([chosen, rejected], dim=1).flatten().requires_grad_()
    return token_logps, torch.tensor([0, 0, 1, 2, 2, 3, 4, 4, 5, 6]), ref


def batch_of(num_pairs, generator):
    lengths = torch.randint(1, 6, (3 * num_pairs,), generator=generator)
    token_logps = -torch.rand(int(lengths.sum()), dtype=torch.float64, generator=generator)
    return token_logps, lengths, -torch.rand(num_pairs, 3, dtype=torch.float64, generator=generator) * 3


def bounds(lengths):
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def nll(z):
    return math.log1p(math.exp(-z))


def log_odds(logp):
    probability = math.exp(logp)
    return math.log(probability / (1 - probability))
