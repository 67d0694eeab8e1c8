"""A head whose vocabulary is spread over two gloo ranks, held against the whole head in one process and in fp64."""

import math

import pytest
import torch
from backends import CPU, TILED
from counted import CountedProducts
from rounding import GRADIENT, stored
from sharded import run_ranks
from torch import distributed as dist
from truth import assert_statistics, head_inputs, relative_error, true_head_logps, value_and_grads

from dpop_kernels.backends import BACKENDS, bounds, chunked_tiles
from dpop_kernels.backends.protocol import RowResults
from dpop_kernels.logps.head import Adapter, Head, Shard
from dpop_kernels.logps.slices import combine_slices
from dpop_kernels.logps.tiling import tiled_token_logps
from dpop_kernels.logps.vocab_parallel import vocab_parallel_token_logps
from dpop_kernels.outputs import TokenStats

VOCAB_SIZE, NUM_TOKENS, HIDDEN_SIZE = 101, 24, 16
# bounds of the ranks' slices: even, uneven, one row only; of three ranks
SPLITS = {"even": (0, 51, 101), "uneven": (0, 90, 101), "one_row": (0, 1, 101), "thirds": (0, 34, 68, 101)}
OPTIONS = {"plain": {}, "scale_and_softcap": {"logit_scale": 0.5, "softcap": 6.0}}


def inputs_of(dtype):
    """The same on every rank. Targets lie in both slices, at their edges too; 1 - p goes down to 1e-7 and below."""
    hidden_states, weight, target_ids = head_inputs(NUM_TOKENS, VOCAB_SIZE, HIDDEN_SIZE, dtype)
    target_ids[:4] = torch.tensor([0, 50, 51, 100])
    return hidden_states, weight, torch.randn(VOCAB_SIZE).to(dtype), target_ids


def check_against_whole_head(rank, split, options, dtype, backend, frozen):
    start, end = SPLITS[split][rank : rank + 2]
    hidden_states, weight, bias, target_ids = inputs_of(dtype)
    grad = torch.linspace(-1, 1, NUM_TOKENS)

    def sliced(hidden_states, shard, bias_shard, **asked):
        if frozen:
            shard, bias_shard = shard.detach(), bias_shard.detach()
        where = {"vocab_start": start, "bias_shard": bias_shard, "backend": backend}
        return vocab_parallel_token_logps(hidden_states, shard, target_ids, **where, **options, **asked)

    def whole(hidden_states, weight, bias):
        return true_head_logps(hidden_states, weight, target_ids, bias=bias, **options)[0]

    leaves = [t.clone().requires_grad_() for t in (hidden_states, weight[start:end], bias[start:end])]
    logps = sliced(*leaves)
    grads = torch.autograd.grad(logps, leaves, grad.to(logps.dtype), allow_unused=True)
    expected, expected_grads = value_and_grads(whole, [t.double() for t in (hidden_states, weight, bias)], grad)
    torch.testing.assert_close(logps.detach().double(), expected, rtol=GRADIENT, atol=1e-9)
    bound = stored(dtype, times=2) if dtype == torch.bfloat16 else GRADIENT  # each slice, and their sum
    assert relative_error(grads[0], expected_grads[0]) <= bound
    # a confident token's own gradient is exact too, not only the sum's
    for candidate, truth in zip(grads[0], expected_grads[0], strict=True):
        assert relative_error(candidate, truth) <= (bound if dtype == torch.bfloat16 else 1e-4)
    if frozen:
        assert grads[1] is None
        assert grads[2] is None
    else:
        assert relative_error(grads[1], expected_grads[1][start:end]) <= bound
        assert relative_error(grads[2], expected_grads[2][start:end]) <= bound
    everyones = [torch.empty_like(logps) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, logps.detach())
    assert all(torch.equal(one, everyones[0]) for one in everyones)
    again, stats = sliced(*leaves, return_stats=True)
    assert torch.equal(again, logps)
    inputs = [t.double() for t in (hidden_states, weight)]
    truth = true_head_logps(*inputs, target_ids, bias=bias.double(), with_stats=True, **options)[1]
    assert_statistics(stats, truth)
    assert torch.equal(torch.autograd.grad(again, leaves[0], grad.to(again.dtype))[0], grads[0])


def check_own_part_of_the_gradient(rank):
    start, end = SPLITS["uneven"][rank : rank + 2]
    hidden_states, weight, _, target_ids = inputs_of(torch.float64)
    grads = []
    for summed in (True, False):
        leaf = hidden_states.clone().requires_grad_()
        logps = vocab_parallel_token_logps(
            leaf, weight[start:end], target_ids, vocab_start=start, sum_grad_hidden=summed
        )
        grads += torch.autograd.grad(logps.sum(), leaf)
    dist.all_reduce(grads[1])
    torch.testing.assert_close(*grads)


def check_low_rank_slice(rank):
    start, end = SPLITS["uneven"][rank : rank + 2]
    hidden_states, weight, _, target_ids = inputs_of(torch.float64)
    states, low_rank = torch.randn(NUM_TOKENS, 3).double(), torch.randn(VOCAB_SIZE, 3).double() / 4
    leaves = [t.clone().requires_grad_() for t in (hidden_states, states, low_rank[start:end])]
    shard = Shard(start, dist.group.WORLD)
    head = Head(weight[start:end], adapter=Adapter(leaves[1], leaves[2]), shard=shard)
    logps, _ = tiled_token_logps(chunked_tiles, leaves[0], head, target_ids)
    grads = torch.autograd.grad(logps.sum(), leaves)
    expected, expected_grads = value_and_grads(
        lambda h, a, b: true_head_logps(torch.cat([h, a], 1), torch.cat([weight, b], 1), target_ids)[0],
        [hidden_states, states, low_rank],
        torch.ones(NUM_TOKENS),
    )
    torch.testing.assert_close(logps, expected)
    torch.testing.assert_close(grads, (*expected_grads[:2], expected_grads[2][start:end]))


def check_trained_entropies(rank):
    """The entropies' own gradient: a frozen head makes its tiles again for it, and else has its two products."""
    start, end = SPLITS["uneven"][rank : rank + 2]
    hidden_states, weight, _, target_ids = inputs_of(torch.float64)
    head = Head(weight[start:end], shard=Shard(start, dist.group.WORLD))
    grad = torch.linspace(-1, 1, NUM_TOKENS, dtype=torch.float64)

    def entropies(hidden_states):
        log_probs = (hidden_states @ weight.T).log_softmax(-1)
        return -(log_probs.exp() * log_probs).sum(-1)

    _, (expected,) = value_and_grads(entropies, [hidden_states], grad)
    for trains in ("perhaps", "always"):
        leaf = hidden_states.clone().requires_grad_()
        _, stats = tiled_token_logps(chunked_tiles, leaf, head, target_ids, with_stats=True, trains_entropy=trains)
        (found,) = torch.autograd.grad(stats.entropy, leaf, grad)
        torch.testing.assert_close(found, expected)


def check_products(rank):
    """Of a slice: a frozen one takes two, as a whole head does, with statistics or without."""
    hidden_states, weight, _, target_ids = inputs_of(torch.float32)
    leaf, shard = hidden_states.requires_grad_(), weight[slice(*SPLITS["uneven"][rank : rank + 2])]
    for trainable, expected in ((False, 2), (True, 4)):
        with CountedProducts(NUM_TOKENS, HIDDEN_SIZE, shard.shape[0]) as counted:
            logps, _ = vocab_parallel_token_logps(
                leaf,
                shard.clone().requires_grad_(trainable),
                target_ids,
                vocab_start=SPLITS["uneven"][rank],
                return_stats=True,
            )
            logps.sum().backward()
        assert counted.products == pytest.approx(expected)


def check_wrong_slices(rank):
    hidden_states, weight, _, target_ids = inputs_of(torch.float32)
    shard = weight[:60]  # on both ranks: ids above have no owner
    with pytest.raises(ValueError, match=r"exactly one rank's slice of the vocabulary, got [02] for token 0"):
        vocab_parallel_token_logps(hidden_states, shard, target_ids, vocab_start=0)


def check_all(rank):
    bounds.CPU = bounds.TileBounds(7, 32, gradient_rows=7, gradient_bytes=1, pair_bytes=1)
    for split in ("even", "uneven", "one_row"):
        check_against_whole_head(rank, split, {}, torch.float32, "chunked", frozen=False)
    for options in OPTIONS.values():
        check_against_whole_head(rank, "uneven", options, torch.float64, "chunked", frozen=False)
        check_against_whole_head(rank, "even", options, torch.float32, "chunked", frozen=True)
    check_against_whole_head(rank, "uneven", {}, torch.bfloat16, "auto", frozen=True)
    for backend in TILED:
        if BACKENDS[backend].why_not(CPU, torch.float32) is None:
            options = OPTIONS["scale_and_softcap"]
            check_against_whole_head(rank, "uneven", options, torch.float32, backend, frozen=False)
    check_own_part_of_the_gradient(rank)
    check_low_rank_slice(rank)
    check_trained_entropies(rank)
    check_products(rank)
    check_wrong_slices(rank)


@pytest.mark.forked
def test_two_ranks_equal_the_whole_head():
    run_ranks(check_all)


def check_thirds(rank):
    for frozen in (False, True):
        check_against_whole_head(rank, "thirds", OPTIONS["scale_and_softcap"], torch.float64, "chunked", frozen=frozen)


@pytest.mark.forked
def test_three_ranks_equal_the_whole_head():
    run_ranks(check_thirds, world_size=3)


def test_combination_keeps_confident_tokens_and_unlikely_slices(monkeypatch):
    # two slices by hand: log-probs within the owner, normalisers e^0 and e^d  ->  log p = logp - log(1 + e^d)
    cases = [(-1e-9, -20.0), (-2.0, 0.0), (-3.0, 800.0), (-0.5, -torch.inf)]
    owner = torch.tensor([[0.0, logp, 1.0] for logp, _ in cases], dtype=torch.float64).T
    other = torch.tensor([[d, 0.0, 0.0] for _, d in cases], dtype=torch.float64).T
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)

    def gather(out, mine, group):
        for slot, rows in zip(out, (owner, other), strict=True):
            slot.copy_(rows)

    monkeypatch.setattr(dist, "all_gather", gather)
    found = combine_slices(RowResults(owner[1], owner[0], None, None, None), owner[2] > 0, 1, "any")
    expected = [-1e-9 - math.log1p(math.exp(-20)), -2 - math.log(2), -3 - 800, -0.5]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found.logps, expected, rtol=1e-8, atol=0)
    torch.testing.assert_close(found.lse, expected.neg() + owner[1], rtol=1e-8, atol=0)
    others = torch.tensor([math.exp(-20) / (1 + math.exp(-20)), 0.5, 1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(found.other_mass, others, rtol=1e-8, atol=0)


def test_statistics_of_two_slices_by_hand(monkeypatch):
    """p = (1/2, 1/4) and (1/8, 1/8): logits -log 2, -2 log 2, -3 log 2 twice, the first one the target."""
    ln2 = math.log(2.0)

    def slice_of(entropy, mean_logit, is_top1, sum_squares, lse, largest):
        row = [torch.tensor([value], dtype=torch.float64) for value in (entropy, mean_logit, math.log(sum_squares))]
        stats = TokenStats(row[0], row[1], torch.tensor([is_top1]), row[2])
        values = [torch.tensor([value], dtype=torch.float64) for value in (0.0, lse, largest)]
        return RowResults(values[0], values[1], stats, None, None, values[2])

    # within (2/3, 1/3) the entropy is log 3 - 2/3 log 2; within (1/2, 1/2) it is log 2
    first = slice_of(math.log(3) - 2 / 3 * ln2, -1.5 * ln2, True, 5 / 9, math.log(3 / 4), -ln2)
    second = slice_of(ln2, -3 * ln2, True, 1 / 2, math.log(1 / 4), -3 * ln2)
    sent = []
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)

    def gather(out, mine, group):
        sent.append(mine)
        for slot, rows in zip(out, (sent[0], sent[-1]), strict=True):
            slot.copy_(rows)

    monkeypatch.setattr(dist, "all_gather", gather)
    with pytest.raises(ValueError, match="exactly one rank's slice"):  # alone twice
        combine_slices(first, torch.tensor([True]), 2, "any")
    stats = combine_slices(second, torch.tensor([False]), 2, "any").stats
    # 1/2 log 2 + 1/4 log 4 + 1/4 log 8; -(1 + 2 + 3 + 3)/4 log 2; 1/4 + 1/16 + 2/64
    expected = [7 / 4 * ln2, -9 / 4 * ln2, 1.0, math.log(11 / 32)]
    assert [float(value) for value in stats] == pytest.approx(expected, rel=1e-14)
