"""What `python -m benchmarks.gpu` measures, at tiny sizes on a CPU, and what it does with a wrong result."""

import math
import random
from pathlib import Path

import pytest
import torch

from benchmarks import cases, records, scale
from benchmarks.gpu import correct, head, predicted, runner, step, sweep, tiles, trainers
from benchmarks.gpu.work import Work
from benchmarks.plan import TINY_HEAD, rehearsal
from benchmarks.shapes import model_size


@pytest.fixture
def work(tmp_path):
    return Work(tmp_path, "part", seconds=600.0, rehearse=True)


def found(work):
    """The last record of each item."""
    return {record["item"]: record for record in records.read(work.path)}


def test_attention_is_held_to_fp64(work):
    correct.run(work, "attention")
    assert work.code == runner.COMPLETE
    assert [item.rpartition(", ")[2] for item in found(work)] == ["128 positions", "123 positions"]
    for record in found(work).values():
        assert set(record["errors"]) == set(correct.NAMES)
        assert max(record["errors"].values()) < 1e-5


def test_wrong_attention_is_refused(work, monkeypatch):
    """Flat attention in which the last position of each head sees nothing new."""
    from dpop_trainer.batches import flat_attention

    exact = flat_attention.flat_attention_forward

    def off(*args, **kwargs):
        output, _ = exact(*args, **kwargs)
        return output * (1 + 1e-4), None

    monkeypatch.setattr(flat_attention, "flat_attention_forward", off)
    correct.run(work, "attention")
    assert work.code == runner.WRONG
    for record in found(work).values():
        assert record["refused"] == f"beyond twice eager's: {', '.join(correct.NAMES)}"
        assert record["errors"]["output"] == pytest.approx(1e-4, rel=0.05)


def test_all_tests_that_need_a_gpu_are_among_those_that_run():
    folder = runner.ROOT / "tests"
    marked = [
        path for path in folder.rglob("test_*.py") if "pytest.mark.gpu" in path.read_text() and path != Path(__file__)
    ]
    assert marked
    assert (
        {path.parent for path in marked}
        == {folder / "kernel"}
        == {runner.ROOT / correct.SELECTIONS["tests marked gpu"][0]}
    )


def test_pytest_decides_whether_tests_pass(work, monkeypatch, tmp_path):
    good, bad = tmp_path / "test_good.py", tmp_path / "test_bad.py"
    good.write_text("def test(): pass")
    bad.write_text("def test(): assert False")
    monkeypatch.setattr(correct, "REHEARSED", {"good": (str(good),), "bad": (str(bad),)})
    correct.run(work, "tests")
    assert found(work)["good"]["passed"]
    assert found(work)["bad"]["failed"] == "pytest's exit code is 1, see log.txt"


def head_case():
    """Of its own for each call, which empties it."""
    return cases.HeadCase(task="frozen", head=TINY_HEAD, num_tokens=24, device=torch.device("cpu"), dtype=torch.float32)


def peers(*names):
    return {name: peer for name, peer in head.all_peers().items() if name in names}


def test_head_is_measured_beside_its_prediction(work):
    head.compare(work, head_case(), peers("dpop-kernels", "PyTorch", "Liger"))
    ours, eager, liger = (found(work)[f"head-frozen-tiny-24, {name}"] for name in ("dpop-kernels", "PyTorch", "Liger"))
    assert (ours["level"], ours["task"], ours["peer"]) == ("head", "frozen", "dpop-kernels")  # as docs are made of
    assert ours["median_s"] > 0 < eager["median_s"]
    # two products of 24 x 128 x 611 at 790 TFLOP/s are less than the bytes at 4.3 TB/s: hidden states, W, the gradient
    moved = 4 * (2 * 24 * 128 + 611 * 128)
    assert ours["predicted"] == {"seconds": moved / predicted.COPY}
    assert liger["skipped"] == "needs CUDA"
    assert work.code == runner.COMPLETE


def test_products_bound_the_prediction_of_a_real_head(monkeypatch):
    counted = {"dpop-kernels": {"frozen": 2.0}, "TRL": {"frozen": 3.0}}
    monkeypatch.setattr(predicted, "head_products", lambda: counted)
    bare = cases.HeadCase(
        task="frozen",
        head=head.CASES[0][0],
        num_tokens=8192,
        device=torch.device("meta"),
        dtype=torch.bfloat16,
    )
    one = 2 * 8192 * 4096 * 151936 / 790e12
    assert one == pytest.approx(12.9e-3, rel=1e-3)
    assert head.predict(bare, "dpop-kernels") == pytest.approx(2 * one)
    assert head.predict(bare, "TRL") == pytest.approx(3 * one)
    assert head.predict(bare, "of unknown products") == pytest.approx(2 * one)  # none can do without these


def test_a_wrong_head_of_ours_fails_its_job(work, monkeypatch):
    from dpop_kernels.logps import linear

    exact = linear.tiled_token_logps

    def off_by_a_thousandth(*args, **kwargs):
        logps, stats = exact(*args, **kwargs)
        return logps + 1e-3, stats

    monkeypatch.setattr(linear, "tiled_token_logps", off_by_a_thousandth)
    head.compare(work, head_case(), peers("dpop-kernels"))
    (record,) = found(work).values()
    assert record["refused"] == "wrong result"
    assert record["errors"]["logp_nats"] == pytest.approx(1e-3, rel=1e-2)
    assert work.code == runner.WRONG


def test_a_case_without_time_is_left_to_the_next_call(tmp_path):
    work = Work(tmp_path, "head", seconds=-1.0, rehearse=True)
    head.compare(work, head_case(), peers("PyTorch"))
    assert work.code == runner.UNFINISHED
    again = Work(tmp_path / "second", "head", seconds=60.0, rehearse=True, done=tmp_path)
    head.compare(again, head_case(), peers("PyTorch"))
    assert "median_s" in found(again)["head-frozen-tiny-24, PyTorch"]
    third = Work(tmp_path / "third", "head", seconds=60.0, rehearse=True, done=tmp_path / "second")
    head.compare(third, head_case(), peers("PyTorch"))
    assert not found(third)


def test_tiles_and_the_product_are_variants_of_one_head(work):
    tiles.run(work, "frozen")
    assert work.code == runner.COMPLETE
    assert [record["peer"] for record in found(work).values()] == 2 * [
        "tiles of 1024 x 8192",
        "tiles of 4 x 4096",
        "gemm",
    ]
    for record in found(work).values():
        assert record["median_s"] > 0
        assert record["errors"]["logp_nats"] < 1e-4


def test_the_sweep_goes_through_the_planned_cases(work, monkeypatch):
    measured = []
    monkeypatch.setattr(sweep, "compare", lambda work, case, peers: measured.append((str(case), set(peers))))
    sweep.run(work, "levels")
    assert [case for case, _ in measured] == [str(case) for case in rehearsal(torch.device("cpu"))]
    assert measured[0][1] == {*head.PEERS["ready"], "dpop-kernels, in place"}


def test_pairs_differ_in_one_word_of_the_later_half():
    plan = step.low_edit_plan(1000, rehearse=False)
    assert (plan.pairs_per_step, plan.num_steps) == (8, 16)
    lengths = []
    for pair in plan.pairs:
        chosen, rejected = pair["chosen"].split(), pair["rejected"].split()
        (edit,) = (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=True)) if a != b)
        assert edit >= len(chosen) // 2
        lengths.append((len(pair["prompt"].split()), len(chosen)))
    prompts, answers = (sorted(side)[64] for side in zip(*lengths, strict=True))
    # the median of 128 lengths of deviation 0.3 in the logarithm is off by 0.3 * 1.25 / sqrt(128) = 3.3 %, here 3 times
    assert prompts == pytest.approx(step.PROMPT, rel=0.1)
    assert answers == pytest.approx(step.ANSWER, rel=0.1)


def test_what_a_step_computes_by_hand():
    pairs = [
        {"prompt": "a b", "chosen": " c d e f", "rejected": " c d w3 f"},
        {"prompt": "a b c", "chosen": " d e", "rejected": " d w3"},
    ]
    # rows of 2 + 4 and 3 + 2 with an EOS: four of 7; scored 2 * 5 + 2 * 3
    assert step.batch_of(pairs, "trl") == scale.Batch(4, 7, 16)
    # prompts 5, shared 2 and 1, tails 3 + 3 and 2 + 2
    assert step.batch_of(pairs, "flat") == scale.Batch(1, 5 + 3 + 10, 13)
    plan = step.low_edit_plan(128256, rehearse=False)
    ours, theirs = (step.predict(model_size("Llama-3-8B"), plan, candidate) for candidate in ("flat", "trl"))
    assert ours["seconds"] == pytest.approx(ours["tflop"] / 790)
    assert theirs["tflop"] > 2 * ours["tflop"]


FIELDS = {"losses": [math.log(2), 0.68], "first_chosen_logp": -100.0, "median_s": 2.0}


def test_wrong_steps_get_no_time():
    def check(truth=FIELDS, **changed):
        return trainers.checked({**FIELDS, **changed}, truth, rehearse=True)

    assert check() == check(truth=None) == FIELDS
    assert check(truth={"refused": "wrong", "losses": [1.0]}) == FIELDS
    assert check(losses=[0.71])["refused"].startswith("the first loss is 0.710000, not log 2")
    assert check(losses=[math.log(2), 0.6802])["refused"] == "losses differ by 2.0e-04"
    assert check(first_chosen_logp=-100.1)["refused"] == (
        "log-probs of the chosen answers differ by 1.0e-03 of their value"
    )
    assert "median_s" not in check(first_chosen_logp=-100.1)
    for wrong in ({"losses": [math.nan]}, {"losses": [math.log(2), math.nan]}, {"first_chosen_logp": math.nan}):
        assert "refused" in check(**wrong)


def test_training_ends_with_the_time():
    from transformers import TrainerControl

    control, watch = TrainerControl(), trainers.Watch(torch.device("cpu"), deadline=0.0)
    watch.on_step_begin(None, None, control)
    watch.on_step_end(None, None, control)
    assert control.should_training_stop
    assert len(watch.seconds) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # TRL's and what it imports
def test_both_trainers_take_the_same_step(tmp_path):
    work = Work(tmp_path, "step", seconds=600.0, rehearse=True)
    for candidate in ("flat", "trl"):
        step.run(work, f"Llama-3.2-1B/{candidate}")
    ours, theirs = found(work).values()
    assert work.code == runner.COMPLETE
    for record in (ours, theirs):
        assert record["p20_s"] <= record["median_s"] <= record["p80_s"]
        assert len(record["losses"]) == 3
        assert record["losses"] == pytest.approx(ours["losses"], abs=trainers.REHEARSED_LOSS)
    assert ours["computed_ratio"] < 1
    assert ours["padding_share"] == 0
    assert (ours["peer"], theirs["peer"]) == ("dpop-kernels, flat", "TRL")


def test_a_pair_of_words():
    pair = trainers.pair_of_words(3, 4, 2, 100, random.Random(0))
    prompt, chosen, rejected = (pair[side].split() for side in ("prompt", "chosen", "rejected"))
    assert (len(prompt), len(chosen), rejected[2]) == (3, 4, "w3")
    assert chosen[:2] + chosen[3:] == rejected[:2] + rejected[3:]
    assert "w3" not in chosen
