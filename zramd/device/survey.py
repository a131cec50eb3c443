"""A count of the pages that are worth recompressing or writing back, which changes nothing."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from zramd.device.algorithms import codec_number
from zramd.device.entry import COMPRESSED, HUGE, STATE_MASK
from zramd.device.work import Work
from zramd.layout import (
    ENTRY_INCOMPRESSIBLE,
    ENTRY_SIZE_MASK,
    ENTRY_SIZE_SHIFT,
    PAGE_SHIFT,
    PRIORITIES,
)

if TYPE_CHECKING:
    from zramd.device.zram import Device


@dataclass(slots=True)
class Survey:
    """Pages with an object in memory, counted.

    Attributes:
        objects: all of them.
        idle: those that were not touched for an age in seconds, by age.
        improvable: those of them that an algorithm to recompress with has not been tried on.
        improvable_huge: the huge ones among these.
        huge: huge ones of any age that none has been tried on.
        seconds: what the count took.
    """

    objects: int = 0
    idle: dict[int, int] = field(default_factory=dict)
    improvable: dict[int, int] = field(default_factory=dict)
    improvable_huge: dict[int, int] = field(default_factory=dict)
    huge: int = 0
    seconds: float = 0.0


def take_survey(
    device: "Device", ages: Sequence[int], threshold: int, now: int, found: Survey, work: Work
) -> Iterator[None]:
    """Count pages into `found`, in steps of a chunk of the page table; the caller holds the lock in each.

    `ages` are in seconds before `now` (of CLOCK_BOOTTIME); objects of less than `threshold` bytes are not improvable.
    """
    highest = max(device.identity.algorithms.secondary, default=0)
    ascending = sorted(set(ages))
    # Of pages that are older than exactly the first n ages: all, improvable, improvable and huge.
    counts = [[0, 0, 0] for _ in range(len(ascending) + 1)]
    work.total = device.disksize >> PAGE_SHIFT
    for first, entries in device.chunks():
        for entry, time in zip(entries, device.access_times(first, len(entries)), strict=True):
            state = entry & STATE_MASK
            if state != COMPRESSED and state != HUGE:
                continue
            found.objects += 1
            older = counts[bisect_right(ascending, now - time)]
            older[0] += 1
            if (
                not entry & ENTRY_INCOMPRESSIBLE
                and codec_number(entry) % PRIORITIES < highest
                and entry >> ENTRY_SIZE_SHIFT & ENTRY_SIZE_MASK >= threshold
            ):
                older[1] += 1
                if state == HUGE:
                    older[2] += 1
                    found.huge += 1
        work.done = first + len(entries)
        if work.cancelled:
            return
        yield
    work.done = work.total
    sums = [0, 0, 0]
    for number in range(len(ascending), 0, -1):
        sums = [total + count for total, count in zip(sums, counts[number], strict=True)]
        age = ascending[number - 1]
        found.idle[age], found.improvable[age], found.improvable_huge[age] = sums
