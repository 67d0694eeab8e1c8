"""The benchmarks measure what they say: inputs, truth, memory, records, and no time for a wrong result."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import compare, cpu_step, inputs, measure, plan, records, shapes, truth
from benchmarks.floors import TINY, Floors
from benchmarks.peers import Peer, all_peers, ours

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
EFFORT = compare.Effort(rounds=2, seconds=0.0, probe=TINY)
ON_CPU = {name: peer for name, peer in all_peers().items() if name in ("dpop-kernels", "PyTorch", "TRL")}


def case_of(level, task):
    return next(case for case in plan.rehearsal(CPU) if (case.level, case.task) == (level, task))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_as_peaked_as_designed(dtype):
    head = shapes.HeadShape("test", 16032, 512)
    hidden_states, weight, target_ids = inputs.head_inputs(head, 256, CPU, dtype)
    logits = hidden_states.double() @ weight.double().T
    own = logits.gather(1, target_ids.unsqueeze(-1)).squeeze(-1)
    others = logits.scatter(1, target_ids.unsqueeze(-1), -torch.inf).logsumexp(1)
    odds = (own - others).sort().values
    designed = torch.linspace(inputs.LOWEST_ODDS, inputs.HIGHEST_ODDS, 256, dtype=torch.float64)
    # the log-sum-exp of 16 thousand Gaussians of deviation 2 or 2.3 is its mean to a few tenths
    assert float((odds - designed).abs().max()) < 0.6
    own_probability = torch.sigmoid(odds)
    assert 0.22 < float((own_probability < 0.5).double().mean()) < 0.32
    assert 0.36 < float((1 - own_probability < 1e-3).double().mean()) < 0.46


def test_a_softcap_and_a_narrow_head_limit_the_odds():
    """Odds that no hidden state can reach are not asked for: everything stays finite and rising."""
    capped = inputs.target_logits(shapes.head_shape("Gemma-2-9B"), 100)
    narrow = inputs.target_logits(shapes.HeadShape("narrow", 500, 32), 100)
    for logits in (capped, narrow):
        assert bool(logits.isfinite().all())
        assert bool((logits.diff() >= 0).all())
    assert float(30 * torch.tanh(capped.max() / 30)) == pytest.approx(0.95 * 30, rel=1e-5)


def test_published_heads_and_their_eighths():
    assert shapes.head_shape("Gemma-2-9B").softcap == 30.0
    assert shapes.head_shape("Llama-3-8B/8") == shapes.HeadShape("Llama-3-8B/8", 16032, 512)
    for head in shapes.HEADS:
        shapes.head_shape(f"{head.name}/8")
    with pytest.raises(ValueError, match=r"name: expected one of .*Llama-3-8B.*, got 'GPT-5'"):
        shapes.head_shape("GPT-5")
    with pytest.raises(ValueError, match="expected a divisor of 128256 and 4096, got 'Llama-3-8B/7'"):
        shapes.head_shape("Llama-3-8B/7")


def test_pairs_have_their_data_sets_lengths_and_edits():
    pairs = shapes.make_pairs(shapes.METAMATH, 400, 1000, seed=3)
    assert pairs == shapes.make_pairs(shapes.METAMATH, 400, 1000, seed=3)
    places = []
    for pair in pairs:
        assert 84 <= len(pair.prompt_ids) <= 156
        assert len(pair.chosen_ids) == len(pair.rejected_ids)
        different = [a != b for a, b in zip(pair.chosen_ids, pair.rejected_ids, strict=True)]
        assert sum(different) == 1
        assert different.index(True) == pair.num_shared
        places.append(pair.num_shared / len(pair.chosen_ids))
    # the mean of 400 uniform numbers is 1/2 ± 4 · 0.29 / 20
    assert sum(places) / 400 == pytest.approx(0.5, abs=0.058)
    assert sum(len(pair.chosen_ids) for pair in pairs) / 400 == pytest.approx(220, abs=8)
    for pair in shapes.make_pairs(shapes.ULTRAFEEDBACK, 20, 1000):
        assert pair.num_shared == 0
        assert shapes.segment_lengths([pair]) == [0, len(pair.chosen_ids), len(pair.rejected_ids)]


def test_truth_by_hand():
    """Two columns, h W = (ln 3, 0): p = 3/4 for the first, and its gradient is (1 - p) (W[0] - W[1])."""
    weight = torch.tensor([[math.log(3.0)], [0.0]])
    result = truth.head_truth(torch.ones(1, 1), weight, torch.tensor([0]))
    assert float(result.logps) == pytest.approx(math.log(0.75), abs=1e-7)
    assert float(result.grad_hidden) == pytest.approx(0.25 * math.log(3.0), abs=1e-7)
    columns, ones = torch.tensor([0, 1]), torch.ones(1)
    gradient = truth.grad_weight_truth(torch.ones(1, 1), weight, torch.tensor([0]), ones, columns)
    assert gradient.flatten().tolist() == pytest.approx([0.25, -0.25], abs=1e-7)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_truth_is_autograds(softcap, monkeypatch):
    monkeypatch.setattr(truth, "BLOCK", 7)  # several blocks
    hidden_states = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    target_ids, factors = torch.randint(20, (5,)), torch.linspace(-1, 1, 5, dtype=torch.float64)
    logits = hidden_states @ weight.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logps = logits.log_softmax(-1).gather(1, target_ids.unsqueeze(-1)).squeeze(-1)
    (grad_hidden,) = torch.autograd.grad(logps.sum(), hidden_states, retain_graph=True)
    (grad_weight,) = torch.autograd.grad(logps @ factors, weight)
    result = truth.head_truth(hidden_states, weight, target_ids, softcap=softcap)
    torch.testing.assert_close(result.logps, logps.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(result.grad_hidden, grad_hidden, rtol=1e-10, atol=1e-13)
    columns = torch.tensor([3, 0, 19])
    candidate = truth.grad_weight_truth(hidden_states, weight, target_ids, factors, columns, softcap=softcap)
    torch.testing.assert_close(candidate, grad_weight[columns], rtol=1e-10, atol=1e-13)


def test_not_a_number_is_the_largest_error():
    nan = torch.tensor([[0.0, math.nan]])
    assert truth.largest(nan) == math.inf
    assert truth.relative(nan, torch.ones(1, 2)) == math.inf
    assert truth.worst_row(nan, torch.ones(1, 2)) == math.inf


def test_peak_memory_counts_what_lives_at_once():
    """Two arrays of 4 MB at the worst moment, though three are made; what was there before does not count."""
    source = torch.ones(1_000_000)

    def call():
        twice = source * 2
        more = twice + 1
        del twice
        return (more * 3).sum()

    assert measure.peak_bytes(call, CPU) == pytest.approx(8e6, rel=1e-3)


def test_peers_take_turns():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in ("a", "b")}
    times = measure.time_in_turns(calls, CPU, rounds=3, seconds=0.0)
    assert order == ["a", "b"] + ["a", "b"] * 3  # warm-up, then rounds
    assert [len(samples) for samples in times.values()] == [3, 3]
    assert measure.spread([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == {
        "median_s": 3.5,
        "p20_s": 2.0,
        "p80_s": 5.0,
        "rounds": 6,
    }


def test_floor_is_the_slower_of_arithmetic_and_traffic():
    floors = Floors(bytes_per_s=10.0, flop_per_s=100.0)
    assert floors.seconds(flop=200.0, num_bytes=5.0) == 2.0
    assert floors.seconds(flop=200.0, num_bytes=50.0) == 5.0


def test_cost_of_the_head_by_hand():
    """N = 24, V = 611, H = 128 in fp32: 2 N V H FLOP per product."""
    product = 2 * 24 * 611 * 128
    expected = {
        "reference": (product, 4 * (24 * 128 + 611 * 128)),
        "frozen": (2 * product, 4 * (2 * 24 * 128 + 611 * 128)),
        "trainable": (3 * product, 4 * (2 * 24 * 128 + 2 * 611 * 128)),
    }
    for task, cost in expected.items():
        assert case_of("head", task).cost() == cost


@pytest.mark.parametrize("case", plan.rehearsal(CPU), ids=str)
def test_every_level_is_checked_and_timed(case):
    results = compare.side_by_side(case, ON_CPU, EFFORT)
    assert "dpop-kernels" in results
    assert "PyTorch" in results
    for result in results.values():
        assert result.trouble is None, result.trouble
        record = result.record
        assert record["p20_s"] <= record["median_s"] <= record["p80_s"]
        assert record["of_floor"] == pytest.approx(record["floor_s"] / record["median_s"])
        assert record["peak_bytes"] > 0
        assert len(result.seconds) == 2
        json.dumps(record)


def broken(function, breakage):
    return lambda *args, **kwargs: breakage(function(*args, **kwargs))


class _LoseATenthOfTheGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 0.9 * gradient


BREAKAGES = {
    "value": lambda value: value * (1 + 1e-2),
    "gradient": _LoseATenthOfTheGradient.apply,
    "nan": lambda value: value * math.nan,
}


@pytest.mark.parametrize("breakage", BREAKAGES)
@pytest.mark.parametrize(("level", "task"), [("head", "frozen"), ("head", "trainable"), ("logits", "forward_backward")])
def test_a_wrong_result_is_never_timed(level, task, breakage, monkeypatch):
    """The kernel itself is broken, below the public function; the peer beside it keeps its time."""
    from dpop_kernels.backends import chunked
    from dpop_kernels.logps import linear

    owner, name = {"head": (linear, "tiled_token_logps"), "logits": (chunked, "token_logps")}[level]
    exact, calls = getattr(owner, name), []

    def wrong(*args, **kwargs):
        logps, stats = exact(*args, **kwargs)
        calls.append(name)
        return BREAKAGES[breakage](logps), stats

    monkeypatch.setattr(owner, name, wrong)
    results = compare.side_by_side(case_of(level, task), ON_CPU, EFFORT)
    record = results["dpop-kernels"].record
    assert record["refused"] == "wrong result"
    assert "median_s" not in record
    assert results["dpop-kernels"].seconds == []
    assert results["PyTorch"].record["median_s"] > 0
    assert calls


@pytest.mark.parametrize(("level", "attribute"), [("dpo", "linear_dpo"), ("pair_loss", "pair_loss")])
@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_wrong_loss_is_never_timed(level, attribute, breakage):
    honest = ON_CPU["dpop-kernels"]
    wrong = dataclasses.replace(honest, **{attribute: broken(getattr(honest, attribute), BREAKAGES[breakage])})
    case = next(case for case in plan.rehearsal(CPU) if case.level == level)
    record = compare.side_by_side(case, {"dpop-kernels": wrong}, EFFORT)["dpop-kernels"].record
    assert record["refused"] == "wrong result"
    assert "median_s" not in record


def test_a_rounded_logit_is_forgiven_only_to_those_who_say_so():
    """bf16 logits of size z are off by z · 2⁻⁸ nat at most; a peer with fp32 logits is held to 1e-4."""
    case = dataclasses.replace(case_of("head", "reference"), dtype=torch.bfloat16)
    largest = case.largest_logit()
    rounding = Peer("rounds", "", has_fp32_logits=False)
    assert case.bounds(rounding).logps == pytest.approx(largest * 2**-7)
    assert case.bounds(Peer("exact", "")).logps == 1e-4
    case_in_fp32 = case_of("head", "reference")
    assert case_in_fp32.bounds(rounding).logps == 1e-4


def test_a_failing_peer_leaves_the_others_their_figures():
    def fails(*args):
        raise RuntimeError("out of registers")

    def exhausted(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    peers = {
        "fails": Peer("fails", "", linear_logps=fails),
        "exhausted": Peer("exhausted", "", linear_logps=exhausted),
        "absent": Peer("absent", "", package="no-such", module="no_such.module", linear_logps=fails),
        "PyTorch": ON_CPU["PyTorch"],
    }
    results = compare.side_by_side(case_of("head", "frozen"), peers, EFFORT)
    troubles = {name: result.trouble for name, result in results.items()}
    assert troubles == {
        "fails": "failed: RuntimeError: out of registers",
        "exhausted": "failed: out of memory",
        "absent": "skipped: no-such is not installed",
        "PyTorch": None,
    }


def test_who_cannot_run_here_says_why(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    quack = all_peers()["QuACK"]
    assert quack.why_not(CPU) == "needs CUDA"
    assert quack.why_not(torch.device("cuda")) == "needs compute capability 9.0"


def test_mean_only_peers_are_held_to_the_mean():
    """A peer that knows only the mean passes with the right one, with the same gradients asked of everybody."""
    exact = ours.linear_logps
    peers = {
        "mean": Peer("mean", "", gives_mean_only=True, linear_logps=lambda *args: exact(*args).mean()),
        "wrong": Peer("wrong", "", gives_mean_only=True, linear_logps=lambda *args: exact(*args).mean() + 1e-3),
    }
    results = compare.side_by_side(case_of("head", "frozen"), peers, EFFORT)
    assert results["mean"].trouble is None
    assert results["wrong"].trouble == "refused: wrong result"


def test_trainers_are_compared_at_every_step():
    records = [{"losses": [0.7, 0.5]}, {"losses": [0.7, 0.53]}, {"losses": [0.69, 0.5]}]
    assert cpu_step.loss_difference(records) == pytest.approx(0.03)
    records.append({"losses": [0.7, math.nan]})
    assert cpu_step.loss_difference(records) == math.inf


def test_random_words_are_as_many_tokens_as_the_pairs_have():
    pairs, tokenizer = cpu_step.workload(cpu_step.Source())
    ids = shapes.make_pairs(shapes.METAMATH, len(pairs), cpu_step.VOCAB_SIZE - 2)
    assert len(pairs) == cpu_step.NUM_STEPS * cpu_step.PAIRS_PER_STEP
    assert len(tokenizer) == 50257
    for words, pair in zip(pairs, ids, strict=True):
        # <pad> and <eos> come first
        assert tokenizer(words["prompt"])["input_ids"] == [token_id + 2 for token_id in pair.prompt_ids]
        assert tokenizer(words["rejected"])["input_ids"] == [token_id + 2 for token_id in pair.rejected_ids]


def test_records_are_appended(tmp_path):
    path = tmp_path / "new" / "levels.jsonl"
    assert records.read(path) == []
    records.append(path, {"a": 1})
    records.append(path, {"a": 2})
    assert records.read(path) == [{"a": 1}, {"a": 2}]
    environment = records.environment(CPU)
    assert environment["device"].startswith("CPU, ")
    assert environment["versions"]["torch"] == torch.__version__


def test_pytest_benchmark_shows_and_records_the_same_samples(tmp_path):
    """One case through the command that users run: the table's median is the record's."""
    path, table = tmp_path / "levels.jsonl", tmp_path / "table.json"
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_pair_loss.py", "-p", "no:cacheprovider", "-n", "0"]
    command += ["--rehearse", "--benchmark-only", "--records", str(path), f"--benchmark-json={table}"]
    command += ["-q", "-k", "PyTorch or dpop-kernels"]
    # a worker's variables would switch pytest-benchmark off
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    environment["OMP_NUM_THREADS"] = "1"
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    recorded = {record["peer"]: record for record in records.read(path)}
    shown = json.loads(table.read_text())["benchmarks"]
    assert {each["params"]["peer"] for each in shown} == set(recorded) == {"dpop-kernels", "PyTorch"}
    for each in shown:
        record = recorded[each["params"]["peer"]]
        assert each["stats"]["median"] == pytest.approx(record["median_s"], rel=1e-6)
        assert each["extra_info"]["errors"] == record["errors"]


def test_peak_is_of_this_process_and_not_of_the_one_that_started_it():
    ballast = torch.ones(256 * 2**18)  # 256 MiB here, none there
    script = "from benchmarks.measure import peak_resident_bytes; print(peak_resident_bytes())"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(run.stdout) < measure.peak_resident_bytes() - ballast.nbytes / 2
