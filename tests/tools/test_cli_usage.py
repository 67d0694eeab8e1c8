"""The command line's manners: help, the printed configuration, exit codes, and messages without a traceback."""

import errno
import json
import os
import signal
import time
from dataclasses import fields

import pytest
import yaml
from datasets import Dataset
from dpop_trainer.cli import COMMANDS, main
from dpop_trainer.inputs.model_setup import init_kwargs, lora_config, quantization_config
from dpop_trainer.settings.arguments import DataArguments, ModelArguments, parse_arguments, run_config
from dpop_trainer.settings.config import DPOPConfig
from dpop_trainer.settings.errors import UsageError
from dpop_trainer.settings.trl_fields import ALTERNATIVES
from ranks import started_alone
from tiny import text_pairs, tiny_llama, word_tokenizer


def parse(*argv):
    return parse_arguments(DPOPConfig, [*argv, "--report_to", "none"], "dpop train")


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A saved model, pairs, and a YAML file that trains the one on the other."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_llama().save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in text_pairs()))
    values = {
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / "pairs.jsonl"),
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder


def test_help_shows_every_field_once_ours_first(capsys):
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    shown = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    expected = {item.name for part in (ModelArguments, DataArguments, DPOPConfig) for item in fields(part) if item.init}
    expected -= ALTERNATIVES.keys()  # which may be set, but not changed
    assert sorted(shown) == sorted(
        [f"--{name}" for name in expected] + ["--help", "--config", "--recipe", "--print-config"]
    )
    places = [shown.index(f"--{name}") for name in ("model_name_or_path", "dataset_name", "dpop_lambda", "max_steps")]
    assert places == sorted(places)
    assert shown.index("--max_steps") < shown.index("--adam_beta1")
    assert "130 interrupted" in " ".join(text.split())
    assert "==SUPPRESS==" not in text


SECRET = "a-word-of-nobody-s"


def test_printed_configuration_is_complete_and_gives_the_same_run(setting, capsys, tmp_path):
    flags = ["--config", str(setting / "run.yaml"), "--dpop_lambda", "7", "--pad_token", "<eos>", "--no_prefix_sharing"]
    flags += ["--model_init_kwargs", '{"attn_implementation": "eager"}', "--peft_config", '{"use_rslora": true}']
    flags += ["--model_name_or_path", "no/such-model"]
    assert main(["train", *flags, "--hub_token", SECRET, "--print-config"]) == 0  # loads nothing
    printed = capsys.readouterr().out
    assert SECRET not in printed
    (tmp_path / "again.yaml").write_text(printed)
    first = run_config(*parse_arguments(DPOPConfig, flags, "dpop train"))
    assert run_config(*parse_arguments(DPOPConfig, ["--config", str(tmp_path / "again.yaml")], "dpop train")) == first
    assert yaml.safe_load(printed) == first
    assert first["model_init_kwargs"] == {"attn_implementation": "eager"}
    assert (first["pad_token"], first["prefix_sharing"], first["dpop_lambda"]) == ("<eos>", False, 7.0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--dpop_lamda", "5"],
            "--dpop_lamda: expected a field of the run, got an unknown flag. Did you mean 'dpop_la",
        ),
        (["--max-prompt-length", "5"], "It is called max_length, for prompt and answer together now."),
        (["--torch_dtype", "bfloat16"], "It is called dtype now."),
        (["--qqqqqq"], "`dpop train --help` lists the fields."),
        (["5"], "'5': expected flags such as --beta 0.1, got a value without one."),
        (["--beta", "much"], "argument --beta: invalid float value: 'much'"),
        (["--bnb_4bit_quant_type", "int4"], "invalid choice: 'int4'"),
        (["--dpop_lam", "5"], "Did you mean 'dpop_lambda'?"),  # no abbreviations: tomorrow's field may begin like that
    ],
)
def test_wrong_usage_is_2_and_named(flags, message, capsys):
    assert main(["train", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "save_strategy: no",
            "save_strategy: expected text (YAML reads no, yes, on and off as booleans: put it in quotes)",
        ),
        ("beta: [0.1]", "beta: expected a number, got [0.1]"),
        ("max_steps: 2.5", "max_steps: expected a whole number, got 2.5"),
        ("use_peft: 3", "use_peft: expected true or false, got 3"),
        ("methods: [dpo]", "expected fields of the run, got 'methods'. `dpop compare` takes it."),
        ("evaluation_strategy: steps", "It is called eval_strategy now."),
        ("ref_model_sync_steps: 0", "ref_model_sync_steps: expected at least 1 optimizer step, got 0."),
        ("model_init_kwargs: eager", "model_init_kwargs: expected a mapping, or one as JSON, got 'eager'"),
        ("peft_config: [1]", "peft_config: expected a mapping of LoraConfig's fields, got [1]"),
        ("per_device_train_batch_size: 0", "per_device_train_batch_size: expected at least 1, got 0. If one is too"),
        ("gradient_accumulation_steps: 0", "gradient_accumulation_steps: expected at least 1, got 0. 1 is no acc"),
        ("learning_rate: -1.0", "learning_rate: expected a number >= 0, got -1.0. The paper uses 5e-5."),
        ("learning_rate: .nan", "learning_rate: expected a number >= 0, got nan."),
        ("learning_rate: .inf", "learning_rate: expected a finite number, got inf."),
        ("weight_decay: .inf", "weight_decay: expected a finite number, got inf."),
        ("num_train_epochs: .inf", "num_train_epochs: expected a finite number, got inf."),
        ("adam_epsilon: .nan", "adam_epsilon: expected a finite number, got nan."),
        ("label_smoothing: .nan", "label_smoothing: expected a finite number, got nan."),
        ("lora_dropout: .nan", "lora_dropout: expected a finite number, got nan."),
        ("warmup_steps: -5", "warmup_steps: expected a number >= 0, got -5. 0 is no warm-up"),
        ("max_steps: 0", "max_steps: expected at least 1, or -1 for as many as num_train_epochs takes, got 0."),
        ("max_steps: -5", "max_steps: expected at least 1, or -1 for"),
        ("num_train_epochs: -1", "num_train_epochs: expected a number > 0 (0.5 is half the data), got -1"),
        ("save_steps: 0", "save_steps: expected a number of steps > 0, or below 1 a fraction of all, got 0. For none"),
        ("eval_strategy: steps\neval_steps: -1", "eval_steps: expected a number of steps > 0"),
        ("lora_r: 0", "lora_r: expected a rank of at least 1, got 0."),
        ("beta: [1\nx: {", "expected YAML, got a syntax error in line 2, column 2: expected ',' or ']', but got ':'"),
        ("lora_task_type: SEQ_CLS", "lora_task_type: expected 'CAUSAL_LM', got 'SEQ_CLS'"),
        ("load_in_4bit: true\nload_in_8bit: true", "load_in_8bit: expected false together with load_in_4bit"),
    ],
)
def test_a_value_that_its_field_cannot_take_is_1_and_named(text, message, capsys, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert main(["train", "--config", str(path)]) == 1
    assert message in capsys.readouterr().err


def test_kernels_that_cannot_run_are_refused_before_anything_is_loaded(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["train", "--kernel_backend", "fused", "--use_cpu", "true"]) == 1
    assert "kernel_backend: 'fused' cannot run here: the Triton kernels run on CUDA" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "sft"])
def test_a_missing_chat_template_is_told_before_the_weights_are_loaded(command, tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])  # which would not load
    word_tokenizer().save_pretrained(tmp_path / "model")
    turns = {"chosen": "w1 w2", "rejected": "w1 w3"}
    record = {name: [{"role": "assistant", "content": text}] for name, text in turns.items()}
    record["prompt"] = [{"role": "user", "content": "w4"}]
    Dataset.from_list([record]).to_parquet(tmp_path / "pairs.parquet")  # not looked into before the imports
    argv = ["--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "pairs.parquet")]
    assert main([command, *argv, "--output_dir", str(tmp_path / "out"), "--use_cpu", "--bf16", "false"]) == 1
    assert "expected a tokenizer with a chat template, since the pairs are messages" in capsys.readouterr().err


def test_a_full_disk_is_told_with_the_places_that_are_written_to(capsys, monkeypatch, tmp_path):
    def full(argv):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setitem(COMMANDS, "pairs", full)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert main(["pairs"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(
        "dpop pairs: while running `dpop pairs`: no space left on a disk ([Errno 28] No space left on device). Free: "
    )
    assert f"GiB in TMPDIR ({tmp_path})" in error


def test_one_word_in_yaml_is_a_list_where_the_field_is_one(tmp_path):
    (tmp_path / "run.yaml").write_text("lora_target_modules: q_proj\nuse_peft: true")
    model, _, _ = parse("--config", str(tmp_path / "run.yaml"))
    assert model.lora_target_modules == ["q_proj"]
    assert lora_config(model).target_modules == {"q_proj"}


def test_adapter_from_flags_and_mapping():
    model, _, config = parse("--lora_r", "4", "--use_dora", "--peft_config", '{"init_lora_weights": "pissa"}')
    adapter = lora_config(model)
    assert (adapter.r, adapter.use_dora, adapter.init_lora_weights) == (4, True, "pissa")
    assert adapter.target_modules == "all-linear"
    assert lora_config(parse()[0]) is None
    with pytest.raises(ValueError, match=r"peft_config: expected fields of peft's LoraConfig, got 'rank'\."):
        lora_config(parse("--peft_config", '{"rank": 4}')[0])
    with pytest.raises(ValueError, match="peft_config: expected JSON, got 'r=4'"):
        parse("--peft_config", "r=4")
    assert init_kwargs(model, config) == {"dtype": "float32"}
    model, _, config = parse("--dtype", "bfloat16", "--model_init_kwargs", '{"dtype": "auto"}', "--trust_remote_code")
    assert init_kwargs(model, config) == {"dtype": "auto", "trust_remote_code": True}


@pytest.mark.parametrize("name", ["load_in_4bit", "load_in_8bit"])
def test_quantisation_that_cannot_be_had_is_refused(name, monkeypatch):
    with pytest.raises(ValueError, match=f"{name}: expected an adapter to train, got none"):
        quantization_config(parse(f"--{name}")[0])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"{name}: expected bitsandbytes, which quantises, to be installed"):
        quantization_config(parse(f"--{name}", "--use_peft", "true")[0])


def test_bf16_without_a_gpu_is_refused_with_the_remedy(monkeypatch, capsys):
    monkeypatch.setattr("dpop_trainer.settings.config.is_torch_bf16_gpu_available", lambda: False)
    assert main(["train", "--bf16", "true", "--print-config"]) == 1
    assert "bf16: expected a GPU that computes in bfloat16, found none. Set bf16 to false" in capsys.readouterr().err
    assert main(["train", "--bf16", "true", "--use_cpu", "--print-config"]) == 0


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("dpop-kernels 0.")


def test_usage_errors_of_other_commands_are_2(capsys):
    assert main(["pairs", "build"]) == 2
    assert main(["inspect"]) == 2
    assert main(["inspect", "--help"]) == 0
    assert issubclass(UsageError, ValueError)


def test_interrupted_run_says_where_it_goes_on_from(setting, tmp_path, monkeypatch, capsys):
    from dpop_trainer.training import runs

    def interrupted(*parts):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "run_train", interrupted)
    argv = ["train", "--config", str(setting / "run.yaml"), "--output_dir", str(tmp_path)]
    assert main(argv) == 130
    assert "No checkpoint was saved yet" in capsys.readouterr().err
    (tmp_path / "checkpoint-20").mkdir()
    assert main(argv) == 130
    assert f"The same command goes on from {tmp_path / 'checkpoint-20'}." in capsys.readouterr().err


@pytest.mark.forked
@pytest.mark.slow
def test_ctrl_c_in_a_real_run(setting, tmp_path):
    argv = ["train", "--config", str(setting / "run.yaml"), "--output_dir", str(tmp_path)]
    argv += ["--max_steps", "100000", "--save_strategy", "steps", "--save_steps", "5"]
    with started_alone(_interruptible, argv) as (process, written):
        deadline = time.monotonic() + 120
        while not (tmp_path / "checkpoint-5").exists() and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGINT)
        process.join(60)
        error = written.read_text()
    assert process.exitcode == 130, error[-2000:]
    assert "interrupted. The same command goes on from" in error
    assert "Traceback" not in error


def _interruptible(argv):
    # where the tests run in the background of a shell, their children would ignore the interrupt
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return main(argv)
