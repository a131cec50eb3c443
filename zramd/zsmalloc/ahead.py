"""Populating a pool's memory ahead of need: a write under memory pressure then finds it there.

A thread of its own does that, without the device's lock while the kernel looks for pages. malloc wakes it, by an
eventfd that both engines write to, when a stock has gone down to its low mark; what is left then serves the writes that
come in meanwhile. Where that is not enough, malloc populates for itself, as it does without this thread.
"""

import logging
import os
import threading
from contextlib import AbstractContextManager

from zramd.layout import ArenaRecord, PoolRecord
from zramd.memory import NoMemoryError
from zramd.zsmalloc.arena import Arena
from zramd.zsmalloc.pool import HANDLE_CHUNK, Pool

LOW_PAGES = 64
"""Of each arena, left when more are wanted. At the least one zspage."""
STOCK_PAGES = 192
"""Of each arena, after more were populated."""
LOW_HANDLES = HANDLE_CHUNK // 2
RETRY_SECONDS = 0.1
"""Between two tries to have memory that the machine did not have."""

_POPULATED, _, _LOW, _WAKE = map(int, ArenaRecord)
_NEXT_HANDLE, _READY_HANDLES, _LOW_HANDLE = PoolRecord.NEXT_HANDLE, PoolRecord.READY_HANDLES, PoolRecord.LOW_HANDLE

log = logging.getLogger(__name__)


class Ahead:
    """Keeps a pool, guarded by `lock`, in stock from `start` to `stop`."""

    def __init__(self, pool: Pool, lock: AbstractContextManager[object]) -> None:
        self._pool = pool
        self._lock = lock
        self._event = os.eventfd(0, os.EFD_CLOEXEC)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ahead", daemon=True)
        self._short = False

    def start(self) -> None:
        """Fill the stocks, and keep them filled from now on.

        Raises:
            NoMemoryError: there is not even memory for the first stocks.
        """
        self.fill()
        with self._lock:
            for arena in self._pool.arenas:
                arena.record[_WAKE] = self._event
                arena.record[_LOW] = max(1, LOW_PAGES // arena.pages)
            self._pool.record[PoolRecord.WAKE] = self._event
        self._thread.start()

    def stop(self) -> None:
        """End the thread; the regions may then go away."""
        self._stopping.set()
        os.eventfd_write(self._event, 1)
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                os.eventfd_read(self._event)
                self.fill()
                self._short = False
            except NoMemoryError as error:
                if not self._short:
                    log.warning("no memory to populate ahead of need: %s", error)
                self._short = True
                self._stopping.wait(RETRY_SECONDS)
                os.eventfd_write(self._event, 1)

    def fill(self) -> None:
        """Populate what is missing of each stock.

        Raises:
            NoMemoryError: there is no room for all.
        """
        for arena in self._pool.arenas:
            self._fill_arena(arena)
        self._fill_handles()

    def _fill_arena(self, arena: Arena) -> None:
        with self._lock:
            missing = max(1, STOCK_PAGES // arena.pages) - arena.record[_POPULATED]
            if missing <= 0:
                return
            zspages = arena.claim(missing)
        try:
            arena.populate(zspages)
        except NoMemoryError:
            with self._lock:
                arena.disclaim(zspages)
            raise
        with self._lock:
            arena.add(zspages)

    def _fill_handles(self) -> None:
        """Populate the next handles. malloc may do so at the same time."""
        pool = self._pool
        with self._lock:
            ready = pool.record[_READY_HANDLES]
            if ready - pool.record[_NEXT_HANDLE] > LOW_HANDLES:
                return
            start, length = pool.next_handles()
        if length:
            pool.populate_handles(start, length)
            with self._lock:
                pool.add_handles(start, length)
                pool.record[_LOW_HANDLE] = pool.record[_READY_HANDLES] - LOW_HANDLES
