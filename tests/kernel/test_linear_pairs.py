"""linear_dpop_loss with a trainable head: three products where pairs fit the workspace, the same numbers everywhere.

Truth is the reference backend in fp64 on the same inputs. References lie a nat from the policy's own sums, so that z is
where σ is flat (hinge active, z = -15 or so) or the slope is β alone: the loss's own condition number, up to βλ = 15
times the error of a sum, then stays out of the comparison of gradients.
"""

import math

import pytest
import torch
from backends import TILED, WITH_TILES, module_of
from counted import CountedProducts
from rounding import GRADIENT, SUM, stored
from truth import head_inputs, relative_error, set_tiles, value_and_grads

from dpop_kernels import linear_dpop_loss
from dpop_kernels.backends import bounds, chunked_tiles, products
from dpop_kernels.logps import pair_tiles, tiling
from dpop_kernels.logps.pair_tiles import PairTile, pack_pairs

HAS_GPU = torch.cuda.is_available()
VOCAB, HIDDEN = 203, 48
LENGTHS = [(5, 3), (1, 1), (2, 8), (3, 3), (1, 4)]  # tokens of the chosen and the rejected answer
NUM_TOKENS = sum(map(sum, LENGTHS))  # 31, few: an interpreted kernel's time goes by rows
PADDED = 16
TRANSFORMS = {"plain": {}, "scaled": {"logit_scale": 0.5}, "softcapped": {"logit_scale": 1.5, "softcap": 12.0}}
TILE_ROWS = {"one_tile": NUM_TOKENS, "several_tiles": 10}  # 10 rows: pairs of 8 + 2, 10, 6 and 5 tokens
GAINS = {"active": [-1.0], "inactive": [0.5], "mixed": [-1.0, 0.5]}  # Δw of the pairs, by turns
# every hinge with every transform, and each of them in both tilings: the tilings take turns
HINGE_TRANSFORM_TILING = [
    (hinge, transform, list(TILE_ROWS)[(i + j) % 2])
    for i, hinge in enumerate(GAINS)
    for j, transform in enumerate(TRANSFORMS)
]


@pytest.fixture
def tiled(request, monkeypatch):
    """By name, "one_tile" or "several_tiles"."""
    set_tile_rows(monkeypatch, TILE_ROWS[request.param])


all_tilings = pytest.mark.parametrize("tiled", TILE_ROWS, indirect=True)


def set_tile_rows(monkeypatch, tile_rows, *, vocab_size=VOCAB, itemsize=4):
    """A workspace of so many rows of logits and all but one byte of another; W is taken in two ragged blocks."""
    num_bytes = (tile_rows + 1) * vocab_size * itemsize - 1
    set_tiles(monkeypatch, rows=7, columns=136, pair_bytes=num_bytes)


def batch(dtype=torch.float32, *, vocab_size=VOCAB, hidden_size=HIDDEN, lengths=LENGTHS):
    """[hidden_states, weight, bias] and labels: a prompt of one or two tokens, padding behind, peaked logits."""
    answers = [chosen for chosen, _ in lengths] + [rejected for _, rejected in lengths]
    rows, weight, target_ids = head_inputs(sum(answers), vocab_size, hidden_size, dtype)
    hidden_states = torch.randn(len(answers), PADDED, hidden_size).to(dtype)
    labels = torch.full((len(answers), PADDED), -100)
    start = 0
    for row, length in enumerate(answers):
        first = row % 2
        hidden_states[row, first : first + length] = rows[start : start + length]
        labels[row, first + 1 : first + 1 + length] = target_ids[start : start + length]
        start += length
    return [hidden_states, weight, torch.randn(vocab_size).to(dtype)], labels


def references(inputs, labels, gains, *, logit_scale=1.0, softcap=None):
    """Reference sums [B], [B] in the precision of the loss: Δw is `gains` by turns, Δl is 0.25."""
    hidden_states, weight, bias = (tensor.double() for tensor in inputs)
    logits = logit_scale * (hidden_states @ weight.T + bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    token_logps = logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:].clamp_min(0).unsqueeze(-1)).squeeze(-1)
    chosen, rejected = torch.where(labels[:, 1:] >= 0, token_logps, 0).sum(1).chunk(2)
    turns = torch.tensor([gains[pair % len(gains)] for pair in range(len(chosen))], dtype=torch.float64)
    dtype = torch.float64 if inputs[0].dtype == torch.float64 else torch.float32
    return (chosen - turns).to(dtype), (rejected - 0.25).to(dtype)


def loss_and_grads(inputs, labels, refs, *, grad_loss=1.0, reduction="mean", **options):
    """Loss, and the gradients of hidden states, weight and bias."""

    def function(hidden_states, weight, bias):
        return linear_dpop_loss(hidden_states, weight, labels, *refs, bias=bias, reduction=reduction, **options)

    grad_output = torch.tensor(grad_loss)
    if reduction == "none":
        grad_output = grad_output * torch.linspace(-1, 2, len(refs[0]))
    return value_and_grads(function, inputs, grad_output)


def truth(inputs, labels, refs, **options):
    doubles = [tensor.double() for tensor in inputs]
    return loss_and_grads(doubles, labels, [ref.double() for ref in refs], backend="reference", **options)


def loss_grads_and_products(inputs, labels, refs, **options):
    with CountedProducts(NUM_TOKENS, HIDDEN, VOCAB) as counted:
        loss, grads = loss_and_grads(inputs, labels, refs, **options)
    return loss, grads, counted.products


def count_products(inputs, labels, refs, *, trained=(True, True, True), backend="chunked", **options):
    hidden_states, weight, bias = (
        tensor.detach().clone().requires_grad_(needed) for tensor, needed in zip(inputs, trained, strict=True)
    )
    with CountedProducts(NUM_TOKENS, HIDDEN, VOCAB) as counted:
        loss = linear_dpop_loss(hidden_states, weight, labels, *refs, bias=bias, backend=backend, **options)
        if loss.requires_grad:
            loss.sum().backward()
    return counted.products


@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("backend", WITH_TILES)
@pytest.mark.parametrize(("hinge", "transform", "tiled"), HINGE_TRANSFORM_TILING, indirect=["tiled"])
def test_equals_fp64(backend, hinge, transform):
    options = TRANSFORMS[transform]
    inputs, labels = batch()
    refs = references(inputs, labels, GAINS[hinge], **options)
    expected, expected_grads = truth(inputs, labels, refs, **options)
    loss, grads = loss_and_grads(inputs, labels, refs, backend=backend, **options)
    assert loss.dtype == torch.float32
    # βλ = 15 multiplies the fp32 error of the sums
    assert (loss - expected).abs() <= 15 * SUM
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert grad.dtype == torch.float32
        assert relative_error(grad, expected_grad) <= GRADIENT


@pytest.mark.usefixtures("tiled")
@all_tilings
@pytest.mark.parametrize("backend", WITH_TILES)
def test_dead_zone_and_smoothed_labels_take_three_products_too(backend):
    inputs, labels = batch()
    refs = references(inputs, labels, GAINS["mixed"])  # of -1 nat, 0.6 lie below the dead zone
    options = {"dead_zone": 0.4, "label_smoothing": 0.1}
    expected, expected_grads = truth(inputs, labels, refs, **options)
    assert not torch.isclose(expected, truth(inputs, labels, refs)[0], rtol=1e-2)
    loss, grads, num_products = loss_grads_and_products(inputs, labels, refs, backend=backend, **options)
    assert num_products == 3
    assert (loss - expected).abs() <= 15 * SUM
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert relative_error(grad, expected_grad) <= GRADIENT


@pytest.mark.usefixtures("tiled")
@all_tilings
@pytest.mark.parametrize("backend", WITH_TILES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_any_reduction_and_any_incoming_gradient(backend, reduction):
    inputs, labels = batch()
    refs = references(inputs, labels, GAINS["mixed"])
    options = {"grad_loss": -0.3, "reduction": reduction}
    expected, expected_grads = truth(inputs, labels, refs, **options)
    loss, grads = loss_and_grads(inputs, labels, refs, backend=backend, **options)
    assert loss.shape == expected.shape
    assert ((loss - expected).abs() <= 15 * SUM * (len(LENGTHS) if reduction == "sum" else 1)).all()
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert relative_error(grad, expected_grad) <= GRADIENT


@pytest.mark.parametrize("backend", WITH_TILES)
def test_bf16(backend):
    inputs, labels = batch(torch.bfloat16)
    refs = references(inputs, labels, GAINS["mixed"])
    expected, expected_grads = truth(inputs, labels, refs, grad_loss=0.3)
    loss, grads, num_products = loss_grads_and_products(inputs, labels, refs, backend=backend, grad_loss=0.3)
    assert num_products == 3
    assert loss.dtype == torch.float32
    assert (loss - expected).abs() <= 15 * SUM
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert grad.dtype == torch.bfloat16
        assert relative_error(grad, expected_grad) <= stored(torch.bfloat16)


@pytest.mark.parametrize("backend", WITH_TILES)
def test_16_bit_products_as_a_gpu_makes_them(backend, monkeypatch):
    # a CPU widens 16-bit factors; here they stay, so that the gradient of the logits is rounded block by block
    sixteen_bit = []

    def matmul(left, right, *, out):
        sixteen_bit.append(left.dtype == right.dtype == torch.bfloat16)
        out.copy_(left.float() @ right.float())

    def matmul_add(total, left, right):
        sixteen_bit.append(left.dtype == right.dtype == torch.bfloat16)
        total += left.float() @ right.float()

    monkeypatch.setattr(pair_tiles, "product_dtype", lambda tensor: tensor.dtype)
    monkeypatch.setattr(products, "matmul", matmul)
    monkeypatch.setattr(tiling, "matmul", matmul)
    monkeypatch.setattr(tiling, "matmul_add", matmul_add)
    set_tile_rows(monkeypatch, NUM_TOKENS)
    inputs, labels = batch(torch.bfloat16)
    refs = references(inputs, labels, GAINS["mixed"])
    expected, expected_grads = truth(inputs, labels, refs, grad_loss=0.3)
    loss, grads = loss_and_grads(inputs, labels, refs, backend=backend, grad_loss=0.3)
    num_blocks = 2  # 203 columns in blocks of 136, or of 128: three products each
    assert sixteen_bit == [True] * 3 * num_blocks
    assert (loss - expected).abs() <= 15 * SUM
    bound = stored(
        torch.bfloat16, times=2, cut=module_of(backend).RUNS_TRITON
    )  # the gradient of the logits, and the sum
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert relative_error(grad, expected_grad) <= bound


def test_fp64_and_gradcheck(monkeypatch):
    lengths = [(3, 2), (1, 4)]
    set_tile_rows(monkeypatch, 5, vocab_size=11, itemsize=8)
    inputs, labels = batch(torch.float64, vocab_size=11, hidden_size=4, lengths=lengths)
    inputs[0], labels = inputs[0][:, :6], labels[:, :6]  # less padding: each number of it is moved too
    refs = references(inputs, labels, [-0.05, 0.5], logit_scale=0.7, softcap=5.0)
    assert pair_tiles.plan_tiles(chunked_tiles, inputs[0].flatten(0, 1), inputs[1], [5, 5]) is not None
    leaves = [tensor.requires_grad_() for tensor in inputs]

    def function(hidden_states, weight, bias, reduction="mean"):
        return linear_dpop_loss(
            hidden_states, weight, labels, *refs, bias=bias, logit_scale=0.7, softcap=5.0, reduction=reduction
        )

    assert function(*leaves).dtype == torch.float64
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradcheck(lambda *leaves: -2.5 * function(*leaves, reduction="sum"), leaves)
    frozen = [tensor.detach() for tensor in leaves]
    assert torch.autograd.gradcheck(lambda weight: function(frozen[0], weight, frozen[2]), leaves[1:2])
    assert torch.autograd.gradcheck(lambda bias: function(*frozen[:2], bias), leaves[2:])


@pytest.mark.parametrize("backend", WITH_TILES)
def test_the_tie_has_slope_zero(backend, monkeypatch):
    # with its own sums as references Δw is exactly 0, z too, and the slopes are ∓β σ(0) = ∓0.15 without any λ
    seen = []
    original = pair_tiles._losses_and_slopes

    def spy(losses_of_sums, sums, pairs):
        losses, slopes = original(losses_of_sums, sums, pairs)
        seen.append((sums, losses, slopes))
        return losses, slopes

    monkeypatch.setattr(pair_tiles, "_losses_and_slopes", spy)
    inputs, labels = batch()
    loss_and_grads(inputs, labels, torch.zeros(2, len(LENGTHS)), backend=backend)
    own_sums = seen[0][0]
    loss_and_grads(inputs, labels, own_sums.unbind(-1), backend=backend)
    _, losses, slopes = seen[1]
    assert losses == pytest.approx(torch.full((5,), math.log(2)))
    assert slopes == pytest.approx(torch.tensor([[-0.15, 0.15]]).expand(5, 2))


@pytest.mark.parametrize("backend", WITH_TILES)
def test_products(backend):
    inputs, labels = batch()
    refs = references(inputs, labels, GAINS["mixed"])
    count = lambda **options: count_products(inputs, labels, refs, backend=backend, **options)  # noqa: E731
    assert count() == 3
    assert count(trained=(True, True, False)) == 3
    assert count(trained=(False, True, False)) == 2  # no gradient of the hidden states
    assert count(trained=(True, False, True)) == 2  # the bias alone: no gradient of W
    assert count(trained=(True, False, False)) == 2  # frozen
    assert count(trained=(False, False, False)) == 1
    assert count(reduction="none") == 4
    with torch.no_grad():
        assert count() == 1


@pytest.mark.parametrize("backend", WITH_TILES)
@pytest.mark.parametrize(
    ("dtype", "tile_rows", "expected"),
    [
        (torch.float32, NUM_TOKENS, 3),
        (torch.float32, 10, 3),  # the longest pair, alone
        (torch.float32, 9, 4),
        (torch.bfloat16, NUM_TOKENS, 3),
        (torch.bfloat16, NUM_TOKENS - 1, 4),  # W's gradient would need an accumulator
        (torch.float16, NUM_TOKENS, 4),  # the loss scale must come before the rounding
    ],
)
def test_workspace_and_dtype_choose(backend, dtype, tile_rows, expected, monkeypatch):
    inputs, labels = batch(dtype)
    refs = references(inputs, labels, GAINS["mixed"])
    three, three_grads = loss_and_grads(inputs, labels, refs, backend=backend)
    set_tile_rows(monkeypatch, tile_rows)
    loss, grads, num_products = loss_grads_and_products(inputs, labels, refs, backend=backend)
    assert num_products == expected
    assert (loss - three).abs() <= 15 * SUM
    for grad, of_three in zip(grads, three_grads, strict=True):
        # each of the two is off by one rounding
        assert relative_error(grad, of_three.double()) <= (
            GRADIENT if dtype == torch.float32 else stored(dtype, times=2)
        )


def test_references_that_want_a_gradient_get_it():
    # Δ is policy minus reference: the gradients of the two sums are opposite, and Σ_pairs of β σ(-z) is that of Δl
    inputs, labels = batch()
    ref_chosen, ref_rejected = (ref.requires_grad_() for ref in references(inputs, labels, GAINS["active"]))
    inputs[1].requires_grad_()
    linear_dpop_loss(*inputs[:2], labels, ref_chosen, ref_rejected, bias=inputs[2], reduction="sum").backward()
    # z = 0.3 · (-1 - 0.25 - 50) = -15.4: σ(-z) is 1 to 2e-7
    assert ref_chosen.grad == pytest.approx(torch.full((5,), 0.3 * 51), rel=1e-5)
    assert ref_rejected.grad == pytest.approx(torch.full((5,), -0.3), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_retained_graph_gives_the_same_gradient_again(dtype):
    (hidden_states, weight, bias), labels = batch(dtype)
    refs = references([hidden_states, weight, bias], labels, GAINS["mixed"])
    leaves = [tensor.requires_grad_() for tensor in (hidden_states, weight, bias)]
    loss = linear_dpop_loss(hidden_states, weight, labels, *refs, bias=bias)
    first = torch.autograd.grad(0.3 * loss, leaves, retain_graph=True)
    second = torch.autograd.grad(0.3 * loss, leaves)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_same_input_same_bits():
    inputs, labels = batch()
    refs = references(inputs, labels, GAINS["mixed"])
    one, other = (loss_and_grads(inputs, labels, refs) for _ in range(2))
    assert torch.equal(one[0], other[0])
    assert all(torch.equal(*pair) for pair in zip(one[1], other[1], strict=True))


def test_autocast_casts_as_torch_linear_does():
    inputs, labels = batch()
    short = [tensor.bfloat16() for tensor in inputs]
    refs = references(short, labels, GAINS["mixed"])
    expected, expected_grads = loss_and_grads(short, labels, refs)
    with torch.autocast("cpu", torch.bfloat16):
        loss, grads = loss_and_grads(inputs, labels, refs)
        products = count_products(inputs, labels, refs)
    assert products == 3
    assert torch.equal(loss, expected)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert grad.dtype == torch.float32
        assert torch.equal(grad.bfloat16(), expected_grad)


def test_positions_without_a_label_get_no_gradient():
    inputs, labels = batch()
    refs = references(inputs, labels, GAINS["active"])
    _, (grad_hidden, _, _) = loss_and_grads(inputs, labels, refs)
    predicts = torch.nn.functional.pad(labels[:, 1:] >= 0, (0, 1))
    assert torch.equal(grad_hidden.abs().sum(-1) > 0, predicts)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, GRADIENT), (torch.bfloat16, stored(torch.bfloat16, times=2))]
)
@pytest.mark.parametrize("backend", TILED)
def test_on_a_gpu(backend, dtype, bound):
    inputs, labels = batch(dtype)
    refs = references(inputs, labels, GAINS["mixed"])
    expected, expected_grads = truth(inputs, labels, refs, grad_loss=0.3)
    on_gpu = [tensor.cuda() for tensor in inputs], labels.cuda(), [ref.cuda() for ref in refs]
    loss, grads = loss_and_grads(*on_gpu, grad_loss=0.3, backend=backend)
    assert (loss.cpu() - expected).abs() <= 15 * SUM
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert relative_error(grad.cpu(), expected_grad) <= stored(dtype, times=2)


def test_pairs_are_packed_in_order():
    assert pack_pairs([3, 4, 2], 9) == [PairTile(slice(0, 3), slice(0, 9))]
    assert pack_pairs([3, 4, 2], 8) == [PairTile(slice(0, 2), slice(0, 7)), PairTile(slice(2, 3), slice(7, 9))]
    assert pack_pairs([3, 4, 2], 4) == [
        PairTile(slice(0, 1), slice(0, 3)),
        PairTile(slice(1, 2), slice(3, 7)),
        PairTile(slice(2, 3), slice(7, 9)),
    ]
    assert pack_pairs([3, 4, 2], 3) is None


def test_workspace():
    # 64 MiB are 524 rows of 32000 fp32 logits; on a GPU the tile may be as large as W in fp32, which is H rows
    weight = torch.empty(32000, 1024, device="meta")
    assert pair_tiles._tile_rows(bounds.CPU, torch.empty(1, 1024, device="meta"), weight) == 524

    class OnGpu(torch.Tensor):
        is_cuda = True

    weight = torch.empty(128256, 4096, dtype=torch.bfloat16, device="meta").as_subclass(OnGpu)
    assert pair_tiles._tile_rows(bounds.triton_bounds(), weight[:1], weight) == 4096


@pytest.mark.parametrize("i", [0, 1])
def test_bad_references_are_named(i):
    (hidden_states, weight, _), labels = batch()
    refs = [torch.zeros(5), torch.zeros(5)]
    refs[i] = torch.zeros(6)
    name = ("ref_chosen_logps", "ref_rejected_logps")[i]
    with pytest.raises(ValueError, match=rf"{name}: expected shape \[5\], one sum for each pair of rows, got \[6\]"):
        linear_dpop_loss(hidden_states, weight.requires_grad_(), labels, *refs)
