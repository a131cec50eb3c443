"""Metrics for Prometheus, made of what the attribute `json` has; for clients too, so nothing of the server is imported.

Two formats: OpenMetrics 1.0, and the text format 0.0.4, which node_exporter reads from files. docs/metrics.md has the
list. Units are seconds and bytes; what is counted in pages is called that.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

BLOCK = 4096
"""Bytes in a page, and in the kernel's unit for the backing store."""

Facts = Mapping[str, Any]
"""What `json` has on a disk; and `classes`, (size, zspages, objects in use) of each size class, if these are wanted."""
Sample = tuple[str, Mapping[str, object], float]
"""(what follows the family's name, labels beside the device, value)"""


class Format(Enum):
    """How metrics are written; the value is the content type."""

    OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
    TEXT = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Family:
    """A metric: `name` is without _total or _info, `kind` is OpenMetrics' type, `samples` takes them from the facts."""

    name: str
    kind: str
    help: str
    samples: Callable[[Facts], Iterable[Sample]]

    @property
    def suffix(self) -> str:
        """What the name of the one sample has that the family's name has not."""
        return {"counter": "_total", "info": "_info"}.get(self.kind, "")

    @property
    def full_name(self) -> str:
        """The name that the one sample has, and a histogram's without _bucket, _count or _sum."""
        return self.name + self.suffix

    @property
    def unit(self) -> str:
        """The unit that OpenMetrics has to be told, "" for none."""
        return next((unit for unit in ("seconds", "bytes") if self.name.endswith(f"_{unit}")), "")


def _single(name: str, kind: str, text: str, keys: tuple[str, ...], scale: int = 1) -> Family:
    """Return a family with one sample, what `keys` lead to in the facts."""
    suffix = "_total" if kind == "counter" else ""

    def samples(facts: Facts) -> Iterator[Sample]:
        found: Any = facts
        for key in keys:
            found = found[key]
        yield suffix, {}, found * scale

    return Family(f"zramd_{name}", kind, text, samples)


def _gauge(name: str, text: str, *keys: str, scale: int = 1) -> Family:
    return _single(name, "gauge", text, keys, scale)


def _counter(name: str, text: str, *keys: str) -> Family:
    return _single(name, "counter", text, keys)


def _by_operation(name: str, text: str, value: str) -> Family:
    def samples(facts: Facts) -> Iterator[Sample]:
        for op, requests in facts["requests"].items():
            yield "_total", {"op": op}, requests[value]

    return Family(f"zramd_{name}", "counter", text, samples)


def _by_class(name: str, text: str, column: int) -> Family:
    def samples(facts: Facts) -> Iterator[Sample]:
        for row in facts.get("classes", ()):
            yield "", {"class": row[0]}, row[column]

    return Family(f"zramd_{name}", "gauge", text, samples)


def _durations(facts: Facts) -> Iterator[Sample]:
    """Yield the histograms, of which only each fourth bound is kept: whole octaves."""
    for op, requests in facts["requests"].items():
        below = 0
        for bound, count in zip(facts["latency_bounds"], requests["buckets"], strict=False):
            below += count
            if bound & bound - 1 == 0:
                yield "_bucket", {"op": op, "le": bound / 1e9}, below
        yield "_bucket", {"op": op, "le": "+Inf"}, requests["count"]
        yield "_count", {"op": op}, requests["count"]
        yield "_sum", {"op": op}, requests["nanoseconds"] / 1e9


def _io_flusher(facts: Facts) -> Iterator[Sample]:
    yield "", {}, int((facts["measures"] or {}).get("IO flusher") == "")


FAMILIES = (
    _gauge("disksize_bytes", "Size of the disk, 0 if it has none yet.", "disksize"),
    _gauge("orig_data_bytes", "Data stored, as its clients wrote it.", "mm_stat", "orig_data_size"),
    _gauge("compr_data_bytes", "That, compressed.", "mm_stat", "compr_data_size"),
    _gauge("mem_used_bytes", "Memory of the pool for it.", "mm_stat", "mem_used_total"),
    _gauge("mem_limit_bytes", "The most that the pool may have, 0 for no limit.", "mm_stat", "mem_limit"),
    _gauge("mem_used_max_bytes", "The most that the pool had since this was last reset.", "mm_stat", "mem_used_max"),
    _gauge("same_pages", "Pages filled with one word, which take no memory.", "mm_stat", "same_pages"),
    _gauge("huge_pages", "Pages stored uncompressed.", "mm_stat", "huge_pages"),
    _counter("huge_pages_since", "Pages ever stored uncompressed.", "mm_stat", "huge_pages_since"),
    _counter("pages_compacted", "Pages of memory that compaction freed.", "mm_stat", "pages_compacted"),
    Family(
        "zramd_pages",
        "gauge",
        "Compressed pages by algorithm, those that are written back too.",
        lambda facts: [("", {"algorithm": name}, count) for name, count in facts["codec_pages"].items()],
    ),
    _counter("failed_reads", "Reads that failed.", "io_stat", "failed_reads"),
    _counter("failed_writes", "Writes that failed, for lack of room too.", "io_stat", "failed_writes"),
    _counter("invalid_io", "Always 0: the protocol refuses what the kernel counts here.", "io_stat", "invalid_io"),
    _counter("notify_free", "Pages discarded.", "io_stat", "notify_free"),
    _gauge("backing_used_bytes", "Live data in the backing store.", "bd_stat", "count", scale=BLOCK),
    _gauge("backing_pages", "Pages that are written back.", "bd_stat", "pages"),
    _counter("backing_reads", "Blocks of 4 KiB read from the backing store.", "bd_stat", "reads"),
    _counter("backing_writes", "Blocks of 4 KiB written to it.", "bd_stat", "writes"),
    _counter("failed_backing_reads", "Pages that it did not return, or not whole.", "io_stat", "failed_backing_reads"),
    _by_operation("requests", "Requests answered, with an error or not.", "count"),
    _by_operation("request_errors", "Requests answered with an error.", "errors"),
    _by_operation("request_bytes", "Bytes of requests answered without one.", "bytes"),
    Family(
        "zramd_request_duration_seconds",
        "histogram",
        "From receiving a request to handing its reply to the kernel.",
        _durations,
    ),
    _gauge("inflight_requests", "Requests received and not answered yet.", "inflight"),
    _gauge("connections", "Clients connected.", "connections"),
    _gauge("memory_locked_bytes", "Locked memory of the server's process.", "memory_locked"),
    Family("zramd_io_flusher", "gauge", "1 if the server's threads are IO flushers, as --swap asks for.", _io_flusher),
    Family(
        "zramd_build",
        "info",
        "What the server is made up of.",
        lambda facts: [("_info", {"version": facts["version"], "engine": facts["engine"], **facts["build"]}, 1)],
    ),
    _by_class("zspages", "Zspages of a size class (in bytes); only with ?classes=1.", 1),
    _by_class("objects", "Objects in use of a size class (in bytes); only with ?classes=1.", 2),
)


def render(disks: Iterable[Facts], wanted: Format) -> str:
    """Return the metrics of disks, which have different names."""
    found = list(disks)
    lines: list[str] = []
    for family in FAMILIES:
        samples = [(facts["name"], sample) for facts in found for sample in family.samples(facts)]
        if not samples:
            continue
        lines += _head(family, wanted)
        for device, (suffix, labels, value) in samples:
            listed = ",".join(f'{name}="{_escape(str(text))}"' for name, text in {"device": device, **labels}.items())
            lines.append(f"{family.name}{suffix}{{{listed}}} {value}")
    if wanted is Format.OPENMETRICS:
        lines.append("# EOF")
    return "".join(f"{line}\n" for line in lines)


def _head(family: Family, wanted: Format) -> list[str]:
    if wanted is Format.TEXT:
        kind = "gauge" if family.kind == "info" else family.kind
        return [f"# HELP {family.full_name} {family.help}", f"# TYPE {family.full_name} {kind}"]
    unit = [f"# UNIT {family.name} {family.unit}"] if family.unit else []
    return [f"# TYPE {family.name} {family.kind}", *unit, f"# HELP {family.name} {family.help}"]


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
