"""A function over tiles of tokens is the function: values, gradients, random numbers, precision; and what it holds."""

import pytest
import torch
from dpop_trainer.models.token_tiles import over_tiles
from rounding import EQUAL, stored
from torch import nn

TILES = [slice(0, 3), slice(3, 6), slice(6, 7)]


def parameters(*shapes, dtype=torch.float64):
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("unused", [False, True])
def test_gradients_of_inputs_and_weights(unused):
    """States, indices and weights, as experts are given them; a parameter that takes no part has no gradient."""
    inner, outer, table, other = parameters((4, 5), (5, 4), (3, 4), (2,))
    states, chosen, scale = torch.randn(7, 4).double(), torch.randint(3, (7, 1)), torch.rand(7, 1).double()
    grad = torch.randn(7, 4).double()

    def function(states, chosen, scale):
        return (torch.tanh(states @ inner) * scale) @ outer + table[chosen[:, 0]]

    def gradients(run):
        sources = [states.clone().requires_grad_(), scale.clone().requires_grad_()]
        output = run(sources[0], chosen, sources[1])
        weights = [inner, outer, table]
        return output.detach(), *torch.autograd.grad(output, [*sources, *weights], grad)

    trained = [other, inner, outer, table] if unused else [inner, outer, table]
    tiled = gradients(lambda *tensors: over_tiles(function, tensors, TILES, lambda: trained))
    for found, expected in zip(tiled, gradients(function), strict=True):
        assert relative(found, expected) <= EQUAL
    with torch.no_grad():
        assert not over_tiles(function, (states, chosen, scale), TILES, lambda: trained).requires_grad


def test_a_weight_is_told_once_of_its_gradient():
    """DDP and FSDP send a gradient on as soon as it is there: it is all of it."""
    (weight,) = parameters((4, 4))
    told = []
    weight.register_post_accumulate_grad_hook(lambda parameter: told.append(parameter.grad.clone()))
    states = torch.randn(7, 4).double()
    over_tiles(lambda part: part @ weight, (states,), TILES, lambda: [weight]).sum().backward()
    (found,) = told
    assert relative(found, states.sum(0).unsqueeze(1).expand(4, 4)) <= EQUAL


def test_random_numbers_are_drawn_again():
    weight = parameters((4, 4))[0]
    drop = nn.Dropout(0.5)
    states = torch.randn(7, 4).double()

    def function(part):
        return drop(part @ weight)

    def gradient(run):
        torch.manual_seed(3)
        run().square().sum().backward()
        found, weight.grad = weight.grad, None
        return found, torch.rand(1)

    tiled, after = gradient(lambda: over_tiles(function, (states,), TILES, lambda: [weight], draws=True))
    # the same numbers, in the same order, by autograd alone
    expected, after_plain = gradient(lambda: torch.cat([function(states[tile]) for tile in TILES]))
    assert relative(tiled, expected) <= EQUAL
    assert after == after_plain  # the backward has put back what it found


def test_sums_of_16_bits_are_rounded_once():
    """160 tiles of one token, whose products are positive and multiples of one matrix: each is rounded to bf16, by u at
    most, and so is their sum; added up in bf16 it would stop growing at 2^8 of them."""
    (weight,) = parameters((4, 3), dtype=torch.bfloat16)
    states = (torch.rand(160, 1) + 0.5).bfloat16() * torch.tensor([1.0, 1.25, 1.5, 1.75]).bfloat16()
    grad = torch.rand(160, 1).bfloat16() * torch.tensor([1.0, 1.5, 1.75]).bfloat16()
    tiles = [slice(t, t + 1) for t in range(160)]
    over_tiles(lambda part: part @ weight, (states,), tiles, lambda: [weight]).backward(grad)
    assert weight.grad.dtype == torch.bfloat16
    truth = states.double().T @ grad.double()
    each = sum((states[tile].double().T @ grad[tile].double()).norm() for tile in tiles)
    assert float((weight.grad.double() - truth).norm()) <= stored(torch.bfloat16) * float(truth.norm() + each)


def test_autocast_is_the_forward_s():
    """In fp32 weights that autocast rounds: the tiles' products are of 16 bits in the backward too, and what autocast
    has rounded without gradient is not used again where there is one."""
    (weight,) = parameters((4, 4), dtype=torch.float32)
    states = torch.randn(7, 4)
    dtypes = []

    def function(part):
        output = part @ weight
        dtypes.append(output.dtype)
        return output

    with torch.autocast("cpu", torch.bfloat16):
        tiled = over_tiles(function, (states,), TILES, lambda: [weight])
        plain = states @ weight
    assert tiled.dtype == torch.bfloat16
    grad = torch.randn(7, 4).bfloat16()
    plain.backward(grad)
    expected, weight.grad = weight.grad, None
    tiled.backward(grad)
    assert dtypes == [torch.bfloat16] * 6
    assert weight.grad.dtype == torch.float32
    # the factors are the same; one product rounded once against three, each rounded once
    rows = states.bfloat16().double()
    each = sum((rows[tile].T @ grad[tile].double()).norm() for tile in TILES)
    bound = stored(torch.bfloat16) * float(expected.double().norm() + each)
    assert float((weight.grad - expected).double().norm()) <= bound


def test_views_of_one_number():
    """A gradient that is one number for all entries, as of a sum, and states that are a view."""
    (weight,) = parameters((4, 4))
    states = torch.randn(1, 4).double().expand(7, 4).requires_grad_()
    output = over_tiles(lambda part: part @ weight, (states,), TILES, lambda: [weight])
    (found,) = torch.autograd.grad(output.sum(), [states])
    assert relative(found, weight.detach().sum(1).expand(7, 4)) <= EQUAL
