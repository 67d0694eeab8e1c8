"""What `dpop eval` makes of figures: paired differences by hand, held-out pairs, the table, names, bad input."""

import json
import math

import numpy as np
import pytest
from datasets import Dataset
from dpop_trainer.cli import main
from dpop_trainer.data import tokenise_pairs
from dpop_trainer.measure.pairs_under_model import evaluate_pairs, pair_token_logps
from dpop_trainer.models.trained import TrainedModel, load_trained
from dpop_trainer.report.terminal import Terminal
from dpop_trainer.tools.evaluation import run as eval_run
from dpop_trainer.tools.evaluation.compare import as_markdown, as_text, compare, difference
from dpop_trainer.tools.evaluation.held_out import compare_with_reference, metric_of, score_pairs
from dpop_trainer.tools.evaluation.records import (
    Metric,
    TaskResult,
    labels,
    read_result,
    result_path,
    write_result,
)
from dpop_trainer.tools.evaluation.run import EvalSettings, _weights_key, run_eval
from dpop_trainer.tools.evaluation.tasks import LEADERBOARD, parse_tasks
from peft import LoraConfig, get_peft_model
from tiny import text_pairs, tiny_llama, word_tokenizer


def result(task, metric, name="acc", **kwargs):
    facts = {"num_questions": 4, "num_fewshot": 5, "num_truncated": 0, "seconds": 0.0, "key": {}, "notes": []}
    return TaskResult(task=task, metrics={name: metric}, main_metric=name, **{**facts, **kwargs})


def answered(*shares):
    return metric_of({str(i): float(share) for i, share in enumerate(shares)})


def test_paired_difference_by_hand():
    # changes +1 0 0 -1 +1 +1: mean 1/3, squared deviations 4/9 1/9 1/9 16/9 4/9 4/9 = 10/3, / 5 / 6
    change = difference(answered(1, 1, 0, 0, 1, 1), answered(0, 1, 0, 1, 0, 0))
    assert change.paired
    assert change.value == pytest.approx(1 / 3)
    assert change.stderr == pytest.approx(math.sqrt(10 / 3 / 5 / 6))
    # two models that answer every question alike differ by exactly nothing, however unsure each figure is
    same = difference(answered(1, 0, 1, 0), answered(1, 0, 1, 0))
    assert same == (0.0, 0.0, True)


def test_figures_of_other_questions_are_not_paired():
    before, after = Metric(0.5, 0.03, None), Metric(0.6, 0.04, None)
    assert difference(after, before) == (pytest.approx(0.1), pytest.approx(0.05), False)
    other = Metric(0.5, 0.03, {"another question": 0.5})
    assert not difference(answered(1, 0), other).paired


def test_average_of_the_six_is_their_plain_mean():
    shares = {name: (i % 2, 1, 0, 1) for i, name in enumerate(LEADERBOARD)}
    before = {name: result(name, answered(*values)) for name, values in shares.items()}
    after = {name: result(name, answered(1, *values[1:])) for name, values in shares.items()}
    rows = compare({"base": before, "run": after})["rows"]
    assert [row["task"] for row in rows] == [*LEADERBOARD, "average"]
    average = rows[-1]
    assert average["figures"]["base"]["value"] == pytest.approx((3 * 0.5 + 3 * 0.75) / 6)
    # three tasks change in one of four questions: +1/4 with an error of 1/4; three do not change at all
    assert average["differences"]["run"]["value"] == pytest.approx(3 * 0.25 / 6)
    assert average["differences"]["run"]["stderr"] == pytest.approx(math.sqrt(3 * 0.25**2) / 6)
    without_one = {name: before[name] for name in list(before)[1:]}
    assert compare({"base": without_one})["rows"][-1]["task"] != "average"


def test_table_shows_percent_errors_and_differences():
    before, after = {"arc": result("arc", answered(0, 1, 0, 1))}, {"arc": result("arc", answered(1, 1, 0, 1))}
    text = as_markdown(compare({"base": before, "run": after}))
    (row,) = [line for line in text.splitlines() if line.startswith("| arc ")]
    # errors: of 0 1 0 1, sqrt(1/3/4) = 28.87; of 1 1 0 1 and of the changes 1 0 0 0, 25
    assert row == "| arc | acc | 5 | 4 | 50.00 ± 28.87 | 75.00 ± 25.00 | +25.00 ± 25.00 |"
    titles, row, _, legend = as_text(compare({"base": before, "run": after})).split("\n")
    assert titles == "task      shots  questions           base            run      run − base"
    assert row == "arc, acc      5          4  50.00 ± 28.87  75.00 ± 25.00  +25.00 ± 25.00"
    assert legend.startswith("± is one standard error.")
    folded = as_text(compare({"base": before, "run": after}), Terminal(40))
    assert "arc, acc\n  shots       5\n  questions   4\n  base        50.00 ± 28.87\n" in folded
    assert max(map(len, folded.splitlines())) <= 40


@pytest.fixture(scope="module")
def base_and_run(tmp_path_factory):
    """A saved base whose vocabulary is padded beyond its tokenizer's, and an adapter on it that changes its answers."""
    folder = tmp_path_factory.mktemp("models")
    model = tiny_llama()
    model.resize_token_embeddings(64, mean_resizing=False)
    model.save_pretrained(folder / "base")
    word_tokenizer().save_pretrained(folder / "base")
    adapted = get_peft_model(
        load_trained(str(folder / "base")).model,
        LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, lora_alpha=64),
    )
    adapted.save_pretrained(folder / "run")
    return folder / "base", folder / "run"


@pytest.fixture
def pairs_file(tmp_path):
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in text_pairs()))
    return path


def test_held_out_pairs_agree_with_inspect(base_and_run):
    base, run = (load_trained(str(folder)) for folder in base_and_run)
    pairs = Dataset.from_list(text_pairs())
    before, after = (score_pairs(trained, pairs, batch_size=4, max_length=None) for trained in (base, run))
    figures = compare_with_reference(after, before)
    dataset = tokenise_pairs(pairs, base.tokenizer)[0]
    by_model = [pair_token_logps(trained.model, dataset, pad_token_id=0) for trained in (run, base)]
    expected = evaluate_pairs(*by_model, dataset)
    assert figures["chosen Δ"].value == pytest.approx(expected.chosen_logratio, abs=1e-5)
    assert figures["rejected Δ"].value == pytest.approx(expected.rejected_logratio, abs=1e-5)
    assert figures["reward accuracy"].value == expected.reward_accuracy
    assert abs(expected.chosen_logratio) > 0.1  # the adapter does something
    chosen = np.array([p.chosen.sum() - r.chosen.sum() for p, r in zip(*by_model, strict=True)])
    assert figures["chosen Δ"].stderr == pytest.approx(chosen.std(ddof=1) / math.sqrt(len(chosen)), rel=1e-4)
    likelier = np.mean([p.chosen.sum() > p.rejected.sum() for p in by_model[1]])
    assert before.metrics["chosen_likelier"].value == likelier


def test_models_that_keep_other_pairs_are_not_mixed_up():
    model, pairs = TrainedModel(tiny_llama().eval(), word_tokenizer()), Dataset.from_list(text_pairs())
    first, last = (
        score_pairs(model, pairs.select(indices), batch_size=4, max_length=None) for indices in (range(4), range(2, 6))
    )
    assert compare_with_reference(first, last) is None  # four pairs each, two of them the same
    comparison = compare({"base": {"pairs": first}, "run": {"pairs": last}})
    assert [row["metric"] for row in comparison["rows"]] == ["chosen_likelier"]
    assert not comparison["rows"][0]["differences"]["run"]["paired"]
    assert comparison["notes"][0].startswith("run, pairs: kept other pairs than base")


def test_pairs_that_occur_twice_are_counted_twice():
    model, pairs = TrainedModel(tiny_llama().eval(), word_tokenizer()), Dataset.from_list(text_pairs()[:1] * 3)
    scored = score_pairs(model, pairs, batch_size=4, max_length=None)
    assert len(scored.metrics["chosen_logps"].by_question) == 3


def _written(path, text):
    path.write_text(text)
    return path


def test_pairs_from_the_command_line_and_again(base_and_run, pairs_file, tmp_path, capsys, monkeypatch):
    bad = '{"prompt": "w1", "chosen": "", "rejected": "w2"}\n'  # is left out
    pairs_file = _written(tmp_path / "with a bad record.jsonl", pairs_file.read_text() + bad)
    argv = ["eval", "--models", *map(str, base_and_run), "--pairs", str(pairs_file), "--out", str(tmp_path / "out")]
    assert main(argv) == 0
    table = (tmp_path / "out" / "results.md").read_text()
    told = capsys.readouterr().out
    assert "| " not in told  # a table of the terminal, not Markdown's
    assert "pairs, reward accuracy" in told
    rows = {row["metric"]: row for row in json.loads((tmp_path / "out" / "results.json").read_text())["rows"]}
    assert set(rows) == {"chosen_likelier", "chosen Δ", "rejected Δ", "reward accuracy"}
    assert set(rows["chosen Δ"]["figures"]) == {"run"}
    assert rows["chosen_likelier"]["num_questions"] == 6

    def no_model(*args, **kwargs):
        raise AssertionError("a finished result was run again")

    monkeypatch.setattr(eval_run, "load_trained", no_model)
    assert main(argv) == 0
    assert (tmp_path / "out" / "results.md").read_text() == table
    capsys.readouterr()
    assert main([*argv, "--limit", "3"]) == 1  # other pairs, another result
    assert "run again" in capsys.readouterr().err
    (base_and_run[1] / "adapter_model.safetensors").touch()  # trained again
    assert main(argv) == 1
    assert "run again" in capsys.readouterr().err


def test_a_second_call_adds_to_the_table(base_and_run, pairs_file, tmp_path, capsys):
    base, run = map(str, base_and_run)
    argv = ["--pairs", str(pairs_file), "--out", str(tmp_path / "out")]
    assert main(["eval", "--models", base, run, *argv]) == 0
    before = json.loads((tmp_path / "out" / "results.json").read_text())
    write_result(  # as another call with --tasks would leave it
        result_path(tmp_path / "out", "run", "arc"),
        result("arc", answered(1, 0), key={**_weights_key(run, EvalSettings("out")), "source": "s"}),
    )
    write_result(
        result_path(tmp_path / "out", "run", "gsm8k"),
        result("gsm8k", answered(1, 0), key={**_weights_key(base, EvalSettings("out")), "source": "s"}),
    )
    assert main(["eval", "--models", base, *argv]) == 0
    after = json.loads((tmp_path / "out" / "results.json").read_text())
    assert after["settings"]["models"] == {"base": base, "run": run}
    assert after["rows"][: len(before["rows"])] == before["rows"]  # the pairs, with the model that was not named
    (arc,) = after["rows"][len(before["rows"]) :]  # gsm8k is of other weights
    assert (arc["task"], list(arc["figures"]), arc["differences"]) == ("arc", ["run"], {})
    assert main(["eval", "--models", base, *argv, "--max_length", "9"]) == 0  # other settings: a table of its own
    assert json.loads((tmp_path / "out" / "results.json").read_text())["settings"]["models"] == {"base": base}


def test_a_model_that_did_not_move_is_said_to(base_and_run):
    base, run = (load_trained(str(folder)) for folder in base_and_run)
    pairs = Dataset.from_list(text_pairs())
    scored = [{"pairs": score_pairs(trained, pairs, batch_size=4, max_length=None)} for trained in (base, base, run)]
    notes = compare(dict(zip(("base", "copy", "run"), scored, strict=True)))["notes"]
    assert notes == ["copy, pairs: no answer moved by 0.01 nats: reward accuracy is that of rounding."]


def test_padding_rows_of_the_vocabulary_stay(base_and_run):
    base, run = (load_trained(str(folder)) for folder in base_and_run)
    assert len(run.tokenizer) == 61
    assert base.model.get_input_embeddings().weight.shape[0] == 64
    assert run.model.get_input_embeddings().weight.shape[0] == 64


def test_result_with_another_key_is_not_taken(tmp_path):
    path = tmp_path / "model" / "task.json"
    written = result("arc", answered(1, 0, 1), key={"limit": 3})
    write_result(path, written)
    assert read_result(path, {"limit": 3}) == written
    assert read_result(path, {"limit": 4}) is None
    assert read_result(tmp_path / "nothing.json", {}) is None


def test_labels_tell_models_apart(tmp_path, monkeypatch):
    assert labels(["Qwen/Qwen2.5-1.5B", "runs/dpop/"]) == ["Qwen2.5-1.5B", "dpop"]
    assert labels(["runs/a/best", "runs/b/best"]) == ["a/best", "b/best"]
    monkeypatch.chdir(tmp_path)  # what a path without a name names
    assert labels([".", "..", "x/../y", "../other"]) == [tmp_path.name, tmp_path.parent.name, "y", "other"]
    for name in ("..", ".", "../..", "/", "a/../.."):
        path = result_path(tmp_path / "out", labels([name])[0], "..")
        assert path.resolve().parent.parent == tmp_path / "out"
    with pytest.raises(ValueError, match="expected each model once"):
        labels(["runs/a", "./runs/a/"])


def test_shots_are_the_leaderboards(tmp_path):
    requests = parse_tasks(["open_llm_leaderboard", "piqa"], None, None)
    # the leaderboard's published settings
    shots = [25, 10, 5, 0, 5, 5]
    assert [request.num_fewshot for request in requests] == [*shots, None]
    assert [request.num_fewshot for request in parse_tasks(["truthfulqa", "gsm8k"], None, 3)] == [0, 3]


def test_local_files_are_part_of_the_result(tmp_path):
    (tmp_path / "arc.jsonl").write_text("{}")
    (request,) = parse_tasks(None, [f"arc={tmp_path / 'arc.jsonl'}"], None)
    assert (request.name, request.num_fewshot) == ("arc_challenge", 25)
    before = request.source
    (tmp_path / "arc.jsonl").write_text("{} ")
    assert request.source != before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tasks", "arc", "arc_challenge"], "expected each task once, got ['arc_challenge'] more than once"),
        (["--local", "arc"], "local: expected NAME=FILE, got 'arc'"),
        (
            ["--local", "arc=nowhere.jsonl"],
            "local: expected a file of questions for arc, found none at 'nowhere.jsonl'",
        ),
        (["--local", "arc.shots={here}"], "expected NAME=FILE or NAME.examples=FILE"),
        (["--local", "arc.examples={here}"], "expected the questions of arc_challenge.examples too"),
        (["--pairs", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--pairs", "{here}", "--limit", "0"], "limit: expected at least 1 question, got 0"),
        (["--pairs", "{here}", "--batch_size", "many"], "batch_size: expected a number from 1 or 'auto', got 'many'"),
    ],
)
def test_bad_usage_is_named_before_a_model_is_loaded(argv, message, base_and_run, pairs_file, capsys, monkeypatch):
    monkeypatch.setattr(eval_run, "load_trained", None)
    argv = [part.format(here=pairs_file) for part in argv]
    assert main(["eval", "--models", str(base_and_run[0]), *argv]) == 1
    assert message in capsys.readouterr().err


def test_missing_models_are_named(tmp_path, pairs_file, capsys):
    assert main(["eval", "--models", str(tmp_path), "--pairs", str(pairs_file)]) == 1
    assert "expected a folder with config.json or adapter_config.json" in capsys.readouterr().err
    assert main(["eval", "--models", "./nowhere", "--pairs", str(pairs_file)]) == 1
    assert "expected an existing folder or a hub id, found nothing at './nowhere'" in capsys.readouterr().err
    assert main(["eval", "--models", "nobody/nothing", "--pairs", str(pairs_file)]) == 1
    assert "hub id that the hub or its cache knows, got 'nobody/nothing'" in capsys.readouterr().err


def test_several_processes_are_refused(pairs_file, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="expected one process, got WORLD_SIZE 2"):
        run_eval(["any"], EvalSettings(out="unused"), pairs=str(pairs_file))
