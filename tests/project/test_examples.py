"""The examples run as a reader would run them, and say of themselves what is so."""

import ast
import importlib.util
import json
import math
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from tiny import text_pairs, tiny_llama, word_tokenizer

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def model_and_pairs(tmp_path_factory):
    """A tiny model's folder and a file of six pairs."""
    folder = tmp_path_factory.mktemp("examples")
    tiny_llama().save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in text_pairs()))
    return str(folder / "model"), str(folder / "pairs.jsonl")


@pytest.fixture(scope="module")
def bare_loop():
    spec = importlib.util.spec_from_file_location("bare_loop", EXAMPLES / "bare_loop.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_bare_loop_trains(bare_loop, model_and_pairs, tmp_path, capsys):
    model, pairs = model_and_pairs
    options = ["--epochs", "5", "--batch_size", "3", "--learning_rate", "1e-3", "--out", str(tmp_path / "out")]
    log = bare_loop.main(["--model", model, "--pairs", pairs, *options])
    assert len(log) == 10
    # Policy and reference are the same weights: Δw = Δl = 0 but for rounding, at most 1e-5 nats for each of the four
    # tokens of an answer in either pass. d loss / d Δ is at most σ(0) · β · (1 + λ), with β = 0.3 and λ = 50.
    assert log[0].loss == pytest.approx(math.log(2), abs=0.5 * 0.3 * (51 + 1) * 8e-5)
    assert log[0].chosen_change == pytest.approx(0, abs=8e-5)
    # DPOP's point: the margin comes from the rejected answers, and the chosen ones do not pay for it
    assert all(step.chosen_change > 0 > step.rejected_change for step in log[-2:])
    assert log[-1].loss < log[0].loss / 10
    assert len(re.findall(r"loss \d", capsys.readouterr().out)) == 10
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_the_bare_loops_log_probs_are_those_of_each_answer_alone(bare_loop, model_and_pairs):
    """Ragged answers in one padded batch against a plain log-softmax of each sequence by itself."""
    model, tokenizer = tiny_llama().eval(), word_tokenizer()
    texts = [(" w3 w4", "w5 w6 w7"), ("w8", " w9"), ("w1 w2 w3", "w9 w9 w2 w1 w5")]
    sequences = [bare_loop.encode(tokenizer, prompt, answer) for prompt, answer in texts]
    with torch.no_grad():
        logps = bare_loop.pair_logps(model, sequences, sequences[::-1])
        expected = []
        for (prompt, answer), sequence in zip(texts, sequences, strict=True):
            ids = tokenizer(f"{prompt} {answer}")["input_ids"] + [tokenizer.eos_token_id]
            assert sequence.ids.tolist() == ids
            all_logps = model(input_ids=sequence.ids[None]).logits[0].double().log_softmax(-1)
            expected.append(sum(all_logps[t - 1, ids[t]] for t in range(sequence.num_prompt, len(ids))))
    # six tokens at most, each to 1e-5 nats
    torch.testing.assert_close(logps[0].double(), torch.stack(expected), atol=6e-5, rtol=0)
    torch.testing.assert_close(logps[1].double(), torch.stack(expected[::-1]), atol=6e-5, rtol=0)


def test_the_bare_loop_fits_its_page_and_needs_no_trainer():
    text = (EXAMPLES / "bare_loop.py").read_text()
    assert len(text.splitlines()) <= 120
    roots = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add(node.module.partition(".")[0])
    assert roots - set(sys.stdlib_module_names) == {"torch", "tqdm", "transformers", "dpop_kernels"}


def test_the_script_trains_an_adapter(model_and_pairs, tmp_path, monkeypatch, capsys):
    model, pairs = model_and_pairs
    run = tmp_path / "run"
    options = ["--output_dir", str(run), "--epochs", "3", "--batch_size", "6", "--learning_rate", "1e-2"]
    monkeypatch.setattr(sys, "argv", ["dpop.py", "--model", model, "--pairs", pairs, *options])
    runpy.run_path(str(EXAMPLES / "dpop.py"), run_name="__main__")
    assert f"dpop inspect {run}" in capsys.readouterr().out
    assert (run / "adapter_model.safetensors").exists()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 3
    assert losses[0] == pytest.approx(math.log(2), abs=0.5 * 0.3 * (51 + 1) * 8e-5)
    assert losses[-1] < losses[0]


def test_the_script_asks_for_what_pyproject_asks_for():
    """Its inline metadata (PEP 723) against the project's: Python, and the range of every package that both name."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no TOML reader")
    text = (EXAMPLES / "dpop.py").read_text()
    (block,) = re.findall(r"(?m)^# /// script$\n((?:^#(?:| .*)$\n)+)^# ///$", text)
    script = tomllib.loads(re.sub(r"(?m)^# ?", "", block))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert script["requires-python"] == project["requires-python"]

    own, *others = [Requirement(line) for line in script["dependencies"]]
    assert (own.name, own.extras) == (project["name"], {"trainer"})
    assert (EXAMPLES / script["tool"]["uv"]["sources"][own.name]["path"]).resolve() == ROOT
    ranges = {
        requirement.name: requirement.specifier
        for requirement in map(Requirement, project["optional-dependencies"]["trainer"])
    }
    assert {requirement.name: requirement.specifier for requirement in others} == {"peft": ranges["peft"]}

    imported = {node.module.partition(".")[0] for node in ast.parse(text).body if isinstance(node, ast.ImportFrom)}
    assert imported == {"dpop_trainer", *(requirement.name for requirement in others)}
