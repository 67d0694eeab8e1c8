"""Training steps of ours against TRL's, as README and docs/benchmarks.md show them."""

from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.levels import table

RESULTS = Path(__file__).parent / "results"
_Steps = dict[str, dict[str, Any]]
"""By candidate."""


def sentence() -> str:
    """A small Llama's step on GSM8K pairs, on the device that was measured last and on others."""
    last, *others = reversed(_by_device(RESULTS / "cpu_step.jsonl").values())
    ours, theirs = _fastest(last), last["trl"]
    faster = theirs["seconds_per_step"] / ours["seconds_per_step"]
    leaner = theirs["peak_mib"] / ours["peak_mib"]
    return (
        f"A LoRA step on GSM8K pairs (Llama of hidden size 256, GPT-2's vocabulary, fp32, {ours['device']}) takes "
        f"**{ours['seconds_per_step']:.2f} s** and {ours['peak_mib'] / 1024:.1f} GiB, TRL {ours['versions']['trl']}'s "
        f"{theirs['seconds_per_step']:.2f} s and {theirs['peak_mib'] / 1024:.1f} GiB: {faster:.1f} times faster in "
        f"{1 / leaner:.0%} of the memory, with the same losses to {ours['largest_loss_difference']:.0e} "
        f"(`python -m benchmarks.cpu_step`).{_as_on_gpu(ours, last)}"
        f"{''.join(map(_elsewhere, others))}{_of_a_chat_model()}"
    )


def of_a_chat_model() -> str:
    """A pretrained model's step, beside its own products run by themselves."""
    parts = []
    by_precision = [_by_device(RESULTS / "chat_step.jsonl", precision) for precision in ("fp32", "bf16")]
    for device, found in (part for steps in by_precision for part in reversed(steps.items())):
        rows = []
        for candidate, record in found.items():
            seconds, alone = record["seconds_per_step"], record["products_seconds"]
            memory = f"{record['peak_mib'] / 1024:.1f} GiB"
            rows.append([_shown(candidate, record), f"{seconds:.2f}", f"{alone:.2f}", f"{seconds / alone:.2f}", memory])
        titles = ["", "seconds a step", "its products alone", "step / products", "peak memory"]
        one = next(iter(found.values()))
        precision = "bf16 autocast" if _precision(one) == "bf16" else "fp32"
        note = (
            f"{one['model']}, LoRA r = 16 on all linear layers, 8 pairs, {precision}, {device}, torch "
            f"{one['versions']['torch']}, {one['date']}; losses agree to {one['largest_loss_difference']:.0e} at every "
            "step."
        )
        parts.append(f"{table(titles, rows)}\n\n{note}")
    return "\n\n".join(parts)


def _of_a_chat_model() -> str:
    """Where all three were measured on one device."""
    for found in reversed(_by_device(RESULTS / "chat_step.jsonl").values()):
        if "trl" in found and "trl, answers alone" in found:
            ours, theirs, alone = _fastest(found), found["trl"], found["trl, answers alone"]
            return (
                f" A step of {ours['model']} ({ours['device']}): {_cost(ours)}; TRL's {_cost(theirs)}, or "
                f"{_cost(alone)} with the answers alone ([benchmarks](docs/benchmarks.md))."
            )
    return ""


def _cost(record: dict[str, Any]) -> str:
    return f"{record['seconds_per_step']:.1f} s and {record['peak_mib'] / 1024:.1f} GiB"


def _shown(candidate: str, record: dict[str, Any]) -> str:
    version = f"TRL {record['versions'].get('trl')}"
    return candidate.replace("trl", version) if candidate.startswith("trl") else f"ours, {candidate}"


def _by_device(path: Path, precision: str = "fp32") -> dict[str, _Steps]:
    """The device that was measured last is last; of each candidate the last record of a step on GSM8K pairs."""
    found: dict[str, _Steps] = {}
    for record in records.read(path):
        if "GSM8K" in record.get("pairs", "GSM8K") and _precision(record) == precision:
            steps = found.pop(record["device"], {})
            found[record["device"]] = steps | {record["candidate"]: record}
    return found


def _precision(record: dict[str, Any]) -> str:
    """Records of fp32 do not name it."""
    return record.get("precision", "fp32")


def _fastest(steps: _Steps) -> dict[str, Any]:
    """Of our layouts."""
    ours = [record for candidate, record in steps.items() if not candidate.startswith("trl")]
    return min(ours, key=lambda record: record["seconds_per_step"])


def _as_on_gpu(ours: dict[str, Any], steps: _Steps) -> str:
    """On a CPU TRL scores every position; what is left of the difference where it does not."""
    theirs = steps.get("trl, answers alone")
    if theirs is None:
        return ""
    return (
        f" On a CPU TRL scores every position. Made to score the answers alone, as it does on a GPU, it takes "
        f"{theirs['seconds_per_step']:.2f} s and {theirs['peak_mib'] / 1024:.1f} GiB: "
        f"{theirs['seconds_per_step'] / ours['seconds_per_step']:.1f} times ours."
    )


def _elsewhere(steps: _Steps) -> str:
    """The same step on another machine."""
    ours, theirs = _fastest(steps), steps["trl"]
    return (
        f" Elsewhere ({ours['device']}): {ours['seconds_per_step']:.2f} s and TRL {theirs['versions']['trl']}'s "
        f"{theirs['seconds_per_step']:.2f} s, {theirs['seconds_per_step'] / ours['seconds_per_step']:.1f} times."
    )
