"""A step that is counted without being computed: against counts by hand and against trainers that run."""

import json

import pytest
import torch
from transformers import LlamaConfig

from benchmarks.counted import head_products, table
from benchmarks.counted.cases import Case
from benchmarks.counted.shapes_only import ShapesOnly
from benchmarks.counted.sides import TRL, count_step
from benchmarks.peers import all_peers

HIDDEN, INNER, VOCAB, HEADS, KV_HEADS, RANK, LAYERS = 32, 48, 96, 4, 2, 16, 2
HEAD_DIM = HIDDEN // HEADS
PROMPT, SHARED, CHOSEN_TAIL, REJECTED_TAIL = 5, 3, 2, 4
"""Tokens of the one pair: both answers begin with three, then go their own way."""
LONGEST = PROMPT + SHARED + REJECTED_TAIL


def linear_maps() -> list[tuple[int, int]]:
    """Inputs and outputs of a layer's: q, k, v, o, gate, up, down."""
    kv = KV_HEADS * HEAD_DIM
    return [
        (HIDDEN, HIDDEN),
        (HIDDEN, kv),
        (HIDDEN, kv),
        (HIDDEN, HIDDEN),
        (HIDDEN, INNER),
        (HIDDEN, INNER),
        (INNER, HIDDEN),
    ]


def model_case(**options) -> Case:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        pad_token_id=0,
    )
    return Case(config, **options)


def the_pair() -> dict:
    shared = list(range(10, 10 + SHARED))
    return {
        "prompt_ids": list(range(1, 1 + PROMPT)),
        "chosen_ids": [*shared, *range(20, 20 + CHOSEN_TAIL)],
        "rejected_ids": [*shared, *range(30, 30 + REJECTED_TAIL)],
        "pair_id": 0,
    }


def body_flop(num_positions: int, *, trains_all: bool) -> int:
    """Forward of the reference, forward of the policy, the same again for the backward, and the backward.

    A layer's last product is not made again: nothing of the backward reads what comes out of it.
    """
    weights = LAYERS * sum(inputs * outputs for inputs, outputs in linear_maps())
    low_rank = LAYERS * sum(RANK * (inputs + outputs) for inputs, outputs in linear_maps())
    if trains_all:  # the backward makes gradients of inputs and weights
        return 2 * num_positions * (weights * 5 - LAYERS * INNER * HIDDEN)
    # an adapter is off in the reference, and its backward makes both gradients
    return 2 * num_positions * (weights * 4 + low_rank * 4 - LAYERS * RANK * HIDDEN)


def attention_flop(seen: int) -> int:
    """Two products of each pair that sees each other, three times forward; five backward."""
    return LAYERS * HEADS * HEAD_DIM * 2 * seen * (2 * 3 + 5)


def head_flop(num_tokens: int, num_products: int) -> int:
    return 2 * num_tokens * VOCAB * HIDDEN * num_products


def triangle(length: int) -> int:
    return length * (length + 1) // 2


def test_a_lora_step_of_ours_in_rows():
    count = count_step("rows", *model_case().models(), [the_pair()], checkpointing=True)
    assert count.body_tokens == 2 * LONGEST
    assert count.body_flop == body_flop(2 * LONGEST, trains_all=False)
    # the shorter row's two paddings see what is before them, and nobody sees a padding: 10 + 10 pairs, not 11 + 12
    short = PROMPT + SHARED + CHOSEN_TAIL
    assert count.attention_flop == attention_flop(triangle(LONGEST) + triangle(short) + 2 * short)
    # reference one product, policy two
    assert count.head_tokens == SHARED + CHOSEN_TAIL + REJECTED_TAIL
    assert count.head_flop == head_flop(SHARED + CHOSEN_TAIL + REJECTED_TAIL, 3)


def test_a_lora_step_of_ours_in_a_tree():
    count = count_step("tree", *model_case().models(), [the_pair()], checkpointing=True)
    trunk, length = PROMPT + SHARED, PROMPT + SHARED + CHOSEN_TAIL + REJECTED_TAIL
    assert count.body_tokens == length
    assert count.body_flop == body_flop(length, trains_all=False)
    tails = sum(tail * trunk + triangle(tail) for tail in (CHOSEN_TAIL, REJECTED_TAIL))
    assert count.attention_flop == attention_flop(triangle(trunk) + tails)


def test_a_lora_step_of_trl():
    count = count_step(TRL, *model_case().models(), [the_pair()], checkpointing=True)
    answers = 2 * SHARED + CHOSEN_TAIL + REJECTED_TAIL
    assert count.body_tokens == 2 * LONGEST
    assert count.body_flop == body_flop(2 * LONGEST, trains_all=False)
    # each answer whole; reference one product, policy three: logits twice, one gradient
    assert count.head_tokens == answers
    assert count.head_flop == head_flop(answers, 4)


@pytest.mark.parametrize(
    ("side", "num_tokens"), [("rows", SHARED + CHOSEN_TAIL + REJECTED_TAIL), (TRL, 2 * SHARED + 6)]
)
def test_a_step_that_trains_all_weights(side, num_tokens):
    count = count_step(side, *model_case(lora=False).models(), [the_pair()], checkpointing=True)
    assert count.body_flop == body_flop(2 * LONGEST, trains_all=True)
    # one product more than with a frozen head, W's gradient: two of ours were one before
    assert count.head_flop == head_flop(num_tokens, 5)


@pytest.mark.parametrize("side", [TRL, "tree"])
def test_each_layer_adds_the_same(side):
    """So that two shallow models tell of a deep one."""
    few, more, many = (
        count_step(side, *model_case().models(depth), [the_pair()], checkpointing=True) for depth in (2, 3, 5)
    )
    assert few.carried_on(more, 3) == many


def test_what_is_held_is_known_by_hand():
    counter = ShapesOnly()
    with counter:
        kept = torch.ones(10, 10, device="meta")  # 400 bytes
        gone = torch.ones(100, 10, device="meta") * 2  # 4000 for the factor and 4000 for the product
        view = kept[:5]
        del gone
        total = kept.sum()
    assert (counter.held, counter.peak) == (404, 8400)
    assert counter.traffic == {"body": 400 + 4000 + 8000 + 404}
    del kept
    assert counter.held == 404  # the view holds it
    del view, total
    assert counter.held == 0


def test_a_selection_has_as_many_rows_as_its_mask_says():
    with ShapesOnly() as counter:
        states = torch.empty(4, 8, device="meta")
        mask = torch.tensor([True, False, True, True])
        product = states[mask] @ torch.empty(8, 5, device="meta")
    assert product.shape == (3, 5)
    assert counter.flop == {"body": 2 * 3 * 8 * 5}


def test_the_table_by_hand(tmp_path, monkeypatch):
    """600 TFLOP in two steps against 200; 494.5 TFLOP/s and 2.5125 TB/s make 0.6067 + 0.0008 s of one, 0.2022 + 0.0002
    of the other."""
    common = {"case": "A", "tuning": "LoRA", "data": "GSM8K", "num_batches": 2, "weight_bytes": 1 << 30}
    theirs = {"body_flop": 500e12, "attention_flop": 20e12, "head_flop": 80e12, "body_traffic": 4e9}
    ours = {"body_flop": 170e12, "attention_flop": 10e12, "head_flop": 20e12, "body_traffic": 1e9}
    lines = [
        {**common, "side": "trl", **theirs, "peak_bytes": 3 << 30},
        {**common, "side": "flat", **theirs, "peak_bytes": 9 << 30},  # an older one
        {**common, "side": "flat", **ours, "peak_bytes": 3 << 29},
    ]
    path = tmp_path / "counted.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    monkeypatch.setattr(table, "RECORDS", path)
    assert table.summary().splitlines()[-1] == (
        "| A, LoRA | 300 → **100** | 3.00 × | 4.00 × | 2.0 → **0.5** GiB | 3.0 × |"
    )
    assert table.predicted_seconds(lines[0]) == pytest.approx(300e12 / 494.5e12 + 2e9 / 2.5125e12)


@pytest.mark.parametrize(
    ("peer", "products"), [("dpop-kernels", (1, 2, 4)), ("PyTorch", (1, 2, 3)), ("TRL", (1, 3, 4))]
)
def test_products_of_a_head(peer, products):
    """Ours: logits and E·W at once with a frozen weight; logits twice and two gradients with a trainable one. Plain
    PyTorch keeps its logits. TRL makes them twice."""
    assert head_products.counted_products(all_peers()[peer]) == products
