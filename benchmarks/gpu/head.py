"""The head at published sizes against its peers, with a bare product of each size measured in the same run."""

from typing import Any

import torch

from benchmarks.cases import HeadCase
from benchmarks.compare import Effort, side_by_side
from benchmarks.floors import TINY, Probe
from benchmarks.gpu import predicted, runner
from benchmarks.gpu.work import Work
from benchmarks.peers import Peer, all_peers, ours
from benchmarks.plan import TINY_HEAD
from benchmarks.shapes import HeadShape, head_shape

CASES = (
    (HeadShape("TRL's published case", 151936, 4096), 8192),
    (head_shape("Llama-3-8B"), 8192),
    (HeadShape("Liger's published case", 131072, 4096), 16384),
)
"""Heads and tokens: TRL's issue 7244 and Liger's benchmark of its SM90 head, both of an H100, and a model's own."""
TASKS = ("frozen", "reference", "trainable")
PEERS = {
    "ready": ("dpop-kernels", "TRL", "torch linear_cross_entropy", "PyTorch"),
    "compiling": ("dpop-kernels", "Liger, scaled", "Liger", "CCE, exact"),
}
"""Those that compile for long, or might hang doing so, have a process of their own, ours with them."""
COPY_BYTES = 2 << 30


def run(work: Work, name: str) -> None:
    """All cases for one group of peers, task by task of each size."""
    peers = {peer: found for peer, found in all_peers().items() if peer in PEERS[name]}
    for head, num_tokens in ((TINY_HEAD, 24),) if work.rehearse else CASES:
        for task in TASKS:
            case = HeadCase(task=task, head=head, num_tokens=num_tokens, device=work.device, dtype=work.dtype)
            compare(work, case, peers, probe=Probe(COPY_BYTES, (num_tokens, head.hidden_size, head.vocab_size)))


def compare(work: Work, case: Any, peers: dict[str, Peer], *, probe: Probe | None = None, group: str = "") -> None:
    """One record per peer: refused where it is wrong against fp64, else timed in turns with the others.

    Args:
        work: of the job.
        case: of benchmarks/cases.py.
        peers: by name.
        probe: sizes of the bare copy and product; the device's own by default.
        group: tells this run of the case from others of the part.
    """
    items = {name: f"{case}, {name}{group}" for name, peer in peers.items() if case.takes(peer)}
    if all(work.found(item) for item in items.values()):
        return
    expected = {name: {"seconds": predict(case, name)} for name in items}
    least = 10 * sum(prediction["seconds"] for prediction in expected.values()) + (0 if work.rehearse else 3)
    if work.left < least:
        work.code = work.code or runner.UNFINISHED
        work.write(f"{case}{group}", skipped=f"{work.left:.0f} s are left")
        return
    for name, item in items.items():
        work.write(item, predicted=expected[name], begun=True)
    effort = Effort(rounds=3, seconds=0.6, probe=probe)
    chosen = ours.BACKEND
    if work.rehearse:
        effort, ours.BACKEND = Effort(rounds=1, seconds=0.0, probe=TINY), "fused"
    try:
        results = side_by_side(case, peers, effort)
    finally:
        ours.BACKEND = chosen
    for name, result in results.items():
        work.write(
            items[name], is_ours=peers[name].package == "dpop-kernels", predicted=expected[name], **result.record
        )
    vars(case).clear()  # its tensors make room for the next
    if work.device.type == "cuda":
        torch.cuda.empty_cache()


def predict(case: Any, peer: str) -> float:
    """Seconds: a peer's own number of products where it is known, else what none can do without."""
    flop, num_bytes = case.cost()
    counted = predicted.head_products().get(peer, {}).get(case.task)
    if case.level == "head" and counted is not None:
        flop = counted * 2.0 * case.num_tokens * case.head.vocab_size * case.head.hidden_size
    return predicted.seconds(flop=flop, num_bytes=num_bytes)
