"""CHES as its paper defines it, by hand and against a second computation from a model's own hidden states."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from dpop_trainer.tools.doctor.ches import ches_score, rank_correlation, score_pairs
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama, token_pairs


def test_by_hand():
    # H_w = (1, 2) + (3, 0) = (4, 2), H_l = (2, 2) + (0, 1) + (1, 0) = (3, 3)
    chosen = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    rejected = torch.tensor([[2.0, 2.0], [0.0, 1.0], [1.0, 0.0]])
    score = ches_score(chosen, rejected)
    # <H_w, H_l> = 4*3 + 2*3 = 18, |H_w|² = 16 + 4 = 20
    assert score.score == -2.0
    # 18 / (2 * 3) - 20 / 2² = 3 - 5
    assert score.normalised == pytest.approx(-2.0, abs=1e-15)


def test_lengths_matter_to_the_normalised_score():
    # H_w = (2, 0), H_l = (3, 3): 6 - 4 = 2, and 6 / (1 * 3) - 4 / 1 = -2
    score = ches_score(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 1.0]] * 3))
    assert (score.score, score.normalised) == (2.0, -2.0)


def test_the_same_answer_scores_zero():
    hidden_states = torch.randn(7, 5) * 1e3
    assert ches_score(hidden_states, hidden_states) == (0.0, 0.0)


def test_close_answers_do_not_cancel():
    """|H|² is 8 · (4e5)² = 1.3e12 here and the score 0.4: a difference of two products in fp64 keeps 3 digits of it."""
    chosen = torch.full((4, 8), 1e5)
    rejected = chosen.double().clone()
    rejected[0, 0] += 1e-6
    # the rejected sum is 1e-6 larger in one component, of which the chosen sum has 4e5
    assert ches_score(chosen.double(), rejected).score == pytest.approx(0.4, rel=1e-4)


def test_an_empty_answer_is_refused():
    with pytest.raises(ValueError, match="expected at least one token in either answer, got 0 and 2"):
        ches_score(torch.zeros(0, 3), torch.zeros(2, 3))


def by_definition(model, record):
    """Row by row from the model's last hidden states (after its final norm) and full log-softmax, in fp64."""
    answers, hidden_sums = [], []
    for field in ("chosen_ids", "rejected_ids"):
        prompt, answer = record["prompt_ids"], record[field]
        output = model(input_ids=torch.tensor([prompt + answer]), output_hidden_states=True)
        predicting = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
        logps = output.logits[0, predicting].log_softmax(-1)
        answers.append(float(logps[torch.arange(len(answer)), torch.tensor(answer)].sum()))
        hidden_sums.append(output.hidden_states[-1][0, predicting].sum(0))
    chosen, rejected = hidden_sums
    t_w, t_l = len(record["chosen_ids"]), len(record["rejected_ids"])
    return (
        *answers,
        float(chosen @ rejected - chosen @ chosen),
        float(chosen @ rejected / (t_w * t_l) - chosen @ chosen / t_w**2),
    )


@pytest.mark.parametrize("lora", [False, True])
def test_against_the_models_own_hidden_states(lora):
    records = [{**record, "pair_id": 10 + i} for i, record in enumerate(token_pairs(5))]
    records[1]["rejected_ids"] = records[1]["rejected_ids"][:2]  # of another length than the chosen one
    model = tiny_llama().double()
    if lora:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.train()
    scores = score_pairs(model, Dataset.from_list(records), pad_token_id=0, batch_size=2, desc=None)
    assert model.training
    assert scores.rows.tolist() == [10, 11, 12, 13, 14]
    assert scores.rejected_tokens.tolist() == [4, 2, 8, 10, 12]
    model.eval()
    with torch.no_grad():
        expected = np.array([by_definition(model, record) for record in records]).T
    for ours, truth in zip(
        (scores.chosen_logps, scores.rejected_logps, scores.ches, scores.ches_normalised), expected, strict=True
    ):
        np.testing.assert_allclose(ours, truth, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(scores.margins, expected[0] - expected[1], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(
        scores.normalised_margins, expected[0] / [4, 6, 8, 10, 12] - expected[1] / [4, 2, 8, 10, 12], rtol=1e-9
    )
    # no hook and no head is left behind
    with torch.no_grad():
        assert model(input_ids=torch.tensor([[5, 6]])).logits.shape == (1, 2, 61)


def test_rank_correlation():
    assert rank_correlation(np.array([1, 2, 3]), np.array([10, 200, 3000])) == pytest.approx(1)
    assert rank_correlation(np.array([1, 2, 3]), np.array([3, 2, 1])) == pytest.approx(-1)
    # ranks (1, 2.5, 2.5, 4) and (1, 2, 3, 4): covariance 4.5, squares 4.5 and 5 -> 4.5 / sqrt(22.5)
    assert rank_correlation(np.array([0, 7, 7, 9]), np.array([1, 2, 3, 4])) == pytest.approx(4.5 / math.sqrt(22.5))
    assert math.isnan(rank_correlation(np.array([1, 1]), np.array([1, 2])))
    assert math.isnan(rank_correlation(np.array([1]), np.array([1])))
