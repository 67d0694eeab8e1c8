"""What else docs/benchmarks.md shows: DPO, logits, the pair loss, other lengths and heads, while there is time."""

from benchmarks.gpu.head import PEERS, compare
from benchmarks.gpu.work import Work
from benchmarks.peers import all_peers
from benchmarks.plan import cases, rehearsal


def run(work: Work, name: str) -> None:
    """The planned cases that the head's part has not had."""
    known = (*PEERS["ready"], "dpop-kernels, in place")
    peers = {peer: found for peer, found in all_peers().items() if peer in known}
    for case in rehearsal(work.device) if work.rehearse else cases(work.device):
        compare(work, case, peers)
