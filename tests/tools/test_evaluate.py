"""Measuring a model on pairs: token log-probs against a plain forward, shifts by hand, greedy completions."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from dpop_trainer.data import tokenise_pairs
from dpop_trainer.measure.generation import Completion, Writing, generate_completions
from dpop_trainer.measure.pairs_under_model import PairTokenLogps, evaluate_pairs, pair_token_logps
from dpop_trainer.measure.stop_tokens import stop_token_ids
from tiny import text_pairs, tiny_llama, token_pairs, word_tokenizer


def tokenised(records):
    return tokenise_pairs(Dataset.from_list(records), word_tokenizer())[0]


def test_token_logps_are_the_models_own():
    model, records = tiny_llama().requires_grad_(False).train(), token_pairs()
    results = pair_token_logps(model, tokenised(records), pad_token_id=0, batch_size=2)
    assert len(results) == len(records)
    assert model.training
    assert "forward" not in model.lm_head.__dict__  # the head it was given is gone
    model.eval()
    for record, result in zip(records, results, strict=True):
        for answer_ids, logps in ((record["chosen_ids"], result.chosen), (record["rejected_ids"], result.rejected)):
            ids = torch.tensor([record["prompt_ids"] + answer_ids])
            log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            expected = log_probs.gather(-1, ids[0, 1:, None])[len(record["prompt_ids"]) - 1 :, 0]
            np.testing.assert_allclose(logps, expected.numpy(), atol=1e-5)


def test_evaluation_by_hand():
    # answers of four tokens that differ in the second; the policy changes them by the numbers below
    dataset = tokenised([{"prompt_ids": [5], "chosen_ids": [6, 7, 8, 9], "rejected_ids": [6, 10, 8, 9]}] * 2)
    reference = [PairTokenLogps(np.full(4, -2.0), np.full(4, -3.0))] * 2
    policy = [
        PairTokenLogps(np.array([-2.0, -1.0, -4.0, -3.0]), np.array([-3.0, -9.0, -3.0, -3.0])),
        PairTokenLogps(np.array([-1.5, -2.5, -2.0, -4.0]), np.full(4, -3.0)),
    ]
    evaluation = evaluate_pairs(policy, reference, dataset)
    assert evaluation.chosen_logratio == pytest.approx((-2.0 - 2.0) / 2)
    assert evaluation.rejected_logratio == pytest.approx((-6.0 + 0.0) / 2)
    assert evaluation.reward_accuracy == 0.5  # -2 > -6, and -2 < 0
    assert evaluation.shift.before.mean_change == pytest.approx(0.25)
    assert evaluation.shift.at.mean_change == pytest.approx((1.0 - 0.5) / 2)
    assert evaluation.shift.after.mean_change == pytest.approx((-2.0 - 1.0 + 0.0 - 2.0) / 4)
    with pytest.raises(ValueError, match="expected log-probs of all 2 pairs, got 1 and 2"):
        evaluate_pairs(policy[:1], reference, dataset)


def test_greedy_completions_do_not_depend_on_the_batch():
    model, tokenizer = tiny_llama().eval(), word_tokenizer()
    prompts = [pair["prompt"] for pair in text_pairs()] + ["w1 w2 w3 w4 w5"]  # of unequal length
    together = generate_completions(model, tokenizer, prompts, max_new_tokens=6, batch_size=7)
    alone = [generate_completions(model, tokenizer, [prompt], max_new_tokens=6)[0] for prompt in prompts]
    assert together == alone
    ids = tokenizer(prompts[0])["input_ids"]
    expected: list[int] = []
    for _ in range(6):
        expected.append(int(model(input_ids=torch.tensor([ids + expected])).logits[0, -1].argmax()))
        if expected[-1] == tokenizer.eos_token_id:
            break
    ended = expected[-1] == tokenizer.eos_token_id
    expected = expected[:-1] if ended else expected
    assert together[0] == Completion(tokenizer.decode(expected, skip_special_tokens=True), expected, ended)


@pytest.mark.parametrize("named", ["list", "one", "none"])
def test_completions_end_before_the_models_own_stop_tokens(named):
    """By hand: argmax after argmax until a token that the model names, which its tokenizer does not know as special."""
    model, tokenizer = tiny_llama().eval(), word_tokenizer()
    prompts = ["w1 w2", "w7 w3 w9"]

    def argmaxes(ids, num_tokens=8):
        for _ in range(num_tokens):
            ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
        return ids[-num_tokens:]

    written = [argmaxes(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    own = next(token for token in written[0][1:] if token not in written[0][:1] and token > 2)  # 0, 1, 2 are special
    model.generation_config.eos_token_id = {"list": [2, own], "one": own, "none": None}[named]
    stops = {2} if named == "none" else {2, own}
    expected = []
    for tokens in written:
        end = next((i for i, token in enumerate(tokens) if token in stops), len(tokens))
        text = tokenizer.decode(tokens[:end], skip_special_tokens=True)
        expected.append(Completion(text, tokens[:end], end < len(tokens)))
    assert generate_completions(model, tokenizer, prompts, max_new_tokens=8) == expected
    assert (f"w{own - 3}" in expected[0].text) == (named == "none")
    assert stop_token_ids(model, tokenizer) == sorted(stops)


def test_writing_by_hand():
    # 4-grams: 1 2 1 2, 2 1 2 1, 1 2 1 2 (again); none in the others. 2-grams: 12 21 12 21 12, 12, of which 12 and 21
    answers = [Completion("", [1, 2, 1, 2, 1, 2], True), Completion("", [1, 2], False), Completion("", [], True)]
    assert Writing.of(answers) == Writing(8 / 3, 2 / 3, pytest.approx(1 / 3), 2 / 6)
    nothing = Writing.of([Completion("", [], True)])
    assert nothing[:2] == (0, 1)
    assert np.isnan(nothing[2:]).all()
