"""The search for the longest pair, and what becomes of a length that does not fit."""

import pytest
import torch

from benchmarks import records
from benchmarks.gpu import longest, runner
from benchmarks.gpu.work import Work


def search(limit, start, *, tries=None):
    tried = []

    def fits(length):
        if tries is not None and len(tried) == tries:
            return None
        tried.append(length)
        return length <= limit

    return longest.longest(fits, start), tried


def test_doubling_then_halving():
    assert search(1000, 100) == ((1000, 1050), [100, 200, 400, 800, 1600, 1200, 1000, 1100, 1050])
    assert search(100, 100, tries=3) == ((100, 150), [100, 200, 150])  # its time was over
    assert search(0, 100) == ((0, 1), [100, 50, 25, 12, 6, 3, 1])
    assert search(30, 100)[0] == (30, 31)


@pytest.fixture
def work(tmp_path):
    return Work(tmp_path, "longest", seconds=600.0, rehearse=True)


def by_item(work):
    return {record["item"]: record for record in records.read(work.path)}


def test_memory_that_runs_out_is_a_result(work, monkeypatch):
    def train(candidate, model, plan, work):
        assert (candidate, plan.num_steps, plan.lora_rank) == ("flat", 1, longest.RANK)
        if plan.max_length > 64:
            raise torch.OutOfMemoryError("tried to allocate")
        return {"median_s": 1e-3 * plan.max_length, "peak_gib": 1.0}

    monkeypatch.setattr(longest, "train", train)
    longest.run(work, "Llama-3-8B")
    assert work.code == runner.COMPLETE
    found = by_item(work)
    assert found["Llama-3-8B, 128 tokens"]["out_of_memory"]
    assert found["Llama-3-8B, 64 tokens"]["predicted"] == {"fits": True, "seconds": 0.032 * 4}
    assert (found["Llama-3-8B"]["longest_tokens"], found["Llama-3-8B"]["too_long_tokens"]) == (
        64,
        66,
    )  # 96, 80, 72, 68, 66 were too long
    assert found["Llama-3-8B"]["predicted"] == {"tokens": 128}


def test_anything_else_ends_the_search(work, monkeypatch):
    def train(candidate, model, plan, work):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(longest, "train", train)
    longest.run(work, "Llama-3-8B")
    assert work.code == runner.WRONG
    assert list(by_item(work)) == ["Llama-3-8B, 32 tokens", "Llama-3-8B"]
    assert by_item(work)["Llama-3-8B"]["longest_tokens"] == 0


def test_a_step_is_the_trainers_own(work):
    fields = longest.one_step(work, longest.llama_config(longest.step.TINY, 4096), 48, 4, "flat")
    assert fields["median_s"] > 0
    # 15 tokens of prompt, 16 of the answer before the edit, 2 tails of 16 and an EOS each: 65 of 96 in rows
    assert fields["computed_ratio"] == pytest.approx(65 / 96)


def test_something_is_expected_of_each_model():
    from benchmarks.gpu.jobs import JOBS

    assert set(longest.CASES) == set(longest.LAYOUTS) == {job.name for job in JOBS if job.part == "longest"}
    assert all(longest.expected(name) > 8192 for name in longest.CASES)
