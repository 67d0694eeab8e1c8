"""`dpop compare`: what a method may be, results through JSON, words that follow the numbers, a whole run."""

import json
import math

import numpy as np
import pytest
import yaml
from datasets import Dataset
from dpop_trainer.cli import main
from dpop_trainer.data import tokenise_pairs
from dpop_trainer.measure.generation import Completion, Writing
from dpop_trainer.measure.pairs_under_model import PairTokenLogps, Ranking, evaluate_pairs
from dpop_trainer.measure.shares import share_interval
from dpop_trainer.measure.token_shift import mean_token_shift, token_shift_as_dict, token_shift_from_dict
from dpop_trainer.models.trained import TrainedModel
from dpop_trainer.settings.arguments import ComparisonArguments, parse_arguments
from dpop_trainer.settings.config import DPOPConfig
from dpop_trainer.tools.compare import answers as compare_answers
from dpop_trainer.tools.compare.answers import (
    Answered,
    Answers,
    Grading,
    Problem,
    answer_problems,
    problems_of,
    right_gain,
)
from dpop_trainer.tools.compare.methods import parse_method, parse_methods
from dpop_trainer.tools.compare.page import headline, result_sections
from dpop_trainer.tools.compare.report import (
    COLUMNS,
    WRITING,
    Comparison,
    RunResult,
    format_comparison,
    has_writing,
    interval,
    read_comparison,
    table_rows,
    table_titles,
    verdict,
)
from dpop_trainer.tools.compare.run import plan_runs
from page import Page
from tiny import text_pairs, tiny_llama, word_tokenizer


@pytest.mark.parametrize(
    ("text", "name", "slug", "overrides"),
    [
        ("dpop", "DPOP", "dpop", {"loss_type": "dpop"}),
        ("dpop:dpop_lambda=5", "DPOP, λ = 5", "dpop-dpop_lambda=5", {"loss_type": "dpop", "dpop_lambda": 5}),
        (
            "dpo:beta=0.1,learning_rate=1.0e-4",
            "DPO, β = 0.1, lr = 0.0001",
            "dpo-beta=0.1-learning_rate=1.0e-4",
            {"loss_type": "dpo", "beta": 0.1, "learning_rate": 1e-4},
        ),
        (
            "dpop:learning_rate=8e-4,gradient_checkpointing=no",  # YAML takes the first for text, the second for False
            "DPOP, lr = 0.0008, gradient_checkpointing = False",
            "dpop-learning_rate=8e-4-gradient_checkpointing=no",
            {"loss_type": "dpop", "learning_rate": 8e-4, "gradient_checkpointing": False},
        ),
        ("dpop:dpop_lambda=much", None, None, "methods: dpop_lambda in .* expected a value that .*, got 'much'"),
        ("dpop:max_length=true", None, None, "methods: max_length in .* expected a number, got True"),
        (
            "dpo+sft:loss_type_is_not=1",
            None,
            None,
            "expected a field of DPOPConfig that may differ, got 'loss_type_is_not'",
        ),
        ("dpop:dpop_lamda=5", None, None, "Did you mean 'dpop_lambda'"),
        ("dpop:5", None, None, "expected FIELD=VALUE after the colon, got '5'"),
        (":beta=1", None, None, "expected LOSS"),
        ("dpo:seed=3", None, None, "expected a field of DPOPConfig that may differ, got 'seed'"),
    ],
)
def test_methods(text, name, slug, overrides):
    if name is None:
        with pytest.raises(ValueError, match=overrides):
            parse_method(text)
    else:
        assert parse_method(text) == (name, slug, overrides)


def test_a_shared_option_goes_to_the_methods_whose_losses_read_it():
    shared = {"max_steps": 7, "beta": 0.2, "dpop_lambda": 5.0, "dpop_dead_zone": 0.1, "dpop_lambda_warmup_steps": 3}
    shared |= {"simpo_gamma": 1.0}
    given = {text: parse_method(text).run_values(shared) for text in ("dpo", "dpop", "simpo+sft", "dpo:dpop_lambda=9")}
    assert given["dpo"] == {"max_steps": 7, "beta": 0.2, "loss_type": "dpo"}
    assert given["dpop"] == {name: value for name, value in shared.items() if name != "simpo_gamma"} | {
        "loss_type": "dpop"
    }
    assert given["simpo+sft"].keys() == {"max_steps", "beta", "simpo_gamma", "loss_type"}
    assert given["dpo:dpop_lambda=9"]["dpop_lambda"] == 9  # its own, to be refused by name


def test_a_list_is_one_value():
    assert parse_method("dpop+ipo:loss_weights=[1,0.5],beta=0.1").overrides == {
        "loss_type": ["dpop", "ipo"],
        "loss_weights": [1, 0.5],
        "beta": 0.1,
    }


def test_methods_are_there_once():
    with pytest.raises(ValueError, match="expected each once, got 'dpo ' and 'dpo'"):
        parse_methods(["dpo", "dpop", "dpo "])
    with pytest.raises(ValueError, match="expected at least one"):
        parse_methods([])


def result(method, seed, chosen, rejected=0.0):
    """One pair of two answers of four tokens; the change of the chosen one falls on its last token."""
    pair = {"prompt_ids": [5], "chosen_ids": [6, 7, 8, 9], "rejected_ids": [6, 10, 8, 9]}
    dataset, _ = tokenise_pairs(Dataset.from_list([pair]), word_tokenizer())
    before = [PairTokenLogps(np.full(4, -2.0), np.full(4, -3.0))]
    after = [PairTokenLogps(np.array([-2, -2, -2, chosen - 2]), np.array([rejected - 3, -3, -3, -3]))]
    history = {"step": [0, 5], "chosen": [0.0, chosen], "rejected": [0.0, rejected]}
    gradients = {"step": [5], "grad_norm": [2.5]}
    return RunResult(method, seed, 1, evaluate_pairs(after, before, dataset), history, 1.5, gradients)


def comparison(**changes):
    """By method, the chosen answers' change with every seed."""
    results = [result(name, seed, value) for name, values in changes.items() for seed, value in enumerate(values)]
    return Comparison(list(changes), results, {}, {})


def test_results_survive_json():
    before = result("DPO", 3, -2.0)
    after = RunResult.from_dict(json.loads(json.dumps(before.as_dict(), allow_nan=False)))
    assert after.as_dict() == before.as_dict()
    assert np.isnan(after.evaluation.chosen_logratio_error)  # of a single pair
    graded = before._replace(answers=Answers(3, 1, 8), ref_answers=Answers(4, 0, 8))
    assert RunResult.from_dict(json.loads(json.dumps(graded.as_dict()))).answers == Answers(3, 1, 8)
    assert after.evaluation.shift.after == before.evaluation.shift.after
    np.testing.assert_array_equal(after.evaluation.shift.profile.mean_change, before.evaluation.shift.profile[1])
    # a region without tokens has no mean, and JSON no NaN
    shift = before.evaluation.shift
    empty = shift._replace(at=shift.at._replace(mean_change=float("nan"), num_tokens=0))
    values = token_shift_as_dict(empty)
    assert values["at"][0] is None
    assert np.isnan(token_shift_from_dict(json.loads(json.dumps(values))).at.mean_change)


def test_mean_shift_by_hand():
    shifts = [result("DPO", seed, value).evaluation.shift for seed, value in enumerate((-2.0, -6.0))]
    mean = mean_token_shift(shifts)
    assert mean.after.mean_change == pytest.approx(-2.0)  # two tokens after the edit, one changed: -1 and -3
    assert mean.after.num_tokens == 4
    assert mean.profile.mean_change[mean.profile.offsets.tolist().index(2)] == pytest.approx(-4.0)


def test_table_by_hand():
    before, *rows = table_rows(comparison(DPO=[-1.0, -3.0], DPOP=[0.5, 0.5]))
    # changes have no value before; the chosen answer's -8 nats were more than the rejected one's -12
    assert before == ["before training", *["—"] * 5, "100.0 %"]
    # standard deviation of -1 and -3 is √2
    assert rows[0][:4] == ["DPO", "−2.00 ± 1.41", "+0.00 ± 0.00", "−1.000 ± 0.707"]
    assert rows[1][:2] == ["DPOP", "+0.50 ± 0.00"]
    assert rows[0][4] == "25.0 % ± 0.0 %"  # one token of four


def test_verdict_follows_the_numbers():
    text = verdict(comparison(DPO=[-10.0, -11.0, -12.0], IPO=[-4.0, 5.0, 0.5], DPOP=[2.0, 2.1, 2.2]))
    assert text.startswith("On 1 held-out pair, 3 seeds: DPO (−11.00 nats) lowered the chosen answers.")
    assert "IPO (+0.50 nats) left the chosen answers where they were." in text
    assert "DPOP (+2.10 nats) raised the chosen answers." in text
    # above IPO by 6, -2.9 and 1.7 nats: mean 1.6, standard deviation √(39.62 / 2) = 4.451, error 4.451 / √3 = 2.570
    lead = "1.60 ± 2.57 above IPO, which is no difference"
    assert f"DPOP keeps them highest (+2.10 nats, {lead}) and also sets" in text
    assert f"the two answers furthest apart (2.10 nats, {lead})." in text
    other = verdict(Comparison(["A", "B"], [result("A", 0, -1.0, -9.0), result("B", 0, 1.0, 0.0)], {}, {}))
    apart = "A sets the two answers furthest apart (8.00 nats, with one seed)."
    assert f"B keeps them highest (+1.00 nats, with one seed) and {apart}" in other
    worse = verdict(Comparison(["A", "B"], [result("A", 0, -9.0, -1.0), result("B", 0, 1.0, 1.0)], {}, {}))
    assert "and none sets the chosen answers further above the rejected ones." in worse
    # 0.5, 0.6 and 0.55 nats more, seed by seed: 0.55 ± 0.05 / √3
    ahead = verdict(comparison(DPO=[1.0, 3.0, -2.0], DPOP=[1.5, 3.6, -1.45]))
    assert "(+1.22 nats, 0.55 ± 0.03 above DPO)" in ahead


def test_the_judgement_in_a_sentence():
    runs = comparison(DPO=[-10.0, -11.0, -12.0], IPO=[-4.0, 5.0, 0.5], DPOP=[2.0, 2.1, 2.2])
    told = "DPO lowered the chosen answers; IPO left them where they were; DPOP raised them."
    assert headline(runs) == told
    assert headline(comparison(A=[-1.0], B=[-2.0])) == "A and B lowered the chosen answers."
    varied = {"DPO, β = 0.1, lr = 0.1": [-10.0], "DPOP": [2.0], "DPOP, λ = 5": [3.0]}
    told = "DPO (β = 0.1, lr = 0.1) lowered the chosen answers; DPOP and DPOP (λ = 5) raised them."
    assert headline(comparison(**varied)) == told
    many = headline(comparison(A=[-1.0], B=[-2.0], C=[-4.0], **{"DPOP, λ = 5": [-0.5]}))
    assert many == "All 4 methods lowered the chosen answers: from −0.50 nats with DPOP (λ = 5) to −4.00 nats with C."


def test_intervals_by_hand():
    runs = comparison(DPO=[-1.0, -3.0])
    # mean -2, standard deviation √2, its error √2 / √2: two of them are 2
    assert interval(COLUMNS[0], runs.of("DPO")) == pytest.approx((-4.0, 0.0))
    alone = comparison(DPO=[-1.0])
    assert interval(COLUMNS[0], alone.of("DPO")) is None  # a single pair leaves no error
    # of one pair, whose chosen answer lost: Wilson's interval of none of one
    low, high = interval(COLUMNS[4], alone.of("DPO")) or (None, None)
    assert (low, high) == pytest.approx((0.0, 1.959964**2 / (1 + 1.959964**2)), abs=1e-6)
    page = Page("\n".join(result_sections(runs)))
    assert "−2.00 ± 1.41−4.00 to +0.00" in page.text  # the second line of the cell
    assert "two standard errors around the mean over seeds" in page.text
    assert "what the pairs of one seed leave open" in Page("\n".join(result_sections(alone))).text


def ranked(**shares):
    """By method, the share of a hundred pairs that it ranks rightly; the model before, half of them."""
    runs = comparison(**{method: [1.0, 1.0] for method in shares})
    results = []
    for run in runs.results:
        ranks = {"ranking": Ranking(shares[run.method], 0.0), "ref_ranking": Ranking(0.5, 0.0)}
        results.append(run._replace(num_pairs=100, evaluation=run.evaluation._replace(**ranks)))
    return runs._replace(results=results)


def test_a_ranking_is_told_from_chance():
    """Wilson's interval of 52 of 100: (0.52 + 3.8415 / 200) / 1.038415 ± 1.95996 / 1.038415 · √(0.2496 / 100 + 3.8415 /
    40000), 42.3 to 61.5 %; of 65 of 100, 55.3 to 73.6 %."""
    text = verdict(ranked(DPO=0.52, DPOP=0.65))
    assert text.endswith(
        "At best (DPOP) the chosen answer is the likelier one in 65.0 % (55.3 to 73.6) of the pairs; before, in "
        "50.0 %. No more often than by chance: DPO."
    )
    runs = ranked(DPO=0.52)
    unlearned = "in 52.0 % (42.3 to 61.5) of the pairs; before, in 50.0 %. That is no more than chance: no preference"
    assert unlearned in verdict(runs)
    before = Ranking(0.2, 0.0)
    results = [run._replace(evaluation=run.evaluation._replace(ref_ranking=before)) for run in runs.results]
    assert verdict(runs._replace(results=results)).endswith("before, in 20.0 %. That is no more than chance.")
    assert share_interval(0.0, 1) == pytest.approx((0.0, 1.959964**2 / (1 + 1.959964**2)), abs=1e-6)


def test_right_answers_stand_in_table_and_verdict():
    runs = comparison(DPO=[-1.0, -3.0], DPOP=[0.5, 0.5])
    right = {"DPO": [2, 4], "DPOP": [6, 6]}
    results = [
        run._replace(answers=Answers(right[run.method][run.seed], 1, 8), ref_answers=Answers(5, 0, 8))
        for run in runs.results
    ]
    runs = runs._replace(results=results)
    assert table_titles(runs)[-1] == "answers right"
    # of eight: five before; two and four, whose shares 0.25 and 0.5 have a standard deviation of 0.1768; six and six
    assert [row[-1] for row in table_rows(runs)] == ["62.5 %", "37.5 % ± 17.7 %", "75.0 % ± 0.0 %"]
    # a half and a quarter more than DPO: 37.5 ± 12.5 points
    solved = "DPOP answers most held-out problems rightly (75.0 %, 37.5 ± 12.5 points above DPO; 62.5 % before)."
    assert solved in verdict(runs)


def test_how_answers_are_written_is_a_table_of_its_own():
    runs = comparison(DPO=[-1.0, -3.0])
    assert not has_writing(runs)
    before, after = Writing(40, 1, 0.05, math.nan), [Writing(50, 1, 0.2, 0.5), Writing(60, 0.5, 0.4, 0.25)]
    results = [run._replace(writing=after[run.seed], ref_writing=before) for run in runs.results]
    runs = runs._replace(results=[RunResult.from_dict(json.loads(json.dumps(run.as_dict()))) for run in results])
    assert has_writing(runs)
    # of two numbers the standard deviation is their difference / √2
    assert table_rows(runs, WRITING) == [
        ["before training", "40", "100.0 %", "5.0 %", "—"],
        ["DPO", "55 ± 7", "75.0 % ± 35.4 %", "30.0 % ± 14.1 %", "37.5 % ± 17.7 %"],
    ]
    assert "repeated 4-grams" in format_comparison(runs)
    assert table_titles(runs)[-1] == "ranking accuracy"


def test_a_gain_is_paired_by_problem():
    """Two seeds: problem 1 is lost by one of them, 2 by both, 3 gained by one: -1/2, -1, 1/2, 0, whose mean is -1/4 and
    whose variance (1/16 + 9/16 + 9/16 + 1/16) / 3 = 5/12."""
    before, one, other = Answers(2, 0, 4, "rrww"), Answers(2, 1, 4, "rnrw"), Answers(0, 0, 4, "wwww")
    assert right_gain([one, other], before) == pytest.approx((-1 / 4, math.sqrt(5 / 12 / 4)))
    assert right_gain([one, Answers(0, 0, 4)], before) is None
    runs = comparison(DPO=[-1.0, -3.0], DPOP=[0.5, 0.5])
    after = {"DPO": [other, other], "DPOP": [one, other]}
    results = [run._replace(answers=after[run.method][run.seed], ref_answers=before) for run in runs.results]
    told = "problem by problem, in points: DPO −50.0 ± 28.9 (no difference) and DPOP −25.0 ± 32.3 (no difference)."
    assert told in verdict(runs._replace(results=results))


def test_every_prompt_is_a_problem_once():
    tokenizer = word_tokenizer()
    pairs = [{"prompt": "w1 w2", "chosen": f" w{i}", "rejected": " w9"} for i in (3, 4)]
    pairs += [
        {"prompt": "w5", "chosen": " w6 w7", "rejected": " w8"},
        {"prompt": "w6", "chosen": " w1", "rejected": " w2"},
    ]
    dataset, _ = tokenise_pairs(Dataset.from_list(pairs), tokenizer)
    problems = problems_of(dataset, tokenizer, Grading("exact", max_answers=2))
    assert [problem.label for problem in problems] == ["w3", "w6 w7"]
    assert problems[1].prompt_ids == tokenizer("w5")["input_ids"]
    with pytest.raises(ValueError, match="held-out pair 0: expected a chosen answer that matcher 'regex' can grade"):
        problems_of(dataset, tokenizer, Grading("regex", answer_regex="z(.)"))


def test_answers_are_counted_by_verdict(monkeypatch):
    texts = {3: "I add. #### 7", 4: "#### 8", 5: "I add, and then I", 6: "the answer is 1,000"}
    monkeypatch.setattr(
        compare_answers,
        "generate_completions",
        lambda model, tokenizer, prompts, **_: [Completion(texts[p[0]], [1, 2, 3, 4], True) for p in prompts],
    )
    problems = [Problem([3], "#### 7"), Problem([4], "#### 7"), Problem([5], "#### 7"), Problem([6], "#### 1000")]
    model = TrainedModel(None, None)  # type: ignore[arg-type]
    graded, writing = answer_problems(model, problems, Grading("numeric"), desc="")
    assert graded == Answers(num_right=2, num_without_answer=1, num_prompts=4, verdicts="rwnr")
    assert graded.right_share == 0.5
    assert answer_problems(model, problems, Grading("none"), desc="") == Answered(None, writing)
    assert writing == Writing(4, 1, 0, 3 / 12)


@pytest.fixture
def setting(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    for name, pairs in (("train", text_pairs()), ("test", text_pairs(9)[6:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    values = {
        "model_name_or_path": str(tmp_path / "model"),
        "dataset_name": str(tmp_path / "train.jsonl"),
        "eval_dataset_name": str(tmp_path / "test.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 8,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 3.0e-3,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "methods": ["dpo", "dpop:dpop_lambda=500"],
        "seeds": [0, 1],
    }
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def test_whole_comparison_and_its_second_start(setting, capsys):
    argv = ["compare", "--config", str(setting / "compare.yaml")]
    assert main(argv) == 0
    out = setting / "out"
    assert {"compare.json", "compare.html", "figures"} <= {path.name for path in out.iterdir()}
    page = Page((out / "compare.html").read_text())
    assert len(page.of("svg")) == len(list((out / "figures").iterdir())) == 6
    written = read_comparison(out / "compare.json")
    assert written.methods == ["DPO", "DPOP, λ = 500"]
    assert [(run.method, run.seed) for run in written.results] == [(m, s) for m in written.methods for s in (0, 1)]
    assert all(run.history["step"] == list(range(9)) for run in written.results)
    for run in written.results:
        assert run.gradients["step"] == list(range(1, 9))
        assert all(norm > 0 for norm in run.gradients["grad_norm"])
        assert run.answers is None
        # the last evaluation of the run and the measurement after it are of the same model
        assert run.history["chosen"][-1] == pytest.approx(run.evaluation.chosen_logratio, abs=1e-4)
    assert not list(out.rglob("*.safetensors"))
    capsys.readouterr()

    assert main([*argv, "--methods", "dpo", "dpop:dpop_lambda=500", "slic"]) == 0
    again = capsys.readouterr().out
    assert again.count("(finished before)") == 4
    assert [run.as_dict() for run in read_comparison(out / "compare.json").results[:4]] == [
        run.as_dict() for run in written.results
    ]
    assert main([*argv, "--learning_rate", "1e-4"]) == 1
    assert "got one with other values of learning_rate" in capsys.readouterr().err
    torn = out / "dpo" / "seed-0" / "comparison.json"
    torn.write_text(torn.read_text()[:-20])
    assert main(argv) == 1
    assert f"{torn}: expected what a finished run measured, got what cannot be read" in capsys.readouterr().err


def test_models_answer_the_held_out_prompts(setting, capsys):
    # its first pair alone is measured on; the prompts of the first two pairs are one
    lines = (setting / "test.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    (setting / "test.jsonl").write_text("\n".join([lines[0], json.dumps({**first, "rejected": " w3"}), *lines[1:]]))
    argv = [
        "compare",
        "--config",
        str(setting / "compare.yaml"),
        "--methods",
        "dpop",
        "--seeds",
        "0",
        "--max_steps",
        "2",
        "--max_eval_pairs",
        "1",
    ]
    assert main([*argv, "--matcher", "exact", "--max_new_tokens", "5", "--max_answers", "2"]) == 0
    (run,) = read_comparison(setting / "out" / "compare.json").results
    assert run.answers is not None
    assert run.ref_answers is not None
    assert run.num_pairs == 1
    assert run.answers.num_prompts == run.ref_answers.num_prompts == 2
    assert run.writing is not None
    assert 0 < run.writing.num_tokens <= 5
    assert "answers right" in (setting / "out" / "compare.html").read_text()
    assert main(argv) == 1  # the same runs without answers would be another comparison
    assert "other values of matcher, max_answers, max_new_tokens" in capsys.readouterr().err


def test_answers_that_nobody_grades_are_described(setting, capsys):
    argv = ["compare", "--config", str(setting / "compare.yaml"), "--methods", "dpop", "--max_steps", "2"]
    assert main([*argv, "--seeds", "0", "--matcher", "none", "--max_new_tokens", "5"]) == 0
    (run,) = read_comparison(setting / "out" / "compare.json").results
    assert run.answers is run.ref_answers is None
    assert run.writing is not None
    assert run.ref_writing is not None
    assert "repeated 4-grams" in capsys.readouterr().out
    page = (setting / "out" / "compare.html").read_text()
    assert "How it writes" in page
    assert "answers right" not in page


def test_runs_that_cut_differently_have_their_own_reference(setting):
    argv = ["compare", "--config", str(setting / "compare.yaml"), "--seeds", "0", "--max_steps", "1"]
    assert main([*argv, "--methods", "dpo", "dpo:max_length=5", "--learning_rate", "0"]) == 0
    for run in read_comparison(setting / "out" / "compare.json").results:
        assert run.evaluation.chosen_logratio == run.evaluation.rejected_logratio == 0.0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods", "dpop:beta=-1"], "beta: expected a finite value > 0, got -1"),
        (["--methods", "dpoop"], "loss_type: expected one of"),
        (["--seeds", "1", "1"], "seeds: expected at least one, each once, got [1, 1]"),
        (["--matcher", "numerical"], "matcher: expected one of numeric, exact, choice or regex, got 'numerical'"),
        (["--matcher", "regex"], "answer_regex: expected a pattern with matcher 'regex'"),
        (["--matcher", "choice"], "held-out pair 0: expected a chosen answer that matcher 'choice' can grade against"),
        (["--max_eval_pairs", "0"], "max_eval_pairs: expected at least 1, got 0"),
        (["--matcher", "exact", "--answer_batch_size", "0"], "answer_batch_size: expected at least 1, got 0"),
    ],
)
def test_nothing_is_trained_before_all_is_checked(setting, capsys, flags, message):
    assert main(["compare", "--config", str(setting / "compare.yaml"), *flags]) == 1
    assert message in capsys.readouterr().err
    assert not (setting / "out").exists()


@pytest.mark.parametrize(
    ("name", "num_methods", "lambdas", "flags"),
    [
        ("gsm8k/compare", 12, {5, 50, 500}, []),
        ("high_edit/compare", 6, {5, 50, 500}, ["--model_name_or_path", "m", "--dataset_name", "d"]),
        ("demo/guidance", 10, {0.5, 5, 50, 500}, []),
        ("smollm2/compare", 4, {50}, []),
        ("smollm2/conversations", 5, {50}, ["--seeds", "0", "1", "2"]),
    ],
)
def test_recipes_of_the_paper_are_sound(name, num_methods, lambdas, flags):
    argv = ["--recipe", name, *flags, "--eval_dataset_name", "e", "--output_dir", "o"]
    plan = plan_runs(*parse_arguments(DPOPConfig, argv, "dpop compare", ComparisonArguments))
    assert len({run.folder for run in plan}) == len(plan) == num_methods * 3
    # a method whose losses read no λ is given none
    assert {run.values["dpop_lambda"] for run in plan if "dpop_lambda" in run.values} == lambdas


def test_held_out_pairs_are_needed(setting, capsys):
    path = setting / "compare.yaml"
    path.write_text("\n".join(line for line in path.read_text().splitlines() if "eval_dataset" not in line))
    assert main(["compare", "--config", str(path)]) == 1
    assert "eval_dataset_name: expected pairs to measure on" in capsys.readouterr().err
