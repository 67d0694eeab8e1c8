"""Attacks on the command line, made at random from a seed: what falls is printed with what was given.

    make test-attacks                             500 command lines, 500 damaged files, 50,000 records
    python tests/helpers/attacks.py 100 --seed 3

Command lines: words of one that works are dropped, doubled, swapped, or replaced by what no option takes. Files: bytes
of one that works are cut, flipped, filled or exchanged, or a value in its JSON is another. Records: fields of one that
works hold any other value.

A command stands where it ends by itself within its bound with an exit code of its own, no traceback, no control
character on the terminal, and, if it failed, with words of this package that name what was wrong: the boundary for
errors that nobody foresaw (`settings/told.py`) is never reached. `demo` and `compare` train for minutes, and are left
out. A record stands where it is a pair, or a problem that says what was expected.
"""

import argparse
import gzip
import json
import os
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from dpop_trainer.cli import main
from dpop_trainer.data.convert import convert_record
from dpop_trainer.data.forms import recognise_form
from dpop_trainer.settings.told import FAULT
from dpop_trainer.tools.mtbench.prompts import FASTCHAT_NAMES
from judges import write_questions
from ranks import run_alone
from tiny import text_pairs, tiny_llama, word_tokenizer

BOUND = 150.0  # seconds: a judge that nobody reaches is asked six times, for one minute
NASTY = [
    *(
        "",
        " ",
        "-",
        "--",
        "---",
        "=",
        "--=",
        "\x1b[2J",
        "\udcff",
        "a" * 5000,
        "☃",
        "%s",
        "{0}",
        "$HOME",
        "[",
        "{",
        "{}",
    ),
    *("nan", "inf", "-inf", "-1", "0", "1e400", "9" * 30, "1.5", "true", "null", "[1]", '{"a": 1}', "[" * 2000),
    *("/", ".", "..", "../..", "~", "~nobody/x", "/dev/null", "/dev/zero", "pipe", "model", "pairs.jsonl", "run.yaml"),
    *("--help", "--config", "--model", "--out", "--limit", "--max_length", "--beta", "--seed"),
]
RUN = {
    "model_name_or_path": "model",
    "dataset_name": "pairs.jsonl",
    "output_dir": "run",
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
}
JUDGE = "mtbench judge --endpoint http://127.0.0.1:9/v1 --judge_model j --questions question.jsonl --out mt"
LINES = [
    "train --config run.yaml --print-config",
    "sft --config run.yaml --print-config",
    "train --config run.yaml --beta 0.1 --max_length 32 --print-config",
    "pairs inspect pairs.jsonl --out doctor --max_scored 2",
    "pairs build edit --source pairs.jsonl --out built.jsonl --seed 1 --limit 2",
    "pairs build metamath --source pairs.jsonl --out built.parquet",
    "inspect model --ref_model model --pairs pairs.jsonl --limit 2 --batch_size 2 --out seen",
    "eval --models model --pairs pairs.jsonl --out results --limit 2 --batch_size 2",
    "mtbench answer --model model --questions question.jsonl --chat_template t.jinja --out mt --max_new_tokens 2",
    f"{JUDGE} --max_attempts 1 --timeout 0.5 --workers 2",
    "export model --out exported --dtype float32",
    "plan --model_name_or_path model --device h100-80gb --max_length 64",
    "recipes --path lora",
    "recipes --copy recipes",
]
# a file that is damaged -> what reads it
READERS = {
    "pairs.jsonl": "pairs inspect pairs.jsonl --out doctor --exit_zero",
    "pairs.json": "pairs inspect pairs.json --out doctor --exit_zero",
    "pairs.jsonl.gz": "pairs inspect pairs.jsonl.gz --out doctor --exit_zero",
    "pairs.parquet": "pairs inspect pairs.parquet --out doctor --exit_zero",
    "pairs.arrow": "pairs inspect pairs.arrow --out doctor --exit_zero",
    "run.yaml": "train --config run.yaml --print-config",
    "question.jsonl": f"{JUDGE} --max_attempts 1 --timeout 0.5",
    "mt/model_answer/m.jsonl": f"{JUDGE} --max_attempts 1 --timeout 0.5",
    "mt/model_judgment/j_single.jsonl": f"{JUDGE} --max_attempts 1 --timeout 0.5",
    "prompts.jsonl": f"{JUDGE} --max_attempts 1 --timeout 0.5 --prompt_file prompts.jsonl",
    "t.jinja": "mtbench answer --model model --questions question.jsonl --chat_template t.jinja --max_new_tokens 2",
    "model/config.json": "inspect model --ref_model model --pairs pairs.jsonl --limit 2 --out seen",
    "model/tokenizer.json": "pairs inspect pairs.jsonl --tokenizer model --out doctor --exit_zero",
    "model/tokenizer_config.json": "pairs inspect pairs.jsonl --tokenizer model --out doctor --exit_zero",
    "model/model.safetensors": "eval --models model --pairs pairs.jsonl --out results --limit 2",
}
# what else an error may name: where the file is sound still, that nobody judges; of a value, its field
_NO_JUDGE = ("endpoint: expected replies", "Missing, and asked for again")
NAMED = {
    "run.yaml": ("dpop",),
    "question.jsonl": _NO_JUDGE,
    "mt/model_answer/m.jsonl": _NO_JUDGE,
    "mt/model_judgment/j_single.jsonl": _NO_JUDGE,
    "prompts.jsonl": (*_NO_JUDGE, "prompt_file"),
    "t.jinja": ("chat_template",),
    "model/config.json": ("model",),
}
VALUES = [
    *(None, True, 0, -1, 1.5, float("nan"), 10**400, "", " ", "\x00", "\ud800", "a", "{", "[]", "x" * 3000),
    *([], [None], [[]], {}, {"": None}, [{"role": "user"}], [{"role": 3, "content": []}], {"role": "user"}),
    *([{"role": "assistant", "content": "a", "tool_calls": [3]}], [1, 2], [-1], [2**40], ["a", 1], {"a": {"b": [{}]}}),
]
USER, RIGHT, WRONG = ({"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("assistant", "c")))
RECORDS: list[dict[str, Any]] = [
    {"prompt": "a", "chosen": " b", "rejected": " c"},
    {"prompt": [USER], "chosen": [RIGHT], "rejected": [WRONG]},
    {"chosen": [USER, RIGHT], "rejected": [USER, WRONG]},
    {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]},
    {"question": "a", "chosen": "b", "rejected": "c"},
    {"input": {"messages": [USER]}, "preferred_output": [RIGHT], "non_preferred_output": [WRONG]},
    {"chosen": "Human: a\n\nAssistant: b", "rejected": "Human: a\n\nAssistant: c"},
]
MORE = ["weight", "margin", "tools", "chat_template_kwargs", "ref_chosen_logps", "score_chosen", "system", "images"]


class Result(NamedTuple):
    """Of one kind of attack."""

    tried: int
    fallen: list[str]
    """Each with what was given and what was wrong with the answer."""


def write_files(folder: Path) -> None:
    """All that the commands read."""
    tiny_llama().save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    pairs = text_pairs(5)
    lines = "".join(json.dumps(pair) + "\n" for pair in pairs)
    (folder / "pairs.jsonl").write_text(lines)
    (folder / "pairs.json").write_text(json.dumps(pairs))
    (folder / "pairs.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    table = pa.Table.from_pylist(pairs)
    pq.write_table(table, folder / "pairs.parquet")
    with pa.OSFile(str(folder / "pairs.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN))
    (folder / "t.jinja").write_text("{% for m in messages %}w1 {{ m.content }} {% endfor %}")
    write_questions(folder / "question.jsonl")
    answers = [{"question_id": number, "choices": [{"index": 0, "turns": ["a", "b"]}]} for number in (81, 111, 121)]
    judged = {"question_id": 81, "model": "m", "judge": ["j", "p"], "user_prompt": "?", "score": 3, "turn": 1}
    prompts = [{"name": name, "system_prompt": "s", "prompt_template": "{question}"} for name in FASTCHAT_NAMES]
    for name, records in (
        ("mt/model_answer/m.jsonl", answers),
        ("mt/model_judgment/j_single.jsonl", [judged]),
        ("prompts.jsonl", prompts),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    os.mkfifo(folder / "pipe")


def in_folder(folder: Path, words: list[str]) -> int:
    """The command line there, with a cache of its own."""
    import datasets.config

    os.chdir(folder)
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    return main(words)


def fault_of(code: int | None, output: str, named: tuple[str, ...]) -> str | None:
    """What is wrong with how a command ended; None where it stood.

    Args:
        code: its exit code.
        output: all that it wrote.
        named: of which an error names one.
    """
    if code not in (0, 1, 2, 3):
        return f"exit code {code}" if code != -9 else f"not ended after {BOUND:g} seconds"
    if FAULT in output or "Traceback" in output:
        return "not foreseen"
    if re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", output):
        return "a control character"
    if code in (1, 2) and "dpop" not in output:
        return "nothing said"
    if code == 1 and not any(name in output for name in named):
        return f"{' or '.join(named)} is not named"
    return None


def mutated_line(generator: random.Random) -> list[str]:
    """The words of a command that works, but for one to three of them."""
    words = generator.choice(LINES).split()
    for _ in range(generator.choice([1, 1, 1, 2, 3])):
        place = generator.randrange(1, len(words)) if len(words) > 1 else 0
        kind = generator.choice(
            ["drop", "double", "swap", "replace", "value", "value", "value", "insert", "glue", "cut"]
        )
        if kind == "drop":
            words = words[:place] + words[place + 1 :]
        elif kind == "double":
            words.insert(place, words[place])
        elif kind == "swap":
            other = generator.randrange(len(words))
            words[place], words[other] = words[other], words[place]
        elif kind == "replace":
            words[place] = generator.choice(NASTY)
        elif kind == "value":
            places = [number for number, word in enumerate(words) if number > 1 and not word.startswith("--")]
            words[generator.choice(places or [place])] = generator.choice(NASTY)
        elif kind == "insert":
            words.insert(place, generator.choice(NASTY))
        elif kind == "glue":
            words[place] = f"{words[place]}={generator.choice(NASTY)}"
        else:
            words[place] = words[place][: generator.randrange(len(words[place]) + 1)]
        if not words:
            return [""]
    return [word.replace("\0", "") for word in words]


def damaged(content: bytes, generator: random.Random) -> bytes:
    """Another content."""
    changed = _with_another_value(content, generator)
    if changed is not None and generator.random() < 0.5:
        return changed
    size = len(content)
    place, length = generator.randrange(size), generator.choice([1, 1, 4, 30, 400])
    kind = generator.choice(["cut", "flip", "zeros", "noise", "insert", "repeat", "empty", "first gone", "other"])
    noise = generator.randbytes(length)
    return {
        "cut": content[:place],
        "flip": content[:place] + bytes([content[place] ^ 1 << generator.randrange(8)]) + content[place + 1 :],
        "zeros": content[:place] + bytes(length) + content[place + length :],
        "noise": content[:place] + noise + content[place + length :],
        "insert": content[:place] + noise + content[place:],
        "repeat": content[:place] + content[place : place + length] * 3 + content[place + length :],
        "empty": b"",
        "first gone": content[place:],
        "other": generator.choice([b"[]", b"{}", b"null\n", b"3\n", b'"a"\n', b"[[]]\n", b"{\n", b"\xff\xfe{\x00"]),
    }[kind]


def _with_another_value(content: bytes, generator: random.Random) -> bytes | None:
    """JSON, or a line of it, with any other value somewhere; None where it is none."""
    lines = content.splitlines()
    place = generator.randrange(len(lines))
    before, text, after = [], content, []
    if len(lines) > 1 and lines[0].startswith(b"{") and lines[0].endswith(b"}"):
        before, text, after = lines[:place], lines[place], lines[place + 1 :]
    try:
        whole = json.loads(text)
    except ValueError:  # not UTF-8, or not JSON
        return None
    holder = whole
    while isinstance(holder, dict | list) and holder:
        key = generator.choice(list(holder)) if isinstance(holder, dict) else generator.randrange(len(holder))
        if not isinstance(holder[key], dict | list) or not holder[key] or generator.random() < 0.3:
            holder[key] = generator.choice(VALUES)
            break
        holder = holder[key]
    return b"\n".join([*before, json.dumps(whole).encode(), *after]) + b"\n"


def attack_lines(number: int, seed: int) -> Result:
    """Mutated command lines, each in a fresh copy of the files."""
    generator = random.Random(f"{seed} lines")

    def one(folder: Path) -> tuple[list[str], tuple[str, ...]]:
        return mutated_line(generator), ("dpop",)

    return _attack(number, one)


def attack_files(number: int, seed: int, names: list[str] | None = None) -> Result:
    """Damaged files, each read by a command that must name it, or do without what is gone.

    Args:
        number: of attacks.
        seed: another one, other attacks.
        names: of `READERS`; None: all, in turn.
    """
    generator = random.Random(f"{seed} files")
    names = names or list(READERS)
    turn = iter(range(number))

    def one(folder: Path) -> tuple[list[str], tuple[str, ...]]:
        name = names[next(turn) % len(names)]
        path = folder / name
        path.write_bytes(damaged(path.read_bytes(), generator))
        return READERS[name].split(), (*NAMED.get(name, ()), Path(name).parts[0], Path(name).name)

    return _attack(number, one)


def _attack(number: int, one: Callable[[Path], tuple[list[str], tuple[str, ...]]]) -> Result:
    fallen = []
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary) / "whole"
        whole.mkdir()
        write_files(whole)
        for count in range(number):
            folder = Path(temporary) / str(count)
            shutil.copytree(whole, folder, copy_function=shutil.copyfile, ignore=shutil.ignore_patterns("pipe"))
            os.mkfifo(folder / "pipe")
            words, named = one(folder)
            code, output = run_alone(in_folder, folder, words, longest=BOUND)
            fault = fault_of(code, output, named)
            if fault is not None:
                fallen.append(f"{fault}: dpop {' '.join(words)!r:.300}\n{output[-600:]}")
            shutil.rmtree(folder)
    return Result(number, fallen)


def attack_records(number: int, seed: int) -> Result:
    """Records of every form with fields of any kind."""
    generator = random.Random(f"{seed} records")
    fallen = []
    for _ in range(number):
        record = dict(generator.choice(RECORDS))
        for _ in range(generator.randint(1, 3)):
            field = generator.choice([*record, *MORE])
            if generator.random() < 0.2:
                record.pop(field, None)
            else:
                record[field] = generator.choice(VALUES)
        try:
            form = recognise_form(record)
        except ValueError as error:
            if not str(error).startswith("columns: expected "):
                fallen.append(f"{error}: {record!r:.300}")
            continue
        try:
            row = convert_record(record, "record 7", form)
        except Exception as error:  # which is what is looked for
            fallen.append(f"{type(error).__name__}: {error}: {record!r:.300}")
            continue
        is_sound = (row["kind"] is None) == (row["problem"] is not None)
        if not is_sound or "expected" not in (row["problem"] or "expected"):
            fallen.append(f"{row['problem']}: {record!r:.300}")
    return Result(number, fallen)


def run(number: int, seed: int) -> int:
    """All three kinds -> 1 where something fell."""
    results = {
        "records": attack_records(100 * number, seed),
        "damaged files": attack_files(number, seed),
        "command lines": attack_lines(number, seed),
    }
    for kind, result in results.items():
        print(f"{kind}: {result.tried} tried, {result.tried - len(result.fallen)} stood", flush=True)
        for line in result.fallen[:20]:
            print(f"  {line.encode('ascii', 'backslashreplace').decode()}")
    return int(any(result.fallen for result in results.values()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("number", type=int, nargs="?", default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.exit(run(options.number, options.seed))
