"""Measure what rounding does at the start: Δw between a model and its own log-probs, computed in other batches.

    python -m benchmarks.cpu_tie GSM8K/train.jsonl MODEL OUT.json

Policy and reference are the same weights, so Δw is 0 but for rounding, and every pair sits on DPOP's hinge. One
optimizer step over all pairs, without clipping, for a reference that is computed online, for one that the trainer
computes once before training, one pair at a time or in another layout, and for columns that the data bring, computed in
batches of the same size, of one pair, and in another layout; each in fp32 and under bf16 autocast.
"""

import argparse
import itertools
import json
import os
import platform
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from dpop_trainer import DPOPConfig, DPOPTrainer
from dpop_trainer.tools.pairs.metamath import build_pairs


class Setting(NamedTuple):
    """How a reference is had."""

    computed: dict[str, Any] | None
    """Options of the pass before training; None computes it online."""
    trained: dict[str, Any]
    are_columns: bool = True
    """The data bring it, as if it were anyone's; else the trainer knows that it is the policy's own."""


ONE_BY_ONE = {"precompute_ref_batch_size": 1}
SETTINGS = {
    "online": Setting(None, {}),
    "computed before training, one pair at a time": Setting(ONE_BY_ONE, {}, are_columns=False),
    "computed before training in rows, trained in trees": Setting(
        {"layout": "rows"}, {"layout": "tree"}, are_columns=False
    ),
    "columns, computed with the same batch size and layout": Setting({}, {}),
    "columns, computed one pair at a time": Setting(ONE_BY_ONE, {}),
    "columns, computed in rows, trained in trees": Setting({"layout": "rows"}, {"layout": "tree"}),
}


def first_step(model: str, data: Dataset, batch_size: int, *, bf16: bool, setting: str) -> dict[str, float]:
    """Figures of the first step."""
    computed, trained, are_columns = SETTINGS[setting]
    with tempfile.TemporaryDirectory() as folder:

        def trainer(overrides: dict[str, Any], pairs: Dataset, *, precompute: bool) -> DPOPTrainer:
            options: dict[str, Any] = {"per_device_train_batch_size": batch_size, **overrides}
            config = DPOPConfig(
                output_dir=f"{folder}/run",
                max_steps=1,
                gradient_accumulation_steps=-(-len(data) // options["per_device_train_batch_size"]),
                logging_steps=1,
                gradient_checkpointing=False,
                max_grad_norm=0.0,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                bf16=bf16,
                model_init_kwargs={"dtype": "float32"},
                precompute_ref_log_probs=precompute,
                ref_cache_dir=f"{folder}/cache",
                **options,
            )
            return DPOPTrainer(model, args=config, train_dataset=pairs)

        pairs, precompute = data, False
        if computed is not None:  # into the cache, and into columns
            with_columns = trainer({**trained, **computed}, data, precompute=True).train_dataset
            pairs, precompute = (with_columns, False) if are_columns else (data, True)
        run = trainer(trained, pairs, precompute=precompute)
        run.train()
    line = next(line for line in run.state.log_history if "loss" in line)
    return {
        "max_chosen_logratio": line["dpop/step_0_max_chosen_logratio"],
        "mean_chosen_logratio": line["dpop/step_0_mean_chosen_logratio"],
        "active_fraction": line["dpop/active_fraction"],
        "grad_norm": line["grad_norm"],
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.cpu_tie", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="GSM8K's train.jsonl")
    parser.add_argument("model", help="a small pretrained causal LM")
    parser.add_argument("out", type=Path)
    parser.add_argument("--num_pairs", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument(
        "--precisions", nargs="+", default=["fp32", "bf16"], help="bf16 is slow where the processor has none"
    )
    options = parser.parse_args(argv)
    with options.source.open() as lines:
        problems = [json.loads(line) for line in lines]
    data = Dataset.from_list(list(itertools.islice(build_pairs(problems, seed=0), options.num_pairs)))
    settings = {
        name: {
            precision: first_step(options.model, data, options.batch_size, bf16=precision == "bf16", setting=name)
            for precision in options.precisions
        }
        for name in SETTINGS
    }
    record = {
        "model": Path(options.model).name,
        "num_pairs": len(data),
        "batch_size": options.batch_size,
        "dpop_lambda": DPOPConfig.dpop_lambda,
        "settings": settings,
        "device": platform.processor() or platform.machine(),
        "num_threads": torch.get_num_threads(),
        "num_cpus": os.cpu_count(),
        "torch": torch.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
