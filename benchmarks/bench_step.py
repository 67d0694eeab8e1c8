"""A whole LoRA training step on a CPU: our layouts against TRL's DPOTrainer, each in processes of its own, in turns.

The model, the pairs and the settings are those of `cpu_step.py`; on a GPU `gpu/step.py` measures the same of a larger
model. Nothing is timed unless all trainers' losses agree at every step.
"""

import pytest
import torch

from benchmarks import cpu_step, records
from benchmarks.conftest import CLOCK, DEVICE
from benchmarks.measure import spread
from benchmarks.peers import trl

NUM_TURNS = 2


@pytest.fixture(scope="module")
def steps(request, comparisons):
    """Each selected trainer's steps from all its turns, recorded once their losses agree."""
    selected = [item.callspec.params["trainer"] for item in request.session.items if item.path == request.path]
    by_trainer: dict[str, list] = {trainer: [] for trainer in selected if why_not(trainer) is None}
    for _ in range(NUM_TURNS):
        for trainer, turns in by_trainer.items():
            turns.append(cpu_step.run_process(trainer))
    difference = cpu_step.loss_difference([turn for turns in by_trainer.values() for turn in turns])
    if not difference <= cpu_step.LARGEST_LOSS_DIFFERENCE:
        pytest.fail(f"refused: the trainers' losses differ by {difference:.1e}", pytrace=False)
    seconds = {}
    for trainer, turns in by_trainer.items():
        seconds[trainer] = [step for turn in turns for step in turn["all_seconds"][1:]]
        record = {
            "level": "step",
            "task": "lora",
            "shape": {"name": "Llama 256 x 4", "pairs": cpu_step.METAMATH.name, "num_pairs": cpu_step.PAIRS_PER_STEP},
            "dtype": "float32",
            "peer": trainer.replace("trl", "TRL") if is_trl(trainer) else f"dpop-kernels, {trainer}",
            "peer_version": records.version("trl" if is_trl(trainer) else "dpop-kernels"),
            "settings": "DPOTrainer" if is_trl(trainer) else f"DPOPTrainer, layout {trainer}",
            **spread(seconds[trainer]),
            "peak_bytes": int(max(turn["peak_mib"] - turn["base_mib"] for turn in turns) * 2**20),
            "errors": {"loss": difference},
        }
        if comparisons.path is not None:
            records.append(comparisons.path, record | comparisons.environment)
    return seconds


def why_not(trainer):
    return trl.PEERS[0].why_not(torch.device("cpu")) if is_trl(trainer) else None


def is_trl(trainer):
    return trainer in (cpu_step.TRL, cpu_step.TRL_ON_GPU)


@pytest.mark.benchmark(group="step-lora", timer=CLOCK)
@pytest.mark.skipif(DEVICE.type == "cuda", reason="python -m benchmarks.gpu measures the step on a GPU")
@pytest.mark.parametrize("trainer", cpu_step.CANDIDATES)
def test_step(benchmark, request, trainer):
    if request.config.getoption("rehearse"):
        pytest.skip("a step has no tiny size")
    if reason := why_not(trainer):
        pytest.skip(reason)
    seconds = request.getfixturevalue("steps")[trainer]
    CLOCK.load(seconds)
    benchmark.pedantic(lambda: None, rounds=len(seconds))
