"""Measure how the cost of zramd grows: with disksize, fill, fragmentation, connections, and stored data."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import click
from experiments import (
    Compaction,
    Connections,
    DiskSize,
    Experiment,
    Fill,
    Fragmentation,
    Growth,
    Lab,
    Point,
    Recovery,
    StartUp,
)
from kernel_build import SkippedError
from measuring import (
    MIB,
    SHARED_MEMORY,
    Progress,
    Spread,
    ending_well,
    output_option,
    plots_option,
    require_memory,
    spread,
    this_machine,
)
from peers import best_engine, require_engine
from report import limits, number, table, write_json

from zramd.native import Engine

PER_PAGE = ("write us/page", "read us/page")
MOST_MEMORY = 4096 * MIB  # of the servers of one experiment
TOUCHED_PAGES, QUICK_PAGES = 65536, 16384
MOST_GROWTH = 1.2
"""What is named: costs that grow by more, and times that grow so much faster than the work."""


@dataclass
class Measured:
    """An experiment, and its samples: for each point a list of figures a repetition."""

    experiment: Experiment
    samples: dict[Point, list[list[float]]] = field(default_factory=dict)

    def column(self, figure: int) -> list[Spread | None]:
        """Return the spread of a figure at each point."""
        return [spread(sample[figure] for sample in self.samples.get(point, [])) for point in self.experiment.points]


def growth(xs: Sequence[float], values: Sequence[float], kind: Growth) -> tuple[float, int] | None:
    """Return how many times a figure grows more than it may, and the index of the point where that is most.

    A figure that may grow with the work is taken for each unit of x, and beyond what it is at x = 0.
    """
    if kind is Growth.WITH_THE_WORK:
        base = values[0] if xs[0] == 0 else 0.0
        units = [(index, (values[index] - base) / x) for index, x in enumerate(xs) if x]
    else:
        units = list(enumerate(values))
    first = units[0][1]
    if kind is Growth.ANY or min(first, *(value for _, value in units)) <= 0:
        return None
    ratios = [(first / value if kind is Growth.DOES_NOT_FALL else value / first, index) for index, value in units]
    return max(ratios)


def grown(measured: Measured) -> Iterator[str]:
    """Yield a line for each figure that grows by more than a fifth, or as much faster than the work."""
    points = measured.experiment.points
    for index, figure in enumerate(measured.experiment.figures):
        column = [value.median for value in measured.column(index) if value is not None]
        found = growth([point.x for point in points], column, figure.growth) if len(column) == len(points) else None
        if found is not None and found[0] > MOST_GROWTH:
            times, most = found
            how = {
                Growth.STAYS: f"{times:.2f} times what it is at {points[0].name}",
                Growth.DOES_NOT_FALL: f"{times:.2f} times less than at {points[0].name}",
                Growth.WITH_THE_WORK: f"{times:.2f} times what it is at first for as much work",
            }
            yield f"{measured.experiment.title}: {figure.name} at {points[most].name} is {how[figure.growth]}"


def run(experiments: Sequence[Experiment], repeat: int, progress: Progress) -> Iterator[Measured]:
    """Do one experiment after the other; within each, the points take turns."""
    progress.begin(sum(len(experiment.points) for experiment in experiments) * (repeat + 1))
    for experiment in experiments:
        measured = Measured(experiment)
        with ExitStack() as undo:
            for point in experiment.points:
                progress.step(f"{experiment.title}, preparing {point.name}")
                experiment.prepare(point, undo)
            for _ in range(repeat):
                for point in experiment.points:
                    progress.step(f"{experiment.title}, {point.name}")
                    measured.samples.setdefault(point, []).append(experiment.sample(point))
        yield measured


def report(measured: Measured) -> Iterator[str]:
    """Yield the lines of the table of one experiment."""
    experiment = measured.experiment
    headings = [experiment.title]
    for figure in experiment.figures:
        headings += [figure.name, "min..max"]
    columns = [measured.column(index) for index in range(len(experiment.figures))]
    rows = []
    for point, *values in zip(experiment.points, *columns, strict=True):
        row = [f"  {point.name}"]
        for figure, value in zip(experiment.figures, values, strict=True):
            row += [number(value, figure.digits), limits(value, figure.digits)]
        rows.append(row)
    yield from table(headings, rows)


def as_json(measured: Measured) -> dict[str, object]:
    """Return all of it, ready for JSON."""
    experiment = measured.experiment
    columns = [measured.column(index) for index in range(len(experiment.figures))]
    return {
        "title": experiment.title,
        "axis": experiment.axis,
        "figures": [figure.name for figure in experiment.figures],
        "points": [
            {"name": point.name, "x": point.x, "medians": values, "samples": measured.samples[point]}
            for point, *values in zip(experiment.points, *columns, strict=True)
        ],
    }


def all_experiments(lab: Lab, *, quick: bool) -> list[Experiment]:
    """Return the experiments at their points, at few of them if `quick`."""

    def points(unit: str, xs: Sequence[int], few: Sequence[int]) -> list[Point]:
        return [Point(f"{x} {unit}".strip(), x) for x in (few if quick else xs)]

    sizes = points("GiB", (1, 4, 16, 64, 256, 1024), (1, 32, 1024))
    stored = points("MiB", (0, 128, 256, 512, 768, 1024), (0, 128, 512))
    states = [Point(name, x) for x, name in enumerate(("fresh", "fragmented", "compacted"))]
    return [
        DiskSize(lab, sizes),
        Fill(lab, points("%", (0, 25, 50, 75, 100), (0, 50, 100))),
        Fragmentation(lab, states),
        Connections(lab, points("", (1, 2, 4, 8, 16), (1, 4, 16))),
        StartUp(lab, sizes),
        Recovery(lab, stored),
        Compaction(lab, stored),
    ]


def draw(directory: Path, found: Sequence[Measured], engine: Engine) -> None:
    """Draw the CPU time of a page, or the time of the whole, of each experiment."""
    from plots import Line, Panel, line_plots

    panels = []
    for measured in found:
        experiment = measured.experiment
        shown = [
            (index, figure) for index, figure in enumerate(experiment.figures) if figure.name in ("seconds", *PER_PAGE)
        ]
        lines = []
        for index, figure in shown:
            column = zip(experiment.points, measured.column(index), strict=True)
            lines.append(Line(figure.name, [(point.x, value) for point, value in column if value is not None]))
        unit = "seconds" if shown[0][1].name == "seconds" else "server CPU, us a page"
        names = [point.name for point in experiment.points]
        panels.append(Panel(experiment.title, experiment.axis, unit, names, lines, experiment.logarithmic))
    line_plots(directory / "scaling", f"zramd, {engine.value} engine, lz4: how its cost grows", panels)


@click.command()
@click.option(
    "--engine", type=click.Choice([engine.value for engine in Engine]), help="Default: native, if it is there."
)
@click.option("--repeat", type=click.IntRange(1), default=5, show_default=True, help="Repetitions: medians are shown.")
@click.option("--only", multiple=True, help="Only experiments whose titles have this in them; may be repeated.")
@click.option("--quick", is_flag=True, help="Fewer points and pages, three repetitions: two minutes.")
@output_option
@plots_option
def main(
    engine: str | None, repeat: int, only: tuple[str, ...], quick: bool, output: Path | None, plots: Path | None
) -> None:
    """Measure how the cost of zramd grows: with disksize, fill, fragmentation, connections, and stored data."""
    machine, progress = this_machine(), Progress()
    chosen = Engine(engine) if engine else best_engine()
    try:
        require_engine(chosen)
    except SkippedError as reason:
        raise click.BadParameter(str(reason), param_hint="--engine") from None
    with ending_well() as interrupt, ExitStack() as undo:
        undo.callback(progress.close)
        require_memory(MOST_MEMORY, "free some")
        directory = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="zramd-scaling-", dir=SHARED_MEMORY)))
        lab = Lab(directory, chosen, QUICK_PAGES if quick else TOUCHED_PAGES, interrupt)
        experiments = [
            experiment
            for experiment in all_experiments(lab, quick=quick)
            if not only or any(part in experiment.title for part in only)
        ]
        if not experiments:
            raise click.BadParameter("no experiment has that in its title", param_hint="--only")
        click.echo(f"{machine}; {chosen.value} engine, lz4, {lab.touched:,} pages at random, depth 32")
        found = []
        for measured in run(experiments, 3 if quick else repeat, progress):
            progress.close()
            found.append(measured)
            click.echo("\n" + "\n".join(report(measured)))
        named = [line for measured in found for line in grown(measured)]
        click.echo("\ngrows by more than 20 % or faster than the work: " + ("" if named else "nothing"))
        for line in named:
            click.echo(f"  {line}")
        if output is not None:
            results = {"machine": machine, "engine": chosen.value, "pages": lab.touched, "grown": named}
            write_json(output, {**results, "experiments": [as_json(measured) for measured in found]})
        if plots is not None:
            draw(plots, found, chosen)


if __name__ == "__main__":
    main()
