"""Trainers in several processes on this machine, as accelerate's launcher starts them: two gloo ranks on the CPU."""

import os
import socket
import sys
import warnings

import torch
from torch import multiprocessing as mp

# what `accelerate launch` sets from trainer/recipes/accelerate/fsdp2_8.yaml
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def launch(function, *args, num_ranks=2, env=None):
    """function(rank, *args) in `num_ranks` processes; the first failure is raised here."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_ranks), **(env or {})}
    mp.spawn(_as_rank, args=(function, args, env), nprocs=num_ranks)


def _as_rank(rank, function, args, env):
    os.environ.update(env, RANK=str(rank), LOCAL_RANK=str(rank), ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    warnings.simplefilter("error")  # as pytest does in its own process
    function(rank, *args)
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # several trainers' process groups and reducers in one process do not always come apart in peace
