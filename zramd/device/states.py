"""What the pages of a device are made up of, in runs."""

from collections.abc import Iterator
from itertools import groupby

from zramd.device.entry import SAME_FILLED, STATE_MASK
from zramd.layout import ENTRY_HAS_ELEMENT, ENTRY_STATE_SHIFT, TABLE_CHUNK_SHIFT, PageState
from zramd.memory import SparseTable

MAX_SCANNED = 2048
"""Entries looked at under one hold of the lock: a fraction of a millisecond, or two if no two neighbours are alike.

What was never written to costs nothing.
"""

Run = tuple[int, PageState, bool]
"""(pages, their state, whether they are zeros)"""

_STATES = tuple(PageState)  # to call an enum costs more than the rest of the loop


def state_runs(table: SparseTable, first: int, end: int) -> Iterator[Run]:
    """Yield runs from page `first` on, to page `end` or MAX_SCANNED entries on.

    Neighbouring runs may be alike. The caller holds the device's lock.
    """
    ready, budget = table.ready, MAX_SCANNED
    while first < end and budget:
        chunk = first >> TABLE_CHUNK_SHIFT
        if ready[chunk]:
            high = min(end, chunk + 1 << TABLE_CHUNK_SHIFT, first + budget)
            budget -= high - first
            yield from _runs(table.words[first:high].tolist())
        else:
            found = ready.find(1, chunk)
            high = end if found < 0 else min(end, found << TABLE_CHUNK_SHIFT)
            yield high - first, PageState.EMPTY, True
        first = high


def _runs(entries: list[int]) -> Iterator[Run]:
    position = 0
    for bits, run in groupby(map(STATE_MASK.__and__, entries)):
        pages = sum(1 for _ in run)
        if bits == SAME_FILLED:
            alike = map(ENTRY_HAS_ELEMENT.__and__, entries[position : position + pages])
            for has_element, part in groupby(alike):
                yield sum(1 for _ in part), PageState.SAME_FILLED, not has_element
        else:
            yield pages, _STATES[bits >> ENTRY_STATE_SHIFT], bits == 0
        position += pages
