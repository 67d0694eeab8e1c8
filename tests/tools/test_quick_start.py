"""Help, and the answer to a mistake, come before anything heavy is imported; what they know is what the classes say."""

import dataclasses
import importlib
import importlib.util
import json
import os
import pickle
import resource
import subprocess
import sys

import dpop_trainer
import dpop_trainer.data
import pytest
import torch
import transformers
from dpop_trainer.cli import COMMANDS, main
from dpop_trainer.run_folder.versions import versions
from dpop_trainer.settings import source_classes
from dpop_trainer.settings.arguments import (
    ComparisonArguments,
    DataArguments,
    ModelArguments,
    check_arguments,
    parse_arguments,
)
from dpop_trainer.settings.model_folder import check_model_folder
from dpop_trainer.settings.own_process import hidden
from dpop_trainer.settings.run_parser import RunParser
from dpop_trainer.settings.source_classes import class_from_source, function_from_source
from dpop_trainer.settings.under_way import under_way
from dpop_trainer.tools.pairs.recipes import RECIPES
from dpop_trainer.tools.plan.arguments import PlanArguments
from tiny import text_pairs, word_tokenizer

HEAVY = ("torch", "transformers", "datasets", "peft", "accelerate", "matplotlib", "pandas", "pyarrow", "numpy", "scipy")
CONFIGS = [("settings.config", "DPOPConfig"), ("settings.config", "SFTConfig"), ("tools.plan.options", "PlanConfig")]

SUBCOMMANDS = [["pairs", "build"], *(["pairs", "build", name] for name in RECIPES), ["pairs", "inspect"]]
SUBCOMMANDS += [["mtbench", "answer"], ["mtbench", "judge"]]
ALL_COMMANDS = [[name] for name in COMMANDS] + SUBCOMMANDS

# calls `main` once for each list of words on stdin -> exit code, stderr, and what is imported by then
CALLS = f"""
import contextlib, io, json, sys
from dpop_trainer.cli import main
for line in sys.stdin:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(json.loads(line))
    print(json.dumps([code, out.getvalue(), err.getvalue(), [m for m in {HEAVY!r} if m in sys.modules]]))
"""

# the least that a process can do, and the seconds that it takes where `dpop train --help` may take one
BARE_SECONDS = 0.02


def cpu_seconds(command, **options):
    """User and system time of a child -> with what it did."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, **options)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done


@pytest.fixture(scope="module")
def allowed_seconds():
    """One second, on a machine whose bare interpreter starts in `BARE_SECONDS`; in proportion on a slower one."""
    bare = min(cpu_seconds([sys.executable, "-c", "pass"])[0] for _ in range(3))
    return max(1.0, bare / BARE_SECONDS)


def called(calls, folder):
    run = subprocess.run(
        [sys.executable, "-c", CALLS],
        input="".join(json.dumps(words) + "\n" for words in calls),
        capture_output=True,
        text=True,
        cwd=folder,
        check=True,
    )
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize("words", ALL_COMMANDS, ids=" ".join)
def test_help_and_a_wrong_flag_are_answered_at_once(words, allowed_seconds, tmp_path):
    for more, code in (["--help"], 0), (["--qqqq", "1"], 2):
        script = [sys.executable, "-c", CALLS]
        seconds, done = cpu_seconds(script, input=json.dumps([*words, *more]) + "\n", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        got, out, err, imported = json.loads(done.stdout)
        assert (got, imported) == (code, [])
        assert seconds < allowed_seconds
        if more == ["--help"]:
            assert out.startswith(f"usage: dpop {words[0]}")
        elif words not in (["pairs"], ["mtbench"], ["pairs", "build"]):  # which want a command first
            assert "--qqqq" in err
            assert len(err.strip().splitlines()) == 1


MISTAKES = [
    (["trian"], 2, "got 'trian'. Did you mean 'train'?"),
    (["pairs", "inspct"], 2, "got 'inspct'. Did you mean 'inspect'?"),
    (["pairs", "build", "metamat"], 2, "invalid choice: 'metamat'"),
    (
        ["inspect", "--paris", "x"],
        2,
        "--paris: expected an option, got an unknown one. Did you mean '--pairs'? `dpop inspect",
    ),
    (["train", "--learning_rte", "1"], 2, "Did you mean 'learning_rate'?"),
    (["train", "--eval_strategy", "stpes"], 2, "--eval-strategy: invalid choice: 'stpes'"),
    (["train", "--log_level", "loud"], 2, "--log-level: invalid choice: 'loud'"),
    (["train", "--loss_type", "dpopp"], 1, "got 'dpopp'. Did you mean 'dpop'?"),
    (["train", "--beta", "0"], 1, "beta: expected a finite value > 0, got 0.0."),
    (["train", "--config", "absent.yaml"], 1, "--config: expected a YAML file, found none at 'absent.yaml'."),
    (["train", "--config", "."], 1, "--config: expected a YAML file, found none at '.'."),
    (["train", "--config", "key.yaml"], 1, "key.yaml: expected fields of the run, got 'max_step'."),
    (["train", "--config", "enum.yaml"], 1, "enum.yaml: layout: expected one of auto, rows, tree, packed, flat, got"),
    (["train"], 1, "dataset_name: expected a hub id or a local file, got none."),
    (["train", "--dataset_name", "absent.jsonl"], 1, "source: expected an existing file or folder, got absent.jsonl."),
    (["train", "--dataset_name", "key.yaml"], 1, "source: expected a file ending in .jsonl, .json, .parquet, .arrow"),
    (["train", "--dataset_name", "a/b", "--model_name_or_path", "./m"], 1, "model: expected a folder with config.json"),
    (["sft", "--output_dir", "key.yaml"], 1, "output_dir: expected a folder, got 'key.yaml'"),
    (["compare", "--dataset_name", "absent.jsonl"], 1, "source: expected an existing file or folder"),
    (["plan", "--device", "h900"], 1, "device: expected one of a100-40gb,"),
    (["plan", "--device", "h100", "--sharding", "zero"], 1, "sharding: expected one of auto, none, ddp, fsdp2, zero2,"),
    (["plan", "--quantization", "3bit"], 1, "quantization: expected one of none, 4bit, 8bit, got '3bit'."),
    (["inspect", "./absent", "--pairs", "a/b"], 1, "model: expected an existing folder or a hub id, found nothing at"),
    (["inspect", ".", "--pairs", "a/b"], 1, "model: expected a folder with config.json or adapter_config.json"),
    (["inspect", "key.yaml", "--pairs", "a/b"], 1, "model: expected an existing folder or a hub id, found a file at"),
    (["eval", "--models", "a/b", "--pairs", "absent.jsonl"], 1, "source: expected an existing file or folder"),
    (["eval", "--models", "a/b", "--local", "arc=absent.jsonl"], 1, "local: expected a file of questions for arc"),
    (["mtbench", "answer", "--model", "a/b", "--questions", "."], 1, "questions: expected a JSONL file, found none"),
    (["export", "a/b", "--out", "key.yaml"], 1, "out: expected a folder, got the file 'key.yaml'."),
    (["export", "a/b", "--out", "new", "--evaluation", "."], 1, "evaluation: expected results.json of `dpop eval`"),
    (["demo", "--output_dir", "key.yaml"], 1, "output_dir: expected a folder, got 'key.yaml'"),
    (["pairs", "build", "arc", "--source", "absent.jsonl", "--out", "o.jsonl"], 1, "source: expected an existing file"),
    (["pairs", "inspect", "absent.jsonl"], 1, "source: expected an existing file or folder, got absent.jsonl."),
    (["pairs", "inspect", "key.yaml"], 1, "source: expected a file ending in"),
    (["pairs", "inspect", "a/b", "--tokenizer", "./absent"], 1, "model: expected a folder with a tokenizer"),
]
TRAIN = ["train", "--output_dir", "new", "--dataset_name", "chat.jsonl", "--model_name_or_path"]
WHOLE_MODEL = ["--model_name_or_path", "./whole"]
NO_TEMPLATE = "expected a tokenizer with a chat template, since the pairs are messages"
MISTAKES += [
    ([*TRAIN, "./whole"], 1, NO_TEMPLATE),
    ([*TRAIN, "./adapter"], 1, NO_TEMPLATE),
    (["sft", *TRAIN[1:], "./whole", "--dataset_name", "completions.jsonl"], 1, NO_TEMPLATE),
    (["compare", *TRAIN[1:], "./whole"], 1, NO_TEMPLATE),
    (
        ["train", "--model_name_or_path", "./whole", "--dataset_name", "a/b", "--eval_dataset_name", "chat.jsonl"],
        1,
        NO_TEMPLATE,
    ),
    (["train", *WHOLE_MODEL, "--dataset_mixture", "odd.jsonl", "chat.jsonl"], 1, "odd.jsonl: columns: expected prompt"),
    (["train", *WHOLE_MODEL, "--dataset_mixture", "absent.jsonl"], 1, "source: expected an existing file or folder"),
    (["train", *WHOLE_MODEL, "--dataset_name", "a/b", "--eval_datasets", "chat.jsonl"], 1, NO_TEMPLATE),
    (["pairs", "inspect", "chat.jsonl", "--tokenizer", "./whole"], 1, NO_TEMPLATE),
    (["inspect", "./whole", "--pairs", "chat.jsonl"], 1, NO_TEMPLATE),
    (["eval", "--models", "a/b", "./whole", "--pairs", "chat.jsonl"], 1, NO_TEMPLATE),
    (
        [*TRAIN, "./whole", "--dataset_name", "odd.jsonl"],
        1,
        "odd.jsonl: columns: expected prompt, chosen and rejected, or",
    ),
    ([*TRAIN, "./whole", "--load_in_4bit"], 1, "load_in_4bit: expected an adapter to train, got none"),
    ([*TRAIN, "./unreadable"], 1, "model: expected JSON in unreadable/config.json, got what cannot be read"),
    ([*TRAIN, "./t5"], 1, "model: expected a causal LM, with or without a vision tower, got a checkpoint of T5Model"),
    ([*TRAIN, "./empty"], 1, "model: expected weights in empty (model.safetensors, "),
    (
        [*TRAIN, "./sharded"],
        1,
        "model: expected the 2 files of weights that sharded/model.safetensors.index.json names, found no b.",
    ),
    ([*TRAIN, "./pointer"], 1, "pointer/model.safetensors, got Git LFS's pointer to them."),
    ([*TRAIN, "./mute"], 1, "processing_class: expected a tokenizer in './mute', found no file of one."),
    ([*TRAIN, "./baseless"], 1, "model: expected base_model_name_or_path in baseless/adapter_config.json, found none."),
    (
        [*TRAIN, "./orphan"],
        1,
        "model: expected a folder with config.json or adapter_config.json, found none at './absent'.",
    ),
]

# folder -> its files, as text or JSON
WHOLE = {"config.json": {}, "tokenizer.json": {}, "tokenizer_config.json": {}, "model.safetensors": "weights"}
TWO_SHARDS = {"weight_map": {"v": "a", "w": "b", "x": "a"}}
FOLDERS: dict[str, dict] = {
    "whole": WHOLE,
    "adapter": {"adapter_config.json": {"base_model_name_or_path": "./whole"}, "adapter_model.safetensors": "weights"},
    "unreadable": {"config.json": "{"},
    "t5": {"config.json": {"is_encoder_decoder": True, "architectures": ["T5Model"], "model_type": "t5"}},
    "empty": {"config.json": {}, "tokenizer.json": {}},
    "sharded": {"config.json": {}, "tokenizer.json": {}, "model.safetensors.index.json": TWO_SHARDS, "a": "weights"},
    "pointer": WHOLE | {"model.safetensors": "version https://git-lfs.github.com/spec/v1\noid sha256:0"},
    "mute": {"config.json": {}, "model.safetensors": "weights"},
    "baseless": {"adapter_config.json": {}},
    "orphan": {"adapter_config.json": {"base_model_name_or_path": "./absent"}},
}


def write_folders(root):
    for folder, files in FOLDERS.items():
        (root / folder).mkdir()
        for name, content in files.items():
            (root / folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    asked, answered = ([{"role": role, "content": "hello"}] for role in ("user", "assistant"))
    chat = {"prompt": asked, "chosen": answered, "rejected": [{"role": "assistant", "content": "go"}]}
    (root / "chat.jsonl").write_text(json.dumps(chat))
    (root / "completions.jsonl").write_text(json.dumps({"prompt": asked, "completion": answered}))
    (root / "odd.jsonl").write_text(json.dumps({"a": 1}))


def test_a_mistake_is_answered_before_anything_heavy_is_imported(tmp_path):
    (tmp_path / "key.yaml").write_text("max_step: 3")
    (tmp_path / "enum.yaml").write_text("layout: rwos")
    write_folders(tmp_path)
    answers = called([words for words, _, _ in MISTAKES], tmp_path)
    assert len(answers) == len(MISTAKES)
    for (words, code, message), (got, out, err, imported) in zip(MISTAKES, answers, strict=True):
        assert (got, imported) == (code, []), (words, err)
        assert message in err, words
        assert not out
        assert len(err.strip().splitlines()) == 1 or words[0] in ("trian", "pairs"), err  # or with all commands below


@pytest.mark.parametrize("named", [5, {"a": 1}, [], [None], "T5Model"])
def test_architectures_of_any_kind_are_told_of(tmp_path, named):
    config = {"is_encoder_decoder": True, "architectures": named, "model_type": "t5"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"model: expected a causal LM, .* \(model type t5\)"):
        check_model_folder(str(tmp_path))


def test_packages_import_their_names_when_they_are_asked_for():
    code = f"import sys, dpop_trainer, dpop_trainer.data; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
    for package in (dpop_trainer, dpop_trainer.data):
        assert sorted(package._MODULES) == sorted(package.__all__)
        for name in package.__all__:
            module = importlib.import_module(f"{package.__name__}.{package._MODULES[name]}")
            assert getattr(package, name) is getattr(module, name)
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            _ = package.nothing
    assert pickle.loads(pickle.dumps(dpop_trainer.DPOPConfig)) is dpop_trainer.DPOPConfig
    assert pickle.loads(pickle.dumps(dpop_trainer.data.PairTree)) is dpop_trainer.data.PairTree


@pytest.mark.parametrize(("module", "name"), CONFIGS)
def test_fields_from_the_source_are_those_of_the_class(module, name):
    real = getattr(importlib.import_module(f"dpop_trainer.{module}"), name)
    read = class_from_source(f"dpop_trainer.{module}", name)
    assert read is not real
    expected, got = dataclasses.fields(real), dataclasses.fields(read)
    assert [item.name for item in got] == [item.name for item in expected]
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.init == theirs.init
        assert ours.default == theirs.default, ours.name
        made = [item.default_factory for item in (ours, theirs)]
        assert made[0] is made[1] or made[0]() == made[1](), ours.name
        plain = [{key: _plain(value) for key, value in item.metadata.items()} for item in (ours, theirs)]
        assert plain[0] == plain[1], ours.name


@pytest.mark.parametrize(("module", "name"), CONFIGS)
def test_flags_from_the_source_are_those_of_the_class(module, name):
    classes = (PlanArguments, ModelArguments, DataArguments, ComparisonArguments)
    parsers = [
        RunParser((*classes, config), "dpop")
        for config in (
            class_from_source(f"dpop_trainer.{module}", name),
            getattr(importlib.import_module(f"dpop_trainer.{module}"), name),
        )
    ]
    for ours, theirs in zip(*(parser._actions for parser in parsers), strict=True):
        for attribute in ("option_strings", "dest", "nargs", "const", "default", "required"):
            assert getattr(ours, attribute) == getattr(theirs, attribute), ours.dest
        assert _plain(ours.choices) == _plain(theirs.choices), ours.dest
        assert getattr(ours.type, "__name__", None) == getattr(theirs.type, "__name__", None), ours.dest
    assert parsers[0].format_help() == parsers[1].format_help()


def _plain(value):
    """Choices as text: a view of a mapping's keys, members of an enum."""
    return value if value is None or isinstance(value, (str, bool, int)) else [str(item) for item in value]


def test_losses_are_resolved_from_the_source_as_by_the_kernels():
    from dpop_kernels.losses.formulas import LOSSES, TRL_NAMES
    from dpop_kernels.losses.weights import resolve_losses

    read = function_from_source("dpop_kernels.losses.weights", "resolve_losses")
    for names in (["sigmoid", "sft"], list(LOSSES), list(TRL_NAMES)[:1]):
        assert read(names) == resolve_losses(names)
    with pytest.raises(ValueError, match=r"loss_weights: expected one for each loss, 1 for \['dpo'\], got 2"):
        read("dpo", [1, 2])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--loss_type dpo --dpop_lambda 5",
            r"dpop_lambda: expected 50.0 with loss_type \['dpo'\], which",
        ),
        ("--loss_type dpo --dpop_dead_zone 0.1", "dpop_dead_zone: expected 0 with loss_type"),
        ("--loss_type aot --gradient_accumulation_steps 2", "gradient_accumulation_steps: expected 1 with 'aot'"),
        ("--loss_type nca_pair --f_divergence_type forward_kl", "f_divergence_type: expected 'reverse_kl' with"),
        ("--loss_type simpo --simpo_gamma -1", "simpo_gamma: expected a finite value >= 0, got -1.0"),
        ("--loss_type simpo --simpo_gamma 1", None),
        ("--f_divergence_type alpha_divergence --f_alpha_divergence_coef 0.7", None),
    ],
)
def test_losses_and_their_options_are_checked_by_the_source_as_by_the_configuration(flags, message):
    argv = ["--output_dir", "out", "--use_cpu", "true", *flags.split()]
    for check in (
        lambda: check_arguments("dpop_trainer.settings.config", "DPOPConfig", argv, "dpop train"),
        lambda: parse_arguments(dpop_trainer.DPOPConfig, argv, "dpop train"),
    ):
        if message is None:
            assert check() is not None
        else:
            with pytest.raises(ValueError, match=message):
                check()


def test_what_is_hidden_is_found_again(tmp_path, monkeypatch):
    (tmp_path / "seldom_needed.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with hidden("seldom_needed", "json"):
        assert json.loads("1") == 1  # which is imported
        assert importlib.util.find_spec("seldom_needed") is None
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("seldom_needed")
    module = importlib.import_module("seldom_needed")
    with hidden("seldom_needed"):
        assert sys.modules["seldom_needed"] is module  # which somebody uses
    monkeypatch.delitem(sys.modules, "seldom_needed")


def test_a_terminal_alone_shows_what_is_under_way(monkeypatch, capsys):
    with under_way("Loading") as show:
        show("Planning")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with under_way("Loading") as show:
        show("Planning")
    clear = "\r\033[K"
    assert capsys.readouterr().err == f"{clear}Loading ...{clear}Planning ...{clear}"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `shown` to be read, which cannot be imported: it needs what is not there."""
    (tmp_path / "shown" / "inner").mkdir(parents=True)
    (tmp_path / "shown" / "__init__.py").write_text("raise ImportError('the package was imported')")
    (tmp_path / "shown" / "inner" / "__init__.py").write_text("from .kinds import Kind\n")
    (tmp_path / "shown" / "inner" / "kinds.py").write_text(
        "import enum\nclass Kind(str, enum.Enum):\n    ONE = 'one'\n    TWO = 'two'\n    def f(self): return absent\n"
    )
    (tmp_path / "shown" / "fields.py").write_text(
        """
from __future__ import annotations
import logging
from dataclasses import dataclass, field
from absent_library import Tensor
from .inner import Kind, kinds as more
try:
    import faster
    NUMBER = 1
except ImportError:
    NUMBER = 2
    ONLY_THERE = 4
TABLE = {}
def put(name, *, value: Tensor = 5):
    def decorate(function: Tensor) -> Tensor:
        TABLE[name] = value
        return function
    return decorate
@put("first")
def _first(x: Tensor): return faster.first(x)
@put("second", value=NUMBER)
def _second(x: Tensor): return faster.second(x)
def levels() -> dict[str, Tensor]:
    return {"low": logging.DEBUG, "high": logging.ERROR}
@dataclass
class Base:
    '''What it is.'''
    unit = "nats"
    if faster.is_there():
        unit = "bits"
    note: str = field(default=unit, metadata={"help": f"one of {', '.join(name for name in TABLE)}"})
    made_of: Tensor | None = None
    kind: Kind = more.Kind.TWO
    def __post_init__(self): raise RuntimeError("its methods are left out")
@dataclass
class Derived(Base):
    level: str = field(default="low", metadata={"choices": levels().keys()})
    lowest: int = ONLY_THERE
@dataclass
class Computed(Base):
    number: int = faster.number() + 1
"""
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(source_classes, "READ_PACKAGES", ("shown",))
    source_classes._source_module.cache_clear()
    yield "shown.fields"
    source_classes._source_module.cache_clear()


def test_a_class_is_read_without_its_package(package):
    read = class_from_source(package, "Derived")
    fields = {item.name: item for item in dataclasses.fields(read)}
    assert list(fields) == ["note", "made_of", "kind", "level", "lowest"]
    made = read()
    assert (made.note, made.made_of, made.kind.value, made.level, made.lowest) == ("bits", None, "two", "low", 4)
    assert fields["note"].metadata["help"] == "one of first, second"
    assert list(fields["level"].metadata["choices"]) == ["low", "high"]
    assert read.__mro__[1].__doc__ == "What it is."
    assert function_from_source(package, "levels")() == {"low": 10, "high": 40}
    assert class_from_source(package, "TABLE") == {"first": 5, "second": 1}


@pytest.mark.parametrize(("name", "why"), [("Computed", "adds what is not known"), ("Absent", "is not there")])
def test_a_class_that_cannot_be_read_is_none(name, why, package):
    assert class_from_source(package, name) is None, why


def test_without_the_source_the_class_itself_answers(monkeypatch, capsys):
    assert main(["train", "--help"]) == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr("dpop_trainer.settings.arguments.class_from_source", lambda module, name: None)
    monkeypatch.setattr("dpop_trainer.tools.plan.cli.class_from_source", lambda module, name: None)
    assert main(["train", "--help"]) == 0
    assert capsys.readouterr().out == expected
    assert main(["train", "--dpop_lamda", "5"]) == 2
    assert "Did you mean 'dpop_lambda'?" in capsys.readouterr().err
    assert main(["plan", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: dpop plan [--config FILE.yaml")


def test_the_parser_of_transformers_is_the_installed_one():
    from dpop_trainer.settings.run_parser import HfArgumentParser

    assert issubclass(RunParser, HfArgumentParser)
    assert (
        sys.modules[transformers.HfArgumentParser.__module__].__file__
        == source_classes.module_from_file("transformers.hf_argparser").__file__
    )
    model, _, config = parse_arguments(dpop_trainer.DPOPConfig, ["--bf16", "false", "--use_cpu"], "dpop")
    assert isinstance(config, dpop_trainer.DPOPConfig)
    assert isinstance(model, ModelArguments)


def test_versions_are_told_without_an_import():
    code = "import sys, json; from dpop_trainer.run_folder.versions import versions; print(json.dumps(versions()), "
    code += f"[m for m in {HEAVY!r} if m in sys.modules])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told == f"{json.dumps(versions())} []\n"
    assert versions()["torch"] == str(torch.__version__)


# the console command itself, and what it has imported when it ends
AS_A_COMMAND = """
import atexit, json, runpy, sys
names = ("torch", "transformers", "peft", "accelerate", "matplotlib")
models = lambda: [m for m in sys.modules if m.startswith("transformers.models.") and "modeling" in m]
atexit.register(lambda: print(json.dumps([m for m in names if m in sys.modules] + models())))
runpy.run_module("dpop_trainer", run_name="__main__", alter_sys=True)
"""


def test_pairs_are_inspected_without_torch_and_to_the_same_result(tmp_path, monkeypatch):
    word_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in text_pairs()))
    monkeypatch.chdir(tmp_path)
    for options, imported in ([], []), (["--tokenizer", "tokenizer"], ["transformers"]):
        words = ["pairs", "inspect", "pairs.jsonl", "--exit_zero", *options]
        environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}  # it tokenises by itself
        run = subprocess.run(
            [sys.executable, "-c", AS_A_COMMAND, *words, "--out", "alone"],
            capture_output=True,
            text=True,
            env=environment,
        )
        assert run.returncode == 0, run.stderr
        assert "PyTorch" not in run.stderr
        assert json.loads(run.stdout.splitlines()[-1]) == imported
        assert main([*words, "--out", "here"]) == 0
        alone, here = (json.loads((tmp_path / out / "doctor.json").read_text()) for out in ("alone", "here"))
        assert alone == here
