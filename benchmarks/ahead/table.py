"""Kernels that were compiled ahead of time as tables for docs/kernels.md, with the times that arithmetic gives them."""

from typing import Any

from benchmarks import records
from benchmarks.levels import table

RECORDS = records.RESULTS / "ahead.jsonl"
PREDICTED_FOR = "sm_90"
CARDS = {"sm_80": "A100", "sm_90": "H100", "sm_100": "B200"}
SHOWN = {
    "tile": "a tile of logits, no gradient",
    "tile -> bf16": "a tile, its exponentials in bf16",
    "tile -> bf16, softcap, stats": "the same with softcap and statistics",
    "rows, bf16": "rows: log-prob and gradient",
    "rows backward, bf16": "rows, backward",
    "bf16": "logits that exist",
    "fp32": "the same in fp32",
    "bf16, ragged rows": "rows at any alignment",
    "bf16 -> bf16": "their gradient",
    "fp32 -> fp32": "the same in fp32",
    "fp32 -> bf16, softcap": "a trainable head's gradient tile, softcap",
    "segment sum, int64 bounds": "sums of segments",
    "pair loss, int64 bounds": "the pair loss",
}
"""Launches of a table, by their names in `aot.all_launches()`."""


def kernels() -> str:
    """This package's own, on the device that predictions are for."""
    latest, measured = _latest(), _measured()
    rows = []
    for name, what in SHOWN.items():
        record = latest[name, PREDICTED_FOR]
        hot, predicted = record["hot"], record.get("predicted_s", {})
        rows.append(
            [
                what,
                str(record["registers"]),
                f"{hot['wide_loads']} of {hot['loads']}",
                str(hot["local"]),
                f"{record['instructions_per_element']:.1f}",
                f"{record['bytes_per_element']:.1f}" if "bytes_per_element" in record else "–",
                *(_microseconds(predicted.get(bound)) for bound in ("bytes", "instructions")),
                _microseconds(measured.get(name)),
            ]
        )
    titles = ["", "registers", "loads of 16 bytes", "local", "instructions", "bytes", "µs, bytes", "µs, instructions"]
    return f"{table([*titles, 'measured'], rows)}\n\n{note()}"


def attention() -> str:
    """FlexAttention's for flat rows, on every device, with predictions for one."""
    latest, measured = _latest(), _measured()
    rows = []
    for name in dict.fromkeys(name for (name, _), record in latest.items() if "lengths" in record):
        record = latest[name, PREDICTED_FOR]
        taken = [latest[name, target] for target in CARDS]
        loops, predicted = record["loops"], record["predicted_s"]
        rows.append(
            [
                name,
                *(f"{r['registers']} / {r['spill_bytes']:,} / {r['shared_memory'] / 1024:.0f}" for r in taken),
                ", ".join(str(loop["instructions"]) for loop in loops),
                ", ".join(str(loop["local"]) for loop in loops),
                *(_microseconds(predicted.get(bound)) for bound in ("products", "instructions")),
                _microseconds(measured.get(name)),
            ]
        )
    titles = ["", *CARDS.values(), "instructions in its loops", "local in them", "µs, products", "µs, instructions"]
    return table([*titles, "measured"], rows)


def note() -> str:
    """What the figures were made with."""
    record = next(iter(_latest().values()))
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"Compiled for {PREDICTED_FOR} ({CARDS[PREDICTED_FOR]}, H200) by {versions}."


def _microseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1e6:,.1f}"


def _latest() -> dict[tuple[str, str], dict[str, Any]]:
    """The last record of each kernel and target, in the order in which they first came."""
    return {(record["name"], record["target"]): record for record in records.read(RECORDS)}


def _measured() -> dict[str, float]:
    """Seconds of a kernel, where a GPU's records have them."""
    found = [record for record in records.read(records.GPU) if record["part"] == "kernels" and "median_s" in record]
    return {record["item"]: record["median_s"] for record in found if not record["device"].endswith("interpreted")}
