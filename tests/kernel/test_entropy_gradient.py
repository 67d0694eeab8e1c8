"""An entropy that is trained on beside the log-probs, dH/dz = -p (log p + H), and a weight in a longer dtype.

The bounds are those of log-probs: a term p (log p + H) errs by p (1 + |log p + H|) δz, one of p alone by p δz.
"""

import math

import pytest
import torch
from backends import IN_FP64, ON_CPU, WITH_TILES, module_of
from counted import CountedProducts
from rounding import GRADIENT, stored
from truth import head_inputs, relative_error, set_tiles, value_and_grads

from dpop_kernels.logps.head import PLAIN, Adapter, Head, LogitTransform
from dpop_kernels.logps.linear import head_token_logps

N, V, H = 9, 130, 24  # the interpreter's time goes by rows times tiles of columns, so both are few
CAPPED = LogitTransform(1.5, softcap=12.0)
WANTED = {"both": (True, True), "entropy": (False, True), "log_probs": (True, False)}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Two blocks of rows by two of columns (three in Triton), the last ones ragged."""
    set_tiles(monkeypatch, rows=5, columns=96)


def scores(inputs, target_ids, wanted, *, transform=PLAIN, trains_entropy="perhaps", backend):
    """Σ g · log-probs + Σ g' · entropies of what is wanted, for hidden states, weight, bias and an adapter or not."""
    hidden_states, weight, bias, *adapter = inputs
    head = Head(weight, bias, transform, Adapter(*adapter) if adapter else None)
    logps, stats = head_token_logps(
        hidden_states, head, target_ids, with_stats=True, trains_entropy=trains_entropy, backend=backend
    )
    num_tokens = len(target_ids)
    terms = (
        logps @ torch.linspace(-2, 3, num_tokens, dtype=logps.dtype),
        stats.entropy @ torch.linspace(1, -2, num_tokens, dtype=logps.dtype),
    )
    return sum(term for term, is_wanted in zip(terms, wanted, strict=True) if is_wanted)


def head_of(kind, dtype=torch.float32, shape=(N, V, H)):
    """Hidden states, weight, bias and for "lora" an adapter's two tensors; targets; which of them are trained."""
    hidden_states, weight, target_ids = head_inputs(*shape, dtype)
    inputs = [hidden_states, weight, torch.randn(shape[1], dtype=dtype) / 4]
    if kind == "lora":
        inputs += [torch.randn(shape[0], 3, dtype=dtype), torch.randn(shape[1], 3, dtype=dtype) / 4]
    trained = {"frozen": [0], "trainable": [0, 1, 2], "lora": [0, 3, 4], "hidden_alone_is_not": [1, 2]}[kind]
    return inputs, target_ids, trained


def value_and_trained_grads(inputs, trained, function):
    def of_trained(*leaves):
        replaced = dict(zip(trained, leaves, strict=True))
        return function([replaced.get(i, tensor) for i, tensor in enumerate(inputs)])

    return value_and_grads(of_trained, [inputs[i] for i in trained], torch.tensor(1.0))


def check_against_fp64(kind, wanted, *, transform, trains_entropy, backend):
    inputs, target_ids, trained = head_of(kind)
    options = {"wanted": WANTED[wanted], "transform": transform}
    expected, expected_grads = value_and_trained_grads(
        [tensor.double() for tensor in inputs],
        trained,
        lambda inputs: scores(inputs, target_ids, **options, backend="reference"),
    )
    value, grads = value_and_trained_grads(
        inputs,
        trained,
        lambda inputs: scores(inputs, target_ids, **options, trains_entropy=trains_entropy, backend=backend),
    )
    assert relative_error(value, expected) <= GRADIENT
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert relative_error(grad, expected_grad) <= GRADIENT


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("kind", ["frozen", "trainable", "lora", "hidden_alone_is_not"])
@pytest.mark.parametrize("transform", [PLAIN, CAPPED], ids=["plain", "softcapped"])
def test_equals_fp64(kind, wanted, transform):
    for trains_entropy in ("perhaps", "always"):
        check_against_fp64(kind, wanted, transform=transform, trains_entropy=trains_entropy, backend="chunked")


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("kind", ["frozen", "trainable"])
def test_every_backend_equals_fp64(backend, kind):
    check_against_fp64(kind, "both", transform=CAPPED, trains_entropy="perhaps", backend=backend)


@pytest.mark.parametrize("kind", ["frozen", "trainable", "lora"])
@pytest.mark.parametrize("backend", IN_FP64)
def test_gradcheck(backend, kind):
    inputs, target_ids, trained = head_of(kind, torch.float64, (6, 11, 5))
    leaves = [inputs[i].requires_grad_() for i in trained]

    def function(*leaves):
        replaced = dict(zip(trained, leaves, strict=True))
        given = [replaced.get(i, tensor) for i, tensor in enumerate(inputs)]
        return scores(given, target_ids, (True, True), transform=LogitTransform(0.7, softcap=5.0), backend=backend)

    assert torch.autograd.gradcheck(function, leaves)


def test_two_columns_by_hand():
    """z = (a, 0): p = σ(a), H = -p log p - q log q, dH/da = -a p q."""
    a = 0.7
    hidden_states, weight = torch.tensor([[a]], dtype=torch.float64), torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    hidden_states.requires_grad_()
    head = Head(weight)
    _, stats = head_token_logps(hidden_states, head, torch.tensor([1]), with_stats=True, trains_entropy="perhaps")
    p = 1 / (1 + math.exp(-a))
    assert float(stats.entropy.detach()) == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p), rel=1e-12)
    stats.entropy.sum().backward()
    assert float(hidden_states.grad) == pytest.approx(-a * p * (1 - p), rel=1e-12)


@pytest.mark.parametrize("backend", ON_CPU)
def test_columns_without_mass_have_none_of_the_gradient(backend):
    """A bias of -inf, as masks make it: p log p is 0 there, and so is its slope."""
    inputs, target_ids, trained = head_of("frozen")
    inputs[2][V // 2 :] = -torch.inf
    target_ids %= V // 2
    _, grads = value_and_trained_grads(
        inputs, trained, lambda inputs: scores(inputs, target_ids, (True, True), backend=backend)
    )
    half = [inputs[0].double(), inputs[1][: V // 2].double(), inputs[2][: V // 2].double()]
    _, expected = value_and_trained_grads(
        half, trained, lambda inputs: scores(inputs, target_ids, (True, True), backend="reference")
    )
    assert relative_error(grads[0], expected[0]) <= GRADIENT


def products(kind, wanted, trains_entropy):
    inputs, target_ids, trained = head_of(kind)
    for i in trained:
        inputs[i].requires_grad_()
    with CountedProducts(N, H, V) as counted:
        scores(inputs, target_ids, WANTED[wanted], trains_entropy=trains_entropy, backend="chunked").backward()
    return counted.products


def test_products():
    """The entropy's gradient costs nothing where tiles are made again anyhow, and nobody pays who does not ask."""
    assert products("frozen", "log_probs", "perhaps") == 2
    assert products("frozen", "both", "always") == products("frozen", "log_probs", "always") == 3
    assert products("frozen", "both", "perhaps") == 4
    for wanted in WANTED:
        assert products("trainable", wanted, "perhaps") == 4


@pytest.mark.parametrize("backend", WITH_TILES)
def test_a_weight_in_fp32_behind_16_bit_states_keeps_its_gradient_in_fp32(backend):
    """Its values are rounded to the states' dtype, as autocast does; the gradient is that of the rounded one."""
    (hidden_states, weight, _), target_ids, _ = head_of("trainable")
    states = hidden_states.to(torch.bfloat16)

    def function(states, weight):
        return head_token_logps(states, Head(weight), target_ids, backend=backend)[0].sum()

    rounded = weight.to(torch.bfloat16)
    value, (grad_states, grad_weight) = value_and_grads(function, [states, weight], torch.tensor(1.0))
    expected, (_, expected_grad) = value_and_grads(
        lambda states, weight: head_token_logps(states, Head(weight), target_ids, backend="reference")[0].sum(),
        [states.double(), rounded.double()],
        torch.tensor(1.0),
    )
    assert relative_error(value, expected) <= GRADIENT
    assert (grad_states.dtype, grad_weight.dtype) == (torch.bfloat16, torch.float32)
    # torch's products take the tile's gradient as it is; Triton's interpreter has them in bf16, as a GPU
    assert relative_error(grad_weight, expected_grad) <= (
        stored(torch.bfloat16, cut=True) if module_of(backend).RUNS_TRITON else GRADIENT
    )
