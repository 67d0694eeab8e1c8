"""`dpop inspect`: tokens as text, what is held against what, words that follow the numbers, a page that escapes."""

import json
import math
import re

import numpy as np
import pytest
import yaml
from datasets import Dataset
from dpop_trainer.cli import main
from dpop_trainer.data import tokenise_pairs
from dpop_trainer.data.counts import TokeniseCounts
from dpop_trainer.data.edits import EditRegions
from dpop_trainer.measure.pairs_under_model import PairTokenLogps, Ranking, evaluate_pairs
from dpop_trainer.report.signed import minus, signed
from dpop_trainer.report.token_text import token_texts
from dpop_trainer.tools.doctor.summary import number
from dpop_trainer.tools.inspect.inspection import subject_of
from dpop_trainer.tools.inspect.report import (
    AnswerTokens,
    Inspection,
    PairChange,
    movement,
    verdict,
    write_inspection,
)
from page import Page
from tiny import text_pairs, tiny_llama, word_tokenizer
from transformers import AutoTokenizer


def evaluation_of(*answers):
    """Answers of four tokens that differ in the second; each is its chosen changes and its rejected changes."""
    pair = {"prompt_ids": [5], "chosen_ids": [6, 7, 8, 9], "rejected_ids": [6, 10, 8, 9]}
    dataset, _ = tokenise_pairs(Dataset.from_list([pair] * len(answers)), word_tokenizer())
    reference = [PairTokenLogps(np.full(4, -2.0), np.full(4, -2.5))] * len(answers)
    policy = [PairTokenLogps(np.array(w) - 2.0, np.array(l) - 2.5) for w, l in answers]  # noqa: E741
    return evaluate_pairs(policy, reference, dataset)


# chosen -4 and -6 nats, all of it after the edit; rejected unchanged
FALL = evaluation_of(([0, 0, -2, -2], [0] * 4), ([0, 0, -3, -3], [0] * 4))


def test_errors_shares_and_rankings_by_hand():
    assert FALL.chosen_logratio == pytest.approx(-5)
    # deviations of one nat from the mean, n - 1 = 1: sd √2, standard error √2 / √2
    assert FALL.chosen_logratio_error == pytest.approx(1.0)
    assert FALL.rejected_logratio_error == 0
    assert FALL.lost_share == 0.5
    # the reference gives -8 to the chosen and -10 to the rejected answer; the policy -12 or -14, and -10
    assert FALL.ref_ranking == Ranking(1.0, 1.0)
    assert FALL.ranking == Ranking(0.0, 0.0)
    assert FALL.rejected_shift.after.mean_change == 0
    assert math.isnan(evaluation_of(([0] * 4, [0] * 4)).chosen_logratio_error)


def test_ranking_by_token_differs_where_lengths_do():
    pair = {"prompt_ids": [5], "chosen_ids": [6, 7, 8, 9], "rejected_ids": [6]}
    dataset, _ = tokenise_pairs(Dataset.from_list([pair]), word_tokenizer())
    logps = [PairTokenLogps(np.full(4, -1.0), np.array([-2.0]))]  # -4 against -2, but -1 per token against -2
    assert evaluate_pairs(logps, logps, dataset).ranking == Ranking(accuracy=0.0, normalised_accuracy=1.0)


def test_verdict_names_the_fall_and_what_to_do():
    text = verdict(FALL, 2)
    assert "lowered the chosen answers by 5.00 ± 1.00 nats, most after the edit (−2.500 nats per token)" in text
    assert "left the rejected answers where they were (+0.00 ± 0.00 nats per answer)" in text
    assert "50% of the chosen answers' tokens lost more than 0.01 nats" in text
    # Wilson's interval of none of two: 0 to z² / (2 + z²)
    assert "the likelier one in 0.0 % (0.0 to 65.8), where the reference had 100.0 %" in text
    assert movement(FALL) == "fell"
    assert text.endswith("train with DPOP, a larger λ, or a smaller learning rate.")


def test_verdict_does_not_cry_wolf():
    # +4 and -5 nats: mean -0.5, standard error 4.5
    unclear = evaluation_of(([0, 0, 2, 2], [0] * 4), ([0, 0, -2.5, -2.5], [0] * 4))
    noise = verdict(unclear, 2)
    assert movement(unclear) == "unchanged"
    assert "more than the rejected one in 50.0 % (9.5 to 90.5) of the pairs" in noise  # 0.5 ± z / 2 / √(2 + z²)
    assert "Which of the two gained more is chance: no preference was learned." in noise
    assert "left the chosen answers where they were (−0.50 ± 4.50 nats per answer)" in noise
    assert "train with DPOP" not in noise
    risen = evaluation_of(([0, 1, 0, 0], [0, -1, 0, 0]))
    rise = verdict(risen, 1)
    assert movement(risen) == "rose"
    assert "raised the chosen answers by 1.00 nats; it lowered the rejected answers by 1.00 nats" in rise
    assert "train with DPOP" not in rise


def test_token_texts_join_to_the_text():
    tokenizer = word_tokenizer()
    assert token_texts(tokenizer, tokenizer("w3 w4 w5", add_special_tokens=False)["input_ids"]) == ["w3", " w4", " w5"]
    ids = tokenizer("w1 w2 w3 w4", add_special_tokens=False)["input_ids"]
    assert token_texts(tokenizer, ids[2:], ids[:2]) == [" w3", " w4"]
    assert token_texts(tokenizer, [], ids) == []


@pytest.mark.parametrize("folder", ["tokenizers/gpt2", "tokenizers/mistral", "models/stories260K"])
def test_token_texts_of_subword_tokenizers(shared, folder):
    tokenizer = AutoTokenizer.from_pretrained(shared / folder)
    text = "Answer: naïve 🎉🧑‍💻 مرحبا 你好 <b> 48/2\n" * 3
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = token_texts(tokenizer, ids)
    assert len(whole) == len(ids)
    assert "".join(whole) == tokenizer.decode(ids)
    for cut in (1, 7, len(ids) // 2, len(ids) - 1):
        tail = token_texts(tokenizer, ids[cut:], ids[:cut])
        assert len(tail) == len(ids) - cut
        # a cut within a character leaves its first bytes outside
        assert tokenizer.decode(ids).endswith("".join(tail).lstrip("\ufffd"))


def test_page_escapes_everything_and_marks_tokens(tmp_path):
    hostile = "<script>alert(1)</script>&\x00\u202e\"'"
    answer = AnswerTokens([hostile, " b", " c"], [-1.0, -1.0, -1.0], [-4.0, -1.0, 0.5], EditRegions(1, 2))
    counts = TokeniseCounts(**{**dict.fromkeys(TokeniseCounts._fields, 0), "num_pairs_in": 1, "num_pairs": 1})
    pair = PairChange(7, hostile, answer, answer)
    inspection = Inspection(hostile, hostile, hostile, counts, FALL, {}, [pair])
    write_inspection(inspection, [], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert "\x00" not in text
    assert "<script>alert(1)</script>&␀⟨U+202E⟩\"'" in page.text  # as a reader sees it
    spans = [span for span in page.of("span") if "title" in span]
    assert len(spans) == 6  # two answers of three tokens
    fell, edit, gained = spans[:3]
    # of changes of 3, 0 and 1.5 nats, in both answers, 98 % of six is the sixth: 3, and the next round number is 5
    assert "in full from 5 nats on" in page.text
    assert "−5 nats" in page.text
    assert "+5 nats" in page.text
    assert fell["class"] == "lost far"  # by more than a third of five
    assert fell["style"] == "--much: 0.6"
    assert fell["title"] == "−3.00 nats: −1.00 → −4.00"
    assert edit["class"] == "edit"
    assert "style" not in edit
    assert (gained["class"], gained["style"]) == ("gained", "--much: 0.3")
    assert "Pair 7: chosen −1.50 nats" in page.text
    assert "The pair whose chosen answer lost most" in page.text
    assert '<h1><span class="bad">Training lowered the chosen answers by 5.00 ± 1.00 nats each</span></h1>' in text


def one_page(pair, tmp_path):
    counts = TokeniseCounts(**{**dict.fromkeys(TokeniseCounts._fields, 0), "num_pairs_in": 1, "num_pairs": 1})
    write_inspection(Inspection("a", "b", "c", counts, FALL, {}, [pair]), [], tmp_path / "page.html")
    return Page((tmp_path / "page.html").read_text())


@pytest.mark.parametrize(("change", "full"), [(0.0, "0.05"), (0.06, "0.1"), (0.2, "0.2"), (0.21, "0.5"), (30.0, "50")])
def test_colours_are_scaled_to_the_run_and_the_scale_is_said(change, full, tmp_path):
    answer = AnswerTokens([" a"], [-1.0], [-1.0 - change], EditRegions(0, 1))
    page = one_page(PairChange(0, "?", answer, answer), tmp_path)
    assert f"in full from {full} nats on" in page.text
    shown = [span.get("style", "") for span in page.of("span") if "title" in span]
    assert shown == [f"--much: {change / float(full):g}" if change else ""] * 2


def test_an_edit_that_is_most_of_the_answers_is_not_framed(tmp_path):
    answer = AnswerTokens([" a", " b"], [-1.0] * 2, [-2.0] * 2, EditRegions(0, 1))
    for distance, framed in ((0.5, 2), (0.51, 0)):
        page = one_page(PairChange(0, "?", answer, answer, distance), tmp_path)
        assert len(page.of("span", class_="edit")) == framed
        assert ("the edit is not framed" in page.text) == (not framed)
    sides = re.findall(r"(chosen|rejected) −2\.00 nats", page.text)
    assert sides == ["chosen", "chosen", "rejected"]  # in the header, and over either answer


def test_zero_has_one_sign_and_what_is_below_it_a_minus_sign():
    assert [signed(value) for value in (-0.004, 0.0, -0.0, 0.004, -0.006, 1.5)] == ["+0.00"] * 4 + ["−0.01", "+1.50"]
    assert signed(-0.0004, 3) == "+0.000"
    assert [minus(told) for told in ("-2.91", "-1e-05", "2.5")] == ["−2.91", "−1e−05", "2.5"]
    assert [number(value) for value in (-6382.4, -0.282, -7.0)] == ["−6,382", "−0.282", "−7"]  # the doctor's


def test_no_pair_is_said_to_have_lost_that_gained(tmp_path):
    counts = TokeniseCounts(**{**dict.fromkeys(TokeniseCounts._fields, 0), "num_pairs_in": 3, "num_pairs": 3})

    def page_of(*changes):
        answers = [AnswerTokens([" a"], [-2.0], [change - 2.0], EditRegions(0, 1)) for change in changes]
        pairs = [PairChange(row, "?", answer, answer) for row, answer in enumerate(answers)]
        write_inspection(Inspection("a", "b", "c", counts, FALL, {}, pairs), [], tmp_path / "page.html")
        return Page((tmp_path / "page.html").read_text()).text

    gained = page_of(0.25, 0.5)
    assert "The 2 pairs whose chosen answers gained least: none lost" in gained
    assert "lost most" not in gained
    mixed = page_of(-0.25, -0.125, 0.5)
    assert "The 2 pairs whose chosen answers lost most" in mixed
    assert "Pair 2" not in mixed


def test_what_is_held_against_what(tmp_path):
    run = tmp_path / "run"
    for name in ("checkpoint-20", "checkpoint-100", "checkpoint-3"):
        (run / name).mkdir(parents=True)
    (run / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"ref_model: expected the model that training was held against.*--ref_model"):
        subject_of(str(run))
    (run / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
    assert subject_of(str(run)).reference.name == "base"
    (run / "config.yaml").write_text(yaml.safe_dump({"model_name_or_path": "start", "max_length": 77}))
    subject = subject_of(str(run))
    assert (subject.reference.name, subject.max_length) == ("start", 77)
    (run / "checkpoint-20" / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
    of_checkpoint = subject_of(str(run / "checkpoint-20"))  # is asked like its run
    assert (of_checkpoint.reference, of_checkpoint.max_length) == (subject.reference, 77)
    assert [step for step, _ in subject.checkpoints] == [3, 20, 100]
    assert subject_of(str(run), "other").reference.name == "other"


def test_inspect_follows_the_checkpoints_of_a_run(tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in text_pairs()))
    run = tmp_path / "run"
    settings = {
        "model_name_or_path": str(tmp_path / "model"),
        "dataset_name": str(tmp_path / "pairs.jsonl"),
        "output_dir": str(run),
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1.0e-3,
        "gradient_checkpointing": False,
        "report_to": "none",
        "use_cpu": True,
        "use_peft": True,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    assert main(["train", "--config", str(tmp_path / "run.yaml")]) == 0
    assert main(["inspect", str(run), "--pairs", str(tmp_path / "pairs.jsonl"), "--num_worst", "2"]) == 0
    result = json.loads((run / "inspect.json").read_text())
    assert [line["step"] for line in result["checkpoints"]] == [2, 4]
    # the last checkpoint is the model that was saved
    assert result["checkpoints"][-1]["chosen_logratio"] == pytest.approx(result["chosen_logratio"], abs=1e-5)
    assert result["checkpoints"][0]["chosen_logratio"] != result["chosen_logratio"]
    lost = [pair["chosen"]["logratio"] for pair in result["worst"]]
    assert len(lost) == 2
    assert lost == sorted(lost)
    assert (run / "inspect.html").exists()
    figures = {"around_the_edit", "by_distance", "checkpoints_answers", "checkpoints_tokens"}
    assert {path.name for path in (run / "figures").iterdir()} == {f"{name}.svg" for name in figures}
    # one word of the three and the end differs
    assert {pair["distance"] for pair in result["worst"]} == {0.25}
    assert main(["inspect", str(run), "--pairs", str(tmp_path / "pairs.jsonl"), "--limit", "0"]) == 1
    assert "limit: expected at least 1, got 0" in capsys.readouterr().err
