"""The attributes of a device, as text to the character as sysfs prints it.

Formats: drivers/block/zram/zram_drv.c and block/genhd.c of Linux 6.18.
"""

import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

from zramd import __version__
from zramd.device import codecs
from zramd.device.block_state import block_state
from zramd.device.disk import Disk
from zramd.device.life import UninitialisedError
from zramd.device.requests import LATENCY_BOUNDS
from zramd.device.zram import Device
from zramd.layout import PRIORITIES
from zramd.native import choose
from zramd.reclaim import Measure, locked_bytes
from zramd.zsmalloc.stats import format_classes


@dataclass(frozen=True, slots=True)
class Served:
    """A disk as its sockets know it: where clients find it, and where it can be changed.

    `measures` returns what is done for swapping to it, None if that was not asked for; `swaps` the swap areas on it;
    `stop` ends the server.
    `policy` carries out explain, on, off or dry-run, or (last) tells what was decided last.
    """

    disk: Disk
    uris: tuple[str, ...]
    admin: Path
    measures: Callable[[], list[Measure] | None] = lambda: None
    swaps: Callable[[], list[str]] = list
    stop: Callable[[], None] = lambda: None
    policy: Callable[[str], str] = lambda _: "off\n"


class AttributeRefusedError(Exception):
    """A request that is answered with an error; the text starts with the errno's name."""


def _mm_stat(disk: Disk) -> str:
    return "{:8d} {:8d} {:8d} {:8d} {:8d} {:8d} {:8d} {:8d} {:8d}\n".format(*astuple(disk.mm_stat()))


def _io_stat(disk: Disk) -> str:
    return "{:8d} {:8d} {:d} {:8d}\n".format(*astuple(disk.io_stat())[:4])


def _stat(disk: Disk) -> str:
    """17 fields: reads, merges, sectors, ms; the same for writes; in flight and two times; discards; flushes.

    Merges and times stay 0, and discards are not counted, as for a kernel zram device. The kernel counts bios; there is
    no bio here, so this counts the client's requests, one that is larger than the connection's buffer as one too.
    """
    counts = disk.request_stat()
    fields = [counts.reads, 0, counts.read_sectors, 0, counts.writes, 0, counts.write_sectors, 0] + [0] * 9
    return " ".join(f"{field:8d}" for field in fields) + "\n"


def _debug_stat(_: Disk) -> str:
    """Return the number of slots that swap could not free because they were locked; a discard here waits instead."""
    return f"version: 1\n0 {0:8d}\n"


def _bd_stat(disk: Disk) -> str:
    stat = disk.bd_stat()
    return f"{stat.count:8d} {stat.reads:8d} {stat.writes:8d}\n"


def _choices(chosen: str | None) -> str:
    return "".join(f"[{name}] " if name == chosen else f"{name} " for name in codecs.NAMES) + "\n"


def _recomp_algorithm(disk: Disk) -> str:
    chosen = [(priority, disk.algorithm(priority)) for priority in range(1, PRIORITIES)]
    return "".join(f"#{priority}: {_choices(name)}" for priority, name in chosen if name)


_TEXTS: dict[str, Callable[[Disk], str]] = {
    "mm_stat": _mm_stat,
    "io_stat": _io_stat,
    "debug_stat": _debug_stat,
    "stat": _stat,
    "disksize": lambda disk: f"{disk.disksize}\n",
    "comp_algorithm": lambda disk: _choices(disk.algorithm()),
    "recomp_algorithm": _recomp_algorithm,
    "mem_limit": lambda disk: f"{disk.mm_stat().mem_limit}\n",
    "mem_used_max": lambda disk: f"{disk.mm_stat().mem_used_max}\n",
    "bd_stat": _bd_stat,
    "backing_dev": lambda disk: f"{disk.backing_path or 'none'}\n",
    "writeback_limit": lambda disk: f"{disk.writeback.limit}\n",
    "writeback_limit_enable": lambda disk: f"{int(disk.writeback.limited)}\n",
    "writeback_batch_size": lambda disk: f"{disk.writeback.batch_size}\n",
    "compressed_writeback": lambda _: "1\n",
    "initstate": lambda disk: f"{int(disk.disksize != 0)}\n",
    "classes": lambda disk: format_classes(disk.class_stats()),
    "codecs": lambda disk: codecs.describe(disk.algorithm() or ""),
    "work": lambda disk: "".join(f"{work}\n" for work in disk.works.under_way()),
}

NAMES = (*_TEXTS, "policy", "json")
STREAMED: dict[str, Callable[[Device], Iterator[str]]] = {"block_state": block_state}
"""What is too much for one text. It tells what pages are, and so is for the owner only."""


def read(served: Served, name: str) -> str:
    """Return the text of an attribute.

    Raises:
        AttributeRefusedError: there is no such attribute, or the disk has it only once it is initialised.
    """
    if name == "policy":
        return served.policy("last")
    if name == "json":
        return json.dumps(everything(served)) + "\n"
    if name in STREAMED:
        raise AttributeRefusedError(f"EACCES {name} is for the owner of the server, at {served.admin}")
    if name not in _TEXTS:
        raise AttributeRefusedError(f"EINVAL no attribute {name!r}; there are: {' '.join(NAMES)}")
    try:
        return _TEXTS[name](served.disk)
    except UninitialisedError as error:
        raise AttributeRefusedError(f"EINVAL {error}") from error


def stream(served: Served, name: str) -> Iterator[str]:
    """Return the parts of the text of an attribute that is streamed.

    Raises:
        AttributeRefusedError: there is none.
    """
    try:
        return STREAMED[name](served.disk.require_opened().device)
    except UninitialisedError as error:
        raise AttributeRefusedError(f"EINVAL {error}") from error


def everything(served: Served) -> dict[str, object]:
    """Return all there is to know, ready for JSON. Sizes are in bytes."""
    disk, opened = served.disk, served.disk.opened
    identity = opened.device.identity if opened else None
    measures = served.measures()
    lz4, zstd = codecs.library_versions()
    return {
        "name": disk.name,
        "version": __version__,
        "uris": list(served.uris),
        "admin": str(served.admin),
        "connections": disk.clients,
        "swaps": served.swaps(),
        "measures": None if measures is None else {measure.name: measure.missing for measure in measures},
        "uuid": str(identity.uuid) if identity else None,
        "initstate": int(opened is not None),
        "disksize": disk.disksize,
        "comp_algorithm": disk.algorithm(),
        "recomp_algorithm": {priority: disk.algorithm(priority) for priority in range(1, PRIORITIES)},
        "level": identity.codec.level if identity else None,
        "dictionary_bytes": len(identity.codec.dictionary) if identity else 0,
        "engine": choose().value,
        "build": {"python": platform.python_version(), "lz4": lz4, "zstd": zstd},
        "memory_locked": locked_bytes(),
        "lz4_implementation": codecs.lz4_implementation(),
        "integrity": identity.integrity if identity else None,
        "chain_size": identity.chain_size if identity else None,
        "codec_pages": opened.device.pages_by_algorithm() if opened else {},
        "mm_stat": asdict(disk.mm_stat()),
        "io_stat": asdict(disk.io_stat()),
        "stat": asdict(disk.request_stat()),
        "requests": {name: asdict(stat) for name, stat in disk.requests.stat().items()},
        "latency_bounds": LATENCY_BOUNDS,
        "inflight": disk.requests.in_flight,
        "work": [asdict(work) | {"seconds": work.seconds} for work in disk.works.under_way()],
        "backing_dev": str(disk.backing_path) if disk.backing_path else None,
        "bd_stat": asdict(disk.bd_stat()),
        "writeback": asdict(disk.writeback),
    }
