"""The plots, as SVG and PNG: what a README can show."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from measuring import Machine, Spread
from report import Results, in_iops, speed
from workloads import Workload

SHOWN = (
    *("randwrite 4k qd32", "randread 4k qd32", "write 128k qd32", "read 128k qd32", "randread 4k qd1"),
    *("mix 70/30 4k qd32", "corpus write 128k", "corpus read 128k qd32"),
)
"""The workloads of a plot: more than these nobody reads."""
NATIVE, PYTHON, KERNEL, OTHER = "#1f5fa8", "#8db4de", "#3f8f5f", "#b4b4b4"
STYLE: dict[str, Any] = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "figure.facecolor": "white",
    "font.size": 9,
    "savefig.dpi": 150,
    "svg.fonttype": "none",
    "svg.hashsalt": "zramd",
}


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a plot: its points by x."""

    name: str
    points: list[tuple[float, Spread]]


@dataclass(frozen=True, slots=True)
class Panel:
    """A plot of lines, with a name for each x; sizes and counts that double are best seen on a logarithmic axis."""

    title: str
    x: str
    y: str
    names: list[str]
    lines: list[Line]
    logarithmic: bool = False


def bench_plots(
    directory: Path, results: Results, workloads: Sequence[Workload], reference: str, machine: Machine
) -> None:
    """Draw throughput and CPU time of each server."""
    shown = [workload for workload in workloads if workload.name in SHOWN] or list(workloads)[: len(SHOWN)]
    shown.sort(key=lambda workload: SHOWN.index(workload.name) if workload.name in SHOWN else 0)

    def throughput(axes: Axes, workload: Workload) -> None:
        unit, name = (1e3, "thousand requests/s") if in_iops(workload) else (1e6, "MB/s")
        servers = results.servers(workload.name)
        for row, server in enumerate(servers):
            value = results.spread(workload.name, server, speed(workload))
            relative = results.ratio(speed(workload), (workload.name, server), (workload.name, reference))
            if value is not None and relative is not None:
                axes.barh(row, value.median / unit, color=_colour(server), xerr=_error(value, unit), ecolor="#404040")
                axes.annotate(
                    f" {value.median / unit:,.0f}  ({relative.median:.2f}x)", (value.high / unit, row), va="center"
                )
        axes.set_xlabel(name)

    def cpu(axes: Axes, workload: Workload) -> None:
        for row, server in enumerate(results.servers(workload.name)):
            start = 0.0
            own = results.spread(workload.name, server, lambda sample: sample.server_cpu)
            client = results.spread(workload.name, server, lambda sample: sample.client_cpu)
            if own is not None:
                axes.barh(row, own.median, color=_colour(server))
                start = own.median
            if client is not None:
                axes.barh(row, client.median, left=start, color="white", edgecolor=_colour(server), hatch="////")
                text = f" {start:.1f} + {client.median:.1f}" if own else f" {client.median:.1f}"
                axes.annotate(text, (start + client.median, row), va="center")
        axes.set_xlabel("µs per 4 KiB page")

    where = f"{machine.cpus} CPUs ({machine.cpu}), Linux {machine.kernel}"
    title = f"Throughput, and in brackets its ratio to {reference}: longer is better\n{where}"
    _bars(directory / "throughput", title, results, shown, throughput)
    title = f"CPU time per page: server (full), and client (hatched): shorter is better\n{where}"
    _bars(directory / "cpu", title, results, shown, cpu)


def _bars(
    path: Path, title: str, results: Results, shown: list[Workload], draw: Callable[[Axes, Workload], None]
) -> None:
    servers = max(len(results.servers(workload.name)) for workload in shown)
    rows = (len(shown) + 1) // 2
    with style.context(STYLE):
        figure = Figure(figsize=(11, 1 + rows * (0.8 + 0.25 * servers)), layout="constrained")
        figure.suptitle(title, fontsize=11)
        for place, workload in enumerate(shown, 1):
            axes = figure.add_subplot(rows, 2, place)
            draw(axes, workload)
            names = results.servers(workload.name)
            axes.set_yticks(range(len(names)), names)
            axes.invert_yaxis()
            axes.margins(x=0.3)
            axes.set_title(workload.name, loc="left")
        _save(figure, path)


def line_plots(path: Path, title: str, panels: Sequence[Panel]) -> None:
    """Draw panels of lines, two beside each other, with the spread of each point."""
    rows = (len(panels) + 1) // 2
    with style.context(STYLE):
        figure = Figure(figsize=(11, 0.7 + 3 * rows), layout="constrained")
        figure.suptitle(title, fontsize=11)
        for place, panel in enumerate(panels, 1):
            axes = figure.add_subplot(rows, 2, place)
            for line in panel.lines:
                xs = [x for x, _ in line.points]
                error = [[value.median - value.low for _, value in line.points]]
                error.append([value.high - value.median for _, value in line.points])
                ys = [value.median for _, value in line.points]
                axes.errorbar(xs, ys, yerr=error, marker="o", markersize=4, capsize=2, label=line.name)
            if panel.logarithmic:
                axes.set_xscale("log", base=2)
                axes.minorticks_off()
            axes.set_xticks(xs, panel.names)
            axes.set_ylim(bottom=0)
            axes.set_xlabel(panel.x)
            axes.set_ylabel(panel.y)
            axes.set_title(panel.title, loc="left")
            axes.grid(axis="y", color="#e0e0e0")
            if len(panel.lines) > 1:
                axes.legend(frameon=False)
        _save(figure, path)


def _error(value: Spread, unit: float) -> list[list[float]]:
    return [[(value.median - value.low) / unit], [(value.high - value.median) / unit]]


def _colour(server: str) -> str:
    if server.startswith("zramd"):
        return NATIVE if "native" in server else PYTHON
    return KERNEL if server.startswith("kernel") else OTHER


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix, metadata in ((".svg", {"Date": None}), (".png", {})):
        figure.savefig(path.with_suffix(suffix), metadata=metadata)
