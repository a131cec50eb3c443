"""Pages that are only in the backing store: read without the device's lock, for who then takes it and looks again."""

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zramd.backing import DamagedObjectError
from zramd.device.codecs import CodecError
from zramd.device.entry import STATE_MASK, WRITTEN_BACK, size_of
from zramd.layout import (
    ENTRY_HANDLE_MASK,
    PAGE_SIZE,
)

if TYPE_CHECKING:
    from zramd.device.pages import Pages

BATCH = 32
"""Pages that are read together, and then looked at under one hold of the lock."""


class PageError(Exception):
    """A stored page cannot be read back."""


class NotInMemoryError(Exception):
    """What was asked needs `pages` that have to be fetched first."""

    def __init__(self, pages: list[int]) -> None:
        super().__init__(f"pages {pages} are written back")
        self.pages = pages


@dataclass(frozen=True, slots=True)
class Fetched:
    """A page as it was when it was fetched, None if it could not be: `failure` says why.

    `entry` and `reused` tell whether it still is that.
    """

    entry: int
    reused: int
    page: bytes | None
    failure: str = ""

    def is_still(self, device: "Pages", index: int) -> bool:
        """Say whether the page is the same still. The caller holds the lock."""
        # An entry alone would not tell: another object may lie at the same place, after a segment was used again.
        return self.entry == device.entry(index) and self.reused == _reused(device, self.entry)


NOTHING_FETCHED: dict[int, Fetched] = {}


def _reused(device: "Pages", entry: int) -> int:
    return device.backing.reused(entry & ENTRY_HANDLE_MASK) if device.backing else 0


def fetch(device: "Pages", pages: list[int]) -> dict[int, Fetched]:
    """Read pages from wherever they are. The caller does not hold the device's lock."""
    found: dict[int, Fetched] = {}
    for start in range(0, len(pages) if len(pages) > 1 else 0, BATCH):
        found |= _fetch_together(device, pages[start : start + BATCH])
    return found | {index: fetch_page(device, index) for index in pages if index not in found}


def _fetch_together(device: "Pages", pages: list[int]) -> dict[int, Fetched]:
    """Return those of some pages that are in the backing store, are read whole, and do not change meanwhile."""
    with device:
        backing = None if device.retired else device.backing
        if backing is None:
            return {}
        entries = {index: device.entry(index) for index in pages}
        seen = {
            index: Fetched(entry, _reused(device, entry), None)
            for index, entry in entries.items()
            if entry & STATE_MASK == WRITTEN_BACK
        }
    objects = backing.read_together(
        (fetched.entry & ENTRY_HANDLE_MASK, index, size_of(fetched.entry)) for index, fetched in seen.items()
    )
    found: dict[int, Fetched] = {}
    with device:
        for index, data in objects.items():
            entry, reused = seen[index].entry, seen[index].reused
            if device.retired or not seen[index].is_still(device, index):
                continue
            device.note_access(index)
            with suppress(CodecError):
                found[index] = Fetched(entry, reused, _page(device, entry, data))
    return found


def _page(device: "Pages", entry: int, data: bytes) -> bytes:
    """Return the page of a written-back object. The caller holds the lock.

    Raises:
        CodecError: it is damaged.
    """
    return data if len(data) == PAGE_SIZE else device.decompress(entry, memoryview(data))


def fetch_page(device: "Pages", index: int) -> Fetched:
    """Read a page from wherever it is. The caller does not hold the device's lock."""
    while True:
        with device:
            if device.retired:
                return Fetched(0, 0, None, "went away with its disk")
            entry = device.entry(index)
            if entry & STATE_MASK != WRITTEN_BACK:
                return _load(device, index, entry)
            reused, backing = _reused(device, entry), device.backing
        data, failure = b"", ""
        if backing is None:
            failure = "is on the backing store, which is missing"
        else:
            try:
                data = backing.read(entry & ENTRY_HANDLE_MASK, index, size_of(entry))
            except OSError as error:
                failure = f"cannot be read from the backing store: {error.strerror}"
            except DamagedObjectError as error:
                failure = f"is damaged on the backing store: {error}"
        with device:
            if device.retired or not Fetched(entry, reused, None).is_still(device, index):
                continue
            if not failure:
                device.note_access(index)
                try:
                    return Fetched(entry, reused, _page(device, entry, data))
                except CodecError as error:
                    failure = f"is damaged: {error}"
            device.note_failed_fetch()
            return Fetched(entry, reused, None, failure)


def _load(device: "Pages", index: int, entry: int) -> Fetched:
    """Return a page that is in memory. The caller holds the lock."""
    try:
        return Fetched(entry, 0, device.load_page(index))
    except PageError as error:
        return Fetched(entry, 0, None, str(error))
