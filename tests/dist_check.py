"""`make dist-check`: build the wheel and the sdist, and try both where nothing of this checkout is at hand.

In an empty environment and an empty folder:

1. the wheel alone installs torch, triton and what those need; importing it costs next to nothing beyond torch;
2. with its extra [trainer], every command and every Python block of README.md works. The models that they name are
   folders of the same name here, tiny ones, and the pairs are eight, so that a run takes a few steps;
3. the sdist holds every file of the checkout, its tests are all collected, and some of them run, from it.

What passes lies in dist/ afterwards. Needs `build` and hatchling, and a package index for pip; nothing else.
"""

import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple, NoReturn

ROOT = Path(__file__).parents[1]

MAX_IMPORT_SECONDS = 1.0
NOT_FOR_THE_KERNELS = ("transformers", "datasets", "peft", "accelerate", "matplotlib", "yaml", "dpop_trainer")

HUB_MODELS = ("Qwen/Qwen2.5-1.5B-Instruct",)
"""What README's lines take from the hub; here a folder of that name, which is tried first."""

STAND_INS = """
import json, sys
from pathlib import Path
from tiny import text_pairs, tiny_llama, word_tokenizer

for folder in sys.argv[1:]:
    tiny_llama().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
for name in ("pairs.jsonl", "held_out.jsonl"):
    Path(name).write_text("".join(json.dumps(pair) + "\\n" for pair in text_pairs(8)))
"""

SMALL_DEMO = """
from dpop_trainer.tools.demo.run import DemoSettings, run_demo

run_demo(settings=DemoSettings(
    num_train_problems=64, num_eval_problems=8, num_exact_match=4, num_pairs=32, hidden_size=32, num_layers=2,
    sft_steps=2, sft_batch_size=8, preference_steps=2, preference_batch_size=4,
))
"""


class Trial(NamedTuple):
    """How a command of README.md is tried.

    Attributes:
        flags: appended, to make it shorter.
        skip: why it is not tried.
        code: Python to run in its place.
        exit_codes: what it may end with.
    """

    flags: tuple[str, ...] = ()
    skip: str = ""
    code: str = ""
    exit_codes: tuple[int, ...] = (0,)


# what a command begins with -> how it is tried; a command that is not here fails the check
COMMANDS = {
    "make demo": Trial(code=SMALL_DEMO),
    "make demo-chat": Trial(skip="fetches a model; tests/tools/test_demo_chat.py runs it on a small one"),
    "make test": Trial(skip="the sdist's tests run below"),
    "pip install": Trial(skip="the wheel is installed already"),
    "dpop pairs inspect": Trial(exit_codes=(0, 3)),  # 3: it found something, as it well may in words without meaning
    "dpop plan": Trial(flags=("--no_search",)),
    "dpop train": Trial(),
    "dpop inspect": Trial(),
}

# a phrase of a Python block -> the names that it takes from the reader's own program
PREAMBLES = {
    "DPOPTrainer(": """
from datasets import load_dataset
dataset = load_dataset("json", data_files="pairs.jsonl", split="train")
""",
    "linear_token_logps(": """
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-1.5B-Instruct")
hidden_states = torch.randn(5, model.config.hidden_size, requires_grad=True)
target_ids = torch.arange(5)
chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps = torch.randn(4, 3).unbind()
""",
}

TESTS_NEED = ("pytest", "pytest-benchmark", "hypothesis", "hatchling", "trl", "gguf")
QUICK_TESTS = (
    "tests/kernel/test_losses.py",
    "tests/project/test_architecture.py",
    "tests/tools/test_recipe_command.py",
    "tests/tools/test_recipes.py::test_recipe_runs[qwen-72b]",
    "tests/tools/test_recipes.py::test_the_page_lists_every_recipe",
)

START = time.perf_counter()


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="dist-check-") as name:
        folder = Path(name)
        wheel, sdist = build(folder / "dist")
        unpacked = unpack(sdist, folder / "sdist")
        empty = folder / "empty"
        empty.mkdir()
        environment = Environment(folder / "environment", folder / "home", empty)

        environment.install(str(wheel))
        check_requirements(environment)
        check_import(environment)

        environment.install(f"{wheel}[trainer]")
        check_modules(environment)
        check_readme(environment, unpacked)

        environment.install(*TESTS_NEED)
        check_tests(environment, unpacked)

        shutil.copytree(folder / "dist", ROOT / "dist", dirs_exist_ok=True)
    say(f"dist/{wheel.name} and dist/{sdist.name} hold what they promise")


class Environment:
    """A fresh virtual environment that sees no other's modules, and no hub.

    Args:
        folder: where to make it.
        home: where Hugging Face's libraries keep what they cache.
        empty: where its programs run.
    """

    def __init__(self, folder: Path, home: Path, empty: Path) -> None:
        self.empty = empty
        self.python = folder / "bin" / "python"
        variables = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
        self.variables = variables | {
            "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "1",
        }
        run([sys.executable, "-m", "venv", folder], cwd=empty, env=self.variables)

    def install(self, *what: str) -> None:
        """By pip, at the versions of constraints.txt. Modules are compiled when they are first imported."""
        pip = [self.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
        self.run([*pip, "--constraint", ROOT / "constraints.txt", *what])
        say(f"installed {' '.join(Path(item).name for item in what)}")

    def run(self, command: list, *, cwd: Path | None = None, exit_codes: tuple[int, ...] = (0,), path: str = "") -> str:
        """As a user would in a shell of their own. `path`: where else Python is to look for modules."""
        variables = self.variables | ({"PYTHONPATH": path} if path else {})
        return run(command, cwd=cwd or self.empty, env=variables, exit_codes=exit_codes)

    def run_code(self, code: str, *arguments: str, path: str = "") -> str:
        return self.run([self.python, "-c", code, *arguments], path=path)


def build(folder: Path) -> tuple[Path, Path]:
    """-> the wheel, built from the sdist; the sdist."""
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT], cwd=ROOT)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    say(f"built {wheel.name}, {sdist.name}")
    return wheel, sdist


def unpack(sdist: Path, folder: Path) -> Path:
    """-> the sdist's own folder. Every file that git tracks must be in it."""
    shutil.unpack_archive(sdist, folder)
    (unpacked,) = folder.iterdir()
    if (ROOT / ".git").exists():
        tracked = run(["git", "ls-files"], cwd=ROOT).splitlines()
        missing = [name for name in tracked if not name.startswith(".ci/") and not (unpacked / name).exists()]
        if missing:
            fail(f"sdist: expected every tracked file, {len(missing)} are missing: {', '.join(missing[:8])}")
    return unpacked


def check_requirements(environment: Environment) -> None:
    """The wheel alone asks for torch and triton, and nothing is installed that those two do not need."""
    code = """
import json
from importlib.metadata import distributions
print(json.dumps({found.metadata["Name"]: found.requires or [] for found in distributions()}))
"""
    found = {plain(name): requires for name, requires in json.loads(environment.run_code(code)).items()}
    if (asked := {name for name, _ in needs(found["dpop-kernels"])}) != {"torch", "triton"}:
        fail(f"requirements: expected torch and triton, got {', '.join(sorted(asked))}")
    if more := found.keys() - needed(found, "dpop-kernels") - {"pip", "setuptools"}:
        fail(f"installed: expected torch, triton and what they need, got also {', '.join(sorted(more))}")
    say(f"the wheel alone brings {', '.join(sorted(found.keys() - {'dpop-kernels', 'pip', 'setuptools'}))}")


def check_import(environment: Environment) -> None:
    """The median of three processes, after one that compiles the modules."""
    code = """
import time, torch
start = time.perf_counter()
import dpop_kernels
print(time.perf_counter() - start)
"""
    seconds = [float(environment.run_code(code)) for _ in range(4)][1:]
    if statistics.median(seconds) > MAX_IMPORT_SECONDS:
        fail(f"import dpop_kernels: expected under {MAX_IMPORT_SECONDS} s beyond torch, got {seconds}")
    say(f"import dpop_kernels costs {statistics.median(seconds):.3f} s beyond torch")


def check_modules(environment: Environment) -> None:
    """Importing the kernels imports none of the trainer's libraries, though they are there."""
    code = "import sys, dpop_kernels; print(dpop_kernels.__file__, *sys.modules)"
    place, *modules = environment.run_code(code).split()
    if found := sorted(set(modules) & set(NOT_FOR_THE_KERNELS)):
        fail(f"import dpop_kernels: expected torch alone, got also {', '.join(found)}")
    if not Path(place).is_relative_to(environment.python.parents[1]):
        fail(f"dpop_kernels: expected the wheel's, imported {place}")


def check_readme(environment: Environment, unpacked: Path) -> None:
    environment.run_code(STAND_INS, *HUB_MODELS, path=str(unpacked / "tests" / "helpers"))
    readme = (unpacked / "README.md").read_text(encoding="utf-8")
    for command in shell_commands(readme):
        told, trial = shlex.join(command), trial_of(command)
        if trial.skip:
            say(f"`{told}`: not tried, {trial.skip}")
        elif trial.code:
            environment.run_code(trial.code)
            say(f"`{told}`, a small one")
        else:
            environment.run([*command, *trial.flags], exit_codes=trial.exit_codes)
            say(f"`{shlex.join([*command, *trial.flags])}`")
    for block in blocks(readme, "python"):
        phrase = preamble_of(block)
        environment.run_code(PREAMBLES[phrase] + block)
        say(f"the Python block with {phrase}...)")


def trial_of(command: list[str]) -> Trial:
    """How README.md's command is tried: the trial of the longest beginning that fits."""
    starts = [start for start in COMMANDS if command[: len(start.split())] == start.split()]
    if not starts:
        fail(f"README.md: `{shlex.join(command)}` fits no line of dist_check.COMMANDS. Say there how to try it")
    return COMMANDS[max(starts, key=len)]


def preamble_of(block: str) -> str:
    """The key of `PREAMBLES` for one of README.md's Python blocks."""
    phrase = next((phrase for phrase in PREAMBLES if phrase in block), None)
    if phrase is None:
        fail(f"README.md: no phrase of dist_check.PREAMBLES is in this block. Say there what it needs\n{block}")
    return phrase


def check_tests(environment: Environment, unpacked: Path) -> None:
    """From the sdist's folder, with the packages of the wheel."""
    pytest = [environment.python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    collected = environment.run([*pytest, "--collect-only"], cwd=unpacked)
    ended = environment.run([*pytest, *QUICK_TESTS], cwd=unpacked)
    say(f"the sdist's tests: {collected.splitlines()[-1]}; of these {ended.splitlines()[-1]}")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def shell_commands(text: str) -> list[list[str]]:
    """The words of each command in the sh blocks, continued lines joined, comments left out."""
    lines = "".join(blocks(text, "sh")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def needs(requires: list[str], extras: frozenset[str] = frozenset()) -> set[tuple[str, frozenset[str]]]:
    """Requirements as a distribution's metadata give them, with these of its extras -> names, and extras of those."""
    found = set()
    for item in requires:
        named, _, marker = item.partition(";")
        name, _, asked = named.partition("[")
        extra = re.search(r"extra == ['\"]([^'\"]+)", marker)
        if extra is None or plain(extra[1]) in extras:
            of_it = frozenset(plain(one.strip()) for one in asked.partition("]")[0].split(",") if one)
            found.add((plain(re.split(r"[^\w.-]", name.strip())[0]), of_it))
    return found


def needed(found: dict[str, list[str]], name: str) -> set[str]:
    """Itself and all that it needs, and they need in turn, of the installed: name -> requirements."""
    met, ahead = set(), {(name, frozenset[str]())}
    while ahead:
        met |= ahead
        ahead = {more for one, extras in ahead for more in needs(found.get(one, []), extras)} - met
    return {one for one, _ in met}


def plain(name: str) -> str:
    """A distribution's name, in the one spelling that stands for all."""
    return re.sub(r"[-_.]+", "-", name).lower()


def run(command: list, *, cwd: Path, env: dict[str, str] | None = None, exit_codes: tuple[int, ...] = (0,)) -> str:
    """-> its standard output. Any other exit code than these ends the check, and shows what was said."""
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True)
    if done.returncode not in exit_codes:
        print(f"{done.stdout}\n{done.stderr}"[-6000:], file=sys.stderr)
        fail(f"`{shlex.join(map(str, command))[:300]}`: expected exit code {exit_codes}, got {done.returncode}")
    return done.stdout


def say(what: str) -> None:
    print(f"{time.perf_counter() - START:5.0f} s  {what}", flush=True)


def fail(what: str) -> NoReturn:
    raise SystemExit(f"dist-check: {what}.")


if __name__ == "__main__":
    main()
