"""Compaction: objects of sparse zspages move into fuller ones, and zspages that become empty are freed.

Which zspage gives and which takes is decided as in Linux 6.18 (__zs_compact in mm/zsmalloc.c). There, a destination is
kept until it is full or somebody waits for the pool's lock; here it goes back to its list after each source, where it
is the first to be found again, so that the pool is whole between any two steps.

Crash rule: an object is copied with its header, its handle's word is stored, and only then the old place is free.
"""

from collections.abc import Iterator

from zramd.layout import FULL, HANDLE_INDEX_SHIFT, HANDLE_ZSPAGE_SHIFT, HEADER_IN_USE
from zramd.zsmalloc.pool import ClassState, Pool


def compact(pool: Pool) -> Iterator[int]:
    """Compact a pool step by step; yield the pages that each step freed.

    A step empties one zspage, or fills one: at most as many moves as the class has objects in a zspage, 256. Between
    steps the pool may be used.
    """
    for size_class in reversed(pool.geometry.kept()):
        state = pool.classes[size_class.index]
        while state.freeable:
            pages = _step(pool, state)
            if pages is None:
                break
            yield pages


def _step(pool: Pool, state: ClassState) -> int | None:
    """Move what fits from the emptiest zspage to the fullest. Return the pages freed, None if there are no two."""
    group = state.filled.bit_length() - 1
    if not group or (state.filled == 1 << group and state.counts[group] == 1):
        return None
    destination = state.heads[group] - 1
    state.regroup(destination, group, FULL)
    group = (state.filled & -state.filled).bit_length() - 1
    source = state.heads[group] - 1
    state.regroup(source, group, FULL)
    _move_objects(pool, state, source, destination)
    state.regroup(destination, FULL, state.group_of[state.used[destination]])
    if state.used[source]:
        state.regroup(source, FULL, state.group_of[state.used[source]])
        return 0
    state.release_zspage(source, FULL)
    pool.pages -= state.pages
    return state.pages


def _move_objects(pool: Pool, state: ClassState, source: int, destination: int) -> None:
    """Move objects, the lowest first, until the source is empty or the destination is full."""
    memory, words, free, fresh = state.map, state.words, state.free, state.fresh
    handles, size, span = pool.handle_region.words, state.size, state.span
    base = destination << HANDLE_ZSPAGE_SHIFT | state.word
    moves = min(state.used[source], state.objects - state.used[destination])
    state.used[source] -= moves
    state.used[destination] += moves
    index = 0
    while moves:
        start = source * span + index * size
        header = words[start >> 3]
        if header & HEADER_IN_USE:
            place = free[destination]
            if place:
                place -= 1
                target = destination * span + place * size
                free[destination] = words[target >> 3] >> 1
            else:
                place = fresh[destination]
                fresh[destination] = place + 1
                target = destination * span + place * size
            memory[target : target + size] = memory[start : start + size]
            handles[header >> 1] = base | place << HANDLE_INDEX_SHIFT
            words[start >> 3] = free[source] << 1
            free[source] = index + 1
            moves -= 1
        index += 1
