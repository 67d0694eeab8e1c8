"""Trainers in processes of their own on this machine: one, or two gloo ranks as accelerate's launcher starts them."""

import contextlib
import gc
import multiprocessing
import os
import socket
import sys
import tempfile
from pathlib import Path

import third_party
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from dpop_trainer.settings.recipes import FOLDER
from torch import multiprocessing as mp

RECIPES = FOLDER / "accelerate"
LONGEST = 600.0  # seconds
PRELOADED = ["torch", "transformers", "datasets", "peft", "accelerate", "dpop_trainer.training.trainer"]


def launcher_arguments(recipe):
    """What `accelerate launch` makes of a recipe, every value of it checked by accelerate."""
    argv = ["--config_file", str(RECIPES / recipe), "-m", "dpop_trainer", "train"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(argv))
    return arguments


def launcher_environment(recipe, num_ranks=2):
    """The variables by which `accelerate launch` tells its processes of a recipe with FSDP, DeepSpeed or tensor
    parallelism; in fp32."""
    arguments = launcher_arguments(recipe)
    arguments.mixed_precision = "no"
    if arguments.parallelism_config_tp_size > 1:
        arguments.parallelism_config_tp_size = num_ranks
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ""  # of which a file of DeepSpeed's own has other values
        _, env = prepare_deepspeed_cmd_env(arguments)
        # told that this is no CPU, where it is not asked for, and that its tensors are on one
        env |= {"ACCELERATE_USE_CPU": "false", "ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
    else:
        env = prepare_multi_gpu_env(arguments)
    return {key: value for key, value in env.items() if key.startswith(("FSDP_", "ACCELERATE_", "DS_", "PARALLELISM_"))}


def launch(function, *args, num_ranks=2, env=None):
    """function(rank, *args) in `num_ranks` processes; the first failure is raised here."""
    start_ranks(_as_rank, (function, args, _meeting_place(num_ranks) | (env or {})), num_ranks)


def _meeting_place(num_ranks):
    """The variables by which ranks find one another."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_ranks)}


def start_ranks(function, args, num_ranks):
    """function(rank, *args) in processes forked from one that has the libraries imported: they start at once."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    mp.start_processes(function, args=args, nprocs=num_ranks, start_method="forkserver")


def run_alone(function, *args, longest=LONGEST):
    """function(*args) in a forked process -> its exit code (-9 if it was killed, as it is after `longest` seconds), all
    that it wrote."""
    with started_alone(function, *args) as (process, written):
        return _ended(process, written, longest)


def run_ranks(function, *args, num_ranks=2):
    """function(rank, *args) in ranks that end as they may, each on its own -> of each its exit code, what it wrote."""
    place = {**_meeting_place(num_ranks), "ACCELERATE_USE_CPU": "true"}
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(
                started_alone(function, rank, *args, env={**place, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            )
            for rank in range(num_ranks)
        ]
        return [_ended(*one, LONGEST) for one in started]


def _ended(process, written, longest):
    process.join(longest)
    process.kill()  # where it has not ended
    process.join()
    return process.exitcode, written.read_text(errors="replace")


@contextlib.contextmanager
def started_alone(function, *args, env=None):
    """A forked process that runs function(*args) and ends with its result, the file of all that it writes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "written"
        process = context.Process(target=_alone, args=(written, function, args, env or {}))
        process.start()
        try:
            yield process, written
        finally:
            process.kill()
            process.join()


def _alone(written, function, args, env):
    os.environ.update(env)
    out = os.open(written, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    gc.freeze()  # the libraries stay: transformers collects garbage after every training
    sys.exit(function(*args))


def _as_rank(rank, function, args, env):
    os.environ.update({"ACCELERATE_USE_CPU": "true", **env, "RANK": str(rank), "LOCAL_RANK": str(rank)})
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    gc.freeze()  # the libraries stay: transformers collects garbage after every training
    third_party.drop_deprecations_between_libraries()
    third_party.make_warnings_errors()
    function(rank, *args)
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # several trainers' process groups and reducers in one process do not always come apart in peace
