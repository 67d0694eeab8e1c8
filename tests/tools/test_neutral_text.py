"""Neutral text: log-probs against a softmax of all logits, the error by hand, and a comparison that measures them."""

import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from dpop_trainer.cli import main
from dpop_trainer.data import tokenise_pairs
from dpop_trainer.measure.neutral_text import TextLogps, TextShift, text_logps, texts_of
from dpop_trainer.measure.pairs_under_model import PairTokenLogps, evaluate_pairs
from dpop_trainer.tools.compare.report import (
    NEUTRAL,
    Comparison,
    RunResult,
    interval,
    read_comparison,
    shown_columns,
    table_rows,
    verdict,
)
from tiny import text_pairs, tiny_llama, word_tokenizer

TEXTS = [" w3 w4 w5 w6 w7", " w9", " w5 w5", " w8 w7 w6 w5 w4 w3 w2"]


@pytest.mark.parametrize("max_length", [None, 4])
def test_every_token_but_the_first_is_scored(max_length):
    model, tokenizer = tiny_llama().double().eval(), word_tokenizer()
    found = text_logps(model, tokenizer, TEXTS, max_length=max_length, batch_size=2)
    rows = [tokenizer(text)["input_ids"][:max_length] for text in TEXTS]
    assert found.num_tokens.tolist() == [len(row) - 1 for row in rows]
    with torch.no_grad():
        for row, value in zip(rows, found.sums, strict=True):
            logps = model(torch.tensor([row])).logits[0].log_softmax(-1)
            expected = sum(logps[t, row[t + 1]].item() for t in range(len(row) - 1))
            # fp64 sums of at most six log-probs, each of a softmax over some ten logits
            assert value == pytest.approx(expected, abs=1e-12)


def test_a_long_text_is_cut_where_the_run_says():
    model, tokenizer, text = tiny_llama(), word_tokenizer(), " w3" * 1500
    num_tokens = len(tokenizer(text)["input_ids"])
    for max_length, kept in ((1200, 1200), (None, 1024), (5000, num_tokens)):
        assert text_logps(model, tokenizer, [text], max_length=max_length).num_tokens.tolist() == [kept - 1]


def test_never_more_tokens_than_positions():
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = word_tokenizer()
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=4, n_embd=8, n_layer=1, n_head=2))
    assert text_logps(model, tokenizer, TEXTS[3:]).num_tokens.tolist() == [3]


def test_the_change_is_per_token_and_its_error_over_texts():
    before = TextLogps(np.array([-4.0, -20.0]), np.array([2, 10]))
    after = TextLogps(np.array([-5.0, -20.0]), np.array([2, 10]))
    shift = TextShift.of(after, before)
    assert shift[:4] == pytest.approx((2, 12, -2.0, -25 / 12))
    assert shift.mean_change == pytest.approx(-1 / 12)
    # residuals -1 + 2/12 and 10/12: √(2 / 1 · 2 · (5/6)²) / 12
    assert shift.error == pytest.approx(2 * 5 / 6 / 12)
    alone = TextShift.of(*(TextLogps(logps.sums[:1], logps.num_tokens[:1]) for logps in (after, before)))
    assert math.isnan(alone.error)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"content": "a"}], "expected a column 'text', got content in the.jsonl"),
        ([{"text": "a"}, {"text": None}], "row 1 of the.jsonl: expected a text, got NoneType"),
        ([{"text": " "}, {"text": ""}], "expected at least one text that is not blank, got none in the.jsonl"),
    ],
)
def test_what_is_no_text_is_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        texts_of(Dataset.from_list(rows), "the.jsonl", 9)


def test_blank_texts_are_passed_over():
    dataset = Dataset.from_list([{"text": text} for text in ("\n", "a", "", "b", "c")])
    assert texts_of(dataset, "", 2) == ["a", "b"]


def test_the_verdict_tells_what_became_of_them():
    pair = {"prompt_ids": [5], "chosen_ids": [6, 7], "rejected_ids": [6, 8]}
    dataset, _ = tokenise_pairs(Dataset.from_list([pair]), word_tokenizer())
    evaluation = evaluate_pairs(*[[PairTokenLogps(np.zeros(2), np.zeros(2))]] * 2, dataset)

    def told(**methods):
        runs = [
            RunResult(name, seed, 1, evaluation, {}, 1.0, {}, neutral_text=TextShift(2, 12, -3.0, -3.0 + change, error))
            for name, changes in methods.items()
            for seed, (change, error) in enumerate(changes)
        ]
        return verdict(Comparison(list(methods), runs, {}, {}))

    # of two seeds the error is half of their difference
    many = told(DPO=[(-0.3, 0.5), (-0.5, 0.5)], DPOP=[(0.02, 0.01), (0.0, 0.01)])
    assert many.endswith("Neutral text, in nats per token: DPO −0.400 ± 0.100 and DPOP +0.010 ± 0.010 (no difference).")
    assert told(DPO=[(-0.3, 0.1)]).endswith("Neutral text, in nats per token: DPO −0.300 ± 0.100.")
    assert told(DPO=[(-0.3, math.nan)]).endswith("Neutral text, in nats per token: DPO −0.300.")


@pytest.fixture
def argv(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    for name, rows in (
        ("train", text_pairs()),
        ("test", text_pairs(9)[6:]),
        ("prose", [{"text": text} for text in TEXTS]),
    ):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {
        "model_name_or_path": tmp_path / "model",
        "dataset_name": tmp_path / "train.jsonl",
        "eval_dataset_name": tmp_path / "test.jsonl",
        "output_dir": tmp_path / "out",
        "max_steps": 2,
        "learning_rate": 3e-3,
        "gradient_checkpointing": "false",
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": "true",
        "seeds": 0,
    }
    return ["compare", *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]


def test_a_comparison_tells_what_was_unlearned(argv, tmp_path, capsys):
    argv += ["--methods", "dpo", "dpop:learning_rate=0"]
    assert main([*argv, "--neutral_texts", str(tmp_path / "prose.jsonl"), "--max_neutral_texts", "3"]) == 0
    written = read_comparison(tmp_path / "out" / "compare.json")
    trained, still = (run.neutral_text for run in written.results)
    assert trained is not None
    assert still is not None
    assert trained[:3] == still[:3] == (3, 4 + 0 + 1, still.ref_mean)
    assert still.mean_change == still.error == 0
    assert trained.mean_change != 0
    assert NEUTRAL in shown_columns(written)
    assert interval(NEUTRAL, written.of("DPO")) == pytest.approx(
        (trained.mean_change - 2 * trained.error, trained.mean_change + 2 * trained.error)
    )
    assert table_rows(written)[0][-1] == "—"
    assert "neutral text Δ" in capsys.readouterr().out
    assert "texts that training is not about" in (tmp_path / "out" / "compare.html").read_text()
    assert main(argv) == 1  # the same runs without texts would be another comparison
    assert "other values of max_neutral_texts, neutral_texts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--neutral_texts", "TRAIN"], "neutral_texts: expected a column 'text', got chosen, prompt, rejected"),
        (["--neutral_texts", "nowhere.jsonl"], "expected an existing file or folder, got nowhere.jsonl"),
        (["--neutral_texts", "WORDS"], "neutral_texts: expected a text of at least two tokens, got 2 of one"),
        (["--max_neutral_texts", "0"], "max_neutral_texts: expected at least 1, got 0"),
    ],
)
def test_nothing_is_trained_on_texts_that_cannot_be_read(argv, tmp_path, capsys, flags, message):
    (tmp_path / "words.jsonl").write_text('{"text": " w3"}\n{"text": " w4"}\n')
    files = {"TRAIN": str(tmp_path / "train.jsonl"), "WORDS": str(tmp_path / "words.jsonl")}
    flags = [files.get(word, word) for word in flags]
    assert main([*argv, *flags]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
