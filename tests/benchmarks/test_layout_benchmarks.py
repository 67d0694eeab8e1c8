"""What the layouts' counts are made of, and that a wrong layout is not timed."""

import pytest
import torch
from dpop_trainer.batches import PairCollator
from transformers import LlamaConfig

from benchmarks import cpu_layouts, layout_counts


def record(pair_id, prompt, chosen, rejected):
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "pair_id": pair_id}


# one prompt of 4 and one chosen answer of 2 against three others of 2 that part at once: 4 + 2 + 3 · 2 columns
SIBLINGS = [record(i, [1, 2, 3, 4], [5, 6], [7 + i, 6]) for i in range(3)]


def test_counts_by_hand():
    counts = layout_counts.count_by_budget(SIBLINGS, pad_token_id=0, hidden_size=64)
    assert {name: figures["computed_tokens"] for name, figures in counts.items()} == {
        "rows": 36,
        "tree": 24,
        "packed, prompts together": 12,
        "flat": 12,  # all fit into one batch anyway
        "flat, prompts together": 12,
    }
    for figures in counts.values():
        assert figures["logical_tokens"] == 36
        assert figures["num_batches"] == 1
        assert figures["padding_share"] == 0
    assert counts["flat"]["budget_filled"] == 12 / 4096


def test_the_right_answer_stands_against_each_wrong_one():
    question = {"question": "2 + 2?", "choices": {"text": ["3", "4", "5"], "label": ["A", "B", "C"]}, "answerKey": "B"}
    pairs = layout_counts.right_against_wrong([question])
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [(" 4", " 3"), (" 4", " 5")]
    assert {pair["prompt"] for pair in pairs} == {"Question: 2 + 2?\nAnswer:"}


def test_a_wrong_layout_is_not_timed():
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    steps = {
        layout: cpu_layouts.Step(PairCollator(pad_token_id=0, layout=layout), config)
        for layout in ("rows", "tree", "packed", "flat")
    }
    cpu_layouts.check(steps, SIBLINGS)
    with torch.no_grad():
        steps["flat"].policy.model.norm.weight.mul_(1.01)
    with pytest.raises(AssertionError, match="flat"):
        cpu_layouts.check(steps, SIBLINGS)
