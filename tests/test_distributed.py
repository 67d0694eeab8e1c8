"""DPOPTrainer on two ranks is DPOPTrainer on one: the same losses, weights and evaluation, whatever the wrapper.

Eleven pairs in global batches of four: the last one of an epoch holds three, two on one rank and one on the other. With
nine pairs it holds one, and a rank has none.
"""

import pytest
import torch
from datasets import Dataset
from dpop_trainer import DPOPConfig, DPOPTrainer
from peft import LoraConfig
from ranks import launch, launcher_environment
from tiny import tiny_llama, token_pairs, word_tokenizer
from torch.distributed.tensor import DTensor

CASES = {
    "rows": {"layout": "rows"},
    "tree": {"layout": "auto"},
    "lora": {"layout": "auto", "lora": True},
    "accumulated": {"layout": "auto", "gradient_accumulation_steps": 2},
    "idle_rank": {"layout": "rows", "num_pairs": 9},
    "checkpointed": {"layout": "rows", "lora": True, "gradient_checkpointing": True},
    "precomputed": {"layout": "rows", "precompute_ref_log_probs": True, "loss_type": "dpo"},
}


def train(folder, *, num_ranks, lora=False, num_pairs=11, **overrides):
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4 // num_ranks,
        "per_device_eval_batch_size": 4 // num_ranks,
        "max_steps": 10,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 5,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dpop_lambda": 5.0,
        "seed": 3,
        **overrides,
    }
    trainer = DPOPTrainer(
        tiny_llama(),
        # another model, so that no pair sits on the hinge, where rounding would decide the first gradient
        ref_model=None if lora else tiny_llama(seed=7),
        args=DPOPConfig(**settings),
        train_dataset=Dataset.from_list(token_pairs(num_pairs)),
        eval_dataset=Dataset.from_list(token_pairs(5, seed=9)),
        processing_class=word_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
    )
    trainer.train()
    return trainer


def whole(parameter):
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()


# of time and memory; and of padding, each rank filling up to the longest of its own rows
OWN_KEYS = ("per_second", "_runtime", "peak_gib", "preparation_time", "padding_share", "computed_ratio", "computed_tokens")


def summary(trainer):
    """What is to agree: the lines of the log, and the weights by name."""
    lines = [
        {key: value for key, value in line.items() if not key.endswith(OWN_KEYS)}
        for line in trainer.state.log_history
        if "train_runtime" not in line
    ]
    named = trainer.accelerator.unwrap_model(trainer.model).named_parameters()
    return {"lines": lines, "weights": {name: whole(p).clone() for name, p in named if p.requires_grad}}


def run_cases(rank, folder, names):
    for name in names:
        trainer = train(folder / name / "ranks", num_ranks=2, **CASES[name])
        result = summary(trainer)
        if rank == 0:
            torch.save(result, folder / f"{name}.pt")


def check_equal(ours, expected):
    assert len(ours["lines"]) == len(expected["lines"]) == 12  # ten steps, two evaluations
    losses = [line["loss"] for line in expected["lines"] if "loss" in line]
    assert max(losses) - min(losses) > 0.03  # it is a trajectory, and not one point ten times
    for line, one in zip(ours["lines"], expected["lines"], strict=True):
        assert line.keys() == one.keys()
        for key, value in one.items():
            # AdamW amplifies the 1e-7 by which sums in another order differ, in proportion to its learning rate
            assert line[key] == pytest.approx(value, rel=1e-5, abs=1e-5), (key, line["step"])
    assert ours["weights"].keys() == expected["weights"].keys()
    for key, weight in expected["weights"].items():
        torch.testing.assert_close(ours["weights"][key], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_two_ranks_equal_one_process(tmp_path, wrapper):
    launch(run_cases, tmp_path, list(CASES), env=launcher_environment("fsdp2_8.yaml") if wrapper == "fsdp2" else None)
    for name, case in CASES.items():
        expected = summary(train(tmp_path / name / "one", num_ranks=1, **case))
        check_equal(torch.load(tmp_path / f"{name}.pt"), expected)
