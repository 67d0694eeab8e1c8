"""The report's pictures: time, memory and fraction of the floor, and precision against speed.

Every peer keeps its colour, line and marker in all pictures, so that they read in grey.
"""

from typing import Any

from dpop_trainer.report.charts import LARGE, Line, lines
from dpop_trainer.report.palette import SERIES, Style
from dpop_trainer.report.scale import Axis
from dpop_trainer.report.svg import Panel

from benchmarks.levels import OURS, Group, device_of_levels, latest
from benchmarks.peers import all_peers
from benchmarks.plan import SWEPT

_SMALLEST_ERROR = 1e-9
"""An error of zero is drawn here."""


def against_tokens() -> list[Panel]:
    """The swept model's frozen head: time and peak memory by tokens, and the floor by model.

    Raises:
        ValueError: there are no records of the head.
    """
    device = _device("against_tokens")
    frozen = {g: p for g, p in latest().items() if (g.device, g.level, g.task) == (device, "head", "frozen")}
    sweep = {g: p for g, p in frozen.items() if g.size.startswith(SWEPT)}
    points = {name: sorted(_tokens_and_record(sweep, name), key=lambda point: point[0]) for name in _names(sweep)}
    ours = points[OURS]
    model = next(iter(sweep.values()))[OURS]["shape"]["name"]
    tokens = Axis(f"tokens of {model}, {device}", log=True, ticks=tuple((float(t), _thousands(t)) for t, _ in ours))
    tokens = tokens._replace(low=0.9 * ours[0][0], high=1.1 * ours[-1][0])
    floor = Line("floor: two products", [t for t, _ in ours], [r["floor_s"] * 1e3 for _, r in ours], kind="floor")
    panels = []
    for name, title, unit, value, below in (
        ("time", "Time", "ms", lambda record: record["median_s"] * 1e3, [floor]),
        ("memory", "Peak memory over the inputs", "MiB", lambda record: record["peak_bytes"] / 2**20, []),
    ):
        # ours is drawn last, on top
        series = [
            Line(_label(of_peer[-1][1]), [t for t, _ in of_peer], [value(r) for _, r in of_peer], _style(peer))
            for peer, of_peer in sorted(points.items(), key=lambda item: item[0] == OURS)
        ]
        unit = f"{unit}, frozen head, forward and backward"
        panels.append(Panel(f"head_{name}", lines(title, below + series, tokens, Axis(unit, log=True), size=LARGE)))
    return [*panels, Panel("head_floors", _floors(frozen))]


def precision() -> list[Panel]:
    """Error against time, one point per peer: of log-probs, and of the worst gradient row.

    Raises:
        ValueError: there are no records of the head.
    """
    device = _device("precision")
    groups = {
        group: peers
        for group, peers in latest().items()
        if (group.device, group.level, group.task) == (device, "head", "frozen") and group.size.startswith(SWEPT)
    }
    # the size at which most peers have a time, the largest of those
    group, peers = max(groups.items(), key=lambda item: (len(_timed(item[1])), item[1][OURS]["shape"]["num_tokens"]))
    keys = (
        ("logp_nats", "Log-probs: lower left is better", "largest error, nats"),
        ("grad_worst_row", "Gradient: lower left is better", "error of its worst row"),
    )
    panels = []
    for key, title, label in keys:
        series = [
            Line(
                _label(record),
                [record["median_s"] * 1e3],
                [max(record["errors"][key], _SMALLEST_ERROR)],
                _style(name),
                kind="marker",
            )
            for name, record in _timed(peers).items()
            if key in record["errors"]
        ]
        slowest = max(one.x[0] for one in series)
        x = Axis(f"ms, {group.size}", low=0.0, high=1.1 * slowest)
        y = Axis(f"{label}, {device}", log=True)
        panels.append(Panel(f"precision_{key}", lines(title, series, x, y, size=LARGE)))
    return panels


def _floors(frozen: dict[Group, dict[str, dict[str, Any]]]) -> str:
    """A row per model, of the case with the most tokens that others have too; a marker per peer."""
    by_model: dict[str, dict[str, dict[str, Any]]] = {}
    for peers in frozen.values():
        shape = peers[OURS]["shape"]
        known = by_model.get(shape["name"])
        if known is None or shape["num_tokens"] > known[OURS]["shape"]["num_tokens"]:
            by_model[shape["name"]] = peers
    models = sorted(by_model, key=lambda name: by_model[name][OURS].get("of_floor", 0))
    series = []
    for name in all_peers():
        rows = [(row, by_model[model][name]) for row, model in enumerate(models) if name in _timed(by_model[model])]
        if rows:
            shares, label = [record["of_floor"] * 100 for _, record in rows], _label(rows[0][1])
            series.append(Line(label, shares, [float(row) for row, _ in rows], _style(name), kind="marker"))
    rows = tuple((float(row), model) for row, model in enumerate(models))
    y = Axis("", -0.5, len(models) - 0.5, ticks=rows)
    whole = Line("the floor", [100.0, 100.0], [-0.5, len(models) - 0.5], kind="floor")
    furthest = max(share for one in series for share in one.x)
    x = Axis("% of the floor", low=0.0, high=max(105.0, 1.05 * furthest))
    return lines("Of the floor, by model", [whole, *series], x, y, size=LARGE)


def _device(name: str) -> str:
    device = device_of_levels()
    if device is None:
        raise ValueError(f"{name}: expected records of the head, found none. Run make bench.")
    return device


def _names(groups: dict[Group, dict[str, dict[str, Any]]]) -> list[str]:
    """Peers with a time, in the peers' own order."""
    timed = {name for peers in groups.values() for name in _timed(peers)}
    return [name for name in all_peers() if name in timed]


def _timed(peers: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: record for name, record in peers.items() if "median_s" in record}


def _tokens_and_record(groups: dict[Group, dict[str, dict[str, Any]]], name: str) -> list[tuple[int, dict[str, Any]]]:
    records = [peers[name] for peers in groups.values() if name in _timed(peers)]
    return [(record["shape"]["num_tokens"], record) for record in records]


def _style(name: str) -> Style:
    """Of a peer: the same in every picture."""
    place = list(all_peers()).index(name)
    style = SERIES[place % len(SERIES)]
    return style if place < len(SERIES) else style._replace(marker=SERIES[(place + 3) % len(SERIES)].marker)


def _label(record: dict[str, Any]) -> str:
    """Name and version, without the build."""
    return f"{record['peer']} {(record['peer_version'] or '').partition('+')[0]}".strip()


def _thousands(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens >= 1024 else str(tokens)
