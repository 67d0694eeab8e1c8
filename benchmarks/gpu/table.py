"""What a call has found, in a line for each record."""

from collections.abc import Iterable
from typing import Any

from benchmarks.gpu.work import TROUBLE


def table(found: Iterable[dict[str, Any]]) -> str:
    """The last record of each item: measured and predicted time, memory, and what went wrong."""
    latest = {(record["part"], record["item"]): record for record in found if "item" in record}
    lines = [f"{'':72} {'measured':>10} {'predicted':>10} {'GiB':>7}"]
    lines += [f"{f'{part}: {item}'[:72]:72} {_cells(record)}" for (part, item), record in latest.items()]
    return "\n".join(lines)


def _cells(record: dict[str, Any]) -> str:
    expected = record.get("predicted", {})
    peak = record.get("peak_gib") or (record["peak_bytes"] / 2**30 if record.get("peak_bytes") else None)
    times = [f"{_time(seconds):>10}" for seconds in (record.get("median_s"), expected.get("seconds"))]
    return f"{' '.join(times)} {'' if peak is None else f'{peak:.2f}':>7} {_remark(record)}".rstrip()


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"


def _remark(record: dict[str, Any]) -> str:
    for key in TROUBLE:
        if key in record:
            return f"{key}: {str(record[key]).splitlines()[0][:60]}"
    if "begun" in record:
        return "begun, and cut"
    if "longest_tokens" in record:
        return f"{record['longest_tokens']} tokens, expected {record['predicted']['tokens']}"
    if "of_floor" in record:
        return f"{record['of_floor']:.0%} of the bare products' rate"
    if record.get("passed"):
        return "passed"
    if record.get("errors"):
        return f"largest error {max(record['errors'].values()):.1e}"
    return "out of memory" if "out_of_memory" in record else ""
