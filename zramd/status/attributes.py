"""The attributes of a device, as text to the character as sysfs prints it.

Formats: drivers/block/zram/zram_drv.c and block/genhd.c of Linux 6.18.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass

from zramd import __version__
from zramd.device import codecs
from zramd.device.zram import Device
from zramd.sizes import memparse


@dataclass(frozen=True, slots=True)
class Served:
    """A device as the status socket knows it: its name, where clients find it, how many are connected."""

    name: str
    device: Device
    uris: tuple[str, ...]
    connections: Callable[[], int]


class AttributeRefusedError(Exception):
    """A request that is answered with an error; the text starts with the errno's name."""


def _mm_stat(device: Device) -> str:
    return "{:8d} {:8d} {:8d} {:8d} {:8d} {:8d} {:8d} {:8d} {:8d}\n".format(*astuple(device.mm_stat()))


def _io_stat(device: Device) -> str:
    return "{:8d} {:8d} {:d} {:8d}\n".format(*astuple(device.io_stat()))


def _stat(device: Device) -> str:
    """17 fields: reads, merges, sectors, ms; the same for writes; in flight and two times; discards; flushes.

    Merges and times stay 0, and discards are not counted, as for a kernel zram device.
    """
    counts = device.request_stat()
    fields = [counts.reads, 0, counts.read_sectors, 0, counts.writes, 0, counts.write_sectors, 0] + [0] * 9
    return " ".join(f"{field:8d}" for field in fields) + "\n"


def _comp_algorithm(device: Device) -> str:
    chosen = device.identity.codec.name
    return "".join(f"[{name}] " if name == chosen else f"{name} " for name in codecs.NAMES) + "\n"


_TEXTS: dict[str, Callable[[Device], str]] = {
    "mm_stat": _mm_stat,
    "io_stat": _io_stat,
    "stat": _stat,
    "disksize": lambda device: f"{device.disksize}\n",
    "comp_algorithm": _comp_algorithm,
    "mem_limit": lambda device: f"{device.mm_stat().mem_limit}\n",
    "mem_used_max": lambda device: f"{device.mm_stat().mem_used_max}\n",
    "initstate": lambda _: "1\n",
}

NAMES = (*_TEXTS, "json")


def read(served: Served, name: str) -> str:
    """Return the text of an attribute.

    Raises:
        AttributeRefusedError: there is no such attribute.
    """
    if name == "json":
        return json.dumps(everything(served)) + "\n"
    if name not in _TEXTS:
        raise _unknown(name)
    return _TEXTS[name](served.device)


def everything(served: Served) -> dict[str, object]:
    """Return all there is to know, ready for JSON. Sizes are in bytes."""
    device = served.device
    identity = device.identity
    return {
        "name": served.name,
        "version": __version__,
        "uris": list(served.uris),
        "connections": served.connections(),
        "uuid": str(identity.uuid),
        "initstate": 1,
        "disksize": device.disksize,
        "comp_algorithm": identity.codec.name,
        "level": identity.codec.level,
        "lz4_implementation": codecs.lz4_implementation(),
        "chain_size": identity.chain_size,
        "mm_stat": asdict(device.mm_stat()),
        "io_stat": asdict(device.io_stat()),
        "stat": asdict(device.request_stat()),
    }


def write(served: Served, name: str, value: str) -> None:
    """Store to an attribute, by the kernel's rules.

    Raises:
        AttributeRefusedError: it cannot be written, or not with this value.
    """
    if name == "mem_limit":
        try:
            served.device.set_mem_limit(memparse(value))
        except ValueError as error:
            raise AttributeRefusedError(f"EINVAL {error}") from error
    elif name == "mem_used_max":
        if value.strip() != "0":
            raise AttributeRefusedError("EINVAL mem_used_max takes only 0, which resets it to the current use")
        served.device.reset_mem_used_max()
    elif name in NAMES:
        raise AttributeRefusedError(f"EACCES {name} cannot be written")
    else:
        raise _unknown(name)


def _unknown(name: str) -> AttributeRefusedError:
    return AttributeRefusedError(f"EINVAL no attribute {name!r}; there are: {' '.join(NAMES)}")
