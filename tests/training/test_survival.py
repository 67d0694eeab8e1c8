"""What a run lives through: being killed, a full disk, a damaged checkpoint, a changed configuration."""

import errno
import json
import logging
import os
import resource
import shutil
import signal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import xxhash
import yaml
from dpop_trainer import DPOPConfig
from dpop_trainer.cli import main
from dpop_trainer.data import digests, load_pairs, read_pairs, tokenise_pairs
from dpop_trainer.models.trained import load_trained
from dpop_trainer.run_folder.checkpoints import checkpoint_problem, files_of
from dpop_trainer.run_folder.files import append_lines
from dpop_trainer.run_folder.run_files import RunFiles
from dpop_trainer.run_folder.sealing import Sealing
from filelock import FileLock
from ranks import run_alone
from tiny import text_pairs, tiny_llama, word_tokenizer
from transformers import TrainerState

TIMES = ("per_second", "_runtime", "peak_gib")

# SIGKILL in the middle of a step: between the two micro-batches of step 5
MID_STEP = """
from dpop_trainer import DPOPTrainer
step = DPOPTrainer.training_step
calls = []
def training_step(self, *args, **kwargs):
    calls.append(0)
    if len(calls) == 10:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)
DPOPTrainer.training_step = training_step
"""

# SIGKILL in the middle of a checkpoint: half of the optimizer's state of step 6 is on the disk
MID_SAVE = """
import torch
save = torch.save
def half(value, path, *args, **kwargs):
    save(value, path, *args, **kwargs)
    if "checkpoint-6" in str(path) and str(path).endswith("optimizer.pt"):
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = half
"""


@pytest.fixture
def setting(tmp_path):
    """A saved model, 14 pairs, and a YAML file: LoRA with dropout, 4 steps an epoch of which the last is partial."""
    tiny_llama().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in text_pairs(14)))
    values = {
        "model_name_or_path": str(tmp_path / "model"),
        "dataset_name": str(tmp_path / "pairs.jsonl"),
        "output_dir": str(tmp_path / "run"),
        "max_steps": 10,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 5.0e-3,
        "use_peft": True,
        "lora_dropout": 0.2,
        "disable_dropout": False,
        "gradient_checkpointing": False,
        "sync_ref_model": True,  # at steps 3, 6 and 9: no checkpoint is of a step at which it moves but one
        "ref_model_sync_steps": 3,
        "logging_steps": 3,  # so that checkpoints fall between two log lines
        "save_steps": 2,
        "save_total_limit": 2,
        "report_to": "none",
        "use_cpu": True,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def argv(setting, *flags):
    return ["train", "--config", str(setting / "run.yaml"), *flags]


def command(setting, sabotage, *flags):
    """`dpop train` in a process of its own -> exit code, what it wrote."""
    return run_alone(sabotaged, sabotage, argv(setting, *flags))


def sabotaged(sabotage, words):
    exec(sabotage, {"os": os, "signal": signal})
    return main(words)


def log_of(folder):
    """The lines of metrics.jsonl, without what is about time."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.endswith(TIMES)} for line in lines]


def weights_of(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def checkpoint_names(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


@pytest.mark.forked
@pytest.mark.slow
def test_killed_twice_is_the_uninterrupted_run_bit_for_bit(setting):
    # in a process of its own like the others: what this one patches in torch may draw random numbers
    code, output = command(setting, "", "--output_dir", str(setting / "whole"))
    assert code == 0, output
    run = setting / "run"

    code, output = command(setting, MID_STEP)
    assert code == -signal.SIGKILL, output
    assert checkpoint_names(run) == ["checkpoint-2", "checkpoint-4"]

    code, output = command(setting, MID_SAVE)  # goes on from step 4
    assert code == -signal.SIGKILL, output
    assert checkpoint_names(run) == [".incomplete", "checkpoint-2", "checkpoint-4"]
    assert (run / ".incomplete" / "checkpoint-6" / "optimizer.pt").exists()

    code, output = command(setting, "")
    assert code == 0, output
    assert "Removed what a stopped run left of checkpoint-6: it was not whole" in output
    assert f"Resuming from {run / 'checkpoint-4'}" in output
    assert checkpoint_names(run) == ["checkpoint-10", "checkpoint-8"]
    assert weights_of(run) == weights_of(setting / "whole")
    assert log_of(run) == log_of(setting / "whole")


def test_finished_run_says_so(setting, capsys):
    flags = ["--max_steps", "2", "--save_strategy", "no"]
    assert main(argv(setting, *flags)) == 0
    before = weights_of(setting / "run")
    log = log_of(setting / "run")
    assert main(argv(setting, *flags, "--logging_steps", "1")) == 0  # which is no other run
    assert "Finished already" in capsys.readouterr().out
    assert weights_of(setting / "run") == before
    assert log_of(setting / "run") == log
    assert main(argv(setting, *flags, "--beta", "0.1")) == 1
    assert "another beta: 0.3 before, 0.1 now. Choose another output_dir" in capsys.readouterr().err
    assert main(argv(setting, "--max_steps", "4", "--save_strategy", "no")) == 1
    assert "max_steps: expected the finished run" in capsys.readouterr().err


def flip(path):
    """One bit in the middle of a file: the same size, another content."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_finished_run_whose_model_or_data_changed_is_none(setting, capsys):
    flags = ["--max_steps", "2", "--save_steps", "2"]
    assert main(argv(setting, *flags)) == 0
    run, weights = setting / "run", setting / "run" / "adapter_model.safetensors"
    kept = weights_of(run)
    for damage, told in (
        (flip, "other bytes in adapter_model"),
        (truncate, "bytes of adapter_model"),
        (Path.unlink, "found no"),
    ):
        weights.write_bytes(kept)
        damage(weights)
        capsys.readouterr()
        assert main(argv(setting, *flags)) == 1
        error = capsys.readouterr().err
        assert told in error
        assert "Delete finished.json there: the same command then goes on from checkpoint-2" in error
    (run / "finished.json").unlink()
    assert main(argv(setting, *flags)) == 0
    assert weights_of(run) == kept
    source = setting / "pairs.jsonl"
    source.write_text(source.read_text().replace("w5", "w7"))
    assert main(argv(setting, *flags)) == 1
    assert f"a finished run with another content of {source}" in capsys.readouterr().err


def test_interrupted_after_its_last_step_trains_no_further(setting):
    flags = ["--max_steps", "5"]  # in the middle of an epoch
    assert main(argv(setting, *flags)) == 0
    run = setting / "run"
    before = weights_of(run)
    (run / "finished.json").unlink()  # as if killed between the last checkpoint and the end
    (run / "adapter_model.safetensors").unlink()
    assert main(argv(setting, *flags)) == 0
    assert weights_of(run) == before
    assert json.loads((run / "finished.json").read_text())["step"] == 5


def test_a_stream_resumed_at_its_end_has_its_counts(setting):
    """14 pairs in batches of 64 records: the first pass of 4 pairs a step ends in step 4, and so the second is read."""
    flags = ["--max_steps", "5", "--streaming", "true"]
    assert main(argv(setting, *flags)) == 0
    run = setting / "run"
    whole = log_of(run)
    (run / "finished.json").unlink()  # as if killed during the final save
    assert main(argv(setting, *flags)) == 0
    assert log_of(run) == whole
    assert whole[-1]["train_data/num_pairs_in"] == 28


def test_written_configuration_reproduces_the_run_bit_for_bit(setting):
    assert main(argv(setting, "--max_steps", "4", "--save_strategy", "no")) == 0
    run, again = setting / "run", setting / "again"
    assert main(["train", "--config", str(run / "config.yaml"), "--output_dir", str(again)]) == 0
    assert weights_of(again) == weights_of(run)
    assert log_of(again) == log_of(run)
    environment = json.loads((run / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["num_processes"] == 1
    assert str(setting) not in (run / "environment.json").read_text()


@pytest.fixture
def interrupted(setting):
    """A run of four steps with two checkpoints, not finished."""
    assert main(argv(setting, "--max_steps", "4")) == 0
    (setting / "run" / "finished.json").unlink()
    return setting


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rate", "1e-3"], "learning_rate: 0.005 before, 0.001 now"),
        (["--seed", "7"], "seed: 42 before, 7 now"),
        (["--max_train_pairs", "13"], "max_train_pairs: None before, 13 now, training data (digest): "),
    ],
)
def test_changed_configuration_is_refused(interrupted, capsys, flags, message):
    assert main(argv(interrupted, *flags)) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Set it back; or start anew with another output_dir" in error


def test_changed_data_is_refused_and_an_explicit_checkpoint_warns(interrupted, capsys, caplog):
    path = interrupted / "pairs.jsonl"
    path.write_text(path.read_text().replace("w5", "w7"))  # as many pairs and tokens as before
    assert main(argv(interrupted)) == 1
    assert "training data (digest): " in capsys.readouterr().err
    checkpoint = interrupted / "run" / "checkpoint-2"
    with caplog.at_level(logging.WARNING):
        assert main(argv(interrupted, "--max_steps", "4", "--resume_from_checkpoint", str(checkpoint))) == 0
    assert "The rest is not the run that began there" in caplog.text


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("adapter_model.safetensors", truncate, "bytes of adapter_model.safetensors"),
        ("optimizer.pt", Path.unlink, "found no optimizer.pt in it"),
        ("optimizer.pt", truncate, "bytes of optimizer.pt"),
        ("trainer_state.json", truncate, "got an unreadable trainer_state.json"),
        ("trainer_state.json", Path.unlink, "found no trainer_state.json in it"),
        ("rng_state.pth", Path.unlink, "found no rng_state.pth in it"),
        ("checkpoint.json", truncate, "got an unreadable trainer_state.json or checkpoint.json"),
    ],
)
def test_damaged_checkpoint_is_named_and_the_one_before_offered(interrupted, capsys, name, damage, message):
    run = interrupted / "run"
    damage(run / "checkpoint-4" / name)
    assert main(argv(interrupted)) == 1
    error = capsys.readouterr().err
    assert f"{run / 'checkpoint-4'}: expected a whole checkpoint" in error
    assert message in error
    assert f"checkpoint-2 is whole: go on from it with --resume_from_checkpoint {run / 'checkpoint-2'}" in error
    assert checkpoint_names(run) == ["checkpoint-2", "checkpoint-4"]


def test_a_flipped_bit_in_any_file_of_a_checkpoint_is_told(interrupted, capsys):
    run = interrupted / "run"
    checkpoint = run / "checkpoint-4"
    names = json.loads((checkpoint / "checkpoint.json").read_text())["files"]
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= names.keys()
    for name in names:
        kept = (checkpoint / name).read_bytes()
        flip(checkpoint / name)
        problem = checkpoint_problem(checkpoint)
        assert name in problem or "trainer_state.json" in problem
        assert f"checkpoint-2 is whole: go on from it with --resume_from_checkpoint {run / 'checkpoint-2'}" in problem
        (checkpoint / name).write_bytes(kept)
    assert checkpoint_problem(checkpoint) is None
    flip(checkpoint / "optimizer.pt")
    assert main(argv(interrupted)) == 1
    assert "got other bytes in optimizer.pt than were written" in capsys.readouterr().err


def test_weights_that_rotted_are_loaded_by_no_tool(setting):
    assert main(argv(setting, "--max_steps", "2")) == 0
    for record in ("checkpoint-2/checkpoint.json", "finished.json"):
        record = setting / "run" / record
        load_trained(str(record.parent))
        flip(record.parent / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=r"expected the files that the run wrote, got other bytes in adapter_mod"):
            load_trained(str(record.parent))
        record.unlink()  # as whoever changed it on purpose is told
        load_trained(str(record.parent))


def test_a_resumed_run_has_its_log_from_the_checkpoint(tmp_path):
    args = DPOPConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    state = TrainerState(global_step=4, log_history=[{"loss": 0.1, "step": 2}, {"loss": 0.3, "epoch": 0.5, "step": 4}])
    whole = [{"step": 0, "pairs": 3.0}, {"step": 2, "loss": 0.1}, {"step": 4, "loss": 0.3, "epoch": 0.5}]
    late = '{"step": 4, "train_runtime": 1.0}\n{"step": 6, "loss": 9}\n'
    for found in (None, b"", b"\xff\x00{", b'{"step": 0}\n{"step": 2, "lo', late.encode()):
        path = tmp_path / "metrics.jsonl"
        path.unlink(missing_ok=True)
        if found is not None:
            path.write_bytes(found)
        RunFiles({}, {"pairs": 3.0}).on_train_begin(args, state, None)
        assert [json.loads(line) for line in path.read_text().splitlines()] == whole


def test_a_second_run_in_a_folder_is_refused(setting, capsys):
    holder = FileLock(setting / "run" / "_run.lock")
    (setting / "run").mkdir()
    (setting / "run" / "_run.holder").write_text(json.dumps({"process": 7, "host": "here", "since": "noon"}))
    assert main(argv(setting, "--max_steps", "1")) == 0  # what a killed run has left holds nobody up
    assert not (setting / "run" / "_run.holder").exists()
    with holder:
        (setting / "run" / "_run.holder").write_text(json.dumps({"process": 7, "host": "here", "since": "noon"}))
        before = sorted(path.name for path in (setting / "run").iterdir())
        assert main(argv(setting, "--max_steps", "1", "--seed", "7")) == 1
        error = capsys.readouterr().err
        assert f"expected a folder in which no run is going on, got {str(setting / 'run')!r}, where process 7" in error
        assert sorted(path.name for path in (setting / "run").iterdir()) == before


def test_a_changed_base_is_refused(interrupted, capsys):
    model = tiny_llama()
    model.config.rms_norm_eps = 1e-3
    model.lm_head.weight.data[30, 3] += 1e-6  # the middle of a tensor
    model.save_pretrained(interrupted / "model")
    assert main(argv(interrupted)) == 1
    error = capsys.readouterr().err
    assert "rms_norm_eps of the model: 1e-06 before, 0.001 now" in error
    assert "base under the adapter (digest): " in error


def test_foreign_checkpoint_without_record(interrupted, capsys):
    """One that transformers' own trainer wrote: weights are opened, and an optimizer's state is asked for."""
    run = interrupted / "run"
    shutil.rmtree(run / "checkpoint-2")
    checkpoint = run / "checkpoint-4"
    for name in ("checkpoint.json", "progress_0.safetensors"):
        (checkpoint / name).unlink()
    truncate(checkpoint / "adapter_model.safetensors")
    assert main(argv(interrupted)) == 1
    error = capsys.readouterr().err
    assert "got an unreadable adapter_model.safetensors" in error
    assert "No other checkpoint of this run is whole" in error
    (checkpoint / "optimizer.pt").unlink()
    shutil.copy(run / "adapter_model.safetensors", checkpoint)
    assert main(argv(interrupted)) == 1
    assert "found no state of the optimizer in it (optimizer.pt)" in capsys.readouterr().err


@pytest.mark.parametrize("failing", ["optimizer.pt", "checkpoint.json"])
def test_full_disk_stops_with_the_older_checkpoint_kept(setting, capsys, monkeypatch, failing):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if failing == "optimizer.pt":
            save = torch.save
            patch.setattr(
                torch, "save", lambda v, path, *a: full() if "checkpoint-4/opt" in str(path) else save(v, path, *a)
            )
        else:  # the very last file
            import dpop_trainer.run_folder.checkpoints as checkpoints

            write = checkpoints.write_json
            patch.setattr(checkpoints, "write_json", lambda p, v: full() if "point-4" in str(p) else write(p, v))
        assert main(argv(setting, "--max_steps", "6")) == 1
    run = setting / "run"
    error = capsys.readouterr().err
    assert f"{run / 'checkpoint-4'}: expected to write a checkpoint, got [Errno 28] No space left on device" in error
    assert "checkpoint-2 is untouched: make room" in error
    assert [name for name in checkpoint_names(run) if name != ".incomplete"] == ["checkpoint-2"]
    assert not (run / ".incomplete" / "checkpoint-4").exists()
    assert main(argv(setting, "--max_steps", "6")) == 0  # there is room now
    assert main(argv(setting, "--max_steps", "6", "--output_dir", str(setting / "whole"))) == 0
    assert weights_of(run) == weights_of(setting / "whole")


def test_full_disk_loses_no_line_of_the_log(setting, monkeypatch, caplog):
    from dpop_trainer.run_folder import run_files

    append, failures = run_files.append_lines, []

    def sometimes_full(path, lines):
        if len(failures) < 2:
            failures.append(0)
            with path.open("a") as file:
                file.write(lines[:9])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(path, lines)

    monkeypatch.setattr(run_files, "append_lines", sometimes_full)
    monkeypatch.setattr("dpop_trainer.report.run_page.write_run_page", lambda *_: 1 / 0)
    flags = ["--max_steps", "4", "--logging_steps", "1", "--save_strategy", "no"]
    with caplog.at_level(logging.WARNING):
        assert main(argv(setting, *flags)) == 0
    assert len(failures) == 2
    assert [line["step"] for line in run_files.read_metrics(setting / "run") if "loss" in line] == [1, 2, 3, 4]
    assert caplog.text.count("The run goes on") == 2  # of the lines once, of the page once


def test_lines_are_added_whole_or_not_at_all(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"one\ntwo\nhal")
    append_lines(path, "three\n")
    assert path.read_bytes() == b"one\ntwo\nthree\n"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (17, limits[1]))  # room for three bytes more
    try:
        with pytest.raises(OSError, match=r"No space left|File too large"):
            append_lines(path, "four\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"one\ntwo\nthree\n"


def test_best_checkpoint_keeps_its_place(setting):
    """transformers notes the best checkpoint's path while the checkpoint is still being written elsewhere."""
    flags = ["--eval_dataset_name", str(setting / "pairs.jsonl"), "--eval_strategy", "steps", "--eval_steps", "2"]
    best = ["--load_best_model_at_end", "true", "--metric_for_best_model", "rewards/margins"]
    assert main(argv(setting, *flags, *best, "--max_steps", "6")) == 0
    run = setting / "run"
    state = json.loads((run / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] in {str(run / name) for name in checkpoint_names(run)}
    margins = {line["step"]: line["eval_rewards/margins"] for line in log_of(run) if "eval_rewards/margins" in line}
    assert state["best_metric"] == max(margins.values())


def cut_a_batch(path):
    """Arrow that ends where a batch of records does reads as a whole file with fewer rows."""
    reader = pa.ipc.open_stream(path.read_bytes())
    schema, batches = reader.schema, list(reader)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch.slice(0, len(batch) - 1))


@pytest.mark.parametrize("damage", [truncate, flip, cut_a_batch])
def test_a_cache_that_is_not_what_was_written_is_made_anew(setting, monkeypatch, caplog, damage):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", setting / "cache")
    source = setting / "pairs.jsonl"

    def read():
        return tokenise_pairs(read_pairs(str(source)), word_tokenizer())[0].to_list()

    def told():
        lines, _ = caplog.text.count("Reading the data anew"), caplog.clear()
        return lines

    expected = read()
    assert told() == 0
    files = sorted((setting / "cache").rglob("*.arrow"), key=lambda path: path.name.startswith("cache-"))
    rows, tokens = files
    for path in (tokens, rows):
        damage(path)
        assert read() == expected
        assert told() == 1
        assert read() == expected  # and is sound from then on
        assert told() == 0
    newest = max((setting / "cache").rglob("cache-*.seal"), key=lambda seal: seal.stat().st_mtime_ns)
    newest.unlink()  # as where a kill came between the two
    assert read() == expected
    assert told() == 1


def test_a_parquet_cache_that_was_cut_is_made_anew(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "pairs.parquet"
    pq.write_table(pa.Table.from_pylist(text_pairs(4)), path)
    assert len(load_pairs(str(path))) == 4
    (cached,) = (tmp_path / "cache").rglob("*.arrow")
    for seal in ("kept", "gone"):  # without one, the rows are counted
        cut_a_batch(cached)
        if seal == "gone":
            cached.with_name(f"{cached.name}.seal").unlink()
        caplog.clear()
        assert load_pairs(str(path)).to_list() == text_pairs(4)
        assert caplog.text.count("Reading the data anew") == 1


def test_cache_that_cannot_be_written_is_named(setting, monkeypatch):
    dataset = load_pairs(str(setting / "pairs.jsonl"))

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("datasets.Dataset.map", full)
    with pytest.raises(ValueError, match=r"expected to write tokenised pairs .*No space left on device"):
        tokenise_pairs(dataset, word_tokenizer())


def test_a_checkpoint_is_hashed_behind_its_writer(tmp_path):
    """By xxhash itself; what is written anew meanwhile is read anew, and what is gone is not asked for."""
    contents = {"model.safetensors": b"a" * 3_000_000, "deeper/optimizer.pt": b"b", "trainer_state.json": b"{}"}
    (tmp_path / "deeper").mkdir()
    with Sealing() as sealing:
        for name, content in contents.items():
            (tmp_path / name).write_bytes(content)
            (tmp_path / "gone").write_bytes(b"c")
            sealing.take(files_of(tmp_path))
        contents["trainer_state.json"] = b"{ }"
        (tmp_path / "trainer_state.json").write_bytes(b"{ }")
        (tmp_path / "gone").unlink()
        found = sealing.digests(tmp_path, files_of(tmp_path))
    expected = {
        name: {"bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
        for name, content in contents.items()
    }
    assert found == expected


def test_hashing_begins_while_the_optimizer_is_written(setting, monkeypatch):
    """When torch.save is given the optimizer's state of step 2, the model's files have been taken."""
    taken, save = [], torch.save

    def saving(value, path, *args, **kwargs):
        if str(path).endswith("checkpoint-2/optimizer.pt"):
            taken.append(set(map(Path, began)))
        return save(value, path, *args, **kwargs)

    began, digest_of = [], digests.digest_of
    monkeypatch.setattr(torch, "save", saving)
    monkeypatch.setattr(Sealing, "take", lambda self, paths: began.extend(paths))
    monkeypatch.setattr(Sealing, "digests", lambda self, folder, paths: {path.name: digest_of(path) for path in paths})
    assert main(argv(setting, "--max_steps", "2")) == 0
    (first,) = taken
    assert {"adapter_model.safetensors", "adapter_config.json"} <= {path.name for path in first}
    assert not {"optimizer.pt", "scheduler.pt", "rng_state.pth"} & {path.name for path in first}
