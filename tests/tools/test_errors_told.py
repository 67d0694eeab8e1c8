"""One boundary for every command: what was being done, with which file, the cause's own words, what to do."""

import errno
import json
import logging
import os
import warnings

import pytest
from dpop_trainer import cli
from dpop_trainer.cli import main
from dpop_trainer.run_folder.files import check_writable
from dpop_trainer.settings.errors import doing
from dpop_trainer.settings.terminal import printable, say, spelt_out
from dpop_trainer.settings.told import FAULT, told
from judges import write_questions
from tiny import text_pairs, tiny_llama, word_tokenizer

CAUSE = RuntimeError("the library's \x1b[2J own words")


@pytest.fixture
def raised(monkeypatch, capsys):
    """What the command line says where a command raises this."""

    def of(error, *argv):
        def fail(argv):
            raise error

        monkeypatch.setitem(cli.COMMANDS, "demo", fail)
        assert main(["demo", *argv]) == 1
        return capsys.readouterr().err

    return of


def test_a_foreign_error_has_what_was_done_its_words_and_what_to_do(raised, tmp_path, monkeypatch):
    file = tmp_path / "pairs.jsonl"
    file.write_text("{}")
    # words that are files are named; others may be a secret
    assert raised(RuntimeError("oh"), str(file), "hf_aaaaaaaaaaaaaaaaaaaa") == (
        f"dpop demo: while running `dpop demo` with {file}: RuntimeError: oh\n{FAULT}\n"
    )
    assert "Set DPOP_DEBUG=1" not in raised(RuntimeError("oh"))
    assert raised(KeyError()).startswith("dpop demo: while running `dpop demo`: KeyError: without a word\n")
    assert raised(MemoryError()).endswith("`dpop plan` says beforehand what fits.\n")
    assert "pip install 'dpop-kernels[trainer]'" in raised(ImportError("No module named 'peft'"))
    denied = raised(PermissionError(errno.EACCES, "Permission denied", str(file)))
    assert f"Permission denied: '{file}'\nCheck that it is there, whole, and yours" in denied
    assert "Traceback" not in denied
    monkeypatch.setenv("DPOP_DEBUG", "1")
    assert "Traceback" in raised(RuntimeError("oh"))


def test_this_package_s_own_words_stand_alone(raised, tmp_path):
    assert raised(ValueError("x: expected 1, got 2.")).startswith("dpop demo: while running")  # a test raised it

    with pytest.raises(ValueError, match="output_dir") as caught, doing("reading the data"):
        check_writable(__file__)
    assert told(["demo"], caught.value).startswith("dpop demo: output_dir: expected a folder, got ")
    (tmp_path / "text").write_bytes(b"\xff")
    with pytest.raises(UnicodeDecodeError) as caught, doing("reading the text"):
        (tmp_path / "text").read_text(encoding="utf-8")
    # a ValueError of Python's
    assert told(["demo"], caught.value).startswith("dpop demo: while reading the text: UnicodeDecodeError: 'utf-8' ")


def test_the_innermost_says_what_was_done_and_a_full_disk_where(raised, tmp_path):
    def error_of(folder):
        error = OSError(errno.ENOSPC, "No space left on device", "half\x1b[8m")
        try:
            with doing("never the outer", "/never"), doing("saving the model to run", folder):
                raise error
        except OSError:
            return error

    text = raised(error_of(tmp_path / "run" / "deeper"))  # a folder that is not there yet
    assert text.startswith("dpop demo: while saving the model to run: no space left on a disk")
    assert f"GiB in the folder written to ({tmp_path / 'run' / 'deeper'})" in text
    assert "\x1b" not in text
    assert "half\\x1b[8m" in text.replace("\\\\", "\\")


def test_another_process_that_is_gone_is_one_sentence(monkeypatch):
    words = "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1\nmore"
    assert FAULT in told(["train"], RuntimeError(words))  # of one process, there is no other
    monkeypatch.setenv("WORLD_SIZE", "2")
    text = told(["train"], RuntimeError(words))
    assert text.startswith("dpop train: while running `dpop train`: another process of this run has ended or does not")
    assert len(text.splitlines()) == 1


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What the commands below look for before they begin."""
    folder = tmp_path_factory.mktemp("told")
    tiny_llama().save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in text_pairs()))
    write_questions(folder / "question.jsonl")
    (folder / "template.jinja").write_text("{{ messages }}")
    return folder


TRAINING = "--model_name_or_path model --dataset_name pairs.jsonl --use_cpu --report_to none --output_dir run"
# command -> what fails in it, what it says
COMMANDS = {
    f"train {TRAINING}": ("training.runs.load_train_data", "reading the data pairs.jsonl"),
    f"sft {TRAINING}": ("training.runs.tokenizer_of", "loading the tokenizer of 'model'"),
    f"train {TRAINING} --eval_dataset_name pairs.jsonl": (
        "training.runs.load_eval_data",
        "reading the held-out data pairs.jsonl",
    ),
    f"compare {TRAINING} --eval_dataset_name pairs.jsonl --methods dpo --seeds 3": (
        "tools.compare.run.run_train",
        "at run 1 of 1: dpo, seed 3 in run/dpo/seed-3",
    ),
    "pairs build metamath --source pairs.jsonl --out built.jsonl": (
        "tools.pairs.build.build_file",
        "building pairs of pairs.jsonl in built.jsonl",
    ),
    "pairs inspect pairs.jsonl --out doctor": ("tools.doctor.examine.examine_pairs", "examining pairs.jsonl"),
    "pairs inspect pairs.jsonl --out doctor --tokenizer model": (
        "models.tokenizer_loading.load_tokenizer",
        "loading the tokenizer of 'model'",
    ),
    "inspect model --ref_model model --pairs pairs.jsonl": (
        "tools.inspect.inspection.load_trained",
        "loading the model 'model'",
    ),
    "plan --model_name_or_path model --device h100-80gb": (
        "tools.plan.setup.make_planner",
        "planning a run of 'model'",
    ),
    "eval --models model --pairs pairs.jsonl --out results": ("tools.evaluation.run._load", "loading model"),
    "mtbench answer --model model --questions question.jsonl --chat_template template.jinja --out mt": (
        "tools.mtbench.answer.load_trained",
        "loading model",
    ),
    "mtbench judge --endpoint http://localhost:9/v1 --judge_model j --questions question.jsonl --out mt": (
        "tools.mtbench.judge.run_judge",
        "having the answers in mt judged by http://localhost:9/v1",
    ),
    "export model --out exported": ("tools.delivery.export.merge_run", "merging model"),
    "demo --output_dir demo": ("tools.demo.run.run_demo", "running the demo in demo"),
    "recipes --copy recipes": ("tools.recipes.cli.copy_recipes", "copying the recipes to recipes"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_with_which_file_it_failed(command, files, monkeypatch, capsys):
    place, expected = COMMANDS[command]

    def fail(*args, **kwargs):
        raise CAUSE

    for name in ("_dpop_doing", "_dpop_folder"):
        vars(CAUSE).pop(name, None)
    monkeypatch.chdir(files)
    monkeypatch.setattr(f"dpop_trainer.{place}", fail)
    assert main(command.split()) == 1
    name = command.split()[0]
    assert capsys.readouterr().err.endswith(
        f"dpop {name}: while {expected}: RuntimeError: the library's \\x1b[2J own words\n{FAULT}\n"
    )


# what no library is asked for -> what is said
IMPOSSIBLE = {
    "pairs inspect pairs.jsonl --out doctor --batch_size 0": "batch_size: expected at least 1, got 0",
    "pairs inspect pairs.jsonl --out doctor --num_proc -1": "num_proc: expected at least 1, got -1",
    "pairs inspect ~nobody-of-this-name/pairs.jsonl": "source: expected an existing file or folder, got ~nobody-of-",
    "pairs inspect ~ --out doctor": "source: expected a folder of data files, got ~: a home or a disk",
    "pairs inspect / --out doctor": "source: expected a folder of data files, got /: a home or a disk",
    "inspect model --ref_model model --pairs pairs.jsonl --num_worst -1": "num_worst: expected at least 0, got -1",
    "eval --models model --pairs pairs.jsonl --out results --num_fewshot -1": "num_fewshot: expected at least 0",
    "eval --models model --pairs pairs.jsonl --out results --batch_size ²": "batch_size: expected a number from 1",
    "eval --models model --pairs pairs.jsonl --out results --device nowhere": "device: expected one of this machine",
    "export model --out exported --max_shard_size much": "max_shard_size: expected a number with KB, MB, GB or TB",
    "demo --seed -1": "seed: expected a whole number from 0 to 4294967295, got -1",
    "train --seed -1 --print-config": "seed: expected a whole number from 0 to 4294967295, got -1",
    "train --config bytes.yaml --print-config": "bytes.yaml: expected YAML, got what cannot be read: 'utf-8' codec",
    "train --config month.yaml --print-config": "month.yaml: expected YAML, got what cannot be read: month must be",
    "inspect broken --ref_model broken --pairs pairs.jsonl --out seen": "got 'broken'. ",
    "pairs inspect pairs.jsonl --out doctor --tokenizer broken": "got 'broken'. ",
    "pairs inspect pairs.jsonl --out doctor --tokenizer text": "text: expected a tokenizer whose model_max_length is a",
}


@pytest.mark.parametrize("command", IMPOSSIBLE)
def test_what_cannot_be_is_said_in_words_of_ours(command, files, monkeypatch, capsys):
    monkeypatch.chdir(files)
    (files / "bytes.yaml").write_bytes(b"beta: \xff")
    (files / "month.yaml").write_text("beta: 2020-13-01")
    (files / "broken").mkdir(exist_ok=True)
    (files / "broken" / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide"}')
    (files / "broken" / "tokenizer.json").write_text('{"model": 3}')
    word_tokenizer().save_pretrained(files / "text")
    settings = json.loads((files / "text" / "tokenizer_config.json").read_text())
    (files / "text" / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": "12"}))
    assert main(command.split()) == 1
    error = capsys.readouterr().err
    assert IMPOSSIBLE[command] in error
    assert FAULT not in error


def test_foreign_text_steers_no_terminal(capsys, caplog):
    foreign = "a\x1b[2J\tb\n\x07\x9b\u202e\ud800 中文 é"
    spelt = "a\\x1b[2J\tb\n\\x07\\x9b\\x202e\\xd800 中文 é"
    assert printable(foreign) == spelt
    say(foreign)
    say(foreign, is_problem=True)
    assert capsys.readouterr() == (f"{spelt}\n", f"{spelt}\n")
    logger = logging.getLogger("somebody else's")
    with spelt_out():
        logger.warning("file %s: %d", foreign, 3)
        warning = warnings.formatwarning(foreign, UserWarning, "\x1b[2J.py", 7, "")
    assert caplog.messages == [f"file {spelt}: 3"]
    assert warning.startswith(f"\\x1b[2J.py:7: UserWarning: {spelt}\n")
    logger.warning("\x1b")  # not half of a pair, which no report of the tests' workers could hold
    assert caplog.messages[-1] == "\x1b"
    assert "\x1b" in warnings.formatwarning(foreign, UserWarning, "x.py", 7, "")


def test_names_of_files_and_findings_steer_no_terminal(tmp_path, monkeypatch, capfd, caplog):
    """From a data set's name and columns to what is printed and logged of them."""
    monkeypatch.chdir(tmp_path)
    name = "pairs\x1b[31m.jsonl"
    pairs = [{**pair, "col\x1b]0;t\x07": 1} for pair in text_pairs(4)]
    (tmp_path / name).write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    assert main(["pairs", "inspect", name, "--out", "o\x1b[5mut", "--exit_zero"]) == 0
    assert main(["pairs", "build", "edit", "--source", name, "--out", "out\x1b[1m.jsonl"]) in (0, 1)
    assert "columns not read: col\\x1b]0;t\\x07" in caplog.text
    written = "".join([*capfd.readouterr(), caplog.text])
    assert "pairs\\x1b[31m.jsonl" in written
    assert not any(sign in written for sign in ("\x1b", "\x07"))
    assert os.path.isdir("o\x1b[5mut")
