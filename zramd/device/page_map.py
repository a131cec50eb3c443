"""A map of a device: how many pages of each of its parts, the cells, are what."""

from array import array
from dataclasses import dataclass
from enum import IntEnum
from itertools import compress
from typing import TYPE_CHECKING

from zramd.device.slices import pause
from zramd.layout import (
    ENTRY_IDLE,
    ENTRY_STATE_MASK,
    ENTRY_STATE_SHIFT,
    PAGE_SHIFT,
    TABLE_CHUNK_SHIFT,
    WORD,
    PageState,
)

if TYPE_CHECKING:
    from zramd.device.zram import Device

MOST_CELLS = 2048
MOST_CHUNKS = 4096
"""Chunks of the page table that are looked at: 8 GiB of the device. Where more are in use, this is a sample."""
SLICE_CHUNKS = 8
"""Chunks that are copied under one hold of the lock: 32 KiB, some microseconds."""

_CHUNK_PAGES = 1 << TABLE_CHUNK_SHIFT
_IDLE = 8
"""Added to the state of a page that is idle."""


class PageKind(IntEnum):
    """What a page is: its state, and whether what is in memory is idle."""

    EMPTY = PageState.EMPTY
    SAME_FILLED = PageState.SAME_FILLED
    COMPRESSED = PageState.COMPRESSED
    HUGE = PageState.HUGE
    WRITTEN_BACK = PageState.WRITTEN_BACK
    COMPRESSED_IDLE = PageState.COMPRESSED | _IDLE
    HUGE_IDLE = PageState.HUGE | _IDLE


_OCCUPIED = tuple(kind for kind in PageKind if kind is not PageKind.EMPTY)
_STATES = bytes(byte >> (ENTRY_STATE_SHIFT - 48) & ENTRY_STATE_MASK for byte in range(256))
"""From the second highest byte of an entry to its state."""
_MARKS = bytes(_IDLE if byte << 56 & ENTRY_IDLE else 0 for byte in range(256))
"""From the highest byte to `_IDLE` or 0."""


@dataclass(slots=True)
class PageMap:
    """Cells of `cell_pages` pages each, a power of two, the last one with what is left of `pages`.

    `counts` has a number of pages for each cell, by kind. They come from `looked_at` pages; if these are fewer than
    `in_use`, the pages of those parts of the page table that are in use, they are estimates.
    """

    pages: int
    cell_pages: int
    counts: dict[PageKind, "array[int]"]
    looked_at: int
    in_use: int

    def __len__(self) -> int:
        """Return the number of cells."""
        return -(-self.pages // self.cell_pages)

    def coarser(self, cells: int) -> "PageMap":
        """Return the same with at most `cells` cells, at least one."""
        found = self
        while len(found) > cells:
            counts = {kind: _pairs(column) for kind, column in found.counts.items()}
            found = PageMap(self.pages, found.cell_pages * 2, counts, self.looked_at, self.in_use)
        return found


def _pairs(column: "array[int]") -> "array[int]":
    sums = array("L", map(int.__add__, column[::2], column[1::2]))
    return sums + column[-1:] if len(column) % 2 else sums


def map_pages(device: "Device") -> PageMap | None:
    """Return the map of a device in at most MOST_CELLS cells; None if it goes away meanwhile. Takes the lock.

    What was never written to costs next to nothing, the rest some microseconds for each of at most MOST_CHUNKS chunks.
    """
    with device:
        ready, pages = device.ready_chunks(), device.disksize >> PAGE_SHIFT
    cell_pages = 1 << max(0, -(-pages // MOST_CELLS) - 1).bit_length()
    cells = -(-pages // cell_pages)
    counts = {kind: array("L", [0]) * cells for kind in PageKind}
    chosen = _choose(ready, max(1, cell_pages >> TABLE_CHUNK_SHIFT))
    for start in range(0, len(chosen), SLICE_CHUNKS):
        chunks = chosen[start : start + SLICE_CHUNKS]
        with device:
            if device.retired:
                return None
            copies = [device.copy_chunk(chunk) for chunk in chunks]
        for chunk, copy in zip(chunks, copies, strict=True):
            first = chunk << TABLE_CHUNK_SHIFT
            # The table is whole pages; and the device may grow meanwhile.
            _count(counts, copy[: (pages - first) * WORD], first, cell_pages)
        pause()
    in_use = ready.count(1)
    if len(chosen) < in_use:
        _extrapolate(counts, ready, chosen, cell_pages >> TABLE_CHUNK_SHIFT)
    for cell, others in enumerate(zip(*(counts[kind] for kind in _OCCUPIED), strict=True)):
        counts[PageKind.EMPTY][cell] = min(cell_pages, pages - cell * cell_pages) - sum(others)
    return PageMap(pages, cell_pages, counts, len(chosen) << TABLE_CHUNK_SHIFT, in_use << TABLE_CHUNK_SHIFT)


def _choose(ready: bytearray, cell_chunks: int) -> list[int]:
    """Return the chunks to look at: all that are in use, or as many of each cell, evenly spaced among those in use."""
    if ready.count(1) <= MOST_CHUNKS:
        return list(compress(range(len(ready)), ready))
    chosen: list[int] = []
    most = MOST_CHUNKS // -(-len(ready) // cell_chunks)
    for first in range(0, len(ready), cell_chunks):
        in_use = list(compress(range(first, first + cell_chunks), ready[first : first + cell_chunks]))
        count = min(most, len(in_use))
        chosen += [in_use[(2 * number + 1) * len(in_use) // (2 * count)] for number in range(count)]
    return chosen


def _count(counts: dict[PageKind, "array[int]"], copy: bytes, first: int, cell_pages: int) -> None:
    """Count the pages of a chunk, the first of which is `first`; those that are empty are left for later."""
    marks = int.from_bytes(copy[7::WORD].translate(_MARKS), "little")
    states = int.from_bytes(copy[6::WORD].translate(_STATES), "little")
    kinds = (states | marks).to_bytes(len(copy) // WORD, "little")
    for start in range(0, len(kinds), cell_pages):
        part, cell = kinds[start : start + cell_pages], (first + start) // cell_pages
        for kind in _OCCUPIED:
            counts[kind][cell] += part.count(kind)


def _extrapolate(counts: dict[PageKind, "array[int]"], ready: bytearray, chosen: list[int], cell_chunks: int) -> None:
    """Scale what was counted of some chunks of a cell up to all of its chunks that are in use."""
    looked_at = bytearray(len(ready))
    for chunk in chosen:
        looked_at[chunk] = 1
    for cell, first in enumerate(range(0, len(ready), cell_chunks)):
        some = looked_at.count(1, first, first + cell_chunks)
        of = ready.count(1, first, first + cell_chunks)
        for kind in _OCCUPIED if some < of else ():
            counts[kind][cell] = counts[kind][cell] * of // some
