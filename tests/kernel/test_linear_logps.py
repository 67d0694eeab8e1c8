"""linear_token_logps on every backend: exact against fp64, in values and gradients, frozen and trainable."""

import math

import pytest
import torch
from backends import CANDIDATES, EVERY, IN_FP64
from rounding import CONTRACT_NATS, GRADIENT, SUM, UNIT, HeadBounds, stored, worst
from truth import assert_statistics, head_inputs, relative_error, set_tiles, true_head_logps, value_and_grads

from dpop_kernels import linear_dpop_loss, linear_token_logps, logits_dpop_loss

pytestmark = pytest.mark.usefixtures("on_its_device")

SHAPES = {  # N, V, H; the interpreter's time goes by rows times tiles of columns, so both are few
    "ragged": (13, 307, 48),  # nothing divides anything
    "one_token": (1, 257, 16),
    "one_column": (5, 1, 8),  # a vocabulary of one: log-prob 0, gradient 0
    "narrow": (16, 130, 7),  # H not a multiple of a vector
}
TRANSFORMS = {
    "plain": {},
    "scaled": {"logit_scale": 0.0625},
    "softcapped": {"softcap": 12.0},
    "both": {"logit_scale": 1.5, "softcap": 30.0},
}


TILINGS = ["one_tile", "many_tiles"]
# every shape with every transform, and each of them in both tilings: the tilings take turns
SHAPE_TRANSFORM_TILING = [
    (shape, transform, TILINGS[(i + j) % 2]) for i, shape in enumerate(SHAPES) for j, transform in enumerate(TRANSFORMS)
]


@pytest.fixture
def tiled(request, monkeypatch):
    """The same numbers whether a call is one tile or ragged many: of 13 rows and 307 columns four by four in torch,
    four by five in Triton."""
    if request.param == "many_tiles":
        set_tiles(monkeypatch, rows=4, columns=96)


def truth(hidden_states, weight, target_ids, bias=None, **options):
    """fp64 values and gradients of the same inputs, for an output gradient of alternating sign and size."""
    inputs = [tensor.double() for tensor in (hidden_states, weight, *([] if bias is None else [bias]))]
    grad = grad_output(len(target_ids))

    def function(hidden_states, weight, *bias):
        bias = bias[0] if bias else None
        return true_head_logps(hidden_states, weight, target_ids, bias=bias, **options)[0]

    return value_and_grads(function, inputs, grad)


def grad_output(num_tokens):
    return torch.linspace(-2, 3, num_tokens, dtype=torch.float64)


@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("backend", CANDIDATES)
@pytest.mark.parametrize(("shape", "transform", "tiled"), SHAPE_TRANSFORM_TILING, indirect=["tiled"])
def test_equals_fp64(backend, shape, transform):
    options = TRANSFORMS[transform]
    hidden_states, weight, target_ids = head_inputs(*SHAPES[shape])
    bias = torch.randn(weight.shape[0])
    expected, expected_grads = truth(hidden_states, weight, target_ids, bias, **options)

    def function(hidden_states, weight, bias):
        return linear_token_logps(hidden_states, weight, target_ids, bias=bias, backend=backend, **options)

    logps, grads = value_and_grads(function, [hidden_states, weight, bias], grad_output(len(target_ids)))
    assert logps.dtype == torch.float32
    assert worst(logps - expected, HeadBounds(hidden_states, weight, target_ids, bias=bias, **options).logps) <= 1
    if shape != "narrow":  # so small an H makes unlikely tokens' logits large
        assert (logps - expected).abs().max() <= CONTRACT_NATS
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        if shape == "one_column":
            assert (grad - expected_grad).abs().max() <= 1e-12
        else:
            assert relative_error(grad, expected_grad) <= GRADIENT

    frozen, (grad_hidden,) = value_and_grads(
        lambda hidden_states: function(hidden_states, weight, bias), [hidden_states], grad_output(len(target_ids))
    )
    assert torch.equal(frozen, logps)
    if shape != "one_column":
        assert relative_error(grad_hidden, expected_grads[0]) <= GRADIENT


@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("tiled", TILINGS, indirect=True)
@pytest.mark.parametrize("backend", CANDIDATES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_keep_fp32_logits(backend, dtype):
    hidden_states, weight, target_ids = head_inputs(13, 307, 64, dtype)
    expected, expected_grads = truth(hidden_states, weight, target_ids)
    logps, grads = value_and_grads(
        lambda h, w: linear_token_logps(h, w, target_ids, backend=backend),
        [hidden_states, weight],
        grad_output(13),
    )
    assert (logps - expected).abs().max() <= CONTRACT_NATS  # eager's rounded logits err by 1e-2 here
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert grad.dtype == dtype
        assert relative_error(grad, expected_grad) <= stored(dtype)
    _, (frozen,) = value_and_grads(
        lambda h: linear_token_logps(h, weight, target_ids, backend=backend), [hidden_states], grad_output(13)
    )
    assert relative_error(frozen, expected_grads[0]) <= stored(dtype, times=2)  # the unit gradient, and its row scaled


@pytest.mark.parametrize("backend", CANDIDATES)
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_confident_tokens_keep_relative_accuracy(backend, trainable):
    # one token per size of 1 - p, down to 1e-7 and beyond: each row's own relative error, not the norm over rows
    hidden_states, weight, target_ids = head_inputs(24, 300, 32, generator=torch.Generator().manual_seed(3))
    expected, (expected_grad, _) = truth(hidden_states, weight, target_ids)
    assert -expected.max() < 1e-7
    hidden_states.requires_grad_()
    weight.requires_grad_(trainable)
    logps = linear_token_logps(hidden_states, weight, target_ids, backend=backend)
    logps.backward(grad_output(24).float())
    # z itself carries rounding of about 1e-6, which is a relative error of 1e-6 in 1 - p
    assert ((logps.detach() - expected) / expected).abs().max() <= 3e-5
    row_errors = (hidden_states.grad - expected_grad).norm(dim=1) / expected_grad.norm(dim=1)
    assert row_errors.max() <= 3e-5


@pytest.mark.parametrize("backend", IN_FP64)
def test_gradcheck(backend):
    hidden_states, weight, target_ids = head_inputs(6, 11, 5, torch.float64)
    bias = torch.randn(11, dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (hidden_states, weight, bias)]

    def function(hidden_states, weight, bias):
        return linear_token_logps(
            hidden_states, weight, target_ids, bias=bias, logit_scale=0.7, softcap=5.0, backend=backend
        )

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradcheck(lambda h: function(h, weight.detach(), bias.detach()), leaves[:1])
    assert torch.autograd.gradcheck(lambda b: function(hidden_states.detach(), weight.detach(), b), leaves[2:])


@pytest.mark.parametrize("backend", CANDIDATES)
def test_statistics(backend):
    hidden_states, weight, target_ids = head_inputs(40, 301, 16)
    _, expected = true_head_logps(hidden_states.double(), weight.double(), target_ids, softcap=20.0, with_stats=True)
    for trainable in (False, True):
        weight.requires_grad_(trainable)
        _, stats = linear_token_logps(
            hidden_states.clone().requires_grad_(), weight, target_ids, softcap=20.0, return_stats=True, backend=backend
        )
        assert_statistics(stats, expected)


@pytest.mark.parametrize("backend", CANDIDATES)
def test_log_of_the_sum_of_squares_of_a_confident_row(backend):
    """Two logits d apart, p = 1 / (1 + x) with x = exp(-d): Σ p² = (1 + x²) / (1 + x)², whose log is -2 x + O(x²), to
    a few units of x and not of 1; the same whichever of the two is the target."""
    weight = torch.tensor([[10.0], [-10.0]])
    for target in (0, 1):
        _, stats = linear_token_logps(
            torch.ones(1, 1), weight, torch.tensor([target]), return_stats=True, backend=backend
        )
        x = math.exp(-20)
        expected = math.log1p(x * x) - 2 * math.log1p(x)
        # exp, product, log1p and a sum round
        assert abs(float(stats.log_sum_sq_probs) / expected - 1) <= 8 * UNIT[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_answer_of_1024_tokens_is_exact_to_a_ten_thousandth(dtype):
    # the contract: |error| of the sum <= 1e-4 nat, which βλ = 15 turns into 1.5e-3 of the loss's argument
    hidden_states, weight, target_ids = head_inputs(1024, 2003, 64, dtype)
    expected, _ = truth(hidden_states, weight, target_ids)
    logps = linear_token_logps(hidden_states, weight, target_ids)
    assert abs(float(logps.double().sum() - expected.sum())) <= 1e-4


@pytest.mark.parametrize(
    ("num_tokens", "vocab_size", "hidden_size"),
    [(1 << 20, 3, 2), (2, 5, 16384), (3, 262144, 4)],
    ids=["a_million_tokens", "widest_hidden", "widest_vocab"],
)
def test_extreme_sizes(num_tokens, vocab_size, hidden_size):
    hidden_states, weight, target_ids = head_inputs(num_tokens, vocab_size, hidden_size)
    expected, (expected_grad, _) = truth(hidden_states, weight, target_ids)
    logps, (grad,) = value_and_grads(
        lambda h: linear_token_logps(h, weight, target_ids), [hidden_states], grad_output(num_tokens)
    )
    bounds = HeadBounds(hidden_states, weight, target_ids)
    assert worst(logps - expected, bounds.logps) <= 1
    assert relative_error(grad, expected_grad) <= bounds.gradient(grad_output(num_tokens))


@pytest.mark.parametrize("backend", CANDIDATES)
def test_no_tokens(backend):
    hidden_states, weight = torch.zeros(0, 8, requires_grad=True), torch.randn(12, 8, requires_grad=True)
    logps = linear_token_logps(hidden_states, weight, torch.zeros(0, dtype=torch.int64), backend=backend)
    logps.sum().backward()
    assert logps.shape == (0,)
    assert hidden_states.grad.shape == (0, 8)
    assert torch.equal(weight.grad, torch.zeros(12, 8))


@pytest.mark.parametrize("backend", CANDIDATES)
def test_same_input_same_bits_and_rows_stand_alone(backend):
    hidden_states, weight, target_ids = head_inputs(64, 515, 32)
    logps = linear_token_logps(hidden_states, weight, target_ids, backend=backend)
    assert torch.equal(logps, linear_token_logps(hidden_states, weight, target_ids, backend=backend))
    half = linear_token_logps(hidden_states[:32], weight, target_ids[:32], backend=backend)
    assert (half - logps[:32]).abs().max() <= 2e-6  # the matrix library may sum in another order for another N


def test_views_and_strides():
    hidden_states, weight, target_ids = head_inputs(20, 77, 16)
    expected = linear_token_logps(hidden_states, weight, target_ids)
    wide = torch.randn(20, 40)
    wide[:, 3:19] = hidden_states
    transposed = weight.T.contiguous().T
    assert torch.allclose(linear_token_logps(wide[:, 3:19], transposed, target_ids), expected, atol=1e-6)


def test_autocast_casts_as_torch_linear_does():
    hidden_states, weight, target_ids = head_inputs(20, 77, 16)
    expected = linear_token_logps(hidden_states.bfloat16(), weight.bfloat16(), target_ids)
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        logps = linear_token_logps(hidden_states.bfloat16(), weight, target_ids)
        logps.sum().backward()
    assert torch.equal(logps.detach(), expected)
    assert weight.grad.dtype == torch.float32


def test_bounded_memory(monkeypatch):
    """512 x 50000 fp32 logits are 98 MiB; tiles are of 512 x 4096, that is 8 MiB, with a gradient too."""
    hidden_states, weight, target_ids = head_inputs(512, 50000, 8)
    sizes = []
    new_empty = torch.Tensor.new_empty

    def spy(tensor, *args, **kwargs):
        result = new_empty(tensor, *args, **kwargs)
        sizes.append(result.numel() * result.itemsize)
        return result

    monkeypatch.setattr(torch.Tensor, "new_empty", spy)
    for trained in (False, True):
        weight.requires_grad_(trained)
        logps = linear_token_logps(hidden_states.requires_grad_(), weight, target_ids)
        logps.sum().backward()
    assert torch.isfinite(logps).all()
    assert max(sizes) == 8 << 20


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("active", [True, False], ids=["hinge_active", "hinge_inactive"])
def test_padded_losses_agree_with_segment_sums_by_hand(backend, active):
    num_pairs, length, vocab_size, hidden_size = 3, 9, 31, 6
    hidden_states = torch.randn(2 * num_pairs, length, hidden_size)
    weight = torch.randn(vocab_size, hidden_size)
    labels = torch.randint(vocab_size, (2 * num_pairs, length))
    for row, (start, end) in enumerate([(2, 9), (1, 4), (8, 9), (3, 7), (0, 5), (2, 3)]):
        labels[row, :start], labels[row, end:] = -100, -100
    logps = (hidden_states @ weight.T)[:, :-1].double().log_softmax(-1)
    shifted = labels[:, 1:]
    token = logps.gather(-1, shifted.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    chosen, rejected = torch.where(shifted >= 0, token, 0).sum(1).chunk(2)
    ref_chosen = (chosen + (1.0 if active else -1.0)).float()
    ref_rejected = rejected.float()
    z = 0.3 * (chosen - ref_chosen - (rejected - ref_rejected) - 50 * (ref_chosen - chosen).clamp_min(0))
    expected = torch.log1p(torch.exp(-z))

    of_logits = logits_dpop_loss(
        hidden_states @ weight.T, labels, ref_chosen, ref_rejected, reduction="none", backend=backend
    )
    of_states = linear_dpop_loss(
        hidden_states, weight, labels, ref_chosen, ref_rejected, reduction="none", backend=backend
    )
    # βλ = 15 multiplies the fp32 error of the sums
    assert (of_logits - expected).abs().max() <= 15 * SUM
    assert (of_states - expected).abs().max() <= 15 * SUM


@pytest.mark.parametrize("backend", EVERY)
def test_padded_losses_pass_dead_zone_and_smoothing_on(backend):
    hidden_states, weight = torch.randn(4, 6, 5), torch.randn(11, 5)
    labels = torch.randint(11, (4, 6))
    targets = labels[:, 1:].unsqueeze(-1)
    logps = (hidden_states @ weight.T)[:, :-1].double().log_softmax(-1).gather(-1, targets).sum((1, 2))
    refs = [logps[:2].float() + 0.5, logps[2:].float()]  # Δw = -0.5: 0.3 below the dead zone, so p = 6
    z, flipped_z = 0.3 * (-0.5 - 6), 0.3 * (0.5 - 6)
    expected = 0.9 * math.log1p(math.exp(-z)) + 0.1 * math.log1p(math.exp(-flipped_z))
    options = {"dpop_lambda": 20.0, "dead_zone": 0.2, "label_smoothing": 0.1, "reduction": "none", "backend": backend}
    for losses in (
        logits_dpop_loss(hidden_states @ weight.T, labels, *refs, **options),
        linear_dpop_loss(hidden_states, weight, labels, *refs, **options),
    ):
        # βλ = 6 multiplies the fp32 error of the sums
        assert (losses - expected).abs().max() <= 6 * SUM


def test_unscored_positions_get_no_gradient_even_if_not_finite():
    logits = torch.randn(2, 4, 7)
    labels = torch.tensor([[-100, 3, 1, -100], [-100, -100, 2, -100]])
    logits[0, 2], logits[1, 3] = float("nan"), float("inf")  # they predict -100
    logits.requires_grad_()
    logits_dpop_loss(logits, labels, torch.zeros(1), torch.zeros(1)).backward()
    assert torch.equal(logits.grad[0, 2], torch.zeros(7))
    assert torch.equal(logits.grad[1, 3], torch.zeros(7))
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[0, 0].abs().sum() > 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"hidden_states": torch.zeros(4, 9)}, r"lm_head_weight: expected shape \[V, 9\]"),
        ({"hidden_states": torch.zeros(2, 4, 8)}, r"hidden_states: expected shape \[N, H\], got \[2, 4, 8\]"),
        ({"hidden_states": torch.zeros(4, 8, dtype=torch.float64)}, "lm_head_weight: expected dtype torch.float64"),
        ({"lm_head_weight": torch.zeros(12, 8, device="meta")}, "lm_head_weight: expected device cpu"),
        ({"target_ids": torch.tensor([0, 1, 2, 12])}, r"target_ids: expected ids in \[0, 12\), got 12"),
        ({"target_ids": torch.tensor([0, 1, 2, -100])}, r"target_ids: expected ids in \[0, 12\), got -100"),
        ({"target_ids": torch.zeros(3, dtype=torch.int64)}, r"target_ids: expected shape \[4\], got \[3\]"),
        ({"target_ids": torch.zeros(4)}, "target_ids: expected int64 or int32, got torch.float32"),
        ({"bias": torch.zeros(8)}, r"bias: expected shape \[12\], got \[8\]"),
        ({"softcap": 0.0}, "softcap: expected None or a finite value > 0, got 0.0"),
        ({"logit_scale": 0.0}, "logit_scale: expected a finite value other than 0"),
        ({"backend": "cuda"}, "backend: expected 'auto' or one of"),
    ],
)
def test_bad_input_is_named(kwargs, message):
    arguments = {
        "hidden_states": torch.zeros(4, 8),
        "lm_head_weight": torch.zeros(12, 8),
        "target_ids": torch.arange(4),
        **kwargs,
    }
    with pytest.raises(ValueError, match=message):
        linear_token_logps(**arguments)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.full((2, 5), -100), r"labels: expected at least one label in every row .* rows \[0, 1\]"),
        (torch.tensor([[1, -100, -100, -100, -100], [1, 2, 3, 4, 5]]), r"got none in rows \[0\]"),
        (torch.zeros(3, 5, dtype=torch.int64), r"labels: expected shape \[2, 5\]"),
        (torch.full((2, 5), 12), r"target_ids: expected ids in \[0, 12\), got 12"),
    ],
    ids=["all_masked", "only_unpredicted", "shape", "out_of_range"],
)
def test_bad_labels_are_named(labels, message):
    with pytest.raises(ValueError, match=message):
        linear_dpop_loss(torch.zeros(2, 5, 8), torch.zeros(12, 8), labels, torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match=message):
        logits_dpop_loss(torch.zeros(2, 5, 12), labels, torch.zeros(1), torch.zeros(1))
