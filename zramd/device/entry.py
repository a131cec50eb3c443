"""Parts of a page-table entry, as they stand in it: see zramd/layout.py.

Plain integers: an enum costs more than the rest of the comparison.
"""

from zramd.layout import ENTRY_SIZE_MASK, ENTRY_SIZE_SHIFT, ENTRY_STATE_MASK, ENTRY_STATE_SHIFT, PageState

STATE_MASK = ENTRY_STATE_MASK << ENTRY_STATE_SHIFT
SAME_FILLED = PageState.SAME_FILLED << ENTRY_STATE_SHIFT
COMPRESSED = PageState.COMPRESSED << ENTRY_STATE_SHIFT
HUGE = PageState.HUGE << ENTRY_STATE_SHIFT
WRITTEN_BACK = PageState.WRITTEN_BACK << ENTRY_STATE_SHIFT
IN_MEMORY = {COMPRESSED, HUGE}
"""The states of pages that have an object in the pool."""


def size_of(entry: int) -> int:
    """Return the bytes of what is stored for a page."""
    return entry >> ENTRY_SIZE_SHIFT & ENTRY_SIZE_MASK
