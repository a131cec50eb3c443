"""Memory of a pool that is populated ahead of need."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from zramd.layout import NOBODY, ArenaRecord, PoolRecord
from zramd.memory import NoMemoryError, RegionStore
from zramd.zsmalloc import FitRule, Pool, geometry
from zramd.zsmalloc.ahead import LOW_HANDLES, LOW_PAGES, STOCK_PAGES, Ahead
from zramd.zsmalloc.arena import Arena
from zramd.zsmalloc.pool import HANDLE_CHUNK

OBJECTS = 3 * HANDLE_CHUNK


def stock(arena: Arena) -> int:
    """Return the free zspages with memory."""
    return arena.record[ArenaRecord.POPULATED]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture
def pool() -> Pool:
    store = RegionStore(None)
    return Pool(geometry(4, FitRule.LEAST_WASTE), OBJECTS, lambda name, size: store.open(name, size, create=True))


@pytest.fixture
def ahead(pool: Pool) -> Iterator[Ahead]:
    ahead = Ahead(pool, threading.Lock())
    yield ahead
    ahead.stop()


def test_from_the_start_each_arena_and_the_handle_table_have_a_stock(pool: Pool, ahead: Ahead) -> None:
    ahead.start()
    for arena in pool.arenas:
        assert stock(arena) == STOCK_PAGES // arena.pages
        assert (
            sum(end - start for start, end in arena.region.data_ranges())
            == STOCK_PAGES // arena.pages * arena.pages << 12
        )
    assert pool.record[PoolRecord.READY_HANDLES] == HANDLE_CHUNK
    assert pool.pages == 0


def test_a_stock_that_goes_down_is_filled_again_without_malloc_populating_anything(
    pool: Pool, ahead: Ahead, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead.start()

    def never(*_: object) -> None:
        pytest.fail("malloc had to populate for itself")

    monkeypatch.setattr(Arena, "grow", never)
    monkeypatch.setattr(Pool, "grow_handles", never)
    arena = pool.arenas[0]
    for _ in range(2 * HANDLE_CHUNK):
        pool.malloc(4096)
        wait_for(lambda: stock(arena) > LOW_PAGES // 2)
        wait_for(lambda: pool.record[PoolRecord.READY_HANDLES] > pool.record[PoolRecord.NEXT_HANDLE])
    wait_for(lambda: pool.record[PoolRecord.LOW_HANDLE] > pool.record[PoolRecord.NEXT_HANDLE])
    assert pool.record[PoolRecord.READY_HANDLES] - pool.record[PoolRecord.LOW_HANDLE] == LOW_HANDLES


def test_where_there_is_no_memory_ahead_it_is_tried_again_and_nothing_is_lost(
    pool: Pool, ahead: Ahead, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead.start()
    arena = pool.arenas[1]
    populate = Arena.populate
    failures = []

    def fail(self: Arena, _: object) -> None:
        failures.append(self)
        raise NoMemoryError("no memory left")

    monkeypatch.setattr(Arena, "populate", fail)
    taken = {arena.take() for _ in range(STOCK_PAGES // 2 - 1)}
    wait_for(lambda: len(failures) >= 2)
    monkeypatch.setattr(Arena, "populate", populate)
    wait_for(lambda: stock(arena) >= LOW_PAGES // 2)
    taken |= {arena.take() for _ in range(LOW_PAGES // 2)}
    assert len(taken) == STOCK_PAGES // 2 - 1 + LOW_PAGES // 2


def test_the_lock_is_free_while_the_kernel_looks_for_pages(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = threading.Lock()
    ahead = Ahead(pool, lock)
    populate = Arena.populate
    held = []

    def look(self: Arena, zspages: "object") -> None:
        held.append(lock.locked())
        populate(self, zspages)  # type: ignore[arg-type]

    monkeypatch.setattr(Arena, "populate", look)
    ahead.start()
    ahead.stop()
    assert held == [False] * 4


def test_nobody_is_told_of_a_pool_that_is_not_kept_in_stock(pool: Pool) -> None:
    assert all(arena.record[ArenaRecord.LOW] == NOBODY for arena in pool.arenas)
    assert pool.record[PoolRecord.LOW_HANDLE] == NOBODY
    for _ in range(HANDLE_CHUNK + 1):
        pool.malloc(4096)
