# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "dpop-kernels[trainer]",
#     "peft>=0.21.2",
# ]
#
# [tool.uv.sources]
# dpop-kernels = { path = ".." }
# ///
"""DPOP with LoRA, one script that brings its own environment:

    uv run examples/dpop.py --model Qwen/Qwen2.5-1.5B-Instruct --pairs pairs.jsonl

`--pairs` is a file, a folder or a hub id, in any form that docs/data.md lists. Outside of a checkout of this project,
take the two lines of `tool.uv.sources` out, and the package comes from the index.
"""

import argparse

from dpop_trainer import DPOPConfig, DPOPTrainer
from dpop_trainer.data import load_pairs
from peft import LoraConfig


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or hub id of a causal LM")
    parser.add_argument("--pairs", required=True, help="file, folder or hub id of preference pairs")
    parser.add_argument("--output_dir", default="runs/dpop")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch_size", type=int, default=4, help="pairs per step")
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    parser.add_argument("--beta", type=float, default=0.3)
    parser.add_argument("--dpop_lambda", type=float, default=50.0, help="0 is DPO")
    parser.add_argument("--lora_rank", type=int, default=16)
    options = parser.parse_args(argv)

    trainer = DPOPTrainer(
        model=options.model,  # the reference is the same model without the adapter
        args=DPOPConfig(
            output_dir=options.output_dir,
            beta=options.beta,
            dpop_lambda=options.dpop_lambda,
            learning_rate=options.learning_rate,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch_size,
            logging_steps=1,
        ),
        train_dataset=load_pairs(options.pairs),
        peft_config=LoraConfig(
            r=options.lora_rank, lora_alpha=2 * options.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    trainer.train()
    trainer.save_model()
    print(f"Trained: {options.output_dir}. What it did: dpop inspect {options.output_dir} --pairs HELD_OUT.jsonl")


if __name__ == "__main__":
    main()
