"""What tensors without data say of themselves is what tensors with data say."""

import pytest
import torch
import torch.nn.functional as F
from dpop_trainer.tools.plan.paper_tensor import PaperTensor, paper, storage_of
from dpop_trainer.tools.plan.tape import Tape


def views(x):
    rows = x.view(6, 8)
    return [
        rows,
        rows.t(),
        x[:, 1:, ::2],
        x.transpose(0, 1).reshape(6, 8),
        x.unsqueeze(1).expand(2, 5, 3, 8),
        x.detach(),
    ]


def products(x):
    made = torch.tensor(2) * x.int() + torch.arange(8, device="cpu")
    return [made, x.to(torch.bfloat16) @ x.transpose(1, 2).bfloat16(), x.sum(-1, keepdim=True), x.new_zeros(3), x * 1]


def whole_numbers_and_others(x):
    count = x.long()
    return [count * 1, count * 1.0, count * True, count / 1, count // 2]


def in_place(x):
    held = x * 2
    return [held.add_(1), held, held.mul_(x), torch.cat([held, held.relu_()], 1), *held.split(1, 1)]


def under_autocast(x):
    weight = torch.ones_like(x[0]).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        hidden = F.linear(x, weight)
        attended = F.scaled_dot_product_attention(hidden[None], hidden[None], hidden[None], is_causal=True)
    F.layer_norm(hidden.float(), (3,)).sum().backward()
    return [hidden, attended, weight.grad]


def sharing(tensors):
    """Which of them are of one storage."""
    keys = [storage_of(tensor)._cdata for tensor in tensors]
    return [keys.index(key) for key in keys]


@pytest.mark.parametrize("program", [views, products, whole_numbers_and_others, in_place, under_autocast])
def test_forms_and_shared_storages_are_those_of_real_tensors(program):
    real = torch.rand(2, 3, 8)
    on_paper = paper(real.shape, real.dtype)
    expected = [real, *program(real)]
    for _ in range(2):  # made once, and remembered
        with Tape([on_paper]):
            found = [on_paper, *program(on_paper)]
        for one, other in zip(found, expected, strict=True):
            assert isinstance(one, PaperTensor)
            assert one.device == other.device
            assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
            assert storage_of(one).nbytes() == other.untyped_storage().nbytes()
        assert sharing(found) == sharing(expected)


@pytest.mark.parametrize("read", [torch.Tensor.item, torch.nonzero, lambda x: bool((x > 0).all())])
def test_what_reads_data_is_named(read):
    with pytest.raises(
        ValueError, match=r"model: expected one .* got one that calls aten\.\w+\.default. dpop plan does"
    ):
        read(paper((1,), torch.float32))


def test_a_wrong_shape_stays_an_error_of_its_own():
    with pytest.raises(RuntimeError, match=r"\b4\b"):
        paper((2, 3), torch.float32) + paper((2, 4), torch.float32)
