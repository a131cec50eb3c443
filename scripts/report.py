"""Samples of several servers by workload, the tables of them, and the file of all of it."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from measuring import Spread, spread
from workloads import Sample, Workload

from zramd.layout import PAGE_SIZE

Quantity = Callable[[Sample], float | None]
"""One of the figures of a sample."""
Run = tuple[str, str]
"""The names of a workload and of the server that does it."""
BUSY = 0.9
"""Of the client's time: from here on it is the client that is measured."""


class Results:
    """The samples of a run: a list for each workload and server, in the order of the repetitions."""

    def __init__(self) -> None:
        self._samples: dict[Run, list[Sample]] = {}

    def add(self, workload: str, server: str, sample: Sample) -> None:
        """Add the sample of the next repetition."""
        self._samples.setdefault((workload, server), []).append(sample)

    def servers(self, workload: str) -> list[str]:
        """Return the servers that did a workload."""
        return [server for name, server in self._samples if name == workload]

    def samples(self, workload: str, server: str) -> list[Sample]:
        """Return the samples of a server; none if it did not do that."""
        return self._samples.get((workload, server), [])

    def spread(self, workload: str, server: str, figure: Quantity) -> Spread | None:
        """Return the median of a figure."""
        return spread(map(figure, self.samples(workload, server)))

    def rows(self) -> Iterator[dict[str, object]]:
        """Yield every sample, with what it is one of."""
        for (workload, server), samples in self._samples.items():
            for repetition, sample in enumerate(samples, 1):
                yield {"workload": workload, "server": server, "repetition": repetition, **asdict(sample)}

    def medians(self) -> Iterator[dict[str, object]]:
        """Yield the spread of every figure of every server."""
        for (workload, server), samples in self._samples.items():
            figures = {each.name: spread(getattr(s, each.name) for s in samples) for each in fields(Sample)}
            yield {"workload": workload, "server": server, **figures}

    def ratio(self, figure: Quantity, over: Run, under: Run) -> Spread | None:
        """Return the median of one run's figure / another's, each of the same repetition."""
        pairs = zip(self.samples(*over), self.samples(*under), strict=False)
        return spread(_divide(figure(first), figure(second)) for first, second in pairs)


def _divide(over: float | None, under: float | None) -> float | None:
    return over / under if over is not None and under else None


def table(headings: list[str], rows: Iterable[list[str]]) -> Iterator[str]:
    """Yield the lines of a table, the first column to the left and the others to the right."""
    lines = [headings, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        yield "  ".join([first.ljust(widths[0]), *cells]).rstrip()


def number(value: Spread | None, digits: int = 0, unit: float = 1) -> str:
    """Return a median as tables show it, in units of `unit`; a dash if it is not known."""
    return "-" if value is None else f"{value.median / unit:,.{digits}f}"


def limits(value: Spread | None, digits: int = 0, unit: float = 1) -> str:
    """Return the least and the greatest."""
    return "-" if value is None else f"{value.low / unit:,.{digits}f}..{value.high / unit:,.{digits}f}"


def in_iops(workload: Workload) -> bool:
    """Say whether requests are counted, or else bytes: what people compare at this size."""
    return workload.block <= PAGE_SIZE


def speed(workload: Workload) -> Quantity:
    """Return the figure of a workload's throughput."""
    return (lambda sample: sample.iops) if in_iops(workload) else (lambda sample: sample.rate)


def workload_table(workload: Workload, results: Results, reference: str) -> Iterator[str]:
    """Yield the lines of the table of one workload."""
    unit, title = (1, "IOPS") if in_iops(workload) else (1e6, "MB/s")
    headings = [workload.name, title, "min..max", "p50 us", "p99", "p99.9"]
    headings += ["server us/page", "min..max", "client us/page", "MiB", f"{reference} / this"]
    rows = []
    for server in results.servers(workload.name):
        samples = results.samples(workload.name, server)
        rate, cpu = spread(map(speed(workload), samples)), spread(sample.server_cpu for sample in samples)
        busy = spread(sample.client_busy for sample in samples)
        client = spread(sample.client_cpu for sample in samples)
        memory = spread(sample.memory for sample in samples)
        ratio = results.ratio(speed(workload), (workload.name, reference), (workload.name, server))
        percentiles = [spread(values) for values in zip(*((s.p50, s.p99, s.p999) for s in samples), strict=True)]
        star = "*" if cpu and busy and busy.median > BUSY else " "
        rows.append(
            [
                f"  {server}",
                *(number(rate, 0, unit), limits(rate, 0, unit)),
                *(number(value) for value in percentiles),
                *(number(cpu, 2), limits(cpu, 2)),
                number(client, 2) + star,
                number(memory, 0, 1 << 20),
                number(ratio, 2),
            ]
        )
    yield ""
    yield from table(headings, rows)


def write_json(path: Path, results: object) -> None:
    """Write dataclasses, and lists and dictionaries of them, as JSON."""
    path.write_text(json.dumps(results, indent=2, default=_as_json) + "\n")


def _as_json(value: object) -> dict[str, Any]:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"{value!r} is nothing that JSON has")
