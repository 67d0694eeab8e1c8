"""Every line of the docs that starts a run is one that its program takes, and the Slurm file makes such lines."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from dpop_trainer.cli import main
from dpop_trainer.data.dataset_source import parse_sources
from dpop_trainer.settings.recipes import recipe_file
from torch.distributed.run import get_args_parser
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]
SBATCH = recipe_file("slurm/train.sbatch")
PAGES = ("recipes", "distributed")


def commands(page):
    """The shell lines of a page that start a run: words without comments, continued lines as one, recipes found."""
    text = (ROOT / "docs" / f"{page}.md").read_text()
    lines = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ").splitlines()
    words = [[found(word) for word in shlex.split(line, comments=True)] for line in lines]
    return [line for line in words if line]


def found(word):
    """As a shell expands "$(dpop recipes --path NAME)"."""
    name = re.fullmatch(r"\$\(dpop recipes --path (\S+)\)", word)
    return str(recipe_file(name[1])) if name else word


LINES = [(page, line) for page in PAGES for line in commands(page)]


def torchrun_arguments(words):
    arguments = get_args_parser().parse_args(words)
    assert (arguments.module, arguments.training_script) == (True, "dpop_trainer")
    return arguments, arguments.training_script_args


def accelerate_arguments(words):
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert (arguments.module, arguments.training_script) == (True, "dpop_trainer")
    return arguments, arguments.training_script_args


def takes(words):
    """`dpop train` takes these words; nothing is loaded."""
    assert words[0] == "train"
    if "run.yaml" not in words:  # the user's own
        assert main([*words, "--use_cpu", "--print-config"]) == 0, words


@pytest.mark.parametrize(("page", "words"), LINES, ids=[f"{page}-{i}" for i, (page, _) in enumerate(LINES)])
def test_a_line_of_the_docs_is_taken(page, words, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    if words[0].startswith("ACCELERATE="):
        assert recipe_file(words.pop(0).partition("=")[2]).is_file()
    program, *words = words
    if program == "dpop":
        takes(words)
    elif program == "torchrun":
        takes(torchrun_arguments(words)[1])
    elif program == "accelerate":
        arguments, rest = accelerate_arguments(words[1:])
        assert (arguments.num_machines > 1) == (arguments.main_process_ip == "HOST")
        takes(rest)
    else:
        assert program == "sbatch"
        at = words.index(str(SBATCH))
        assert words[:at] in ([], ["--nodes", "2"])
        takes(["train", "--recipe", *words[at + 1 :]])


def test_there_are_lines_for_one_node_for_several_and_for_slurm():
    programs = [line[0] for page, line in LINES if page == "recipes"]
    assert programs.count("torchrun") == 2
    assert programs.count("accelerate") == 5
    assert sum("sbatch" in line for _, line in LINES) == 3


def run_under_slurm(folder, *arguments, num_nodes=1, srun=None, **environment):
    """The job's script with programs that write down what they are given -> words per node, and the whole run."""
    programs = {
        "scontrol": 'echo "$@" >> "$OUT/scontrol.log"; printf "node%s\\n" $(seq "$SLURM_NNODES")',
        "srun": srun or 'shift; for i in $(seq 0 $((SLURM_NNODES - 1))); do SLURM_NODEID=$i "$@"; done',
        "torchrun": 'printf "%s\\n" torchrun "$@" > "$OUT/node-${SLURM_NODEID}"; exit "${STATUS:-0}"',
        "dpop": f'exec {sys.executable} -m dpop_trainer "$@"',
        "accelerate": 'printf "%s\\n" accelerate "$@" > "$OUT/node-${SLURM_NODEID}"',
    }
    for name, body in programs.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    known = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        "OUT": str(folder),
        "SLURM_JOB_ID": "31234",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": str(num_nodes),
        "SLURM_GPUS_ON_NODE": "4",
    }
    command = ["bash", str(SBATCH), *arguments]
    run = subprocess.run(command, env=known | environment, cwd=ROOT, capture_output=True, text=True)
    nodes = [
        (folder / f"node-{i}").read_text().splitlines() for i in range(num_nodes) if (folder / f"node-{i}").exists()
    ]
    return nodes, run


@pytest.mark.parametrize("num_nodes", [1, 2])
def test_slurm_starts_torchrun_on_every_node(num_nodes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    nodes, run = run_under_slurm(tmp_path, "yi-34b", "--run_name", "a b", num_nodes=num_nodes)
    assert run.returncode == 0, run.stderr
    assert len(nodes) == num_nodes
    assert nodes == [nodes[0]] * num_nodes  # they find each other
    arguments, rest = torchrun_arguments(nodes[0][1:])
    assert (arguments.nnodes, arguments.nproc_per_node) == (str(num_nodes), "4")
    assert (arguments.rdzv_backend, arguments.rdzv_id) == ("c10d", "31234")
    assert arguments.rdzv_endpoint == "node1:31234"  # 20000 + 31234 % 20000
    assert rest == ["train", "--recipe", "yi-34b", "--run_name", "a b"]
    takes(rest)


@pytest.mark.parametrize("by_name", [True, False])
def test_slurm_starts_accelerate_with_each_nodes_rank(by_name, tmp_path, capsys):
    file = "accelerate/fsdp2_2x8" if by_name else str(recipe_file("accelerate/fsdp2_2x8"))
    words = [str(recipe_file("llama-3-8b")), "--use_peft", "false"]
    nodes, run = run_under_slurm(tmp_path, *words, num_nodes=2, ACCELERATE=file)
    assert run.returncode == 0, run.stderr
    for rank, node in enumerate(nodes):
        arguments, rest = accelerate_arguments(node[2:])
        assert (arguments.machine_rank, arguments.num_machines, arguments.num_processes) == (rank, 2, 8)
        assert (arguments.main_process_ip, arguments.main_process_port) == ("node1", 31234)
        assert (arguments.use_fsdp, arguments.fsdp_version) == (True, 2)
        assert rest == ["train", "--config", *words]
        takes(rest)


def test_slurm_hands_a_failure_on_and_says_what_is_missing(tmp_path):
    _, run = run_under_slurm(tmp_path, "lora", STATUS="3")
    assert run.returncode == 3
    _, run = run_under_slurm(tmp_path, "lora.yaml")
    assert run.returncode == 2
    assert "Did you mean lora?" in run.stderr
    assert "recipe: expected a file or a recipe's name, got 'lora.yaml'." in run.stderr
    _, run = run_under_slurm(tmp_path, "lora", ACCELERATE="accelerate/fsdp")
    assert run.returncode == 2
    assert "Did you mean accelerate/fsdp2_8 or accelerate/fsdp2_2x8" in run.stderr
    _, run = run_under_slurm(tmp_path)
    assert run.returncode != 0
    assert "usage: sbatch [--nodes N] train.sbatch RECIPE" in run.stderr


def test_slurm_takes_flags_as_they_are(tmp_path):
    nodes, run = run_under_slurm(tmp_path, "lora", "--run_name", "$(exit 1)")
    assert run.returncode == 0, run.stderr
    assert nodes[0][-1] == "$(exit 1)"


def test_slurm_queues_itself_again_when_time_is_nearly_up(tmp_path):
    _, run = run_under_slurm(
        tmp_path,
        "lora",
        srun='kill -USR1 "$PPID"; sleep 1 > "$OUT/unused" 2>&1',  # as Slurm does, while the run goes on
    )
    assert run.returncode == 128 + signal.SIGUSR1
    assert "queued again" in run.stdout
    assert (tmp_path / "scontrol.log").read_text().splitlines()[-1] == "requeue 31234"


def test_mixture_of_the_docs_is_one():
    text = (ROOT / "docs" / "recipes.md").read_text()
    (block,) = (block for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if "dataset_mixture" in block)
    sources = parse_sources(yaml.safe_load(block)["dataset_mixture"], "dataset_mixture")
    recipe = yaml.safe_load(recipe_file("qwen-72b").read_text())
    assert [source.path for source in sources] == [part["path"] for part in recipe["dataset_mixture"]]


def test_chat_template_by_hand():
    from tiny import word_tokenizer

    tokenizer: PreTrainedTokenizerFast = word_tokenizer()
    tokenizer.chat_template = recipe_file("chatml.jinja").read_text()
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    prompt = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == prompt
    asked = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert asked == prompt + "<|im_start|>assistant\n"
    messages.append({"role": "assistant", "content": "4"})
    assert tokenizer.apply_chat_template(messages, tokenize=False) == asked + "4<|im_end|>\n"  # the prompt is its start
