"""Trainers in several processes on this machine, as accelerate's launcher starts them: two gloo ranks on the CPU."""

import multiprocessing
import os
import socket
import sys

import third_party
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from dpop_trainer.settings.recipes import FOLDER
from torch import multiprocessing as mp

RECIPES = FOLDER / "accelerate"


def launcher_arguments(recipe):
    """What `accelerate launch` makes of a recipe, every value of it checked by accelerate."""
    argv = ["--config_file", str(RECIPES / recipe), "-m", "dpop_trainer", "train"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(argv))
    return arguments


def launcher_environment(recipe):
    """The variables by which `accelerate launch` tells its processes of a recipe with FSDP; in fp32."""
    arguments = launcher_arguments(recipe)
    arguments.mixed_precision = "no"
    env = prepare_multi_gpu_env(arguments)
    return {key: value for key, value in env.items() if key.startswith(("FSDP_", "ACCELERATE_"))}


def launch(function, *args, num_ranks=2, env=None):
    """function(rank, *args) in `num_ranks` processes; the first failure is raised here."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_ranks), **(env or {})}
    start_ranks(_as_rank, (function, args, env), num_ranks)


def start_ranks(function, args, num_ranks):
    """function(rank, *args) in processes forked from one that has the libraries imported: they start at once."""
    multiprocessing.set_forkserver_preload(["torch", "transformers", "datasets", "peft", "accelerate"])
    mp.start_processes(function, args=args, nprocs=num_ranks, start_method="forkserver")


def _as_rank(rank, function, args, env):
    os.environ.update(env, RANK=str(rank), LOCAL_RANK=str(rank), ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    third_party.drop_deprecations_between_libraries()
    third_party.make_warnings_errors()
    function(rank, *args)
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # several trainers' process groups and reducers in one process do not always come apart in peace
