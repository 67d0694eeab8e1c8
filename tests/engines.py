"""`make test-distributed`: every engine with every layout, LoRA and all weights, against one process over ten steps.

The suite has one of each kind (`training/test_distributed.py`); here is the grid. By its name pytest does not collect
this file unless it is asked to.
"""

import os

import pytest
import torch
from rank_runs import check_equal, summary, train
from ranks import launch, launcher_environment

# engine -> wrapper, ranks, how many of them run a batch together
ENGINES = {
    "ddp": (None, 2, 1),
    "fsdp2": ("fsdp2_8.yaml", 2, 1),
    "ddp, three ranks": (None, 3, 1),
    "sequence parallel": (None, 2, 2),
    "sequence parallel, three ranks": (None, 3, 3),
    "two groups of sequence parallel": (None, 4, 2),
    "fsdp2 x sequence parallel": ("fsdp2_8.yaml", 2, 2),
    "fsdp2 x two groups of sequence parallel": ("fsdp2_8.yaml", 4, 2),
}
LAYOUTS = ("rows", "tree", "packed", "flat")
TRAINED = {"all": {}, "lora": {"lora": True}, "lora, checkpointed": {"lora": True, "gradient_checkpointing": True}}
PAIRS_PER_STEP = 12  # a multiple of what any engine runs at a time


def cases():
    return {
        f"{layout}, {trained}": {"layout": layout, "pairs_per_step": PAIRS_PER_STEP, "num_pairs": 19, **options}
        for layout in LAYOUTS
        for trained, options in TRAINED.items()
    }


def run_cases(rank, folder, size):
    num_groups = int(os.environ["WORLD_SIZE"]) // size
    results = {
        name: summary(train(folder / name, num_ranks=num_groups, sequence_parallel_size=size, **case))
        for name, case in cases().items()
    }
    if rank == 0:
        torch.save(results, folder / "results.pt")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return {name: summary(train(folder / name, **case)) for name, case in cases().items()}


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_is_one_process_in_every_layout(engine, alone, tmp_path):
    recipe, num_ranks, size = ENGINES[engine]
    env = launcher_environment(recipe) if recipe else None
    launch(run_cases, tmp_path, size, num_ranks=num_ranks, env=env)
    results = torch.load(tmp_path / "results.pt")
    assert results.keys() == alone.keys()
    for name, expected in alone.items():
        check_equal(results[name], expected)
