"""DPOPTrainer on two ranks is DPOPTrainer on one: the same losses, weights and evaluation, whatever the wrapper.

Eleven pairs in global batches of four: the last one of an epoch holds three, two on one rank and one on the other. With
nine pairs it holds one, and a rank has none.
"""

import os

import pytest
import torch
from accelerate import DistributedType, PartialState
from datasets import Dataset
from dpop_trainer import DPOPConfig, DPOPTrainer
from dpop_trainer.run_folder.checkpoints import CheckpointError
from dpop_trainer.training.non_finite import NonFiniteError
from peft import LoraConfig
from ranks import launch, launcher_environment
from rounding import sum_of
from tiny import UNUSED_ID, tiny_llama, token_pairs, word_tokenizer
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

CASES = {
    "rows": {"layout": "rows"},
    "tree": {"layout": "auto"},
    "lora": {"layout": "auto", "lora": True},
    "accumulated": {"layout": "auto", "gradient_accumulation_steps": 2},
    "idle_rank": {"layout": "rows", "num_pairs": 9},
    "weighted": {"layout": "auto", "weighted": True, "gradient_accumulation_steps": 2},
    "checkpointed": {"layout": "rows", "lora": True, "gradient_checkpointing": True},
    "moving": {"layout": "rows", "sync_ref_model": True, "ref_model_sync_steps": 3},
    "precomputed": {"layout": "rows", "precompute_ref_log_probs": True, "loss_type": "dpo", "dpop_lambda": 50.0},
}


def build(folder, *, num_ranks, lora=False, num_pairs=11, weighted=False, bad_pair=None, **overrides):
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
    model, records = tiny_llama(), token_pairs(num_pairs)
    if weighted:  # the ranks' shares of a step then differ in weight
        records = [{**pair, "weight": 0.5 + i % 4} for i, pair in enumerate(records)]
    if bad_pair is not None:
        model.model.embed_tokens.weight.data[UNUSED_ID] = float("nan")
        records[bad_pair]["prompt_ids"][0] = UNUSED_ID
    args = DPOPConfig(**settings)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # accelerate shards models on GPUs alone; FSDP2 itself runs on a CPU as well
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = DPOPTrainer(
        model,
        # another model, so that no pair sits on the hinge, where rounding would decide the first gradient
        ref_model=None if lora else tiny_llama(seed=7),
        args=args,
        train_dataset=Dataset.from_list(records),
        eval_dataset=Dataset.from_list(token_pairs(5, seed=9)),
        processing_class=word_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
    )
    assert trainer.is_fsdp_enabled == (os.environ.get("ACCELERATE_USE_FSDP") == "true")
    return trainer


def train(folder, **options):
    trainer = build(folder, **options)
    trainer.train()
    return trainer


def whole(parameter):
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()


# of time and memory; and of padding, each rank filling up to the longest of its own rows
OWN_KEYS = (
    "per_second",
    "_runtime",
    "peak_gib",
    "preparation_time",
    "padding_share",
    "computed_ratio",
    "computed_tokens",
)


def summary(trainer):
    """What is to agree: the lines of the log, and the weights by name."""
    lines = [
        {key: value for key, value in line.items() if not key.endswith(OWN_KEYS)}
        for line in trainer.state.log_history
        if "train_runtime" not in line
    ]
    named = trainer.accelerator.unwrap_model(trainer.model).named_parameters()
    return {"lines": lines, "weights": {name: whole(p).clone() for name, p in named if p.requires_grad}}


def run_all(rank, folder):
    """On each rank: all cases, a run that stops and resumes, and one that meets a NaN. Results go to `folder`."""
    results = {name: summary(train(folder / name / "ranks", num_ranks=2, **case)) for name, case in CASES.items()}

    saves = {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 1, "layout": "rows"}
    train(folder / "resumed", num_ranks=2, **{**saves, "max_steps": 4})  # in the middle of the second epoch
    trainer = build(folder / "resumed", num_ranks=2, **saves)
    trainer.train(resume_from_checkpoint=True)
    results["resumed"] = summary(trainer)
    # the stopped run took step 4 for its last, and evaluated there
    results["resumed"]["lines"] = [
        line for line in results["resumed"]["lines"] if "eval_loss" not in line or line["step"] != 4
    ]
    trainer.save_model()

    with pytest.raises(NonFiniteError) as raised:
        train(folder / "bad", num_ranks=2, layout="rows", bad_pair=3)
    (folder / f"error{rank}.txt").write_text(str(raised.value))
    with pytest.raises(CheckpointError) as raised:  # before the first step
        train(folder / "other", num_ranks=2, layout="rows", seed=3 + rank, num_pairs=11 - rank, max_steps=5 + rank)
    (folder / f"other{rank}.txt").write_text(str(raised.value))
    if rank == 0:
        torch.save(results, folder / "results.pt")


def check_equal(ours, expected):
    assert len(ours["lines"]) == len(expected["lines"]) == 12  # ten steps, two evaluations
    losses = [line["loss"] for line in expected["lines"] if "loss" in line]
    assert max(losses) - min(losses) > 0.03  # it is a trajectory, and not one point ten times
    for line, one in zip(ours["lines"], expected["lines"], strict=True):
        assert line.keys() == one.keys()
        for key, value in one.items():
            # AdamW amplifies the 1e-7 by which sums in another order differ, in proportion to its learning rate;
            # rewards and log-ratios are differences of sums over some 16 tokens, of up to 32 nats
            assert line[key] == pytest.approx(value, rel=1e-5, abs=sum_of(16, 32)), (key, line["step"])
    assert ours["weights"].keys() == expected["weights"].keys()
    for key, weight in expected["weights"].items():
        # a thousandth of the furthest that ten steps of AdamW can take it: of single elements whose gradient is next to
        # nothing, rounding decides the direction
        furthest = 10 * 2e-4 * weight.numel() ** 0.5
        assert (ours["weights"][key] - weight).norm() <= 1e-3 * furthest, key


@pytest.mark.slow
def test_two_ranks_equal_one_process(tmp_path):
    # both wrappers in one test: the single process's runs are the same for both, and take longest
    alone = {name: summary(train(tmp_path / name / "one", num_ranks=1, **case)) for name, case in CASES.items()}
    for wrapper, env in {"ddp": None, "fsdp2": launcher_environment("fsdp2_8.yaml")}.items():
        folder = tmp_path / wrapper
        folder.mkdir()
        launch(run_all, folder, env=env)
        results = torch.load(folder / "results.pt")
        for name, expected in {**alone, "resumed": alone["rows"]}.items():
            check_equal(results[name], expected)
        check_folders(folder, results)


def check_folders(tmp_path, results):
    resumed = tmp_path / "resumed"
    assert [path.name for path in resumed.glob("*checkpoint-*")] == ["checkpoint-10"]
    for folder in (resumed, resumed / "checkpoint-10"):
        loaded = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
        for key, weight in results["resumed"]["weights"].items():
            torch.testing.assert_close(loaded[key], weight, rtol=0, atol=0)

    # both ranks stop at the same step; the one that had the pair says so and saves the batch
    errors = [(tmp_path / f"error{rank}.txt").read_text() for rank in range(2)]
    assert errors[0].split(":")[0] == errors[1].split(":")[0]
    (report,) = (tmp_path / "bad").glob("nonfinite_step_*/report_rank*.json")
    with_pair = int(report.stem.removeprefix("report_rank"))
    assert "pair ids [3]" in errors[with_pair]
    assert "no pair of this rank" in errors[1 - with_pair]
    # and neither trains on what the other has not
    one, other = [(tmp_path / f"other{rank}.txt").read_text() for rank in range(2)]
    assert one == other
    assert one.startswith("process 1: expected the configuration, data and model of process 0, got another ")
    for told in ("max_steps: 5 there, 6 here", "seed: 3 there, 4 here", "training data (digest): "):
        assert told in one
    assert not (tmp_path / "other" / "metrics.jsonl").exists()
