"""One training run, as one process and as several ranks have it: built, run, and held against each other.

Eleven pairs in global batches of four: the last one of an epoch holds three, two on one rank and one on the other. With
nine pairs it holds one, and a rank has none.
"""

import os
from typing import NamedTuple

import pytest
import torch
from accelerate import DistributedType, PartialState
from datasets import Dataset
from dpop_trainer import DPOPConfig, DPOPTrainer
from dpop_trainer.models.quantised import four_bit_config
from peft import LoraConfig, get_peft_model
from ranks import launch, launcher_environment
from rounding import sum_of
from tiny import UNUSED_ID, tiny_llama, token_pairs, word_tokenizer
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, set_seed

IN_TWO = " in two"
TENSOR_PARALLEL = "tp_8.yaml"
RUN_SEED = 3
SEEDS = {"policy": 0, "reference": 7}
LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
SHAPE = {"num_attention_heads": 6, "hidden_size": 48}  # heads for two ranks and for three


class Engine(NamedTuple):
    """How ranks work together: how many, how many of them on each batch (each some tokens, or under the recipe of
    tensor parallelism some heads), under DDP or a recipe of accelerate, and what its launcher is told beside that."""

    num_ranks: int
    ranks_per_batch: int = 1
    recipe: str | None = None
    env: tuple[tuple[str, str], ...] = ()


CASES = {
    "rows": {"layout": "rows"},
    "tree": {"layout": "auto"},
    "lora": {"layout": "auto", "lora": True},
    "accumulated": {"layout": "auto", "gradient_accumulation_steps": 2, "tiled": True},
    "idle_rank": {"layout": "rows", "num_pairs": 9},
    "weighted": {"layout": "auto", "weighted": True, "gradient_accumulation_steps": 2},
    "checkpointed": {"layout": "rows", "lora": True, "gradient_checkpointing": True, "tiled": True},
    "moving": {"layout": "rows", "sync_ref_model": True, "ref_model_sync_steps": 3},
    "precomputed": {"layout": "rows", "precompute_ref_log_probs": True, "loss_type": "dpo", "dpop_lambda": 50.0},
}


def build(
    folder,
    *,
    num_ranks=1,
    lora=False,
    num_pairs=11,
    weighted=False,
    bad_pair=None,
    tiled=False,
    pairs_per_step=4,
    streamed=False,
    in_fp32=False,
    four_bit=False,
    **overrides,
):
    """A trainer of ten steps; `num_ranks` batches are run at a time, by as many processes or groups of them."""
    is_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    is_tensor_parallel = int(os.environ.get("PARALLELISM_CONFIG_TP_SIZE", "1")) > 1
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": pairs_per_step // num_ranks,
        "per_device_eval_batch_size": pairs_per_step // num_ranks,
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
        # DeepSpeed is asked for on what is no CPU alone, and told here which processes it is among
        "use_cpu": not is_deepspeed,
        "ddp_backend": "gloo" if is_deepspeed else None,
        "dpop_lambda": 5.0,
        "seed": RUN_SEED,
        # against one process without
        "tiled_mlp": 5 if tiled and (num_ranks > 1 or overrides.get("sequence_parallel_size", 1) > 1) else None,
        # in fp32 it would make steps of their full length of gradients that are rounding alone
        "adam_epsilon": 1e-4 if in_fp32 else 1e-8,
        **overrides,
    }
    dtype = torch.float32 if in_fp32 else torch.float64
    model, reference = (tiny_llama(seed=seed, **SHAPE).to(dtype) for seed in SEEDS.values())
    records = token_pairs(num_pairs)
    if weighted:  # the ranks' shares of a step then differ in weight
        records = [{**pair, "weight": 0.5 + i % 4} for i, pair in enumerate(records)]
    if bad_pair is not None:
        model.model.embed_tokens.weight.data[UNUSED_ID] = float("nan")
        records[bad_pair]["prompt_ids"][0] = UNUSED_ID
    if is_tensor_parallel or four_bit:  # as it is loaded
        settings["model_init_kwargs"] = {"dtype": str(dtype).removeprefix("torch.")}
        name = "adapter" if lora and is_tensor_parallel else "policy"
        model, reference = (str(folder.parent / one) for one in (name, "reference"))
    args = DPOPConfig(**settings)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" or is_tensor_parallel:
        # accelerate shards models on GPUs alone; FSDP2 and DTensors themselves run on a CPU as well
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    pairs = Dataset.from_list(records)
    trainer = DPOPTrainer(
        model,
        # another model, so that no pair sits on the hinge, where rounding would decide the first gradient
        ref_model=None if lora else reference,
        args=args,
        train_dataset=pairs.to_iterable_dataset() if streamed else pairs,
        eval_dataset=Dataset.from_list(token_pairs(5, seed=9)),
        processing_class=word_tokenizer(),
        peft_config=LoraConfig(**LORA) if lora and not is_tensor_parallel else None,
        quantization_config=four_bit_config(torch.float32, storage="float32") if four_bit else None,
    )
    assert trainer.is_fsdp_enabled == (os.environ.get("ACCELERATE_USE_FSDP") == "true")
    if os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING") == "true":
        assert trainer.accelerator.state.fsdp_plugin.cpu_ram_efficient_loading
    return trainer


def train(folder, **options):
    trainer = build(folder, **options)
    trainer.train()
    return trainer


def train_in_two(folder, **options):
    """A run that stops in the middle of its second epoch, and the trainer that resumed it."""
    saves = {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 1, **options}
    train(folder, **{**saves, "max_steps": 4})
    trainer = build(folder, **saves)
    trainer.train(resume_from_checkpoint=True)
    # the stopped run took step 4 for its last, and evaluated there
    log = trainer.state.log_history
    log[:] = [line for line in log if "eval_loss" not in line or line["step"] != 4]
    return trainer


def run_here(folder, cases):
    """Cases by name in this process -> of each what is to agree."""
    if any(case.get("four_bit") for case in cases.values()):
        _save_models(folder)
    return {name: summary(train(folder / name, **case)) for name, case in cases.items()}


def run_on(engine, folder, cases):
    """The same on an engine's ranks; a case that is named "... in two" is stopped and resumed."""
    folder.mkdir(exist_ok=True)
    env = launcher_environment(engine.recipe, engine.num_ranks) if engine.recipe else {}
    if engine.recipe == TENSOR_PARALLEL or any(case.get("four_bit") for case in cases.values()):
        _save_models(folder)
    launch(_run_cases, folder, engine, cases, num_ranks=engine.num_ranks, env={**env, **dict(engine.env)})
    return torch.load(folder / "results.pt")


def _save_models(folder):
    """The models that other runs make as they begin, for those that spread a model as they load it."""
    for name, seed in SEEDS.items():
        tiny_llama(seed=seed, **SHAPE).double().save_pretrained(folder / name)
    policy = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float64)
    set_seed(RUN_SEED)
    get_peft_model(policy, LoraConfig(**LORA)).save_pretrained(folder / "adapter")


def _run_cases(rank, folder, engine, cases):
    shares = {
        "num_ranks": engine.num_ranks // engine.ranks_per_batch,
        "sequence_parallel_size": 1 if engine.recipe == TENSOR_PARALLEL else engine.ranks_per_batch,
    }
    results = {}
    for name, case in cases.items():
        run = train_in_two if name.endswith(IN_TWO) else train
        trainer = run(folder / name, **shares, **case)
        results[name] = summary(trainer)
        if name.endswith(IN_TWO):
            trainer.save_model()
    if rank == 0:
        torch.save(results, folder / "results.pt")


def whole(parameter):
    if hasattr(parameter, "ds_id"):  # ZeRO-3's
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
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


def check_equal(ours, expected):
    assert len(ours["lines"]) == len(expected["lines"]) == 12  # ten steps, two evaluations
    losses = [line["loss"] for line in expected["lines"] if "loss" in line]
    assert max(losses) - min(losses) > 0.03  # it is a trajectory, and not one point ten times
    for line, one in zip(ours["lines"], expected["lines"], strict=True):
        assert line.keys() == one.keys()
        for key, value in one.items():
            # the contract of fp32, which a run in fp64 is far from; in it metrics and a tile's sums may be kept
            assert line[key] == pytest.approx(value, rel=1e-5, abs=sum_of(16, 32)), (key, line["step"])
    assert ours["weights"].keys() == expected["weights"].keys()
    for key, weight in expected["weights"].items():
        # a thousandth of the furthest that ten steps of AdamW can take it: of single elements whose gradient is next to
        # nothing, rounding decides the direction
        furthest = 10 * 2e-4 * weight.numel() ** 0.5
        assert (ours["weights"][key] - weight).norm() <= 1e-3 * furthest, key


def check_saved(folder, expected):
    """What a run of all weights has saved is what it came to, bit for bit."""
    loaded = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    for key, weight in expected["weights"].items():
        torch.testing.assert_close(loaded[key], weight, rtol=0, atol=0)
