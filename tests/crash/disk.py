"""A disk whose server is killed again and again, and what must hold after each time."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from tests.crash.client import PAUSE_SECONDS, Client
from tests.crash.servers import SECONDS, Server, Starter
from tests.crash.steps import Phase, Step
from tests.crash.traffic import Traffic, in_memory, save, say
from tests.property.test_device import read, recount, write
from tests.property.test_pool import check_invariants
from zramd.backing.store import SEGMENT
from zramd.device.codecs import parse_codec
from zramd.device.disk import Disk
from zramd.device.opening import OpenDevice
from zramd.device.wanted import Wanted
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
from zramd.status.client import StatusError
from zramd.zsmalloc.pool import ClassState

PAGES = 1024
SIZE = PAGES * PAGE_SIZE
SEGMENTS = 4
"""Of the backing store, which is full at times."""
RESTORED_AFTER = 1000
"""Requests."""
TRAFFIC_SECONDS = 0.05
"""Before a disk is grown or reset."""
SAID = ("zramd: connection ended:", "zramd: zram0: policy:")
"""How lines begin that are no trouble: a client was sent away, or the policy has done something."""
NOT_USED = " is not used: stored pages "
"""What a server says at its start when the algorithm that it is to have was changed since."""


class KilledDisk:
    """A disk kept in `directory`, with two clients. It lives and is verified in turns. If it is `busy`, it is saved all
    the time too, and told everything that it can be told.

    `answered` counts the requests of both clients, `compacted` the pages that compaction has freed, `written_back` the
    blocks that went to the backing store, `saved` the images that were verified.
    """

    def __init__(
        self,
        directory: Path,
        seed: int,
        algorithm: str = "lz4",
        chain_size: int = 8,
        *,
        integrity: bool = False,
        busy: bool = False,
    ) -> None:
        self._busy = busy
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
        self._image = b""
        self._is_restored: bool | None = None
        self.compacted = self.written_back = self.saved = 0

    @property
    def answered(self) -> int:
        return sum(client.answered for client in self._clients)

    def live_until(self, starter: Starter, seconds: float, requests: int = 0) -> None:
        """Have a server killed that many seconds after it has answered so many requests."""
        server = self._start(starter)
        wanted = self.answered + requests
        with self._traffic(server) as traffic:
            while self.answered < wanted and not server.has_died(PAUSE_SECONDS):
                pass
            died = server.has_died(seconds)
            server.kill()
        assert not died, server.errors.read_text()
        _require_killed(server)
        self._image = traffic.image

    def live_to(self, starter: Starter, step: Step, passing: int) -> None:
        """Have a server die when it passes a step for the n-th time."""
        server = self._start(starter, step, passing)
        with self._traffic(server) as traffic:
            if step.phase is Phase.RESETTING:
                server.has_died(TRAFFIC_SECONDS)
                say(server, "reset force")
            if step.phase is Phase.RESTORING:
                # However slow the machine is, there are pages to restore.
                wanted = self.answered + RESTORED_AFTER
                while self.answered < wanted and not server.has_died(PAUSE_SECONDS):
                    pass
                self._restore(server)
            if step.phase is Phase.ENLARGING:
                server.has_died(TRAFFIC_SECONDS)
                self._asked += SIZE
                self._sizes.append(self._asked)
                say(server, f"grow {self._asked}")
            died = server.has_died(SECONDS)
            server.kill()
        assert died, f"the step {step.name} was not passed {passing} times"
        _require_killed(server, f"killed at {step.name}")
        if step.phase in (Phase.RESETTING, Phase.RESTORING):
            for client in self._clients:
                client.forget()
            self._sizes.insert(0, SIZE)
        if step.phase is Phase.RESTORING:
            self._is_restored = step.leaves_disk
        if step.phase is not Phase.RESTORING:
            self._image = traffic.image
        elif step.leaves_disk:
            held = _contents(self._image)
            for client in self._clients:
                client.expect(held)

    def _traffic(self, server: Server) -> Traffic:
        return Traffic(self._clients, server, self._medium, PAGES, busy=self._busy)

    def _restore(self, server: Server) -> None:
        """Have a server save its disk, throw it away, and restore it; it dies meanwhile."""
        while True:
            try:
                self._image = save(server)
                break
            except StatusError:
                # It is being saved, or does not serve yet.
                assert not server.has_died(PAUSE_SECONDS)
        say(server, "reset force")
        with in_memory(self._image) as fd:
            say(server, "restore fd", fd)

    def live_while_savers_are_killed(self, starter: Starter, moments: Iterable[float]) -> None:
        """Have `zramd save FILE` killed after so many seconds each, and then the server, while it saves too."""
        directory = self._directory / "saved"
        directory.mkdir(exist_ok=True)
        file = directory / "zram0.img"
        server = self._start(starter)
        command = [sys.executable, "-m", "zramd", "save", "--admin", str(server.admin), str(file)]
        with self._traffic(server) as traffic:
            for seconds in moments:
                before = file.read_bytes() if file.exists() else b""
                with subprocess.Popen(command, stderr=subprocess.DEVNULL) as saver:
                    time.sleep(seconds)
                    saver.kill()
                assert [path.name for path in directory.iterdir()] in ([], [file.name])
                if file.exists() and (found := file.read_bytes()) != before:
                    self.saved += bool(_contents(found))
            with subprocess.Popen(command, stderr=subprocess.DEVNULL) as saver:
                server.has_died(TRAFFIC_SECONDS)
                server.kill()
        _require_killed(server)
        self._image = traffic.image

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
            assert self._is_restored in (None, opened.recovered)
            self._is_restored = None
            assert opened.device.disksize in self._sizes
            self._sizes = [opened.device.disksize]
            disk = read(opened.device, 0, SIZE)
            for client in self._clients:
                client.check(disk)
            _check_counters(opened.device)
            _check_pool(opened.device)
            self.written_back = max(self.written_back, opened.device.bd_stat().writes)
            if self._image:
                self.saved += bool(_contents(self._image))
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


def _contents(image: bytes) -> bytes:
    """Return what is on a disk that is restored from an image, which must be whole."""
    disk = Disk("restored", None)
    with in_memory(image) as fd:
        disk.restore(fd)
    opened = disk.require_opened()
    _check_counters(opened.device)
    try:
        return read(opened.device, 0, SIZE)
    finally:
        opened.close()


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
    """Check that a server was killed, and had no other trouble."""
    status, lines = server.end(), server.errors.read_text().splitlines()
    said = [line for line in lines if not line.startswith(SAID) and NOT_USED not in line]
    assert (status, said) == (-signal.SIGKILL, list(last_words)), f"a server ended with status {status} and said {said}"
