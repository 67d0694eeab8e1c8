"""The command line as a user meets it: YAML and flags, whole runs on files, errors that name what is wrong."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from dpop_trainer.cli import main
from dpop_trainer.inputs.model_setup import lora_config
from dpop_trainer.report.signed import signed
from dpop_trainer.settings.arguments import parse_arguments, run_config
from dpop_trainer.settings.config import DPOPConfig
from dpop_trainer.training.last_words import last_words
from peft import AutoPeftModelForCausalLM
from tiny import text_pairs, tiny_llama, word_tokenizer
from transformers import AutoModelForCausalLM


@pytest.fixture
def setting(tmp_path):
    """A saved model, a JSONL file, and a YAML file that trains the one on the other."""
    tiny_llama().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in text_pairs()))
    values = {
        "model_name_or_path": str(tmp_path / "model"),
        "dataset_name": str(tmp_path / "pairs.jsonl"),
        "output_dir": str(tmp_path / "run"),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": "1e-3",  # PyYAML reads 1e-3 without a point as text
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def parse(*argv):
    return parse_arguments(DPOPConfig, list(argv), "dpop train")


def test_flags_win_over_the_file(setting):
    model, data, config = parse("--config", str(setting / "run.yaml"), "--max_steps", "7", "--dpop_lambda", "5")
    assert model.model_name_or_path == str(setting / "model")
    assert data.dataset_name == str(setting / "pairs.jsonl")
    assert (config.max_steps, config.dpop_lambda, config.learning_rate) == (7, 5.0, 1e-3)
    assert config.beta == 0.3  # neither says: the default


def test_written_configuration_gives_the_same_run(setting):
    parts = parse(
        "--config", str(setting / "run.yaml"), "--use_peft", "true", "--lora_target_modules", "q_proj", "v_proj"
    )
    path = setting / "again.yaml"
    path.write_text(yaml.safe_dump(run_config(*parts)))
    again = parse("--config", str(path))
    assert run_config(*again) == run_config(*parts)
    assert again[0].lora_target_modules == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dpop_lamda: 5", "got 'dpop_lamda'. Did you mean 'dpop_lambda'"),
        ("[1, 2]", "expected a mapping of fields to values, got list"),
        ("a: [", "expected YAML, got a syntax error"),
        ("beta: 0", "beta: expected a finite value > 0"),
    ],
)
def test_bad_files_are_named(tmp_path, capsys, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert main(["train", "--config", str(path)]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["train", "--config", "no-such.yaml"], 1, "--config: expected a YAML file, found none at 'no-such.yaml'"),
        (["train"], 1, "dataset_name: expected a hub id or a local file, got none"),
        (
            ["tran"],
            2,
            "one of train, sft, recipes, pairs, inspect, plan, compare, eval, mtbench, export, demo, got 'tran'",
        ),
        (["pairs", "build", "metamath", "--source", "no-such.jsonl", "--out", "x.jsonl"], 1, "no-such.jsonl"),
        (["pairs", "bild"], 2, "expected one of build, inspect, got 'bild'"),
    ],
)
def test_bad_usage_is_named(capsys, argv, code, message):
    assert main(argv) == code
    assert message in capsys.readouterr().err


def test_missing_model_is_named(setting, capsys):
    argv = ["train", "--config", str(setting / "run.yaml"), "--model_name_or_path", str(setting / "nowhere")]
    assert main(argv) == 1
    assert "expected a folder with config.json or adapter_config.json, found none at" in capsys.readouterr().err


def test_an_output_dir_that_cannot_be_is_named_before_anything_is_loaded(setting, capsys):
    in_the_way = setting / "pairs.jsonl"
    for output_dir in (in_the_way, in_the_way / "run"):
        argv = ["train", "--config", str(setting / "run.yaml"), "--model_name_or_path", "nowhere"]
        assert main([*argv, "--output_dir", str(output_dir)]) == 1
        error = capsys.readouterr().err
        assert f"output_dir: expected a folder, got '{output_dir}', where {in_the_way} is a file." in error


def test_flags_of_an_adapter_without_use_peft_are_told(caplog):
    assert lora_config(parse("--lora_r", "4", "--use_dora", "true")[0]) is None
    assert "use_peft is off: all weights are trained, and lora_r=4, use_dora=True has no effect." in caplog.text
    caplog.clear()
    assert lora_config(parse("--lora_r", "16")[0]) is None  # the default, as a written configuration has it
    assert not caplog.text


def test_bad_line_of_the_data_is_named(setting, capsys):
    path = setting / "pairs.jsonl"
    path.write_text(path.read_text() + '{"prompt": "w1", "chosen": \n')
    assert main(["train", "--config", str(setting / "run.yaml")]) == 1
    error = capsys.readouterr().err
    assert "pairs.jsonl" in error
    assert "line 7" in error


def test_a_run_ends_with_what_became_of_it():
    history = [
        {"eval_dpop/chosen_logratio": -3.0, "eval_rewards/accuracies": 0.25},
        {"dpop/chosen_logratio": 9.0, "rewards/accuracies": 1.0},
        {"eval_dpop/chosen_logratio": 1.5, "eval_rewards/accuracies": 0.75},
    ]
    counts = {"train_data/num_pairs_in": 40, "train_data/dropped_empty": 3, "train_data/skipped_bad": 1}
    assert last_words(Path("a run"), history, {**counts, "eval_data/dropped_empty": 5}, "held out.jsonl") == [
        "On held-out pairs: chosen Δ +1.50 nats an answer, reward accuracy 75.0%.",
        "Not trained on: 4 of 40 pairs (10.0%).",
        "Next: dpop inspect 'a run' --pairs 'held out.jsonl'",
    ]
    unseen = last_words(Path("run"), history[1:2], {}, "held_out.jsonl")
    assert unseen == [
        "On the last training pairs: chosen Δ +9.00 nats an answer, reward accuracy 100.0%.",
        "The held-out pairs were not looked at: set eval_strategy to steps or epoch.",
        "Next: dpop inspect run --pairs held_out.jsonl",
    ]
    assert last_words(Path("run"), [{"loss": 1.0}], {"train_data/num_pairs_in": 40}, None) == []  # of sft


def test_train_full_then_inspect(setting, capsys):
    assert main(["train", "--config", str(setting / "run.yaml")]) == 0
    run = setting / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    told = capsys.readouterr().out
    last = [line for line in lines if "loss" in line][-1]
    assert f"chosen Δ {signed(last['dpop/chosen_logratio'])} nats an answer, reward accuracy" in told
    assert told.endswith(f"Next: dpop inspect {run} --pairs PAIRS\n")
    assert yaml.safe_load((run / "config.yaml").read_text())["dataset_name"].endswith("pairs.jsonl")
    trained = AutoModelForCausalLM.from_pretrained(run)
    assert any(
        not torch.equal(ours, start)
        for ours, start in zip(trained.parameters(), tiny_llama().parameters(), strict=True)
    )
    with (setting / "pairs.jsonl").open("a") as file:  # such as HH-RLHF's held-out pairs have
        file.write('{"prompt": "w1", "chosen": "", "rejected": "w2"}\n')
    capsys.readouterr()
    assert main(["inspect", str(run), "--pairs", str(setting / "pairs.jsonl")]) == 0  # the run names its reference
    told = capsys.readouterr().out
    assert told.startswith("6 of 7 pairs kept; dropped: 1 that cannot be used.\n")
    assert "Training " in told
    result = json.loads((run / "inspect.json").read_text())
    # six pairs, answers of three words and the end: one token before, one at, two after the edit
    assert [result[f"{region}_edit"]["num_tokens"] for region in ("before", "at", "after")] == [6, 6, 12]
    by_region = sum(
        result[f"{r}_edit"]["mean_change"] * result[f"{r}_edit"]["num_tokens"] for r in ("before", "at", "after")
    )
    assert result["chosen_logratio"] == pytest.approx(by_region / 6, rel=1e-5)
    assert result["reference"] == str(setting / "model")
    assert (run / "figures" / "by_distance.svg").exists()
    (run / "config.yaml").unlink()
    assert main(["inspect", str(run), "--pairs", str(setting / "pairs.jsonl")]) == 1
    assert "Pass --ref_model" in capsys.readouterr().err


def test_train_lora_and_load_back(setting):
    argv = ["train", "--config", str(setting / "run.yaml"), "--use_peft", "true", "--learning_rate", "1e-2"]
    assert main(argv) == 0
    card = (setting / "run" / "README.md").read_text()
    assert "library_name: peft" in card
    assert "An adapter of `model` after 3 steps on `pairs.jsonl`" in card
    assert str(setting) not in card
    model = AutoPeftModelForCausalLM.from_pretrained(setting / "run")
    ids = torch.tensor([[5, 6, 7]])
    with_adapter = model(input_ids=ids).logits
    with model.disable_adapter():
        assert not torch.equal(with_adapter, model(input_ids=ids).logits)
        torch.testing.assert_close(model(input_ids=ids).logits, tiny_llama()(input_ids=ids).logits)


def test_interrupted_run_goes_on_from_its_checkpoint(setting, capsys):
    config = ["--config", str(setting / "run.yaml"), "--save_strategy", "steps", "--save_steps", "2"]
    assert main(["train", *config, "--max_steps", "2", "--lr_scheduler_type", "constant"]) == 0
    assert main(["train", *config, "--max_steps", "4", "--lr_scheduler_type", "constant"]) == 0
    assert "checkpoint-2" in capsys.readouterr().out
    steps = [
        json.loads(line)["step"]
        for line in (setting / "run" / "metrics.jsonl").read_text().splitlines()
        if '"loss"' in line
    ]
    assert steps == [1, 2, 3, 4]


def test_sft_learns_the_chosen_answers(setting):
    argv = ["sft", "--config", str(setting / "run.yaml"), "--max_steps", "60", "--learning_rate", "1e-2"]
    assert main(argv) == 0
    lines = [json.loads(line) for line in (setting / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    # mean negative log-prob per token: about log 61 at first, and six short answers can be learned by heart
    assert losses[0] > 3.0
    assert losses[-1] < 0.3
    assert lines[-2]["mean_token_accuracy"] > 0.9


def test_pairs_alone_shows_its_commands(capsys):
    assert main(["pairs"]) == 0
    assert "from-samples" in capsys.readouterr().out


def test_pairs_from_other_fields(tmp_path, capsys):
    record = {
        "query": "A box has 3 rows of 4. How many?",
        "response": "There are 3 * 4 = 12. Then 12 + 1 = 13.\n#### 13",
    }
    (tmp_path / "meta.jsonl").write_text(
        json.dumps(record) + "\n" + json.dumps({**record, "response": "#### 1"}) + "\n"
    )
    fields = ["--question_field", "query", "--answer_field", "response"]
    files = ["--source", str(tmp_path / "meta.jsonl"), "--out", str(tmp_path / "p.jsonl")]
    assert main(["pairs", "build", "metamath", *files, *fields]) == 0
    assert capsys.readouterr().out.startswith("1 pair built; 1 skipped")
    (pair,) = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert pair["chosen"].endswith("#### 13")
    assert pair["rejected"].endswith("#### 13")
    assert pair["rejected"] != pair["chosen"]
