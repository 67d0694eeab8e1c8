"""A rank that ends, killed or on a full disk, ends the other within a minute by one line, and the run goes on."""

import errno
import json
import os
import signal
import time

import pytest
import torch
from dpop_trainer import DPOPTrainer
from dpop_trainer.cli import main
from ranks import run_ranks
from tiny import text_pairs, tiny_llama, word_tokenizer


def dpop_train(rank, words, what):
    """`dpop train` on a rank, of which the second is killed in step 5, or finds its disk full at step 6."""
    if rank == 1 and what == "killed":
        step, calls = DPOPTrainer.training_step, []

        def training_step(self, *args, **kwargs):
            calls.append(0)
            if len(calls) == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self, *args, **kwargs)

        DPOPTrainer.training_step = training_step
    if rank == 1 and what == "full":
        save = torch.save

        def full(value, path, *args, **kwargs):
            if "checkpoint-6" in str(path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            return save(value, path, *args, **kwargs)

        torch.save = full
    return main(words)


@pytest.mark.forked
@pytest.mark.slow
def test_a_rank_that_ends_ends_the_other_and_the_run_goes_on(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in text_pairs(8)))
    run = tmp_path / "run"
    words = ["train", "--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "pairs.jsonl")]
    words += ["--output_dir", str(run), "--max_steps", "8", "--save_steps", "2", "--logging_steps", "1", "--use_peft"]
    words += ["--per_device_train_batch_size", "1", "--gradient_checkpointing", "false", "--use_cpu"]
    words += ["--report_to", "none", "--disable_tqdm", "true"]
    other_ended = f"dpop train: while training in {run}"

    started = time.monotonic()
    (code, told), (killed, _) = run_ranks(dpop_train, words, "killed")
    assert (code, killed) == (1, -signal.SIGKILL), told
    (line,) = [line for line in told.splitlines() if line.startswith("dpop train: ")]
    assert line.startswith(other_ended)
    assert "another process of this run has ended or does not answer; its own last lines say why. Then give" in line
    assert (run / "checkpoint-4").is_dir()

    (code, told), (full, says) = run_ranks(dpop_train, words, "full")
    assert (code, full) == (1, 1), told + says
    assert f"{other_ended}, from {run / 'checkpoint-4'}: another process of this run has ended" in told
    (line,) = [line for line in says.splitlines() if line.startswith("dpop train: ")]
    assert f"{run / 'checkpoint-6'}: expected to write a checkpoint, got [Errno 28] No space left on device" in line
    assert "checkpoint-4 is untouched: make room" in line
    assert time.monotonic() - started < 2 * 60
    assert not (run / "checkpoint-6").exists()

    results = run_ranks(dpop_train, words, None)
    assert [code for code, _ in results] == [0, 0], results
    assert f"Resuming from {run / 'checkpoint-4'}" in results[0][1]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
    assert json.loads((run / "finished.json").read_text())["step"] == 8
