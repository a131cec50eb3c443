"""What a codec does to pages: how small they become, what that takes, and what a pool would hold."""

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from zramd.device.codecs import Codec
from zramd.device.opening import OpenDevice
from zramd.device.wanted import Wanted
from zramd.device.work import Work, WorkKind
from zramd.device.zram import Device
from zramd.layout import ENTRY_SIZE_MASK, ENTRY_SIZE_SHIFT, PAGE_SIZE
from zramd.memory import RegionStore
from zramd.zsmalloc import geometry
from zramd.zsmalloc.classes import MAX_CHAIN_SIZE

LEVELS = {"lz4": (1, 2, 4, 8), "lz4hc": (3, 6, 9, 12), "zstd": (-5, -1, 1, 2, 3, 6, 9, 12, 15, 19)}
"""Of each codec, those that differ from their neighbours."""
PART = 64 * PAGE_SIZE
"""Bytes that are compressed, or read, at once: after each part the trial may be cancelled."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of it: bytes of each object, PAGE_SIZE for huge ones, and microseconds of processor time a page."""

    lengths: tuple[int, ...]
    compress: float
    decompress: float

    @property
    def ratio(self) -> float:
        """Bytes of data for each stored byte."""
        return len(self.lengths) * PAGE_SIZE / sum(self.lengths)


def run_trial(chosen: Codec, pages: bytearray, work: Work | None = None) -> Trial | None:
    """Store pages, none of them same-filled, on a device of its own and read them, as the engine in use does.

    None if the work was cancelled.

    Raises:
        NoMemoryError: there is no room for the device.
    """
    work = work or Work(WorkKind.ESTIMATE)
    # Of all chain sizes, the largest takes the fewest pages for huge: lengths then serve for all.
    opened = OpenDevice(RegionStore(None), Wanted(len(pages), chosen, MAX_CHAIN_SIZE))
    try:
        return _run(opened.device, pages, work)
    finally:
        opened.close()


def _run(device: Device, pages: bytearray, work: Work) -> Trial | None:
    compressing = decompressing = 0.0
    stream = device.stream(pages)
    for offset in range(0, len(pages), PART):
        length = min(PART, len(pages) - offset)
        started = time.thread_time()
        prepared = stream.prepare(offset, length, offset)
        compressing += time.thread_time() - started
        with device:
            device.write(stream, offset, length, offset, prepared)
        started = time.thread_time()
        found: list[bytes | memoryview] = []
        with device:
            device.read(offset, length, found)
        decompressing += time.thread_time() - started
        work.done += length // PAGE_SIZE
        if work.cancelled:
            return None
    with device:
        lengths = tuple(entry >> ENTRY_SIZE_SHIFT & ENTRY_SIZE_MASK for _, entry in device.entries())
    scale = 1e6 * PAGE_SIZE / len(pages)
    return Trial(lengths, compressing * scale, decompressing * scale)


def pool_memory(lengths: Iterable[int], chain_size: int, objects: int) -> int:
    """Return the bytes that a pool holds for so many objects, of which those of these lengths are a sample.

    Zspages are full but for the last of each class.
    """
    shape = geometry(chain_size)
    counts = Counter(shape.class_of[length if length < shape.huge_limit else PAGE_SIZE] for length in lengths)
    scale = objects / max(1, counts.total())
    return sum(
        -(-round(count * scale) // size_class.objects) * size_class.zspage_bytes for size_class, count in counts.items()
    )
