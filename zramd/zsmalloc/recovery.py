"""Rebuilding a pool's private state from its regions.

The caller names the objects that are reached from the page table. Whatever else is in the regions, such as objects
that a crash left half made or half freed, is free.
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
from zramd.zsmalloc.pool import Pool


class DamagedError(Exception):
    """The regions contradict themselves."""


def recover(pool: Pool, objects: Iterable[tuple[int, int]]) -> None:
    """Fill a new pool on old regions with `objects`, pairs of (handle, payload bytes).

    Raises:
        DamagedError: an object is not where its handle says, or two share a place.
    """
    for arena in pool.arenas:
        span = arena.pages * PAGE_SIZE
        end = max((end for _, end in arena.region.data_ranges()), default=0)
        arena.restore(min(arena.capacity, -(-end // span)))
    ready = max((end for _, end in pool.handle_region.data_ranges()), default=0) // PAGE_SIZE * PAGE_SIZE // WORD
    seen = bytearray(ready)
    for handle, length in objects:
        if handle >= ready or seen[handle]:
            raise DamagedError(f"handle {handle} does not exist or is used twice")
        seen[handle] = 1
        _adopt(pool, handle, length)
    _rebuild_lists(pool, seen)
    _rebuild_handles(pool, seen, ready)
    for arena in pool.arenas:
        arena.release_unused()


def _adopt(pool: Pool, handle: int, length: int) -> None:
    word = pool.handle_region.words[handle]
    index = word >> HANDLE_INDEX_SHIFT & HANDLE_INDEX_MASK
    zspage = word >> HANDLE_ZSPAGE_SHIFT
    size_class = pool.geometry.class_of[length]
    if not word & HANDLE_IN_USE or word >> HANDLE_CLASS_SHIFT & HANDLE_CLASS_MASK != size_class.index:
        raise DamagedError(f"handle {handle} is not of an object of {length} bytes")
    arena = pool.arenas[size_class.pages - 1]
    if index >= size_class.objects or zspage >= len(arena):
        raise DamagedError(f"handle {handle} points outside the pool")
    if not size_class.huge:
        offset = zspage * size_class.zspage_bytes + index * size_class.size
        if arena.region.words[offset >> 3] != handle << 1 | HEADER_IN_USE:
            raise DamagedError(f"the object of handle {handle} carries another handle")
    if arena.size_class[zspage] not in (0, size_class.index + 1) or arena.used[zspage] == size_class.objects:
        raise DamagedError(f"the zspage of handle {handle} belongs to another object")
    arena.size_class[zspage] = size_class.index + 1
    arena.used[zspage] += 1
    arena.fresh[zspage] = max(arena.fresh[zspage], index + 1)


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
