"""The columns of `zramd status`: those of zramctl, in its order and with its help, and then zramd's own."""

import os
from collections.abc import Callable, Iterable
from enum import Enum, auto
from typing import Any, NamedTuple

from zramd.attach.sysfs import BlockDevice
from zramd.sizes import format_size
from zramd.status.percentile import percentile

Value = str | int | float | None
UNKNOWN = "-"
RATIO_DIGITS = 4


class Shown(NamedTuple):
    """A disk as a row: what its server tells (attribute json), and the devices it is attached as."""

    facts: dict[str, Any]
    nodes: list[BlockDevice]

    @property
    def node(self) -> str | None:
        """The block device: the one that is in use, if there are several."""
        used = [node for node in self.nodes if node.place()] or self.nodes
        swaps: list[str] = self.facts["swaps"]
        return used[0].path if used else swaps[0] if swaps else None

    @property
    def place(self) -> str | None:
        """Where it is mounted, or [SWAP]."""
        if self.facts["swaps"]:
            return "[SWAP]"
        return next(filter(None, (node.place() for node in self.nodes)), None)

    @property
    def ratio(self) -> float | None:
        """Stored data by the memory they take."""
        memory = self.facts["mm_stat"]
        used = memory["mem_used_total"]
        return round(memory["orig_data_size"] / used, RATIO_DIGITS) if used else None

    @property
    def streams(self) -> int:
        """How many pages can be compressed at a time: the compiled engine does that outside the disk's lock."""
        return os.cpu_count() or 1 if self.facts["engine"] == "native" else 1

    @property
    def state(self) -> str:
        """What is going on with the disk."""
        if not self.facts["initstate"]:
            return "reset"
        return "in-use" if self.facts["connections"] else "idle"

    @property
    def p99(self) -> int | None:
        """Nanoseconds that all but a hundredth of the reads and writes took at most."""
        requests = self.facts["requests"]
        both = zip(requests["read"]["buckets"], requests["write"]["buckets"], strict=True)
        found = percentile(self.facts["latency_bounds"], [sum(counts) for counts in both], 0.99)
        return None if found is None else round(found)


class Kind(Enum):
    """What a column is made of."""

    TEXT = auto()
    NUMBER = auto()
    SIZE = auto()
    RATIO = auto()
    TIME = auto()


class Column(NamedTuple):
    """One column: how it is called, what its help is, and what is in it."""

    name: str
    help: str
    kind: Kind
    value: Callable[[Shown], Value]

    def text(self, value: Value, *, exact: bool) -> str:
        """Return a value as a cell. `exact`: sizes in bytes, times in nanoseconds."""
        if value is None:
            return "" if self.kind is Kind.TEXT else UNKNOWN
        if self.kind is Kind.SIZE and not exact:
            return format_size(int(value))
        if self.kind is Kind.TIME and not exact:
            return format_time(float(value))
        return f"{value:.{RATIO_DIGITS}f}" if self.kind is Kind.RATIO else str(value)


def format_time(nanoseconds: float) -> str:
    """Format a time in three digits or so: `850ns 23.5us 1.2ms 3s`."""
    unit, size = next(((unit, size) for unit, size in _UNITS if nanoseconds >= size), _UNITS[-1])
    number = nanoseconds / size
    return f"{number:.0f}{unit}" if number >= 100 or number == round(number) else f"{number:.1f}{unit}"


_UNITS = (("s", 1e9), ("ms", 1e6), ("us", 1e3), ("ns", 1.0))


def _memory(field: str) -> Callable[[Shown], Value]:
    return lambda shown: shown.facts["mm_stat"][field]


def _fact(name: str) -> Callable[[Shown], Value]:
    return lambda shown: shown.facts[name]


COLUMNS = {
    column.name: column
    for column in (
        Column("NAME", "zram device name", Kind.TEXT, _fact("name")),
        Column("DISKSIZE", "limit on the uncompressed amount of data", Kind.SIZE, _fact("disksize")),
        Column("DATA", "uncompressed size of stored data", Kind.SIZE, _memory("orig_data_size")),
        Column("COMPR", "compressed size of stored data", Kind.SIZE, _memory("compr_data_size")),
        Column("ALGORITHM", "the selected compression algorithm", Kind.TEXT, _fact("comp_algorithm")),
        Column("STREAMS", "number of concurrent compress operations", Kind.NUMBER, lambda shown: shown.streams),
        Column("ZERO-PAGES", "empty pages with no allocated memory", Kind.NUMBER, _memory("same_pages")),
        Column(
            "TOTAL",
            "all memory including allocator fragmentation and metadata overhead",
            Kind.SIZE,
            _memory("mem_used_total"),
        ),
        Column("MEM-LIMIT", "memory limit used to store compressed data", Kind.SIZE, _memory("mem_limit")),
        Column("MEM-USED", "peak memory usage to store compressed data", Kind.SIZE, _memory("mem_used_max")),
        Column("MIGRATED", "number of objects migrated by compaction", Kind.NUMBER, _memory("pages_compacted")),
        Column("COMP-RATIO", "compression ratio: DATA/TOTAL", Kind.RATIO, lambda shown: shown.ratio),
        Column("MOUNTPOINT", "where the device is mounted", Kind.TEXT, lambda shown: shown.place),
        Column("HUGE-PAGES", "incompressible pages, stored as they are", Kind.NUMBER, _memory("huge_pages")),
        Column(
            "HUGE-SINCE", "incompressible pages since the device was made", Kind.NUMBER, _memory("huge_pages_since")
        ),
        Column("BACKEND", "engine of the server: native or python", Kind.TEXT, _fact("engine")),
        Column("STATE", "reset (no size), idle (no client) or in-use", Kind.TEXT, lambda shown: shown.state),
        Column(
            "P99",
            "99 of 100 reads and writes took at most this, since the server started",
            Kind.TIME,
            lambda shown: shown.p99,
        ),
        Column("CLIENTS", "connections of NBD clients", Kind.NUMBER, _fact("connections")),
        Column("DEVICE", "block device it is attached as", Kind.TEXT, lambda shown: shown.node),
    )
}
"""zramctl of util-linux 2.41 has those up to MOUNTPOINT."""

DEFAULT = ("NAME", "ALGORITHM", "DISKSIZE", "DATA", "COMPR", "TOTAL", "STREAMS", "MOUNTPOINT")


def parse_columns(text: str) -> list[Column]:
    """Return the columns of a LIST, or for +LIST those by default and them.

    Raises:
        ValueError: there is no column of that name.
    """
    more = text.startswith("+")
    names = [name.strip().upper() for name in text.removeprefix("+").split(",")]
    for name in names:
        if name not in COLUMNS:
            raise ValueError(f"no column {name!r}; there are: {' '.join(COLUMNS)}")
    return [COLUMNS[name] for name in ((*DEFAULT, *names) if more else names)]


def describe_columns(columns: Iterable[Column] = COLUMNS.values()) -> str:
    """Return the help of each column, a line each."""
    return "\n".join(f"{column.name:12}{column.help}" for column in columns)
