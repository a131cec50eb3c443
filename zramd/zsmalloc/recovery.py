"""Rebuilding a pool's private state from its regions.

The caller names the objects that are reached from the page table. Whatever else is in the regions, such as objects
that a crash left half made or half freed, is free. Nothing is changed before all objects have been found whole.
"""

from collections.abc import Iterable

from zramd.layout import (
    FULL,
    HANDLE_CLASS_MASK,
    HANDLE_CLASS_SHIFT,
    HANDLE_IN_USE,
    HANDLE_INDEX_MASK,
    HANDLE_INDEX_SHIFT,
    HANDLE_ZSPAGE_SHIFT,
    HEADER_IN_USE,
    PAGE_SIZE,
    WORD,
)
from zramd.memory import Region
from zramd.zsmalloc.arena import Arena
from zramd.zsmalloc.pool import ClassState, Pool

MAX_LOST = 16
"""Objects that no entry reaches. A crash leaves one; a process that fails otherwise, and goes on, could leave more."""

_CLASS_BITS = HANDLE_CLASS_MASK << HANDLE_CLASS_SHIFT | HANDLE_IN_USE
_LOWEST_BIT = bytes(number & 1 for number in range(256))
_SAMPLE = 64
"""Bytes of a huge page that are looked at first: the rest of one that is same-filled so far is looked at too."""


class DamagedError(Exception):
    """The regions contradict themselves."""


def recover(pool: Pool, objects: Iterable[tuple[int, int]], most_lost: int = MAX_LOST) -> None:
    """Fill a new pool on old regions with `objects`, pairs of (handle, payload bytes).

    Raises:
        DamagedError: an object is not where its handle says, two share a place, or more than `most_lost` are not named.
        NoMemoryError: there is no room for the pages of zeros that a sparse copy of the regions has left out.
    """
    present = [bytearray()] + [_restore(arena) for arena in pool.arenas]
    ready = _restore_handles(pool.handle_region)
    seen = bytearray(ready)
    _adopt(pool, objects, seen, present)
    in_use = pool.handle_region.bytes[: ready * WORD : WORD].tobytes().translate(_LOWEST_BIT).count(1)
    lost = in_use - seen.count(1)
    if lost > most_lost:
        raise DamagedError(f"no page has {lost} of the {in_use} objects")
    _rebuild_lists(pool, seen)
    _rebuild_handles(pool, seen, ready)
    for arena in pool.arenas:
        arena.release_unused()


def _restore(arena: Arena) -> bytearray:
    """Return for each zspage that an arena may have whether all of its pages have memory."""
    span = arena.pages * PAGE_SIZE
    ranges = list(arena.region.data_ranges())
    count = min(arena.capacity, -(-ranges[-1][1] // span)) if ranges else 0
    arena.restore(count)
    present = bytearray(count)
    for start, end in ranges:
        first, stop = -(-start // span), min(end // span, count)
        present[first:stop] = b"\1" * max(0, stop - first)
    return present


def _restore_handles(region: Region) -> int:
    """Return how many handles the table has."""
    size = max((end for _, end in region.data_ranges()), default=0) // PAGE_SIZE * PAGE_SIZE
    if size:
        region.populate(0, size, shared=True)
    return size // WORD


def _adopt(pool: Pool, objects: Iterable[tuple[int, int]], seen: bytearray, present: list[bytearray]) -> None:
    """Check each object, and count it in its zspage."""
    class_for, handles, ready = pool.class_for, pool.handle_region.words, len(seen)
    for handle, length in objects:
        if handle >= ready or seen[handle]:
            raise DamagedError(f"handle {handle} does not exist or is used twice")
        seen[handle] = 1
        word, state = handles[handle], class_for[length]
        if state is None or word & _CLASS_BITS != state.word:
            raise DamagedError(f"handle {handle} is not of an object of {length} bytes")
        zspage, index = word >> HANDLE_ZSPAGE_SHIFT, word >> HANDLE_INDEX_SHIFT & HANDLE_INDEX_MASK
        whole = present[state.pages]
        if index >= state.objects or zspage >= len(whole):
            raise DamagedError(f"handle {handle} points outside the pool")
        if not whole[zspage]:
            _make_whole(state, zspage)
            whole[zspage] = 1
        if state.size != PAGE_SIZE:
            if state.words[(zspage * state.span + index * state.size) >> 3] != handle << 1 | HEADER_IN_USE:
                raise DamagedError(f"the object of handle {handle} carries another handle")
        elif length == PAGE_SIZE and _is_same_filled(state, zspage):
            raise DamagedError(f"the object of handle {handle} has been overwritten")
        used = state.used[zspage]
        if not used:
            state.arena.size_class[zspage] = state.size_class.index + 1
        elif state.arena.size_class[zspage] != state.size_class.index + 1 or used == state.objects:
            raise DamagedError(f"the zspage of handle {handle} belongs to another object")
        state.used[zspage] = used + 1
        if index >= state.fresh[zspage]:
            state.fresh[zspage] = index + 1


def _make_whole(state: ClassState, zspage: int) -> None:
    """Give a zspage that is in use the pages that it lacks, which were of zeros: some copies leave such pages out."""
    state.arena.region.populate(zspage * state.span, state.span, shared=True)


def _is_same_filled(state: ClassState, zspage: int) -> bool:
    """Say whether a page that is stored as it is has one pattern: it would not have been stored so."""
    page = state.map
    start = zspage * state.span
    end = start + PAGE_SIZE
    if page[start : start + _SAMPLE - WORD] != page[start + WORD : start + _SAMPLE]:
        return False
    return page[start : end - WORD] == page[start + WORD : end]


def _rebuild_lists(pool: Pool, seen: bytearray) -> None:
    """Thread the free objects of each zspage, ascending, and put the zspages on their fullness lists."""
    handles = pool.handle_region.words
    for arena in pool.arenas:
        words = arena.region.words
        for zspage in reversed(range(len(arena))):
            if not arena.used[zspage]:
                continue
            state = pool.classes[arena.size_class[zspage] - 1]
            state.adopt(arena.used[zspage])
            pool.pages += arena.pages
            group = state.group_of[arena.used[zspage]]
            if group == FULL:
                continue
            state.regroup(zspage, FULL, group)
            base = zspage << HANDLE_ZSPAGE_SHIFT | state.size_class.index << HANDLE_CLASS_SHIFT | HANDLE_IN_USE
            for index in reversed(range(arena.fresh[zspage])):
                offset = zspage * state.span + index * state.size
                header = words[offset >> 3]
                handle = header >> 1
                if (
                    header & HEADER_IN_USE
                    and handle < len(seen)
                    and seen[handle]
                    and handles[handle] == base | index << HANDLE_INDEX_SHIFT
                ):
                    continue
                words[offset >> 3] = arena.free[zspage] << 1
                arena.free[zspage] = index + 1


def _rebuild_handles(pool: Pool, seen: bytearray, ready: int) -> None:
    top = seen.rfind(1) + 1
    handles = pool.handle_region.words
    free = 0
    for handle in reversed(range(1, top)):
        if not seen[handle]:
            handles[handle] = free << 1
            free = handle
    # Left over from handles that no entry reaches.
    pool.handle_region.bytes[top * WORD : ready * WORD] = bytes((ready - top) * WORD)
    pool.restore_handles(free, max(1, top), ready)
