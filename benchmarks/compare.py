"""Peers side by side on one case: checked against fp64, then timed in turns. A wrong result is not timed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks import measure
from benchmarks.cases import Case, Output
from benchmarks.floors import PROBES, Floors, Probe, measure_floors
from benchmarks.peers import Peer


@dataclass(frozen=True)
class Effort:
    """How long a case is measured."""

    rounds: int = 5
    """At least this many of every peer."""
    seconds: float = 2.0
    """And as many as are begun in this time."""
    probe: Probe | None = None
    """Sizes of the floors; None for the device's own."""


@dataclass
class Result:
    """A peer's record, and the samples behind it."""

    record: dict[str, Any]
    seconds: list[float] = field(default_factory=list)

    @property
    def trouble(self) -> str | None:
        """Why there is no time, as the record says it."""
        return next(
            (f"{key}: {self.record[key]}" for key in ("skipped", "refused", "failed") if key in self.record), None
        )


def side_by_side(case: Case, peers: Mapping[str, Peer], effort: Effort) -> dict[str, Result]:
    """One record per peer that offers the case's level, by name.

    A peer that cannot run here is `skipped`, one that fails or runs out of memory has `failed`, one whose result is not
    the fp64 truth within its rounding is `refused`; none of these has a time.
    """
    results: dict[str, Result] = {}
    calls: dict[str, Callable[[], Output]] = {}
    flop, num_bytes = case.cost()
    floors = measure_floors(case.device, case.dtype, effort.probe or PROBES[case.device.type])
    for name, peer in peers.items():
        if not case.takes(peer):
            continue
        results[name] = Result(_identity(case, peer, flop, num_bytes, floors))
        if reason := peer.why_not(case.device):
            results[name].record["skipped"] = reason
            continue
        call, fields = _checked(case, peer)
        results[name].record |= fields
        if call is not None:
            calls[name] = call
    for name, seconds in measure.time_in_turns(
        calls, case.device, rounds=effort.rounds, seconds=effort.seconds
    ).items():
        record = results[name].record
        record |= measure.spread(seconds)
        record["of_floor"] = record["floor_s"] / record["median_s"]
        results[name].seconds = seconds
    return results


def _identity(case: Case, peer: Peer, flop: float, num_bytes: float, floors: Floors) -> dict[str, Any]:
    return {
        "level": case.level,
        "task": case.task,
        "shape": case.sizes,
        "dtype": str(case.dtype).removeprefix("torch."),
        "peer": peer.name,
        "peer_version": peer.version,
        "settings": peer.settings,
        "mean_only": peer.gives_mean_only,
        "flop": flop,
        "bytes": num_bytes,
        "floor_s": floors.seconds(flop=flop, num_bytes=num_bytes),
        "copy_bytes_per_s": floors.bytes_per_s,
        "gemm_flop_per_s": floors.flop_per_s,
    }


def _checked(case: Case, peer: Peer) -> tuple[Callable[[], Output] | None, dict[str, Any]]:
    """The call if it may be timed, and what is known of it: errors, peak memory, or why it may not."""
    try:
        call = case.candidate(peer)
        errors = case.errors(call(), peer)
        if case.is_wrong(errors, peer):
            return None, {"errors": errors, "refused": "wrong result"}
        # again for memory, with a call of its own: one that writes over its inputs gets fresh ones
        call = case.candidate(peer)
        call()
        return call, {"errors": errors, "peak_bytes": measure.peak_bytes(call, case.device)}
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None, {"failed": "out of memory"}
    except Exception as error:  # one peer that fails must not cost the others their figures
        return None, {"failed": f"{type(error).__name__}: {error}"[:500]}
