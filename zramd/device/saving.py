"""Saving a disk: its pages at one moment, as they are stored, to a file or a pipe."""

import errno
import os
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from xxhash import xxh3_128

from zramd.device.entry import size_of
from zramd.device.image import Counts, Header, pack_chunk, pack_header, pack_trailer
from zramd.device.snapshot import Snapshot
from zramd.device.work import Work
from zramd.device.zram import Device
from zramd.layout import ENTRY_STATE_MASK, ENTRY_STATE_SHIFT, PageState

QUEUED = 4
"""Chunks (of up to 2 MiB) that wait to be written."""
LOOK_SECONDS = 0.005
"""How often the snapshot is looked after while what takes its chunks is slow."""


class _Output:
    """Writes to a descriptor in a thread of its own: who reads the snapshot has more to do than to wait for a disk."""

    def __init__(self, target: int) -> None:
        self._target = os.dup(target)
        self._parts: queue.Queue[list[bytes] | None] = queue.Queue(QUEUED)
        self._whole = xxh3_128()
        self._error: Exception | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._run, name="save", daemon=True).start()

    def put(self, parts: list[bytes] | None, meanwhile: Callable[[], None]) -> None:
        """Let these be written next; None is the end. Call `meanwhile` now and then until there is room for them.

        Raises:
            OSError: what was put before could not be written; or what `meanwhile` raises.
        """
        while True:
            meanwhile()
            if self._error:
                raise self._error
            try:
                self._parts.put(parts, timeout=LOOK_SECONDS)
            except queue.Full:
                continue
            return

    def finish(self, trailer: bytes, meanwhile: Callable[[], None]) -> None:
        """Write the end of the image, and wait until everything is written.

        Raises:
            OSError: it cannot be written; or what `meanwhile` raises.
        """
        self.put([trailer], meanwhile)
        self.put(None, meanwhile)
        while not self._ended.wait(LOOK_SECONDS):
            meanwhile()
        if self._error:
            raise self._error

    def abandon(self) -> None:
        """Write no more. What is being written may take as long as it likes."""
        self._error = self._error or OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
        # The thread takes from it as well.
        with suppress(queue.Empty):
            while True:
                self._parts.get_nowait()
        self._parts.put_nowait(None)

    def _run(self) -> None:
        try:
            while (parts := self._parts.get()) is not None and not self._error:
                for part in parts:
                    self._whole.update(part)
                    self._write(part)
            if not self._error:
                self._write(self._whole.digest())
        except Exception as error:  # whatever it is, what is there is no image
            self._error = error
        finally:
            os.close(self._target)
            self._ended.set()

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._target, view) :]


def save(device: Device, target: int, work: Work, is_cancelled: Callable[[], bool]) -> Counts:
    """Write an image of a device, as it is when this is called, to a descriptor, which stays open.

    Raises:
        SnapshotLostError, CodecError, NoMemoryError: as `Snapshot`.
        OSError: it cannot be written; or ECANCELED.
    """
    output = _Output(target)
    try:
        with Snapshot(device) as snapshot:

            def look_after() -> None:
                if work.cancelled or is_cancelled():
                    raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
                snapshot.populate()

            identity = device.identity
            header = Header(
                device.disksize,
                identity.uuid,
                int(time.time()),
                snapshot.pages_stored,
                identity.chain_size,
                identity.rule,
                identity.integrity,
                snapshot.algorithms,
            )
            work.total = snapshot.pages_stored
            output.put([pack_header(header)], look_after)
            counts = Counts()
            for number, entries, data in snapshot.chunks():
                parts, runs = pack_chunk(number, entries, data)
                if parts:
                    count(counts, runs)
                    output.put(parts, look_after)
                work.done = counts.pages
        output.finish(pack_trailer(counts), look_after)
        return counts
    except BaseException:
        output.abandon()
        raise


def count(counts: Counts, runs: list[tuple[int, int]]) -> None:
    """Count a chunk."""
    counts.chunks += 1
    for entry, pages in runs:
        state = entry >> ENTRY_STATE_SHIFT & ENTRY_STATE_MASK
        if state == PageState.EMPTY:
            continue
        counts.pages += pages
        if state == PageState.SAME_FILLED:
            counts.same += pages
        else:
            counts.bytes += pages * size_of(entry)
            counts.huge += pages * (state == PageState.HUGE)
