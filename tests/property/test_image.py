"""A snapshot that is read while any history goes on, saved as an image and restored: the disk of one moment."""

import os

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from xxhash import xxh3_128_digest

from tests.property.test_device import PAGES, SIZE, DeviceMachine, read, recount
from zramd.device.entry import size_of
from zramd.device.image import Counts, Header, pack_chunk, pack_header, pack_trailer, take_header
from zramd.device.opening import OpenDevice
from zramd.device.restoring import Source, fill, identity_for
from zramd.device.saving import count
from zramd.device.snapshot import Snapshot
from zramd.device.wanted import Wanted
from zramd.device.work import Work, WorkKind
from zramd.device.zram import Device
from zramd.layout import (
    ENTRY_IDLE,
    ENTRY_INCOMPRESSIBLE,
    ENTRY_LASTING_MASK,
    ENTRY_STATE_MASK,
    ENTRY_STATE_SHIFT,
    PAGE_SIZE,
    PageState,
)
from zramd.memory import RegionStore

STATE = ENTRY_STATE_MASK << ENTRY_STATE_SHIFT
WRITTEN_BACK = PageState.WRITTEN_BACK << ENTRY_STATE_SHIFT
NOT_CONTENTS = ENTRY_IDLE | ENTRY_INCOMPRESSIBLE


def lasting_entries(device: Device) -> list[int]:
    """Return what the entries of a device say of its pages, without marks that a read may change."""
    with device:
        entries = [device.entry(page) & ENTRY_LASTING_MASK & ~NOT_CONTENTS for page in range(PAGES)]
    return [in_memory(entry) if entry & STATE == WRITTEN_BACK else entry for entry in entries]


def in_memory(entry: int) -> int:
    """Return the entry that a written-back page has when it is restored."""
    state = PageState.HUGE if size_of(entry) == PAGE_SIZE else PageState.COMPRESSED
    return entry & ~STATE | state << ENTRY_STATE_SHIFT


def restored(image: bytes) -> OpenDevice:
    fd = os.memfd_create("image")
    os.write(fd, image)
    os.lseek(fd, 0, os.SEEK_SET)
    source = Source(fd, lambda: False)
    header = take_header(source.take)
    opened = OpenDevice(RegionStore(None), Wanted(filled=identity_for(header, header.disksize)))
    fill(opened.device, header, source, 0, Work(WorkKind.RESTORE))
    opened.finish(0)
    os.close(fd)
    return opened


class SnapshotMachine(DeviceMachine):
    """The device with a snapshot that is taken, read in parts between other steps, and compared with what was then."""

    segments = 128  # which are not reclaimed while there is a snapshot

    def __init__(self) -> None:
        super().__init__()
        self.snapshot: Snapshot | None = None

    @precondition(lambda self: self.snapshot is None)
    @rule()
    def take_snapshot(self) -> None:
        self.snapshot = Snapshot(self.device)
        self.then = bytes(self.expected)
        self.stat_then = self.device.mm_stat()
        self.backed_then = self.device.bd_stat().pages
        self.entries_then = lasting_entries(self.device)
        self.entries: list[int] = []
        self.data: list[bytes] = []

    @precondition(lambda self: self.snapshot is not None)
    @rule(pages=st.integers(1, PAGES))
    def read_on(self, pages: int) -> None:
        assert self.snapshot is not None
        first = len(self.entries)
        entries, data = self.snapshot.read(first, min(PAGES, first + pages))
        self.entries += entries
        self.data.append(data)
        if len(self.entries) == PAGES:
            self.compare(self.snapshot)
            self.end_snapshot()

    def end_snapshot(self) -> None:
        if self.snapshot:
            self.snapshot.__exit__(None, None, None)
            self.snapshot = None

    def compare(self, snapshot: Snapshot) -> None:
        identity = self.device.identity
        header = Header(
            SIZE,
            identity.uuid,
            0,
            snapshot.pages_stored,
            identity.chain_size,
            identity.rule,
            False,
            snapshot.algorithms,
        )
        parts, runs = pack_chunk(0, self.entries, b"".join(self.data))
        counts = Counts()
        if runs:
            count(counts, runs)
        image = pack_header(header) + b"".join(parts) + pack_trailer(counts)
        opened = restored(image + xxh3_128_digest(image))
        device = opened.device
        assert read(device, 0, SIZE) == self.then
        assert device.mm_stat() == recount(device, device.mm_stat())
        assert lasting_entries(device) == self.entries_then
        stat = device.mm_stat()
        assert (stat.orig_data_size, stat.same_pages) == (self.stat_then.orig_data_size, self.stat_then.same_pages)
        if not self.backed_then:
            found = stat.compr_data_size, stat.huge_pages
            assert found == (self.stat_then.compr_data_size, self.stat_then.huge_pages)
        codecs = [made and made.key for made in device.identity.algorithms.codecs]
        assert codecs == [made and made.key for made in snapshot.algorithms.codecs]
        assert device.identity.uuid != identity.uuid
        opened.close()

    @rule()
    def restart(self) -> None:
        self.end_snapshot()
        super().restart()

    def teardown(self) -> None:
        self.end_snapshot()
        super().teardown()


TestSnapshot = SnapshotMachine.TestCase
