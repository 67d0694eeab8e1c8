"""The counted steps as tables for README and docs, and what a device would make of them by arithmetic."""

import itertools
from typing import Any

from benchmarks import records
from benchmarks.levels import table

RECORDS = records.RESULTS / "counted.jsonl"
OURS, THEIRS = "flat", "trl"
GIB = 1 << 30

FLOP_PER_S, BYTES_PER_S = 989e12, 3.35e12
"""An H100 SXM's dense bf16 products and memory, by its data sheet."""
PRODUCT_UTILISATION, COPY_UTILISATION = 0.5, 0.75
"""What of them a step is taken to reach. The ratio of two sides hardly depends on these."""


def summary() -> str:
    """README: a step on GSM8K, this package in the layout that it takes on a GPU against TRL."""
    rows = [
        [
            f"{case}, {ours['tuning']}" if ours["tuning"] not in case else case,
            f"{flop(theirs) / 1e12:.0f} → **{flop(ours) / 1e12:.0f}**",
            f"{flop(theirs) / flop(ours):.2f} ×",
            f"{theirs['head_flop'] / ours['head_flop']:.2f} ×",
            f"{_over_weights(theirs) / GIB:.1f} → **{_over_weights(ours) / GIB:.1f}** GiB",
            f"{predicted_seconds(theirs) / predicted_seconds(ours):.1f} ×",
        ]
        for case, sides in _by_case("GSM8K").items()
        for theirs, ours in [(sides[THEIRS], sides[OURS])]
    ]
    titles = ["8 GSM8K pairs", "TFLOP of a step", "fewer", "of the head", "memory over the weights", "predicted"]
    return table(titles, rows)


def whole() -> str:
    """docs/benchmarks.md: every case, data set and side."""
    rows = []
    for record in _latest().values():
        steps = record["num_batches"]
        rows.append(
            [
                f"{record['case']}, {record['tuning']}" if record["tuning"] not in record["case"] else record["case"],
                record["data"],
                "TRL" if record["side"] == THEIRS else f"ours, {record['side']}",
                f"{record['body_tokens'] / steps:,.0f}",
                f"{record['head_tokens'] / steps:,.0f}",
                *(f"{record[part] / steps / 1e12:.2f}" for part in ("body_flop", "attention_flop", "head_flop")),
                f"{record['body_traffic'] / steps / 1e9:,.0f}",
                f"{record['weight_bytes'] / GIB:.1f} + {_over_weights(record) / GIB:.2f}",
                f"{predicted_seconds(record) * 1e3:,.0f}",
            ]
        )
    titles = ["model", "pairs", "side", "positions", "scored", "layers, TFLOP", "attention", "head"]
    return table([*titles, "other traffic, GB", "held, GiB", "ms, predicted"], rows)


def note() -> str:
    """What the figures were made with."""
    record = next(iter(_latest().values()))
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return (
        f"Means of {record['num_batches']} batches of {record['pairs_per_batch']} pairs; {versions}. Predicted: FLOP "
        f"at {PRODUCT_UTILISATION:.0%} of {FLOP_PER_S / 1e12:.0f} TFLOP/s and other traffic at "
        f"{COPY_UTILISATION:.0%} of {BYTES_PER_S / 1e12:.2f} TB/s, an H100's data sheet. It is arithmetic: no GPU was "
        f"measured."
    )


def flop(record: dict[str, Any]) -> float:
    """Of a step."""
    return sum(record[part] for part in ("body_flop", "attention_flop", "head_flop")) / record["num_batches"]


def predicted_seconds(record: dict[str, Any]) -> float:
    """Of a step on the device above, products and other operations one after the other."""
    traffic = record["body_traffic"] / record["num_batches"]
    return flop(record) / (PRODUCT_UTILISATION * FLOP_PER_S) + traffic / (COPY_UTILISATION * BYTES_PER_S)


def _over_weights(record: dict[str, Any]) -> int:
    return record["peak_bytes"] - record["weight_bytes"]


def _latest() -> dict[tuple[str, str, str], dict[str, Any]]:
    """The last record of each case, data set and side, in the order in which they first came."""
    return {(record["case"], record["data"], record["side"]): record for record in records.read(RECORDS)}


def _by_case(data: str) -> dict[str, dict[str, dict[str, Any]]]:
    found = [record for record in _latest().values() if record["data"] == data]
    return {
        case: {record["side"]: record for record in group}
        for case, group in itertools.groupby(found, lambda record: record["case"])
    }
