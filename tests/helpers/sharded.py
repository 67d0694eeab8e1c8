"""What tests of several processes share: a group of gloo ranks on this machine, and how their failures come back."""

import datetime
import os
import socket

import third_party
import torch
from ranks import start_ranks
from torch import distributed as dist


def run_ranks(function, *args, world_size=2):
    """function(rank, *args) in `world_size` processes of one gloo group; the first failure is raised here."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start_ranks(_in_group, (world_size, port, function, args), world_size)


def _in_group(rank, world_size, port, function, args):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # accelerate warns where it has to choose
    os.environ.setdefault("TRITON_INTERPRET", "1")  # gloo's tensors are on the CPU, also where there is a GPU
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=datetime.timedelta(seconds=60))
    torch.manual_seed(0)
    third_party.drop_deprecations_between_libraries()
    third_party.make_warnings_errors()
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()
