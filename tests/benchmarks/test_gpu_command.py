"""`python -m benchmarks.gpu`: the order of its jobs, their time by a clock of the test, its records, a second call."""

import itertools
import os
import sys
import time

import pytest
import torch

from benchmarks import records
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import runner
from benchmarks.gpu.jobs import FIRST, FIRST_SECONDS, JOBS, SECOND, SECOND_SECONDS, Job, find
from benchmarks.gpu.table import table
from benchmarks.gpu.work import Work


class FakeTime:
    """A clock that only jobs move on."""

    def __init__(self):
        self.now = 1000.0

    def executor(self, wanted, codes=None):
        """Jobs that want so many seconds; one that wants more than it is given is killed."""
        self.given = {}

        def execute(job, seconds):
            self.given[str(job)] = seconds
            self.now += min(wanted(job), seconds)
            return None if wanted(job) > seconds else (codes or {}).get(str(job), runner.COMPLETE)

        return execute


def call(folder, wanted, *, jobs=JOBS, budget=FIRST_SECONDS, done=(), codes=None):
    fake = FakeTime()
    clock = runner.Clock(budget, now=lambda: fake.now)
    fine = runner.run(jobs, folder, clock, fake.executor(wanted, codes), set(done))
    return fake.given, clock.spent, fine


def test_the_calls_are_as_long_as_their_jobs():
    assert sum(job.cap for job in FIRST) <= FIRST_SECONDS == 540
    assert sum(job.cap for job in SECOND) <= SECOND_SECONDS == 240
    assert [part for part, _ in itertools.groupby(job.part for job in JOBS)] == [
        "correct",
        "head",
        "step",
        "large",
        "longest",
        "kernels",
        "tiles",
        "sweep",
    ]
    for job in JOBS:
        assert find(str(job)) == job
        assert callable(job.run)
    with pytest.raises(ValueError, match=r"job: expected one of correct/tests, .*, got 'head'"):
        find("head")


def test_jobs_that_all_hang_are_cut_at_their_caps(tmp_path):
    given, spent, fine = call(tmp_path, lambda job: float("inf"))
    assert given == {str(job): job.cap for job in FIRST}  # nothing is left for the second call's
    assert spent == FIRST_SECONDS
    assert not fine
    ended = [record["ended"] for record in records.read(tmp_path / runner.RECORDS)]
    assert ended == ["cut"] * len(FIRST) + ["no time"] * len(SECOND)


def test_one_that_hangs_costs_the_others_nothing(tmp_path):
    jobs = (Job("a", "1", 40), Job("a", "2", 20), Job("b", "1", 30))
    given, spent, _ = call(tmp_path, lambda job: 1000 if job.name == "2" else 10, jobs=jobs)
    # the second has its own 20 s and the 30 that the first left over; the third all of its 30
    assert given == {"a/1": 40, "a/2": 50, "b/1": 30}
    assert spent == 10 + 50 + 10


def test_what_the_first_call_leaves_over_goes_to_the_second_calls_jobs(tmp_path):
    given, spent, fine = call(tmp_path, lambda job: 20.0)
    assert list(given) == [str(job) for job in JOBS]
    assert spent == 20 * len(JOBS)
    assert fine


def test_a_second_call_does_what_the_first_did_not_finish(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    codes = {"head/ready": runner.UNFINISHED, "step/Llama-3-8B/flat": 1, "step/Llama-3-8B/trl": runner.WRONG}
    _, _, fine = call(first, lambda job: 1000 if str(job) == "large/Qwen-72B/trl" else 15.0, jobs=FIRST, codes=codes)
    assert not fine
    given, spent, _ = call(second, lambda job: 1000.0, budget=SECOND_SECONDS, done=runner.done_jobs(first))
    left = ["head/ready", "step/Llama-3-8B/flat", "large/Qwen-72B/trl", "longest/Llama-3-8B"]
    assert list(given) == left  # a job of ours that is wrong is done; measuring it again would not mend it
    assert [given[job] for job in left] == [95, 55, 50, 40]  # the last one gets what is left of 240
    assert spent == SECOND_SECONDS


def test_a_process_is_killed_with_all_that_it_started(tmp_path):
    fifo, log = tmp_path / "fifo", tmp_path / "log.txt"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    begun = time.monotonic()
    assert runner.ended(["sh", "-c", f"(echo begun; sleep 60) > {fifo} & sleep 60"], log, 1.0) is None
    os.set_blocking(reader, True)
    assert os.read(reader, 100) == b"begun\n"
    assert os.read(reader, 100) == b""  # which only comes once nobody is left who could write
    os.close(reader)
    assert time.monotonic() - begun < 50
    assert runner.ended([sys.executable, "-c", "print('said'); raise SystemExit(3)"], log, 60.0) == 3
    assert "said" in log.read_text()


def test_a_job_runs_as_the_command_with_its_name(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(runner, "ended", lambda *arguments: calls.append(arguments) or 0)
    assert runner.process(tmp_path, ["--rehearse"])(find("head/ready"), 95.0) == 0
    ((program, log, seconds),) = calls
    assert program[1:] == [
        *("-m", "benchmarks.gpu", str(tmp_path), "--job", "head/ready", "--rehearse", "--seconds", "93.0")
    ]
    assert (log, seconds) == (tmp_path / "log.txt", 95.0)


def test_records_are_there_before_and_after_what_is_measured(tmp_path):
    work = Work(tmp_path, "part", seconds=60.0, rehearse=True)
    seen = []

    def measure():
        seen.extend(records.read(work.path))
        return {"median_s": 2.0}

    work.measure("one", measure, predicted={"seconds": 1.5})
    (begun,) = seen
    assert (begun["item"], begun["begun"], begun["predicted"]) == ("one", True, {"seconds": 1.5})
    assert begun["device"].endswith("interpreted")  # never to be taken for a GPU's figure
    work.measure("two", lambda: 1 / 0, predicted={})
    work.measure("three", lambda: pytest.fail("there is no time"), predicted={}, least=1000.0)
    kept = records.read(work.path)
    assert [record["item"] for record in kept] == ["one", "one", "two", "two", "three"]
    assert kept[1]["predicted"] == {"seconds": 1.5}
    assert kept[3]["failed"] == "ZeroDivisionError: division by zero"
    assert kept[4]["skipped"].endswith("s are left")
    assert work.code == runner.WRONG

    later = Work(tmp_path / "later", "part", seconds=60.0, rehearse=True, done=tmp_path)
    again = []
    for item in ("one", "two", "three"):
        later.measure(item, lambda item=item: again.append(item) or {}, predicted={})
    assert again == ["three"]


def test_what_there_is_no_time_for_leaves_the_job_unfinished(tmp_path):
    work = Work(tmp_path, "part", seconds=0.0, rehearse=True)
    work.measure("one", dict, predicted={}, least=1.0)
    assert work.code == runner.UNFINISHED
    peer = Work(tmp_path, "part", seconds=9.0, rehearse=True)
    peer.measure("two", lambda: 1 / 0, predicted={}, is_ours=False)
    assert peer.code == runner.COMPLETE  # a peer's failing is a result


def test_the_table_has_a_line_for_each_item():
    common = {"part": "step", "predicted": {"seconds": 0.5}}
    found = [
        {**common, "item": "a", "begun": True},
        {**common, "item": "a", "median_s": 0.25, "peak_gib": 12.0},
        {**common, "item": "b", "begun": True},
        {**common, "item": "c", "failed": "OutOfMemoryError: tried\nmore"},
        {"part": "longest", "item": "d", "predicted": {"tokens": 100}, "longest_tokens": 90},
        {"part": "step", "job": "step/a", "ended": "done"},
        {"part": "correct", "item": "e", "predicted": {}, "passed": True},
    ]
    lines = [" ".join(line.split()) for line in table(found).splitlines()]
    assert lines == [
        "measured predicted GiB",
        "step: a 250.00 ms 500.00 ms 12.00",
        "step: b 500.00 ms begun, and cut",
        "step: c 500.00 ms failed: OutOfMemoryError: tried",
        "longest: d 90 tokens, expected 100",
        "correct: e passed",
    ]


def test_an_interrupted_call_says_what_it_has(tmp_path, monkeypatch, capsys):
    def interrupted(*arguments):
        records.append(tmp_path / runner.RECORDS, {"part": "head", "item": "first", "median_s": 2.0})
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run", interrupted)
    assert command.main([str(tmp_path), "--rehearse"]) == 1
    printed = capsys.readouterr().out
    assert "Interrupted" in printed
    assert "head: first" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the command would measure it")
def test_refuses_to_measure_without_a_gpu(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main([str(tmp_path)])
    assert "no CUDA device here. Pass --rehearse" in capsys.readouterr().err
