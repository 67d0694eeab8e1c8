"""`make test-distributed`: every engine with every layout, LoRA and all weights, against one process over ten steps.

Then the kinds of cases with every engine that can deal four pairs out evenly. The suite has some of each
(`training/test_distributed.py`). By its name pytest does not collect this file unless it is asked to.

DeepSpeed runs on CPUs over gloo where it is installed: `make test-distributed` has it in an environment of its own. It
computes in fp32, and so does what it is held against.
"""

from importlib.util import find_spec

import pytest
from rank_runs import CASES, IN_TWO, TENSOR_PARALLEL, Engine, check_equal, check_saved, run_here, run_on

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
    engine = Engine(2, recipe="fsdp2_8.yaml", shards_checkpoints=True)
    found = run_on(engine, tmp_path, {stopped: CASES["rows"]})[stopped]
    expected = run_here(tmp_path / "alone", {"rows": CASES["rows"]})
    check_equal(found, expected["rows"])
    check_saved(tmp_path / stopped, found)
    assert (tmp_path / stopped / "checkpoint-10" / "pytorch_model_fsdp_0").is_dir()


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
