"""Which products a step has, and that their time is each kind's as often as it was called."""

import torch
import torch.nn.functional as F

from benchmarks import products_alone
from benchmarks.products_alone import Products


def a_step():
    weight = torch.ones(5, 3, requires_grad=True)
    states = torch.ones(4, 3)
    for _ in range(2):
        (F.linear(states, weight) * 2).sum().backward()


def test_products_are_written_down_by_their_shapes():
    with Products() as products:
        a_step()
    # the products of the forward, and of the weight's gradient; none for states, which need no gradient
    assert sorted((count, sorted(form.shape for form in args)) for (_, args, _), count in products.calls.items()) == [
        (2, [(3, 5), (4, 3)]),
        (2, [(4, 3), (5, 4)]),
    ]


def test_attention_is_a_product_in_both_directions():
    query = torch.ones(1, 1, 8, 4, requires_grad=True)
    with Products() as products:
        F.scaled_dot_product_attention(query, query, query).sum().backward()
    assert [name for (func, _, _) in products.calls for name in [func._overloadpacket.__name__]] == [
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    ]


def test_seconds_are_those_of_each_kind_times_its_calls(monkeypatch):
    with Products() as products:
        a_step()
    monkeypatch.setattr(products_alone, "_seconds", lambda func, args, kwargs: 0.5)
    assert products.seconds_alone() == 4 * 0.5


def test_they_run_again_by_themselves(monkeypatch):
    clock = iter([0.0, 9.0, *(value for second in (3.0, 1.0, 2.0) for value in (0.0, second))] * 2)
    monkeypatch.setattr(products_alone.time, "perf_counter", lambda: next(clock))
    with Products() as products:
        a_step()
    assert products.seconds_alone() == 2 * 1.0 + 2 * 1.0  # the quickest after the first
