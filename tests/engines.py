"""`make test-distributed`: every engine with every layout, LoRA and all weights, against one process over ten steps.

Then the kinds of cases with every engine that can deal four pairs out evenly. The suite has some of each
(`training/test_distributed.py`). By its name pytest does not collect this file unless it is asked to.

DeepSpeed runs on CPUs over gloo where it is installed: `make test-distributed` has it in an environment of its own. It
computes in fp32, and so does what it is held against.
"""

from importlib.util import find_spec

import pytest
import torch
from rank_runs import CASES, IN_TWO, TENSOR_PARALLEL, Engine, check_equal, check_saved, run_here, run_on
from rounding import sum_of

ENGINES = {
    "ddp": Engine(2),
    "fsdp2": Engine(2, recipe="fsdp2_8.yaml"),
    "ddp, three ranks": Engine(3),
    "fsdp2, three ranks": Engine(3, recipe="fsdp2_8.yaml"),
    "sequence parallel": Engine(2, 2),
    "sequence parallel, three ranks": Engine(3, 3),
    "two groups of sequence parallel": Engine(4, 2),
    "fsdp2 x sequence parallel": Engine(2, 2, "fsdp2_8.yaml"),
    "tensor parallel": Engine(2, 2, TENSOR_PARALLEL),
    "fsdp2 x two groups of sequence parallel": Engine(4, 2, "fsdp2_8.yaml"),
}
OF_FOUR = [name for name, engine in ENGINES.items() if engine.num_ranks // engine.ranks_per_batch != 3]
TRAINED = {"all": {}, "lora": {"lora": True}, "lora, checkpointed": {"lora": True, "gradient_checkpointing": True}}
GRID = {
    f"{layout}, {trained}": {"layout": layout, "pairs_per_step": 12, "num_pairs": 19, **options}
    for layout in ("rows", "tree", "packed", "flat")
    for trained, options in TRAINED.items()
}
ZERO = {"zero2": Engine(2, recipe="zero2_8.yaml"), "zero3": Engine(2, recipe="zero3_8.yaml")}
REFUSED = {"zero3": ("tiled", "sync_ref_model"), "tensor parallel": ("sync_ref_model",)}
OF_ZERO = {
    name: {**case, "in_fp32": True}
    for name, case in {**CASES, **{name: GRID[name] for name in GRID if name.startswith(("packed", "flat"))}}.items()
}


def taken_by(engine, cases):
    refused = REFUSED.get(engine, ())
    return {name: case for name, case in cases.items() if not any(case.get(option) for option in refused)}


@pytest.fixture(scope="module")
def layouts_alone(tmp_path_factory):
    return run_here(tmp_path_factory.mktemp("layouts"), GRID)


@pytest.fixture(scope="module")
def kinds_alone(tmp_path_factory):
    return run_here(tmp_path_factory.mktemp("kinds"), CASES)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_layout_is_one_process(engine, layouts_alone, tmp_path):
    results = run_on(ENGINES[engine], tmp_path, GRID)
    for name, expected in layouts_alone.items():
        check_equal(results[name], expected)


@pytest.mark.parametrize("engine", OF_FOUR)
def test_every_kind_of_case_is_one_process(engine, kinds_alone, tmp_path):
    results = run_on(ENGINES[engine], tmp_path, taken_by(engine, CASES))
    for name, result in results.items():
        check_equal(result, kinds_alone[name])


def test_checkpoints_in_shards_resume_and_the_model_is_saved_whole(tmp_path):
    stopped = "rows" + IN_TWO
    engine = Engine(2, recipe="fsdp2_8.yaml", env=(("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT"),))
    found = run_on(engine, tmp_path, {stopped: CASES["rows"]})[stopped]
    expected = run_here(tmp_path / "alone", {"rows": CASES["rows"]})
    check_equal(found, expected["rows"])
    check_saved(tmp_path / stopped, found)
    assert (tmp_path / stopped / "checkpoint-10" / "pytorch_model_fsdp_0").is_dir()


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_bf16_over_ranks_is_fp32_to_its_rounding(engine, tmp_path):
    """And so is bf16 in one process: DDP rounds where it does, FSDP2 elsewhere, as its layers hand on bf16."""
    case = {"layout": "rows", "in_fp32": True}
    (expected, *_) = run_here(tmp_path / "alone", {"fp32": case})["fp32"]["lines"]
    (found, *_) = run_on(ENGINES[engine], tmp_path / "ranks", {"bf16": {**case, "bf16": True}})["bf16"]["lines"]
    # an estimate: sixteen tokens, each behind some sixteen roundings of numbers of about 2
    nats = sum_of(16 * 16, 2, torch.bfloat16)
    for key in ("logps/chosen", "logps/rejected"):
        assert 0 < abs(found[key] - expected[key]) <= nats, key
    # a nat of a chosen answer is β (1 + λ) of the loss, one of a rejected answer β
    assert abs(found["loss"] - expected["loss"]) <= 0.3 * (1 + 5 + 1) * nats


def test_a_base_in_four_bits_under_fsdp2_is_one_process(tmp_path):
    cases = {"four bits": {"layout": "rows", "lora": True, "four_bit": True, "in_fp32": True}}
    expected = run_here(tmp_path / "alone", cases)
    results = run_on(ENGINES["fsdp2"], tmp_path / "ranks", cases)
    check_equal(results["four bits"], expected["four bits"])


def test_loading_that_spares_the_hosts_memory_is_one_process(tmp_path):
    stopped = "rows" + IN_TWO
    engine = Engine(2, recipe="fsdp2_8.yaml", env=(("FSDP_CPU_RAM_EFFICIENT_LOADING", "true"),))
    found = run_on(engine, tmp_path, {stopped: CASES["rows"]})[stopped]
    check_equal(found, run_here(tmp_path / "alone", {"rows": CASES["rows"]})["rows"])
    check_saved(tmp_path / stopped, found)


@pytest.mark.parametrize("case", ["rows", "lora"])
def test_tensor_parallel_resumes_and_its_model_is_saved_whole(case, tmp_path):
    stopped = case + IN_TWO
    found = run_on(ENGINES["tensor parallel"], tmp_path, {stopped: CASES[case]})[stopped]
    check_equal(found, run_here(tmp_path / "alone", {case: CASES[case]})[case])
    if case == "rows":
        check_saved(tmp_path / stopped, found)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("engine", ZERO)
def test_deepspeed_is_one_process(engine, tmp_path):
    cases = taken_by(engine, OF_ZERO)
    expected = run_here(tmp_path / "alone", cases)
    stopped = "rows" + IN_TWO
    results = run_on(ZERO[engine], tmp_path / "ranks", {**cases, stopped: cases["rows"]})
    for name, result in results.items():
        check_equal(result, expected[name.removesuffix(IN_TWO)])
    for folder in (tmp_path / "ranks" / stopped, tmp_path / "ranks" / stopped / "checkpoint-10"):
        check_saved(folder, results[stopped])
