"""The report's pictures: time, memory and fraction of the floor, and precision against speed.

Every peer keeps its colour, line and marker in all pictures, so that they read in grey.
"""

import math
from pathlib import Path
from typing import Any

from dpop_trainer.run_folder import plot_style as style
from dpop_trainer.run_folder.plot_style import LABEL, finish
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from benchmarks.levels import OURS, Group, device_of_levels, latest
from benchmarks.peers import all_peers
from benchmarks.plan import SWEPT

_COLORS = (style.BLUE, style.VERMILLION, style.GREEN, style.PURPLE, style.ORANGE, style.SKY_BLUE, style.BLACK)
_LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 2)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h")
_SMALLEST_ERROR = 1e-9
"""An error of zero is drawn here."""


def plot_against_tokens(path: Path) -> None:
    """Writes a PNG of the swept model's frozen head: time and peak memory by tokens, and the floor by model.

    Args:
        path: the PNG.

    Raises:
        ValueError: there are no records of the head.
    """
    device = _device("plot_against_tokens")
    frozen = {g: p for g, p in latest().items() if (g.device, g.level, g.task) == (device, "head", "frozen")}
    sweep = {g: p for g, p in frozen.items() if g.size.startswith(SWEPT)}
    figure = Figure(figsize=(10.2, 3.5), layout="constrained")
    time, memory, floor = figure.subplots(1, 3, width_ratios=(1, 1, 1.15))
    for name in _names(sweep):
        points = sorted(_tokens_and_record(sweep, name), key=lambda point: point[0])
        tokens = [point[0] for point in points]
        label = _label(points[-1][1])
        _line(time, tokens, [record["median_s"] * 1e3 for _, record in points], name, label)
        _line(memory, tokens, [record["peak_bytes"] / 2**20 for _, record in points], name, label)
    points = sorted(_tokens_and_record(sweep, OURS), key=lambda point: point[0])
    floors = [record["floor_s"] * 1e3 for _, record in points]
    time.plot([t for t, _ in points], floors, color="0.6", linewidth=3, zorder=0, label="floor: two products")
    for axes, title, unit in ((time, "Time", "ms"), (memory, "Peak memory over the inputs", "MiB")):
        axes.set_xscale("log", base=2)
        axes.set_xticks([t for t, _ in points], [_thousands(t) for t, _ in points])
        axes.xaxis.set_minor_locator(NullLocator())
        _log_scale(axes)
        finish(axes, title, "tokens", unit)
    _plot_floors(floor, frozen)
    handles, labels = time.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=LABEL)
    model = next(iter(sweep.values()))[OURS]["shape"]["name"]
    figure.suptitle(f"Frozen head of {model}, forward and backward — {device}", fontsize=10)
    _save(figure, path)


def plot_precision(path: Path) -> None:
    """Writes a PNG of error against time, one point per peer: log-probs left, the worst gradient row right.

    Args:
        path: the PNG.

    Raises:
        ValueError: there are no records of the head.
    """
    device = _device("plot_precision")
    groups = {
        group: peers
        for group, peers in latest().items()
        if (group.device, group.level, group.task) == (device, "head", "frozen") and group.size.startswith(SWEPT)
    }
    # the size at which most peers have a time, the largest of those
    group, peers = max(groups.items(), key=lambda item: (len(_timed(item[1])), item[1][OURS]["shape"]["num_tokens"]))
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    panels = figure.subplots(1, 2)
    keys = (
        ("logp_nats", "Log-probs", "largest error (nats)"),
        ("grad_worst_row", "Gradient", "error of its worst row"),
    )
    for axes, (key, title, label) in zip(panels, keys, strict=True):
        for name, record in _timed(peers).items():
            if key in record["errors"]:
                error = max(record["errors"][key], _SMALLEST_ERROR)
                _, marker, color = _style(name)
                axes.plot(
                    record["median_s"] * 1e3,
                    error,
                    marker,
                    color=color,
                    markersize=7,
                    linestyle="",
                    label=_label(record),
                )
        axes.margins(x=0.1)
        axes.set_xlim(left=0)
        _log_scale(axes)
        finish(axes, f"{title}: lower left is better", "ms", label)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=LABEL)
    figure.suptitle(f"Precision against speed, frozen head: {group.size} — {device}", fontsize=10)
    _save(figure, path)


def _plot_floors(axes: Axes, frozen: dict[Group, dict[str, dict[str, Any]]]) -> None:
    """A row per model, of the case with the most tokens that others have too; a marker per peer."""
    by_model: dict[str, dict[str, dict[str, Any]]] = {}
    for peers in frozen.values():
        shape = peers[OURS]["shape"]
        known = by_model.get(shape["name"])
        if known is None or shape["num_tokens"] > known[OURS]["shape"]["num_tokens"]:
            by_model[shape["name"]] = peers
    models = sorted(by_model, key=lambda name: by_model[name][OURS].get("of_floor", 0))
    for row, model in enumerate(models):
        for name, record in _timed(by_model[model]).items():
            _, marker, color = _style(name)
            axes.plot(record["of_floor"] * 100, row, marker, color=color, markersize=6, zorder=3)
    axes.axvline(100, color="0.6", linewidth=3, zorder=0)
    axes.set_yticks(range(len(models)), models)
    axes.set_xlim(left=0)
    axes.margins(y=0.12)
    finish(axes, "Of the floor, by model", "%", "")


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


def _style(name: str) -> tuple[Any, str, str]:
    """Line, marker, colour of a peer: the same in every picture."""
    place = list(all_peers()).index(name)
    return _LINES[place % len(_LINES)], _MARKERS[place % len(_MARKERS)], _COLORS[place % len(_COLORS)]


def _line(axes: Axes, x: list[int], y: list[float], name: str, label: str) -> None:
    line, marker, color = _style(name)
    above = 4 if name == OURS else 3
    axes.plot(
        x,
        y,
        label=label,
        color=color,
        linestyle=line,
        marker=marker,
        markersize=5,
        linewidth=style.LINE_WIDTH,
        zorder=above,
    )


def _label(record: dict[str, Any]) -> str:
    """Name and version, without the build."""
    return f"{record['peer']} {(record['peer_version'] or '').partition('+')[0]}".strip()


def _log_scale(axes: Axes) -> None:
    """Logarithmic in y, from a power of ten to a power of ten, so that the scale is always labelled."""
    axes.set_yscale("log")
    low, high = axes.dataLim.intervaly
    axes.set_ylim(10 ** math.floor(math.log10(low) - 0.1), 10 ** math.ceil(math.log10(high) + 0.1))
    if low >= 0.01:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _thousands(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens >= 1024 else str(tokens)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(style.png(figure))
