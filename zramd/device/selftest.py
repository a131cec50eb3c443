"""A self-test of what a device is made of: a broken library or a miscompiled engine must not get at anybody's data.

A small volatile device is made, used in every way, and recovered from its regions: a few milliseconds.
"""

import hashlib
import os

from zramd.device.codecs import Codec
from zramd.device.opening import OpenDevice
from zramd.device.wanted import Wanted
from zramd.device.zram import Device
from zramd.layout import PAGE_SIZE, PageState
from zramd.memory import NoMemoryError, Region, RegionStore
from zramd.native import VARIABLE, Engine, choose

PAGES = 48
SIZE = PAGES * PAGE_SIZE
OBJECT_BYTES = 1000
"""Of a page that cannot be compressed: objects of about this size lie three and a half in a page."""
FASTEST_LEVEL = 22
"""From level 0. Beyond, lz4 and zstd skip so much that they may leave any page as it is."""

_NOISE = hashlib.shake_128(b"zramd").digest(PAGES * OBJECT_BYTES + PAGE_SIZE)


class SelfTestError(Exception):
    """A device did not do what it has to; the text is one line."""


def selftest(codec: Codec) -> None:
    """Try out a codec, and the engine that will be used.

    Raises:
        SelfTestError: they do not work, and no device may be served with them.
        NoMemoryError: there is no room to find out.
        EngineError: the engine that was asked for cannot be had.
    """
    engine = choose()
    try:
        _try_out(codec)
    except NoMemoryError:
        raise
    except Exception as error:
        what = str(error) if isinstance(error, SelfTestError) else f"{type(error).__name__}: {error}".partition("\n")[0]
        remedy = f"set {VARIABLE}=python, or install zramd again" if engine is Engine.NATIVE else "install zramd again"
        raise SelfTestError(
            f"the self-test of {codec.name} level {codec.level} with the {engine.value} engine failed: {what}; {remedy}"
        ) from error


class _KeptRegions(RegionStore):
    """Memfds that outlive a device, so that another one finds it there."""

    def __init__(self) -> None:
        super().__init__(None)
        self._files: dict[str, int] = {}

    def exists(self, name: str) -> bool:
        return name in self._files

    def open(self, name: str, size: int, *, create: bool, grow: bool = False) -> Region:
        if create:
            region = super().open(name, size, create=True)
            self._files[name] = os.dup(region.fd)
            return region
        return Region(os.dup(self._files[name]), size, name)

    def rename(self, old: str, new: str) -> None:
        self._files[new] = self._files.pop(old)

    def forget(self) -> None:
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()


def _try_out(codec: Codec) -> None:
    store = _KeptRegions()
    opened = OpenDevice(store, Wanted(SIZE, codec))
    expected = _fill(opened.device, codec)
    _compact(opened.device, expected)
    before = opened.device.mm_stat()
    opened.close()
    opened = OpenDevice(store, Wanted(SIZE, codec))
    _require(opened.recovered and opened.device.mm_stat() == before, "the counters changed in a recovery")
    _require_contents(opened.device, expected, "a recovery")
    _empty(opened.device)
    # Where something fails, views of the regions may be left, and the process has no more to do than to say so.
    opened.close()
    store.forget()


def _fill(device: Device, codec: Codec) -> bytearray:
    """Write pages of every kind, some over others. Return what the device has to hold."""
    contents = bytearray(SIZE)
    stream = device.stream(contents)

    def write(first: int, *pages: bytes) -> None:
        start, length = first * PAGE_SIZE, len(pages) * PAGE_SIZE
        contents[start : start + length] = b"".join(pages)
        prepared = stream.prepare(start, length, start)
        with device:
            device.write(stream, start, length, start, prepared)

    objects = [_compressible(page) for page in range(PAGES - 4)]
    write(0, *objects, _NOISE[-PAGE_SIZE:], _NOISE[:8] * (PAGE_SIZE // 8), bytes(PAGE_SIZE))
    _require_contents(device, contents, "they were written")
    if abs(codec.level) <= FASTEST_LEVEL:
        states = [(pages, state) for pages, state, _ in device.states(0, PAGES)]
        expected = [(PAGES - 4, PageState.COMPRESSED), (1, PageState.HUGE)]
        expected += [(1, PageState.SAME_FILLED), (1, PageState.SAME_FILLED), (1, PageState.EMPTY)]
        _require(states == expected, "pages are not stored as what they are")
    write(0, _NOISE[-PAGE_SIZE:])
    write(PAGES - 4, objects[0])
    write(PAGES - 1, objects[1])
    _require_contents(device, contents, "they were overwritten")
    stat = device.mm_stat()
    _require((stat.orig_data_size, stat.same_pages) == (SIZE, 2), "the counters are wrong")
    return contents


def _compressible(number: int) -> bytes:
    start = number * OBJECT_BYTES
    return _NOISE[start : start + OBJECT_BYTES].ljust(PAGE_SIZE, b"z")


def _compact(device: Device, contents: bytearray) -> None:
    """Discard every page but each seventh of those that share zspages, and compact the rest."""
    for page in range(1, PAGES - 4):
        if page % 7:
            with device:
                device.discard(page * PAGE_SIZE, PAGE_SIZE)
            contents[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = bytes(PAGE_SIZE)
    _require_contents(device, contents, "others were discarded")
    freeable = sum(stat.freeable for stat in device.class_stats())
    before = device.mm_stat()
    device.compact()
    after = device.mm_stat()
    freed = (before.mem_used_total - after.mem_used_total) // PAGE_SIZE
    _require(freed == after.pages_compacted == freeable, "compaction does not free what it counts")
    _require_contents(device, contents, "a compaction")


def _empty(device: Device) -> None:
    with device:
        device.discard(0, SIZE)
    stat = device.mm_stat()
    left = (stat.orig_data_size, stat.compr_data_size, stat.mem_used_total, stat.same_pages, stat.huge_pages)
    _require(not any(left), "the counters of an empty device are not 0")
    _require_contents(device, bytearray(SIZE), "all were discarded")


def _require_contents(device: Device, contents: bytearray, after: str) -> None:
    out: list[bytes | memoryview] = []
    with device:
        device.read(0, SIZE, out)
    _require(b"".join(out) == contents, f"pages did not come back after {after}")


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise SelfTestError(otherwise)
