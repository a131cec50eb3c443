"""A disk whose server is killed again and again, and what must hold after each time."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from tests.crash.client import PAUSE_SECONDS, Client
from tests.crash.servers import SECONDS, Server, Starter
from tests.crash.steps import Phase, Step
from tests.property.test_device import read, recount, write
from tests.property.test_pool import check_invariants
from zramd.backing.store import SEGMENT
from zramd.device.codecs import parse_codec
from zramd.device.opening import OpenDevice, Wanted
from zramd.device.zram import Device
from zramd.layout import (
    ENTRY_HANDLE_MASK,
    ENTRY_SIZE_MASK,
    ENTRY_SIZE_SHIFT,
    ENTRY_STATE_MASK,
    ENTRY_STATE_SHIFT,
    HANDLE_IN_USE,
    PAGE_SIZE,
    PageState,
    PoolRecord,
)
from zramd.memory import RegionStore
from zramd.status.client import StatusError, ask
from zramd.zsmalloc.pool import ClassState

PAGES = 1024
SIZE = PAGES * PAGE_SIZE
SEGMENTS = 4
"""Of the backing store, which is full at times."""
TRAFFIC_SECONDS = 0.05
"""Before a disk is grown or reset."""


class KilledDisk:
    """A disk kept in `directory`, with two clients. It lives and is verified in turns.

    `answered` counts the requests of both clients, `compacted` the pages that compaction has freed, `written_back` the
    blocks that went to the backing store.
    """

    def __init__(
        self, directory: Path, seed: int, algorithm: str = "lz4", chain_size: int = 8, *, integrity: bool = False
    ) -> None:
        self._directory = directory
        self._algorithm = algorithm
        self._wanted = Wanted(SIZE, parse_codec(algorithm), chain_size, integrity=integrity)
        self._state = directory / "state"
        self._medium = directory / "medium"
        self._medium.touch()
        os.truncate(self._medium, SEGMENTS * SEGMENT)
        self._clients = [Client(seed, first, PAGES // 2) for first in (0, PAGES // 2)]
        self._sizes = [SIZE]
        self._asked = SIZE
        self._filler = random.Random(seed).randbytes(SIZE)
        self.compacted = self.written_back = 0

    @property
    def answered(self) -> int:
        return sum(client.answered for client in self._clients)

    def live_until(self, starter: Starter, seconds: float, requests: int = 0) -> None:
        """Have a server killed that many seconds after it has answered so many requests."""
        server = self._start(starter)
        wanted = self.answered + requests
        with _Traffic(self._clients, server, self._medium):
            while self.answered < wanted and not server.has_died(PAUSE_SECONDS):
                pass
            died = server.has_died(seconds)
            server.kill()
        assert not died, server.errors.read_text()
        _require_killed(server)

    def live_to(self, starter: Starter, step: Step, passing: int) -> None:
        """Have a server die when it passes a step for the n-th time."""
        server = self._start(starter, step, passing)
        with _Traffic(self._clients, server, self._medium):
            if step.phase is Phase.RESETTING:
                server.has_died(TRAFFIC_SECONDS)
                _ask(server, "reset force")
            if step.phase is Phase.ENLARGING:
                server.has_died(TRAFFIC_SECONDS)
                self._asked += SIZE
                self._sizes.append(self._asked)
                _ask(server, f"grow {self._asked}")
            died = server.has_died(SECONDS)
            server.kill()
        assert died, f"the step {step.name} was not passed {passing} times"
        _require_killed(server, f"killed at {step.name}")
        if step.phase is Phase.RESETTING:
            for client in self._clients:
                client.forget()
            self._sizes.insert(0, SIZE)

    def _start(self, starter: Starter, step: Step | None = None, passing: int = 0) -> Server:
        made_with = ["--algorithm", self._algorithm, "--chain-size", str(self._wanted.chain_size)]
        if self._wanted.integrity:
            made_with.append("--integrity")
        kept = ["--state", str(self._state), "--size", str(SIZE)]
        return starter.start(self._directory, *kept, *made_with, step=step, passing=passing)

    def verify(self) -> bool:
        """Check all that is left, as the next server finds it. Return whether there was a disk."""
        opened = OpenDevice(RegionStore(self._state), self._wanted)
        try:
            assert opened.device.disksize in self._sizes
            self._sizes = [opened.device.disksize]
            disk = read(opened.device, 0, SIZE)
            for client in self._clients:
                client.check(disk)
            _check_counters(opened.device)
            _check_pool(opened.device)
            self.written_back = max(self.written_back, opened.device.bd_stat().writes)
            self.compacted = max(self.compacted, opened.device.mm_stat().pages_compacted)
            return opened.recovered
        finally:
            opened.close()

    def verify_that_nothing_leaks(self) -> None:
        """Fill the disk, empty it and fill it once more; it is empty in the end."""
        opened = OpenDevice(RegionStore(self._state), self._wanted)
        device = opened.device
        try:
            for _ in range(2):
                write(device, 0, bytearray(self._filler))
                assert device.mm_stat().mem_used_total == SIZE
                # An object is written before the one in its place is freed.
                assert device.pool.record[PoolRecord.NEXT_HANDLE] <= PAGES + 2
                with device:
                    device.discard(0, SIZE)
                stat = device.mm_stat()
                left = (
                    stat.orig_data_size,
                    stat.compr_data_size,
                    stat.mem_used_total,
                    stat.same_pages,
                    stat.huge_pages,
                    device.bd_stat().count,
                    device.bd_stat().pages,
                )
                assert not any(left)
        finally:
            opened.close()
        for client in self._clients:
            client.forget()
        self.verify()


def _check_counters(device: Device) -> None:
    stat = device.mm_stat()
    assert stat == recount(device, stat)
    assert stat.mem_used_max >= stat.mem_used_total
    assert stat.huge_pages_since >= stat.huge_pages


def _check_pool(device: Device) -> None:
    """Check that the pool is whole, has no object but those of the page table, and no memory but for them."""
    pool = device.pool
    live = {}
    for _, entry in device.entries():
        if entry >> ENTRY_STATE_SHIFT & ENTRY_STATE_MASK in (PageState.COMPRESSED, PageState.HUGE):
            length = entry >> ENTRY_SIZE_SHIFT & ENTRY_SIZE_MASK
            handle = entry & ENTRY_HANDLE_MASK
            live[handle] = bytes(pool.map(handle, length))
    check_invariants(pool, live)
    populated = sum(end - start for arena in pool.arenas for start, end in arena.region.data_ranges())
    assert populated == pool.pages * PAGE_SIZE
    for arena in pool.arenas:
        for zspage in range(len(arena)):
            if arena.used[zspage]:
                _check_free_objects(pool.classes[arena.size_class[zspage] - 1], zspage)
    words = pool.handle_region.words
    free, handle = set(), pool.record[PoolRecord.FREE_HANDLE]
    while handle:
        assert not words[handle] & HANDLE_IN_USE
        free.add(handle)
        handle = words[handle] >> 1
    assert free | set(live) == set(range(1, pool.record[PoolRecord.NEXT_HANDLE]))
    assert len(free) + len(live) == pool.record[PoolRecord.NEXT_HANDLE] - 1
    assert not any(words[pool.record[PoolRecord.NEXT_HANDLE] : pool.record[PoolRecord.READY_HANDLES]])


def _check_free_objects(state: ClassState, zspage: int) -> None:
    """Check that what is not in use is on the list of free objects, or behind all that ever were in use."""
    listed, index = 0, state.free[zspage]
    while index:
        assert index <= state.fresh[zspage]
        listed += 1
        index = state.words[(zspage * state.span + (index - 1) * state.size) >> 3] >> 1
    assert state.used[zspage] + listed == state.fresh[zspage] <= state.objects


def _require_killed(server: Server, *last_words: str) -> None:
    """Check that a server was killed, and had no other trouble; that a client is sent away is none."""
    status = server.end()
    said = [line for line in server.errors.read_text().splitlines() if not line.startswith("zramd: connection ended:")]
    assert (status, said) == (-signal.SIGKILL, list(last_words)), f"a server ended with status {status} and said {said}"


class _Traffic:
    """What goes on while a server lives: its clients, and long work of all kinds. It ends with the server."""

    def __init__(self, clients: list[Client], server: Server, medium: Path) -> None:
        self._failures: list[BaseException] = []
        actions = [partial(client.run, server.unix, server.has_died) for client in clients]
        actions.append(partial(_compact_and_recompress, server))
        actions.append(partial(_write_back, server, medium))
        self._threads = [threading.Thread(target=self._run, args=(action,)) for action in actions]

    def _run(self, action: Callable[[], None]) -> None:
        try:
            action()
        except BaseException as error:
            self._failures.append(error)

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.join()
        if self._failures:
            raise self._failures[0]


def _compact_and_recompress(server: Server) -> None:
    _ask(server, "recomp_algorithm algo=zstd priority=1")
    while not server.has_died():
        for request in ("compact 1", "recompress max_pages=20"):
            _ask(server, request)
            time.sleep(PAUSE_SECONDS)


def _write_back(server: Server, medium: Path) -> None:
    generator = random.Random(server.pid)
    while not server.has_died(PAUSE_SECONDS):
        first = generator.randrange(PAGES)
        request = f"writeback page_indexes={first}-{min(PAGES, first + generator.randrange(1, 300)) - 1}"
        # It may be full, or be busy with something else; after a reset there is none.
        with suppress(StatusError, OSError):
            if ask(server.admin, "backing_dev") == "none\n":
                ask(server.admin, f"backing_dev {medium}")
            ask(server.admin, request)


def _ask(server: Server, request: str) -> None:
    """Ask for a change, once the server can be asked; it may die of that, or before."""
    deadline = time.monotonic() + SECONDS
    while not server.has_died() and time.monotonic() < deadline:
        with suppress(StatusError, OSError):
            ask(server.admin, request)
            return
        time.sleep(PAUSE_SECONDS)
