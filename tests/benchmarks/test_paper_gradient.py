"""The paper's theorem, numerically: autograd's step on the tokens after the edit is the expression that was derived."""

import json

import torch
from dpop_trainer.data.edits import first_difference
from tiny import text_pairs, tiny_llama, token_pairs, word_tokenizer

from benchmarks.paper_gradient import expected_steps, main, pair_figures


def test_autograd_agrees_with_the_derivation():
    model = tiny_llama().eval()
    for record in token_pairs():
        figures = pair_figures(model, record)
        changed = first_difference(record["chosen_ids"], record["rejected_ids"])
        assert len(figures["p_chosen"]) == len(record["chosen_ids"]) - changed - 1
        expected = expected_steps(figures["p_chosen"], figures["p_rejected"])
        for name, step in expected.items():
            torch.testing.assert_close(figures[name], step, rtol=1e-9, atol=1e-12)
        # pushed down by DPO exactly where the right beginning makes the token likelier
        assert torch.equal(figures["dpo"] < 0, figures["p_chosen"] > figures["p_rejected"])


def test_signs_by_hand():
    # p_w = 0.9 after the right beginning, p_l = 0.5 after the wrong one
    steps = expected_steps(torch.tensor([0.9], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64))
    torch.testing.assert_close(steps["dpo"], torch.tensor([0.15 * -0.4], dtype=torch.float64))
    # 51 · 0.1 - 0.5 = 4.6, and σ of 0.3 · 51 is 1 to seven digits
    torch.testing.assert_close(steps["dpop"], torch.tensor([0.3 * 4.6], dtype=torch.float64), rtol=1e-6, atol=0)


def test_record(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in text_pairs()))
    paths = {"--model": "model", "--pairs": "pairs.jsonl", "--out": "o.json"}
    main([part for flag, name in paths.items() for part in (flag, str(tmp_path / name))])
    record = json.loads((tmp_path / "o.json").read_text())
    assert record["num_tokens"] == 6 * 2  # a word and the end after the edit, in six pairs
    assert record["largest_difference_from_theory"] < 1e-12
    assert 0 <= record["dpo_pushes_down_share"] <= 1
