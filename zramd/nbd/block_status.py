"""Metadata contexts, and the extents that BLOCK_STATUS reports in them."""

from enum import IntEnum

from zramd.device.states import Run
from zramd.layout import PAGE_SHIFT, PageState
from zramd.nbd.protocol import Allocation


class Context(IntEnum):
    """Metadata contexts; the numbers are their ids on the wire."""

    ALLOCATION = 1
    STATE = 2


CONTEXT_NAMES = {Context.ALLOCATION: "base:allocation", Context.STATE: "zramd:state"}
"""The status of an extent in zramd:state is its pages' state: 0 empty, 1 same-filled, 2 compressed, 3 huge, 4 written
back."""

Extent = tuple[int, int]
"""(bytes, status)"""

_HOLE, _ZERO = int(Allocation.HOLE | Allocation.ZERO), int(Allocation.ZERO)


def find_contexts(query: str) -> list[Context]:
    """Return the contexts that a query of LIST_META_CONTEXT asks for: a name, or a namespace that ends in a colon."""
    return [
        context
        for context, name in CONTEXT_NAMES.items()
        if query == name or (query.endswith(":") and name.startswith(query))
    ]


def extents(runs: list[Run], context: Context, offset: int, length: int, *, one: bool) -> list[Extent]:
    """Return at least one extent from `offset` on, with no two alike in a row; `one`: only one.

    `runs` starts with the page at `offset`. Together the extents are `length` bytes (not 0) or as much as the runs
    cover.
    """
    found: list[Extent] = []
    begin, end = offset, offset + length
    page, status = offset >> PAGE_SHIFT, -1
    for pages, state, is_zero in runs:
        following = state if context is Context.STATE else _allocation(state, is_zero)
        boundary = page << PAGE_SHIFT
        if following != status:
            if boundary > begin:
                found.append((boundary - begin, status))
                if one:
                    return found
                begin = boundary
            status = following
        page += pages
    found.append((min(page << PAGE_SHIFT, end) - begin, status))
    return found


def _allocation(state: PageState, is_zero: bool) -> int:
    if state is PageState.EMPTY:
        return _HOLE
    return _ZERO if is_zero else 0
