"""How many matrix products each peer's head takes, forward and backward: counted where it runs, else read in its code.

    python -m benchmarks.counted.head_products OUT.json

One product is 2·N·V·H FLOP. Three ways: without gradient, with a frozen weight, with a trainable one.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks import records
from benchmarks.cases import HeadCase
from benchmarks.counted.shapes_only import IN_PLACE
from benchmarks.peers import Peer, all_peers
from benchmarks.shapes import HeadShape

TASKS = ("reference", "frozen", "trainable")
SHAPE, NUM_TOKENS = HeadShape("counted", vocab_size=512, hidden_size=64), 96
"""Larger than no chunk of any peer, so that nothing is computed for padding."""

READ = {
    "torch.compile": (1, 2, 3),
    "torch linear_cross_entropy": (1, 3, 4),
    "Liger": (1, 3, 4),
    "Liger, scaled": (1, 4, 4),
    "CCE, exact": (1, 3, 4),
    "CCE, filtered": (1, 3, 4),
    "QuACK": (1, 2, 3),
}
"""Read in the code of `VERSIONS_READ`: compiled, below what a counter sees, or for CUDA alone. QuACK knows each token's
factor in the forward, because it gives the mean alone; Liger's scaled head makes W's gradient whoever asks."""
VERSIONS_READ = {
    "torch": "2.13.0",
    "liger-kernel": "0.8.5",
    "cut-cross-entropy": "25.1.1",
    "quack-kernels": "0.6.5",
}


class ProductFlop(TorchDispatchMode):
    """The FLOP of all matrix products that torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        packet = IN_PLACE.get(func._overloadpacket, func._overloadpacket)
        if packet in flop_registry:
            self.total += flop_registry[packet](*args, out_val=output)
        return output


def counted_products(peer: Peer) -> tuple[float, ...]:
    """Of each of `TASKS`, on a CPU."""
    found = []
    for task in TASKS:
        device = torch.device("cpu")
        case: Any = HeadCase(task=task, device=device, dtype=torch.float32, head=SHAPE, num_tokens=NUM_TOKENS)
        call = case.candidate(peer)
        with ProductFlop() as flop:
            call()
        found.append(flop.total / (2 * NUM_TOKENS * SHAPE.vocab_size * SHAPE.hidden_size))
    return tuple(found)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.counted.head_products", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("out", type=Path, help="the record, JSON")
    options = parser.parse_args(argv)
    peers: dict[str, Any] = {}
    for name, peer in all_peers().items():
        if peer.linear_logps is None:
            continue
        if name in READ:
            peers[name] = {"products": READ[name], "read_in": VERSIONS_READ[peer.package]}
        elif peer.why_not(torch.device("cpu")) is None:
            peers[name] = {"products": counted_products(peer), "counted_in": peer.version}
    record = {"case": "head_products", "tasks": TASKS, "peers": peers, "commit": records.commit()}
    options.out.write_text(json.dumps(record, indent=2) + "\n")
    for name, found in peers.items():
        print(f"{name}: {', '.join(f'{count:g} {task}' for count, task in zip(found['products'], TASKS, strict=True))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
