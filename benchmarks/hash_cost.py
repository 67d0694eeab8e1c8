"""What hashes add to saving a checkpoint of a run with all weights: the model, then the optimizer's state.

    python -m benchmarks.hash_cost                       1 GiB, 15 rounds
    python -m benchmarks.hash_cost --gib 0.1 --rounds 3 --folder /mnt/disk

A run saves at every step. In turns, so that all see the same disk and neighbours: without hashes; with them, begun as
`run_folder.sealing` does while the optimizer is written; and with all of them at the end, for comparison. Times are
from the step's end to the checkpoint in its place. In each the system takes all files to the disk.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from datasets import Dataset
from dpop_trainer import DPOPConfig, DPOPTrainer
from dpop_trainer.run_folder import sealing
from dpop_trainer.training.whole_checkpoints import WholeCheckpoints
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from benchmarks.cpu_step import word_tokenizer

WAYS = ("no hashes", "hashes", "hashes at the end")
_WIDTH = 512
_BYTES = 4 * 3  # of a weight in fp32, with Adam's two moments


@contextmanager
def as_said(way: str) -> Iterator[None]:
    """One of `WAYS`."""
    if way == "hashes":
        yield
    elif way == "no hashes":
        with patch.object(sealing, "digest_of", lambda path: {"bytes": path.stat().st_size}):
            yield
    else:
        with patch.object(WholeCheckpoints, "model_written", lambda *_: None):
            yield


class Timed(TrainerCallback):
    """Saves at every step, one way after the other, and keeps the seconds of each but the first round's."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {way: [] for way in WAYS}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        number, place = divmod(state.global_step - 1, len(WAYS))
        self._way = WAYS[(place + number) % len(WAYS)]  # each is first as often as the others
        self._patched = as_said(self._way)
        self._patched.__enter__()
        self._started = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seconds = time.perf_counter() - self._started
        self._patched.__exit__(None, None, None)
        if state.global_step > len(WAYS):
            self.seconds[self._way].append(seconds)
        shutil.rmtree(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def measure(gib: float, rounds: int, folder: Path) -> dict[str, list[float]]:
    """-> seconds of each save, by way."""
    of_a_layer = 4 * _WIDTH**2 + 3 * _WIDTH * 4 * _WIDTH
    sizes = {"hidden_size": _WIDTH, "intermediate_size": 4 * _WIDTH, "num_attention_heads": 8, "vocab_size": 64}
    layers = max(1, round(gib * 2**30 / _BYTES / of_a_layer))
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers, max_position_embeddings=64))
    pairs = Dataset.from_list([{"prompt_ids": [3, 4], "chosen_ids": [5, 6], "rejected_ids": [7, 8]}] * 2)
    timed = Timed()
    with tempfile.TemporaryDirectory(dir=folder) as run:
        args = DPOPConfig(
            output_dir=run,
            max_steps=len(WAYS) * (rounds + 1),
            save_steps=1,
            learning_rate=1e-9,
            per_device_train_batch_size=1,
            gradient_checkpointing=False,
            precompute_ref_log_probs=True,
            ref_cache_dir=f"{run}/references",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            use_cpu=True,
        )
        trainer = DPOPTrainer(
            model, args=args, train_dataset=pairs, processing_class=word_tokenizer(64), callbacks=[timed]
        )
        trainer.train()
    return timed.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    found = measure(options.gib, options.rounds, options.folder)
    plain = statistics.median(found["no hashes"])
    for way, seconds in found.items():
        low, middle, high = statistics.quantiles(seconds, n=4)
        beside = statistics.median(one - other for one, other in zip(seconds, found["no hashes"], strict=True))
        print(
            f"{way:18}{middle:7.3f} s (quartiles {low:.3f} and {high:.3f}): {middle / plain - 1:+.1%}; "
            f"within a round {beside:+.3f} s"
        )


if __name__ == "__main__":
    main()
