"""Marking pages that nobody has touched, as Linux 6.18 does (mark_idle in zram_drv.c)."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from zramd.device.entry import IN_MEMORY, STATE_MASK
from zramd.device.work import Work, WorkKind
from zramd.layout import ENTRY_IDLE, PAGE_SHIFT

if TYPE_CHECKING:
    from zramd.device.zram import Device


def mark_idle(device: "Device", cutoff: int | None, work: Work | None = None) -> Iterator[None]:
    """Mark pages as idle, in steps of a chunk of the page table; the caller holds the lock in each.

    Those that were last touched before `cutoff`, in seconds of CLOCK_BOOTTIME, are idle and the others are not; None is
    all. What has no object in memory (same-filled, written back) is left alone. `work` counts pages of the device,
    those that are idle being changed.
    """
    work = work or Work(WorkKind.IDLE)
    work.total = device.disksize >> PAGE_SHIFT
    for first, entries in device.chunks():
        times = device.access_times(first, len(entries)) if cutoff is not None else None
        for offset, entry in enumerate(entries):
            if entry & STATE_MASK in IN_MEMORY:
                idle = times is None or times[offset] < (cutoff or 0)
                work.changed += idle
                wanted = entry | ENTRY_IDLE if idle else entry & ~ENTRY_IDLE
                if wanted != entry:
                    device.replace_entry(first + offset, wanted)
        work.done = first + len(entries)
        if work.cancelled:
            return
        yield
    work.done = work.total
