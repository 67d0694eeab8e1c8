"""Runs on every kind of data: the three public preference files, streams that resume, mixtures, evaluation by name."""

import json

import datasets.config
import pytest
import yaml
from datasets import Dataset
from dpop_trainer import DPOPConfig, DPOPTrainer, SFTConfig, SFTTrainer
from dpop_trainer.cli import main
from dpop_trainer.settings.arguments import parse_arguments, run_config
from tiny import text_pairs, tiny_llama, token_pairs, word_tokenizer
from transformers import AutoTokenizer

CHAT = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
SETTINGS = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def flags(**values):
    return [part for key, value in {**SETTINGS, **values}.items() for part in (f"--{key}", str(value))]


def metrics_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def model(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def chats(words):
    """Conversations in ShareGPT's form that the tiny tokenizer knows the words of."""
    return [
        {"conversations": [{"from": "human", "value": word}]}
        | {answer: {"from": "gpt", "value": value} for answer, value in (("chosen", "w8 w9"), ("rejected", "w8 w7"))}
        for word in words
    ]


@pytest.mark.parametrize(
    ("name", "num_records"),
    [("dpo_en_demo.json", 300), ("orca_dpo_pairs_validation.jsonl", 284), ("tulu_preference_sample.jsonl", 100)],
)
def test_public_preference_files_train(tmp_path, capsys, shared_once, request, name, num_records):
    """From the command line, each in its form, with nothing said about it; every record is accounted for."""
    path, run = shared_once / "data" / "prefs" / name, tmp_path / "run"
    pretrained = request.getfixturevalue("tiny_llama")  # the name of the random one of `tiny` here
    (tmp_path / "chat.jinja").write_text(CHAT)
    argv = ["train", *flags(model_name_or_path=pretrained, dataset_name=path, output_dir=run, max_length=256)]
    assert main(argv) == 1
    assert "Give one with chat_template_path" in capsys.readouterr().err
    assert main([*argv, "--chat_template_path", str(tmp_path / "chat.jinja")]) == 0
    first, *lines = metrics_of(run)
    counts = {key.removeprefix("train_data/"): value for key, value in first.items()}
    dropped = sum(value for key, value in counts.items() if key.startswith(("dropped_", "skipped_")))
    assert counts["num_pairs_in"] == num_records == counts["num_pairs"] + dropped
    assert counts["skipped_bad"] == counts["dropped_empty"] == counts["dropped_identical"] == 0
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert all(line["rewards/chosen"] == 0 for line in lines if line["step"] == 1)
    assert AutoTokenizer.from_pretrained(run).chat_template == CHAT


def test_stream_trains_as_the_whole_does(tmp_path):
    """The same pairs in the same order give the same losses; two passes and a batch that spans them."""
    records = token_pairs(5)
    losses = []
    for kind in ("stream", "whole"):
        dataset = Dataset.from_list(records if kind == "stream" else [records[i % 5] for i in range(8)])
        trainer = DPOPTrainer(
            tiny_llama(),
            args=DPOPConfig(
                output_dir=str(tmp_path / kind), train_sampling_strategy="sequential", **{**SETTINGS, "max_steps": 4}
            ),
            train_dataset=dataset.to_iterable_dataset() if kind == "stream" else dataset,
            processing_class=word_tokenizer(),
        )
        trainer.train()
        lines = metrics_of(tmp_path / kind)
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4
    (last,) = [line for line in metrics_of(tmp_path / "stream") if line["step"] == 4 and "loss" in line]
    # records are read a pass of five at a time, and two passes hold what four steps need
    assert last["train_data/num_pairs_in"] == last["train_data/num_pairs"] == 10


def streamed_run(model, folder, pairs, *, steps, **more):
    argv = flags(
        model_name_or_path=model,
        dataset_name=pairs,
        output_dir=folder,
        streaming=True,
        shuffle_buffer_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_strategy="steps",
        save_steps=3,
        max_steps=steps,
        on_bad_record="skip",
        **more,
    )
    assert main(["train", *argv]) == 0
    return metrics_of(folder)


def test_resumed_stream_is_the_uninterrupted_stream_bit_for_bit(tmp_path, model, capsys):
    """Three passes over seven shuffled records, one of them bad, interrupted in the second."""
    pairs = write(tmp_path / "pairs.jsonl", [*text_pairs(6), {"prompt": "w1"}])
    whole = streamed_run(model, tmp_path / "whole", pairs, steps=8)
    streamed_run(model, tmp_path / "parts", pairs, steps=5, save_total_limit=1)
    parts = streamed_run(model, tmp_path / "parts", pairs, steps=8)
    assert "checkpoint-5" in capsys.readouterr().out
    keys = ("step", "loss", "rewards/margins", "logps/chosen")
    rows = [[{key: line[key] for key in keys} for line in lines if "loss" in line] for lines in (whole, parts)]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0]] == list(range(1, 9))
    assert len({row["loss"] for row in rows[0]}) == 8
    for folder in ("whole", "parts"):
        (line,) = (tmp_path / folder / "skipped_records.jsonl").read_text().splitlines()
        assert json.loads(line)["place"] == f"{pairs}, line 7"
        last = [line for line in metrics_of(tmp_path / folder) if "loss" in line][-1]
        assert last["train_data/skipped_bad"] * 7 == last["train_data/num_pairs_in"]


def test_mixture_and_evaluation_sets_by_name(tmp_path, model):
    """A text file and a chat in one run, from YAML; each evaluation set has metrics of its own; config.yaml reloads."""
    values = {
        **SETTINGS,
        "model_name_or_path": str(model),
        "output_dir": str(tmp_path / "run"),
        "chat_template_path": "{% for m in messages %}{{ m['content'] }} {% endfor %}",
        "dataset_mixture": [
            {"path": write(tmp_path / "text.jsonl", text_pairs(6)), "weight": 2},
            {"path": write(tmp_path / "chats.jsonl", chats(["w1", "w2", "w3"])), "num_pairs": 2},
        ],
        "eval_datasets": [
            {"path": write(tmp_path / "easy.jsonl", text_pairs(3))},
            {"path": write(tmp_path / "other.jsonl", chats(["w4 w5", "w6"])), "label": "hard"},
        ],
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    assert main(["train", "--config", str(path)]) == 0
    first, *lines = metrics_of(tmp_path / "run")
    counted = {key: value for key, value in first.items() if key.endswith("/num_pairs_in")}
    assert counted == {"train_data/num_pairs_in": 14, "easy_data/num_pairs_in": 3, "hard_data/num_pairs_in": 2}
    merged = {key: value for line in lines for key, value in line.items()}
    for name in ("easy", "hard"):
        assert f"eval_{name}_loss" in merged
        assert f"eval_{name}_rewards/margins" in merged
    assert merged["eval_easy_logps/chosen"] != merged["eval_hard_logps/chosen"]
    assert not any(key.startswith("eval_rewards") for key in merged)
    again = parse_arguments(DPOPConfig, ["--config", str(tmp_path / "run" / "config.yaml")], "dpop train")
    written = run_config(*again)
    assert written["dataset_mixture"] == values["dataset_mixture"]
    assert written["eval_datasets"] == values["eval_datasets"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"streaming": True, "max_steps": -1}, "max_steps: expected the number of optimizer steps"),
        (
            {"streaming": True, "dataloader_num_workers": 1},
            "dataloader_num_workers: expected 0 with a streamed data set",
        ),
        ({"streaming": True, "precompute_ref_log_probs": True}, "precompute_ref_log_probs: expected False with a stre"),
        (
            {"streaming": True, "accelerator_config": '{"dispatch_batches": true}'},
            "accelerator_config.dispatch_batches: expected None or False, got True",
        ),
        ({"dataset_mixture": "a.jsonl"}, "dataset_mixture: expected none beside dataset_name"),
        ({"eval_datasets": "a.jsonl", "eval_dataset_name": "b.jsonl"}, "eval_datasets: expected neither"),
        ({"eval_datasets": "nowhere/a/b.jsonl"}, "source: expected an existing file or folder, got nowhere/a/b.jsonl"),
        ({"max_train_pairs": 0}, "max_train_pairs: expected at least 1, got 0"),
        ({"dataset_test_split": "test"}, "dataset_test_split: expected a data set with several splits, got the file"),
        ({"chat_template_path": "nowhere.jinja"}, "chat_template_path: expected an existing file"),
        (
            {"chat_template_path": "./nowhere"},
            "chat_template_path: expected zephyr, chatml, a .jinja file, a model to take it",
        ),
    ],
)
def test_what_does_not_go_together_is_named(tmp_path, model, capsys, more, message):
    pairs = write(tmp_path / "pairs.jsonl", text_pairs())
    argv = flags(**{"model_name_or_path": model, "dataset_name": pairs, "output_dir": tmp_path / "run", **more})
    assert main(["train", *argv]) == 1
    assert message in capsys.readouterr().err


def test_bad_records_from_the_command_line(tmp_path, model, capsys):
    records = [*text_pairs(6), {"prompt": "w1", "chosen": " w2"}]
    pairs, run = write(tmp_path / "pairs.jsonl", records), tmp_path / "run"
    argv = ["train", *flags(model_name_or_path=model, dataset_name=pairs, output_dir=run)]
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert f"{pairs}, line 7: rejected: expected text, got null" in error
    assert "on_bad_record='skip'" in error
    assert main([*argv, "--on_bad_record", "skip"]) == 0
    (line,) = (run / "skipped_records.jsonl").read_text().splitlines()
    assert json.loads(line)["place"] == f"{pairs}, line 7"
    assert metrics_of(run)[0]["train_data/skipped_bad"] == 1


def test_supervised_stream_of_completions(tmp_path):
    dataset = Dataset.from_list([{"prompt": f"w{i}", "completion": f" w{i + 1}"} for i in range(3)])
    trainer = SFTTrainer(
        tiny_llama(),
        args=SFTConfig(output_dir=str(tmp_path), **SETTINGS),
        train_dataset=dataset.to_iterable_dataset(),
        eval_dataset={"held": dataset, "streamed": dataset.to_iterable_dataset()},
        processing_class=word_tokenizer(),
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_held_loss"] == pytest.approx(metrics["eval_streamed_loss"], rel=1e-6)
