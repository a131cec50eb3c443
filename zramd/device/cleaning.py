"""Cleaning the backing store: what is live in sparse segments moves together, so that there are free ones again."""

import threading

from zramd.backing import DamagedObjectError, FullError, Store
from zramd.device.entry import STATE_MASK, WRITTEN_BACK, size_of
from zramd.device.slices import pause
from zramd.device.zram import Device
from zramd.layout import (
    ENTRY_HANDLE_MASK,
    PAGE_SHIFT,
)

AT_ONCE = 16
"""Segments that are cleaned before it is looked for the sparsest again."""
BATCH = 64
"""Objects that are looked at, or moved, under one hold of the device's lock."""
RECLAIM_SECONDS = 1.0
"""How often it is looked for emptied segments."""


Object = tuple[int, int, int]
"""(place, page, bytes of data)"""


def clean(device: Device, backing: Store) -> None:
    """Move live objects out of sparse segments, as far as that makes room. Nothing is pending to be flushed.

    What cannot be read stays where it is: its page is lost, but only that.
    """
    mover = _Mover(device, backing)
    for segment in backing.sparsest(AT_ONCE):
        try:
            found = list(backing.objects(segment))
            for start in range(0, len(found), BATCH):
                mover.move(found[start : start + BATCH])
        except OSError:
            continue
        except FullError:
            break
    mover.publish()


class _Mover:
    """Moves objects; those appended are `pending`: (page, entry, new place)."""

    def __init__(self, device: Device, backing: Store) -> None:
        self._device = device
        self._backing = backing
        self._pending: list[tuple[int, int, int]] = []

    def move(self, objects: list[Object]) -> None:
        """Append those that are live to the segment that is being filled.

        Raises:
            FullError: there is no segment to move them to.
        """
        for index, entry in self._live(objects):
            length = size_of(entry)
            try:
                data = self._backing.unseal(entry & ENTRY_HANDLE_MASK, index, length)
            except DamagedObjectError:
                continue
            if not self._backing.has_room(length):
                self.publish()
                self._backing.end_segment()
                reclaim(self._device, self._backing)
                self._backing.begin_segment(spare=0)
            self._pending.append((index, entry, self._backing.append(index, data)))
        pause()

    def _live(self, objects: list[Object]) -> list[tuple[int, int]]:
        device, pages = self._device, self._device.disksize >> PAGE_SHIFT
        with device:
            if device.retired:
                return []
            entries = [(index, device.entry(index), place) for place, index, _ in objects if index < pages]
        return [
            (index, entry)
            for index, entry, place in entries
            if entry & STATE_MASK == WRITTEN_BACK and entry & ENTRY_HANDLE_MASK == place
        ]

    def publish(self) -> None:
        """Write what was appended, and let the pages have it instead, unless they have changed."""
        pending, self._pending = self._pending, []
        try:
            self._backing.flush()
        except OSError:
            return
        device = self._device
        for start in range(0, len(pending), BATCH):
            with device:
                for index, entry, place in pending[start : start + BATCH]:
                    if not device.retired and device.entry(index) == entry:
                        device.move_backed(index, place)
            pause()


class Reclaimer:
    """A thread that gives segments back soon after they have lost their last object."""

    def __init__(self, device: Device, backing: Store) -> None:
        self._device = device
        self._backing = backing
        self._stop = threading.Event()
        threading.Thread(target=self._run, name="reclaim", daemon=True).start()

    def stop(self) -> None:
        """Let it end soon."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(RECLAIM_SECONDS):
            if self._backing.has_emptied:
                reclaim(self._device, self._backing)


def reclaim(device: Device, backing: Store) -> None:
    """Give segments without live objects back, so that they can be used again; not while a snapshot may have them."""
    while True:
        with device:
            emptied = [] if device.retired or device.has_snapshot else backing.take_emptied()
        if not emptied:
            return
        backing.give_back(emptied)
