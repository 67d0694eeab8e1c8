"""Hold `dpop plan --device cpu` to a step that is run: its seconds and its memory, in fp32 and in bf16.

    python -m benchmarks.planned_cpu OUT.json --pairs pairs.jsonl --model FOLDER       on a quiet machine

The runs are those of `cpu_step.py`, in the flat layout: the small Llama with random weights, and the pretrained model.
Each is planned as a user would plan it, on the pairs that it then trains on; what part of the planned rate the step
reached is what `CPU_UTILISATION` stands for.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.cpu_head import machine
from benchmarks.cpu_step import Source, model_of, run_process, workload
from benchmarks.levels import table

RECORD = Path(__file__).parent / "results" / "planned_cpu.json"
PRECISIONS = ("fp32", "bf16")


def planned(source: Source, folder: Path) -> dict[str, Any]:
    """What `dpop plan` says of the run that `cpu_step` makes."""
    records, tokenizer = workload(source)
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(record) + "\n" for record in records))
    model = source.model
    if model is None:
        model = str(folder / "model")
        model_of(source, len(tokenizer)).config.save_pretrained(model)
        tokenizer.save_pretrained(model)
    options: dict[str, Any] = {
        "model": model,
        "data": pairs,
        "device": "cpu",
        "use_peft": "true",
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_target_modules": "all-linear",
        "loss_type": "dpo",
        "per_device_train_batch_size": source.pairs_per_step,
        "max_length": 1024,
        "gradient_checkpointing": "false",
        "dtype": "float32",
        "bf16": str(source.bf16).lower(),
        "use_cpu": "true",
        "layout": "flat",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "dpop_trainer", "plan", *words, "--no_search", "--json"]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout)


def held(source: Source) -> dict[str, Any]:
    """One run, planned and made."""
    with tempfile.TemporaryDirectory() as folder:
        plan = planned(source, Path(folder))
    run = run_process("flat", source)
    seconds, share = statistics.median(run["all_seconds"][1:]), plan["device"]["utilisation"]
    asked = plan["asked"]
    return {
        "model": "Llama 256 x 4" if source.model is None else Path(source.model).name,
        "precision": "bf16" if source.bf16 else "fp32",
        "pairs": source.pairs_per_step,
        "product_tflops": plan["device"]["tflops"],
        "planned_seconds": asked["micro_batch_seconds"],
        "measured_seconds": seconds,
        "share": share * asked["micro_batch_seconds"] / seconds,
        "planned_gib": asked["memory"]["total_bytes"] / 2**30,
        "measured_gib": run["peak_mib"] / 2**10,
    }


def as_table() -> str:
    """docs/plan.md: planned and measured, side by side."""
    record = json.loads(RECORD.read_text())
    rows = [
        [
            f"{run['model']}, {run['precision']}{' autocast' if run['precision'] == 'bf16' else ''}",
            f"{run['product_tflops'] * 1000:.0f} GFLOP/s",
            *(f"{run[f'{kind}_seconds']:.2f} s" for kind in ("planned", "measured")),
            *(f"{run[f'{kind}_gib']:.2f} GiB" for kind in ("planned", "measured")),
        ]
        for run in record["runs"]
    ]
    titles = ["", "its products", "a step, planned", "measured", "memory, planned", "measured"]
    pairs = {run["model"]: run["pairs"] for run in record["runs"]}
    batches = " and ".join(f"{count} ({model})" for model, count in pairs.items())
    note = (
        f"LoRA r = 16 on all linear layers, flat, GSM8K pairs in batches of {batches}; {record['device']}, torch "
        f"{record['versions']['torch']}, {record['date']}."
    )
    return f"{table(titles, rows)}\n\n{note}"


def main(argv: list[str] | None = None) -> None:
    """Write the records."""
    parser = argparse.ArgumentParser("python -m benchmarks.planned_cpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--pairs", required=True, help="as for cpu_step")
    parser.add_argument("--tokenizer", required=True, help="of the small model: folder or hub id")
    parser.add_argument("--model", required=True, help="folder or hub id of a pretrained model with its tokenizer")
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    options = parser.parse_args(argv)
    found = []
    for precision in options.precisions:
        bf16 = precision == "bf16"
        for source in (
            Source(options.pairs, options.tokenizer, bf16=bf16),
            Source(options.pairs, model=options.model, bf16=bf16),
        ):
            found.append(held(source))
            print(json.dumps(found[-1]), flush=True)
    options.out.write_text(json.dumps({**machine(), "runs": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
