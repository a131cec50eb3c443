"""What each page is, as the kernel's file block_state tells it (read_block_state in zram_drv.c of Linux 6.18)."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from zramd.device.algorithms import codec_number
from zramd.device.entry import size_of
from zramd.device.slices import pause
from zramd.layout import (
    ENTRY_IDLE,
    ENTRY_INCOMPRESSIBLE,
    ENTRY_STATE_MASK,
    ENTRY_STATE_SHIFT,
    PAGE_SIZE,
    PRIORITIES,
    PageState,
)

if TYPE_CHECKING:
    from zramd.device.zram import Device


def block_state(device: "Device") -> Iterator[str]:
    """Yield the lines of a chunk of the page table at a time, at most 20 KiB.

    A line is the page, the second of CLOCK_BOOTTIME in which it was last read or written, and what it is: s for
    same-filled, w written back, h huge, i idle, r recompressed, n incompressible. One that is written back is still
    what it was in memory, as in Linux 7.0 with compressed_writeback. Empty pages have none. The lock is held while a
    chunk is copied, and not while the caller has the lines.
    """
    chunks = device.chunks()
    while True:
        with device:
            found = None if device.retired else next(chunks, None)
            if found is None:
                return
            first, entries = found
            times = device.access_times(first, len(entries))
        yield "".join(
            f"{first + offset:12d} {times[offset]:12d}.000000 {_flags(entry)}\n"
            for offset, entry in enumerate(entries)
            if entry
        )
        pause()


def _flags(entry: int) -> str:
    state = entry >> ENTRY_STATE_SHIFT & ENTRY_STATE_MASK
    return (
        ("s" if state == PageState.SAME_FILLED else ".")
        + ("w" if state == PageState.WRITTEN_BACK else ".")
        + ("h" if size_of(entry) == PAGE_SIZE else ".")
        + ("i" if entry & ENTRY_IDLE else ".")
        + ("r" if codec_number(entry) % PRIORITIES else ".")
        + ("n" if entry & ENTRY_INCOMPRESSIBLE else ".")
    )
