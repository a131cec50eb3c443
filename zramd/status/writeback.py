"""The words for a backing store and for writing pages back to it, by the rules of Linux 6.18's files of these names."""

import errno
from dataclasses import replace
from pathlib import Path

from zramd.device.disk import Disk
from zramd.device.writeback import Selection, WritebackType
from zramd.sizes import parse_unsigned

MAX_LIMIT = (1 << 52) - 1
MAX_BATCH_SIZE = (1 << 32) - 1
_BOOLEANS = {"y": True, "1": True, "t": True, "on": True, "n": False, "0": False, "f": False, "off": False}
"""How kstrtobool reads what a word begins with."""


def set_backing_dev(disk: Disk, value: str) -> None:
    """Choose a path, or `none`."""
    text = value.removesuffix("\n")
    if not text.startswith("/") and text != "none":
        raise ValueError("backing_dev takes the absolute path of a file or block device, or none")
    disk.set_backing(None if text == "none" else Path(text))


def set_limit(disk: Disk, value: str) -> None:
    """Set how many pages may be written back."""
    limit = parse_unsigned(value, "writeback_limit", MAX_LIMIT)
    disk.set_writeback(lambda settings: replace(settings, limit=limit))


def set_limit_enable(disk: Disk, value: str) -> None:
    """Say whether the limit counts."""
    limited = parse_unsigned(value, "writeback_limit_enable", MAX_LIMIT) != 0
    disk.set_writeback(lambda settings: replace(settings, limited=limited))


def set_batch_size(disk: Disk, value: str) -> None:
    """Set how many pages are taken at a time."""
    size = parse_unsigned(value, "writeback_batch_size", MAX_BATCH_SIZE)
    if not size:
        raise ValueError("writeback_batch_size is at least 1")
    disk.set_writeback(lambda settings: replace(settings, batch_size=size))


def set_compressed(_: Disk, value: str) -> None:
    """Take a yes: pages are always written back as they are stored."""
    text = value.strip().lower()
    wanted = _BOOLEANS.get(text[:2], _BOOLEANS.get(text[:1]))
    if wanted is None:
        raise ValueError("compressed_writeback takes 1")
    if not wanted:
        raise ValueError("pages are always written back compressed: compressed_writeback cannot be 0")


def write_back(disk: Disk, value: str) -> str:
    """Write pages back, and return a line about it."""
    outcome = disk.write_back(lambda pages: parse_selections(value, pages))
    return (
        f"{'cancelled: ' * outcome.cancelled}{outcome.written} of {outcome.candidates} pages written back, "
        f"{outcome.bytes_written} bytes saved\n"
    )


def parse_selections(value: str, pages: int) -> list[Selection]:
    """Read what `writeback` takes: `type=T`, `page_index=N`, `page_indexes=LOW-HIGH`, or a bare T.

    A type ends the text, and means the last range that was given before it.

    Raises:
        ValueError: it is none of that.
        OSError: ERANGE, there are no such pages.
    """
    selections: list[Selection] = []
    first, last = 0, pages - 1
    for word in value.split():
        key, _, given = word.partition("=")
        if not given or key == "type":
            return [*selections, Selection(_type(given or key), first, last)]
        if key == "page_index":
            first = last = parse_unsigned(given, key)
        elif key == "page_indexes":
            low, dash, high = given.partition("-")
            if not dash:
                raise ValueError(f"{word} is not page_indexes=LOW-HIGH")
            first, last = parse_unsigned(low, key), parse_unsigned(high, key)
        else:
            continue
        if first > last or last >= pages:
            raise OSError(errno.ERANGE, f"{word}: the disk has pages 0 to {pages - 1}")
        selections.append(Selection(WritebackType.ANY, first, last))
    return selections


def _type(name: str) -> WritebackType:
    try:
        if not name:
            raise ValueError
        return WritebackType(name)
    except ValueError:
        kinds = ", ".join(kind.value for kind in WritebackType if kind.value)
        raise ValueError(f"{name!r} is not one of {kinds}") from None
