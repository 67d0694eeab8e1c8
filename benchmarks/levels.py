"""The records of `make bench` and `benchmarks.gpu` as tables: which ones count, and what their cells say."""

import json
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from packaging.version import Version

from benchmarks import records
from benchmarks.peers import Peer, all_peers
from benchmarks.plan import SWEPT

OURS = "dpop-kernels"
INSTALLED = records.RESULTS / "peers_installed.json"
"""Versions of the peers where the pages were last made."""
NOT_YET = "Not measured yet: `make bench` measures, and writes what belongs here."
TITLES = {
    ("head", "frozen"): "Head, frozen (LoRA): hidden states to log-probs, forward and backward",
    ("head", "reference"): "Head, reference pass: forward alone",
    ("head", "trainable"): "Head, trainable: forward and backward",
    ("dpo", "frozen"): "DPO through a frozen head: reference pass, policy, loss, gradients",
    ("dpo", "trainable"): "DPO through a trainable head",
    ("logits", "forward"): "Logits that exist: forward",
    ("logits", "forward_backward"): "Logits that exist: forward and backward",
    ("pair_loss", "forward_backward"): "Token log-probs to DPOP's loss and back",
    ("step", "lora"): "A whole LoRA step",
}


class Group(NamedTuple):
    """What was measured side by side: one level at one size on one device."""

    device: str
    level: str
    task: str
    size: str

    @property
    def is_gpu(self) -> bool:
        return not self.device.startswith("CPU")


def latest() -> dict[Group, dict[str, dict[str, Any]]]:
    """By group and peer the last record; an interpreted rehearsal is no measurement."""
    groups: dict[Group, dict[str, dict[str, Any]]] = {}
    for record in records.read(records.LEVELS) + records.read(records.GPU):
        if "level" not in record or record["device"].endswith("interpreted"):
            continue
        group = Group(record["device"], record["level"], record["task"], size_of(record))
        groups.setdefault(group, {})[record["peer"]] = record
    return groups


def device_of_levels() -> str | None:
    """The GPU if there are head records of one, else the CPU; None without records."""
    devices = [group.device for group, peers in latest().items() if group.level == "head" and OURS in peers]
    return min(devices, key=lambda device: device.startswith("CPU")) if devices else None


def most_tokens() -> dict[str, int]:
    """By model, the most tokens that our frozen head has run with on a GPU."""
    most: dict[str, int] = {}
    for group, peers in latest().items():
        if group.is_gpu and (group.level, group.task) == ("head", "frozen") and "median_s" in peers.get(OURS, {}):
            shape = peers[OURS]["shape"]
            most[shape["name"]] = max(most.get(shape["name"], 0), shape["num_tokens"])
    return most


def size_of(record: dict[str, Any]) -> str:
    """The size in words, which tells one case from another."""
    shape = record["shape"]
    parts = [shape["name"]]
    if "pairs" in shape:
        parts.append(f"{shape['num_pairs']} {shape['pairs']} pairs")
    elif "num_pairs" in shape:
        parts = [f"{shape['num_pairs']} {shape['name']} pairs"]
    else:
        parts.append(f"{shape['num_tokens']} tokens")
    return f"{', '.join(parts)}, {record['dtype']}"


def table(titles: list[str], rows: Iterable[list[str]]) -> str:
    """A markdown table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def all_levels() -> str:
    """Every group as a table of its peers, GPU before CPU, in the order of `TITLES`."""
    groups = latest()
    if not groups:
        return NOT_YET
    parts = []
    order = list(TITLES)
    devices = sorted(dict.fromkeys(group.device for group in groups), key=lambda device: device.startswith("CPU"))
    for device in devices:
        of_device = {group: peers for group, peers in groups.items() if group.device == device}
        parts.append(f"## {device}\n\n{_run(list(of_device.values()))}")
        for key in order:
            sections = [group for group in of_device if (group.level, group.task) == key]
            if sections:
                parts.append(f"### {TITLES[key]}")
            parts += [f"**{group.size}**\n\n{peer_table(of_device[group])}" for group in sections]
    return "\n\n".join(parts)


def peer_table(peers: dict[str, dict[str, Any]]) -> str:
    """One group: its peers with their times, memory and errors; who has none, with the reason."""
    measured = {name: record for name, record in peers.items() if "median_s" in record}
    of_ours = [record for name, record in measured.items() if name.startswith(OURS)]
    ours = measured.get(OURS) or min(of_ours, key=lambda record: record["median_s"], default=None)
    rows = []
    for record in measured.values():
        errors = record["errors"]
        rows.append(
            [
                _name(record),
                f"{milliseconds(record['median_s'])} ({record['p20_s'] * 1e3:.4g} … {record['p80_s'] * 1e3:.4g})",
                f"{record['median_s'] / ours['median_s']:.2f} ×" if ours else "",
                f"{record['of_floor']:.0%}" if "of_floor" in record else "",
                mebibytes(record["peak_bytes"]),
                _error(errors, "logp_nats", "loss"),
                _error(errors, "grad"),
                _error(errors, "grad_worst_row"),
            ]
        )
    titles = ["", "ms (p20 … p80)", "of our time", "of the floor", "memory"]
    titles += ["log-prob or loss error", "gradient error", "in its worst row"]
    text = table(titles, rows) if rows else ""
    absent = [f"{name}: {reason(record)}" for name, record in peers.items() if name not in measured]
    return f"{text}\n\nWithout a time: {'; '.join(absent)}." if absent else text


def headline() -> str:
    """The frozen head: every peer at the swept model's size, on a GPU if there are records of one."""
    chosen = [
        (group, peers)
        for group, peers in latest().items()
        if (group.level, group.task) == ("head", "frozen") and group.size.startswith(SWEPT) and OURS in peers
    ]
    if not chosen:
        return ""
    # the middle of the sweep: large enough for arithmetic to count, small enough for everyone to fit
    group, peers = max(chosen, key=lambda item: (item[0].is_gpu, -abs(_tokens(item[1]) - _middle(item[0].is_gpu))))
    rows = [
        [
            _name(record),
            milliseconds(record["median_s"]),
            f"{record['of_floor']:.0%}",
            mebibytes(record["peak_bytes"]),
            _error(record["errors"], "logp_nats"),
            _error(record["errors"], "grad_worst_row"),
        ]
        for record in peers.values()
        if "median_s" in record
    ]
    titles = [
        "frozen head, forward and backward",
        "ms",
        "of the floor",
        "memory",
        "log-prob error",
        "gradient, worst row",
    ]
    note = (
        f"{group.size}; {group.device}. Peers take turns in one run; errors are against fp64; the floor is two matrix "
        "products at the rate measured in the same run."
    )
    return f"{table(titles, rows)}\n\n{note}"


def peers_table() -> str:
    """Who is measured and how it is set up, from the adapters themselves."""
    seen: dict[str, str] = {}
    for group in latest().values():
        seen |= {name: record["peer_version"] or "" for name, record in group.items() if "median_s" in record}
    rows = []
    for peer in all_peers().values():
        kinds = [
            ("log-probs from logits", peer.logits_logps),
            ("the mean log-prob alone" if peer.gives_mean_only else "log-probs from hidden states", peer.linear_logps),
            ("DPO from hidden states", peer.linear_dpo),
            ("the pair loss", peer.pair_loss),
        ]
        does = ", ".join(text for text, function in kinds if function is not None)
        needs = "CUDA" if peer.needs_cuda else ""
        version = seen.get(peer.name, "–")
        rows.append([peer.name, version + _since(peer, version), does, _products(peer), peer.settings, needs])
    titles = ["peer", "version measured", "computes", "products of its head", "how it is called", "needs"]
    return table(titles, rows)


def _products(peer: Peer) -> str:
    """Without gradient, with a frozen and with a trainable head, and how that is known."""
    found = json.loads((records.RESULTS / "head_products.json").read_text())["peers"].get(peer.name)
    if found is None:
        return ""
    counts = ", ".join(f"{count:g}" for count in found["products"])
    if "read_in" not in found:
        return f"{counts} (counted)"
    return f"{counts} (read in {found['read_in']}{_since(peer, found['read_in'])})"


def note_installed() -> None:
    """Write down which versions of the peers are here, so that the page can say what has come out since; those that are
    not here keep what was written of them."""
    known = json.loads(INSTALLED.read_text()) if INSTALLED.exists() else {}
    here = {peer.package: version for peer in all_peers().values() if (version := peer.version) is not None}
    INSTALLED.write_text(json.dumps(known | here, indent=2, sort_keys=True) + "\n")


def _since(peer: Peer, version: str) -> str:
    """That a newer version is out, where the page's maker had one."""
    installed = json.loads(INSTALLED.read_text()).get(peer.package) if INSTALLED.exists() else None
    if installed is None or version in ("–", "") or Version(installed).release <= Version(version).release:
        return ""
    return f"; {installed} is out"


def milliseconds(seconds: float) -> str:
    return f"**{seconds * 1e3:.3g}**" if seconds < 1 else f"**{seconds * 1e3:.0f}**"


def mebibytes(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:.0f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:.0f} KiB"


def reason(record: dict[str, Any]) -> str:
    """Why a record has no time."""
    return next(f"{record[key]}" for key in ("skipped", "refused", "failed") if key in record)


def _name(record: dict[str, Any]) -> str:
    name = f"{record['peer']} {record['peer_version'] or ''}".strip()
    return f"{name} (mean only)" if record.get("mean_only") else name


def _error(errors: dict[str, float], *names: str) -> str:
    return next((f"{errors[name]:.0e}" for name in names if name in errors), "")


def _tokens(peers: dict[str, dict[str, Any]]) -> int:
    return peers[OURS]["shape"]["num_tokens"]


def _middle(is_gpu: bool) -> int:
    return 8192 if is_gpu else 2048


def _run(groups: list[dict[str, dict[str, Any]]]) -> str:
    """What all records of a device have in common, or the range of it."""
    every = [record for peers in groups for record in peers.values()]

    def distinct(value: Callable[[dict[str, Any]], Any]) -> str:
        return ", ".join(sorted({str(value(record)) for record in every if value(record) is not None}))

    versions = (
        f"torch {distinct(lambda r: r['versions']['torch'])}, triton {distinct(lambda r: r['versions']['triton'])}"
    )
    rates = [record for record in every if "gemm_flop_per_s" in record]
    floors = ""
    for unit, key in (("GB/s copied", "copy_bytes_per_s"), ("GFLOP/s multiplied", "gemm_flop_per_s")):
        values = [record[key] / 1e9 for record in rates]
        if values:
            floors += f", {min(values):.0f} … {max(values):.0f} {unit}"
    commits = distinct(lambda r: r["commit"])
    days = distinct(lambda r: r["time"][:10])
    return f"{versions}; floors{floors[1:]}; commit {commits}; {days}."
