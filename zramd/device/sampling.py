"""Pages of a device in use, chosen at random: a look that leaves access times and idle flags as they are."""

import random
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from zramd.device.algorithms import Decompressors
from zramd.device.codecs import CodecError
from zramd.device.entry import HUGE, IN_MEMORY, STATE_MASK
from zramd.device.fetching import PageError
from zramd.device.slices import in_slices, pause
from zramd.device.work import Work
from zramd.device.zram import Device
from zramd.layout import PAGE_SIZE

MOST_PAGES = 8192
"""In a sample: 32 MiB."""
BATCH = 8
"""Pages that are copied under one hold of the lock."""


@dataclass(slots=True)
class Sample:
    """Some of a device's pages that have an object in memory, in random order, and how many of these there are."""

    pages: list[bytes]
    objects: int


def sample_pages(device: Device, count: int, work: Work) -> Sample:
    """Return at most `count` pages, decompressed; fewer if there are fewer, or if that is cancelled.

    Raises:
        PageError: a page is damaged.
    """
    chosen: array[int] = array("Q")
    generator = random.Random()  # noqa: S311 (it has nothing to hide)
    sample = Sample([], 0)
    in_slices(device, _choose(device, min(count, MOST_PAGES), chosen, generator, sample, work))
    order = sorted(chosen)
    decompressors = Decompressors(device.identity.algorithms)
    for start in range(0, len(order), BATCH):
        if work.cancelled or device.retired:
            break
        _copy(device, order[start : start + BATCH], decompressors, sample.pages)
        pause()
    generator.shuffle(sample.pages)
    return sample


def _choose(
    device: Device, count: int, chosen: "array[int]", generator: random.Random, sample: Sample, work: Work
) -> Iterator[None]:
    """Choose `count` pages, each with the same chance, in one pass over the page table (reservoir sampling)."""
    draw, seen = generator.random, 0
    for first, entries in device.chunks():
        for offset, entry in enumerate(entries):
            if entry & STATE_MASK in IN_MEMORY:
                seen += 1
                if len(chosen) < count:
                    chosen.append(first + offset)
                elif (place := int(draw() * seen)) < count:
                    chosen[place] = first + offset
        sample.objects = seen
        if work.cancelled:
            return
        yield


def _copy(device: Device, indexes: list[int], decompressors: Decompressors, pages: list[bytes]) -> None:
    copies: list[tuple[int, int, bytes]] = []
    try:
        with device:
            decompressors.refresh(device.generation)
            for index in [] if device.retired else indexes:
                entry = device.entry(index)
                if entry & STATE_MASK in IN_MEMORY:
                    copies.append((index, entry, device.stored(entry).tobytes()))
        for index, entry, data in copies:  # noqa: B007 (for the error)
            pages.append(data if entry & STATE_MASK == HUGE else decompressors.page(entry, data))
    except CodecError as error:
        raise PageError(f"page {index} is damaged: {error}") from error
    assert all(len(page) == PAGE_SIZE for page in pages)  # noqa: S101 (a codec gives whole pages)
