"""Writeback: which pages it takes, what stops it, what a store that fails costs, and how it is asked for."""

import errno
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.nbd_bytes import READ, REPLY_BYTES, SIMPLE, Peer, receive
from tests.property.test_device import make_data, read, recount, write
from zramd.backing import FullError, Medium
from zramd.backing.store import SEGMENT
from zramd.device.block_state import block_state
from zramd.device.cleaning import clean, reclaim
from zramd.device.codecs import CodecError, codec
from zramd.device.disk import Disk
from zramd.device.fetching import PageError
from zramd.device.idle import mark_idle
from zramd.device.opening import OpenDevice
from zramd.device.recompression import Recompression, Recompressor
from zramd.device.slices import in_slices
from zramd.device.wanted import Wanted
from zramd.device.writeback import LimitError, Selection, Writeback, WritebackOutcome, WritebackType
from zramd.device.zram import Device
from zramd.layout import ENTRY_HANDLE_MASK, ENTRY_STATE_MASK, ENTRY_STATE_SHIFT, ENTRY_TAKEN, PAGE_SIZE, PageState
from zramd.memory import RegionStore
from zramd.nbd.block_status import Context, extents
from zramd.nbd.protocol import Error
from zramd.nbd.transmission import Transmission
from zramd.status import attributes, control
from zramd.status.attributes import AttributeRefusedError, Served
from zramd.status.writeback import parse_selections

PAGES = 256
SIZE = PAGES * PAGE_SIZE
KINDS = ["text", "half", "random", "zero"]


@pytest.fixture
def medium(tmp_path: Path) -> Path:
    path = tmp_path / "medium"
    path.touch()
    os.truncate(path, 16 * SEGMENT)
    return path


@pytest.fixture
def opened(medium: Path, tmp_path: Path) -> Iterator[OpenDevice]:
    opened = OpenDevice(RegionStore(tmp_path / "state"), Wanted(SIZE, codec("lz4"), backing=medium))
    for page in range(PAGES):
        write(opened.device, page * PAGE_SIZE, make_data(KINDS[page % 4], page, PAGE_SIZE))
    yield opened
    opened.close()


def write_back(device: Device, kind: WritebackType = WritebackType.ANY, *pages: int) -> WritebackOutcome:
    assert device.backing is not None
    selections = [Selection(kind, page, page) for page in pages] or [Selection(kind, 0, PAGES - 1)]
    return Writeback(device, device.backing, selections).run()


def state(device: Device, page: int) -> PageState:
    with device:
        return PageState(device.entry(page) >> ENTRY_STATE_SHIFT & ENTRY_STATE_MASK)


def backed(device: Device) -> set[int]:
    return {page for page in range(PAGES) if state(device, page) is PageState.WRITTEN_BACK}


def test_what_is_written_back_takes_no_memory_and_reads_as_before(opened: OpenDevice) -> None:
    device = opened.device
    before, contents = device.mm_stat(), read(device, 0, SIZE)
    assert device.backing is not None
    work = Writeback(device, device.backing, [Selection(WritebackType.ANY, 0, PAGES - 1)])
    outcome = work.run()
    assert (work.work.changed, work.work.saved) == (outcome.written, outcome.bytes_written)
    after = device.mm_stat()
    assert outcome.written == outcome.candidates == PAGES * 3 // 4
    assert outcome.bytes_written == before.compr_data_size
    assert (after.compr_data_size, after.huge_pages, after.mem_used_total) == (0, 0, 0)
    assert (after.orig_data_size, after.same_pages) == (before.orig_data_size, before.same_pages)
    assert after == recount(device, after)
    assert read(device, 0, SIZE) == contents
    # Pages share blocks.
    stat = device.bd_stat()
    assert stat.count <= stat.writes < outcome.written
    assert stat.count <= stat.reads < outcome.written
    # Reading brings nothing back.
    assert len(backed(device)) == outcome.written


def test_a_restart_finds_it_and_a_store_that_was_moved_too(opened: OpenDevice, medium: Path, tmp_path: Path) -> None:
    contents = read(opened.device, 0, SIZE)
    write_back(opened.device)
    stat = opened.device.bd_stat()
    opened.close()
    for path in (None, tmp_path / "elsewhere"):
        if path:
            medium.rename(path)
        again = OpenDevice(RegionStore(tmp_path / "state"), Wanted(backing=path))
        assert again.backing_path == (path or medium)
        assert (again.device.bd_stat().count, again.device.bd_stat().pages) == (stat.count, stat.pages)
        assert read(again.device, 0, SIZE) == contents
        write(again.device, 0, make_data("text", 1000, PAGE_SIZE))
        write_back(again.device)
        contents = read(again.device, 0, SIZE)
        again.close()
    # Another one has to wait until no page is written back.
    other = tmp_path / "other"
    other.touch()
    os.truncate(other, 16 * SEGMENT)
    again = OpenDevice(RegionStore(tmp_path / "state"), Wanted(backing=other))
    assert again.backing_path == path
    assert read(again.device, 0, SIZE) == contents
    assert other.read_bytes() == bytes(16 * SEGMENT)
    with again.device:
        again.device.discard(0, SIZE)
    again.close()
    again = OpenDevice(RegionStore(tmp_path / "state"), Wanted(backing=other))
    assert again.backing_path == other
    again.close()


def test_types_are_the_kernels(opened: OpenDevice) -> None:
    device = opened.device
    in_slices(device, mark_idle(device, None))
    touched = set(range(0, PAGES, 8)) | {2, 6}
    for page in touched:
        read(device, page * PAGE_SIZE, PAGE_SIZE)
    huge = set(range(2, PAGES, 4))
    assert write_back(device, WritebackType.HUGE_IDLE).written == len(huge - touched)
    assert backed(device) == huge - touched
    write_back(device, WritebackType.HUGE)
    assert backed(device) == huge
    write_back(device, WritebackType.IDLE)
    filled = set(range(3, PAGES, 4))
    assert backed(device) == set(range(PAGES)) - touched - filled | huge
    # What is written back is not idle, nor in memory: it is not written again.
    in_slices(device, mark_idle(device, None))
    assert write_back(device, WritebackType.HUGE).candidates == 0


def test_what_recompression_gave_up_is_a_type(opened: OpenDevice) -> None:
    opened.set_algorithm(1, codec("zstd"))
    assert write_back(opened.device, WritebackType.INCOMPRESSIBLE).candidates == 0
    Recompressor(opened.device, Recompression(huge=True)).run()
    assert write_back(opened.device, WritebackType.INCOMPRESSIBLE).written == PAGES // 4


def test_a_page_that_is_damaged_in_memory_holds_up_no_other(
    opened: OpenDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, stored = opened.device, opened.device.stored
    with device:
        damaged = device.entry(2)

    def fail(entry: int) -> memoryview:
        if entry == damaged:
            raise CodecError("its checksum is wrong")
        return stored(entry)

    monkeypatch.setattr(device, "stored", fail)
    with pytest.raises(PageError, match="page 2 is damaged"):
        write_back(device)
    assert backed(device) == {page for page in range(PAGES) if page % 4 != 3 and page != 2}


def test_a_page_keeps_its_codec(opened: OpenDevice) -> None:
    contents = read(opened.device, 0, SIZE)
    opened.set_algorithm(1, codec("zstd", 9))
    Recompressor(opened.device, Recompression()).run()
    pages = [opened.device.codec_pages(number) for number in range(8)]
    write_back(opened.device)
    assert [opened.device.codec_pages(number) for number in range(8)] == pages
    # Nothing of it is recompressed.
    assert Recompressor(opened.device, Recompression()).run().candidates == 0
    assert read(opened.device, 0, SIZE) == contents


def test_the_largest_go_first_and_the_limit_is_a_number_of_pages(opened: OpenDevice) -> None:
    device = opened.device
    with device:
        device.writeback = type(device.writeback)(limit=3, limited=True)
    with pytest.raises(LimitError):
        write_back(device)
    assert backed(device) == {254, 250, 246}
    assert device.writeback.limit == 0
    with device:
        device.writeback = type(device.writeback)(limit=2, limited=True)
    # No candidate is left when the limit is used up.
    assert write_back(device, WritebackType.ANY, 0, 1).written == 2


def test_what_is_touched_meanwhile_stays(opened: OpenDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    device = opened.device
    assert device.backing is not None
    flush, expected = device.backing.flush, bytearray(read(device, 0, SIZE))

    def touch_and_flush() -> None:
        # Page 2 is written twice: its object may well lie where it lay, and have the same size.
        for seed in (1, 2):
            write(device, 2 * PAGE_SIZE, make_data("random", seed, PAGE_SIZE))
            expected[2 * PAGE_SIZE : 3 * PAGE_SIZE] = make_data("random", seed, PAGE_SIZE)
        read(device, 6 * PAGE_SIZE, PAGE_SIZE)
        with device:
            device.discard(10 * PAGE_SIZE, PAGE_SIZE)
        expected[10 * PAGE_SIZE : 11 * PAGE_SIZE] = bytes(PAGE_SIZE)
        flush()

    monkeypatch.setattr(device.backing, "flush", touch_and_flush)
    assert write_back(device, WritebackType.ANY, 2, 6, 10, 14).written == 1
    assert backed(device) == {14}
    assert read(device, 0, SIZE) == expected
    assert device.mm_stat() == recount(device, device.mm_stat())


def test_recompression_too_notices_a_page_that_was_written_twice(
    opened: OpenDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = opened.device
    opened.set_algorithm(1, codec("zstd", 9))
    # Huge for lz4, and not for zstd.
    digits = [bytes(random.Random(seed).choices(b"0123456789", k=PAGE_SIZE)) for seed in range(3)]
    write(device, 0, bytearray(digits[0]))
    work = Recompressor(device, Recompression(huge=True))
    attempt = work._try

    def write_and_try(index: int, entry: int, data: bytes) -> tuple[bytes | None, int]:
        for number in (1, 2):
            write(device, 0, bytearray(digits[number]))
        return attempt(index, entry, data)

    monkeypatch.setattr(work, "_try", write_and_try)
    work.run()
    assert read(device, 0, PAGE_SIZE) == digits[2]


def test_a_full_store_stops_writeback_and_nothing_else(opened: OpenDevice, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.touch()
    os.truncate(small, 4 * SEGMENT)
    opened.set_backing(small)
    device, contents = opened.device, make_data("random", 1, SIZE)
    write(device, 0, contents)
    with pytest.raises(FullError):
        write_back(device)
    # Two segments of three; one is for cleaning.
    assert len(backed(device)) == 2 * (SEGMENT // (PAGE_SIZE + 48))
    assert device.mm_stat() == recount(device, device.mm_stat())
    with device:
        assert not any(entry & ENTRY_TAKEN for _, entry in device.entries())
    assert read(device, 0, SIZE) == contents
    # What is written anew makes room.
    with device:
        device.discard(100 * PAGE_SIZE, SIZE - 100 * PAGE_SIZE)
    assert write_back(device).written == 100
    assert read(device, 0, 100 * PAGE_SIZE) == contents[: 100 * PAGE_SIZE]


def test_cleaning_moves_what_is_live_together(opened: OpenDevice) -> None:
    device, generator = opened.device, random.Random(1)
    assert device.backing is not None
    expected = make_data("random", 1, SIZE)
    write(device, 0, expected)
    write_back(device)
    for page in generator.sample(range(PAGES), PAGES * 9 // 10):
        with device:
            device.discard(page * PAGE_SIZE, PAGE_SIZE)
        expected[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = bytes(PAGE_SIZE)
    used = sum(device.backing._state)
    clean(device, device.backing)
    reclaim(device, device.backing)
    assert sum(device.backing._state) < used
    assert read(device, 0, SIZE) == expected
    assert device.mm_stat() == recount(device, device.mm_stat())


def test_what_has_become_empty_is_given_back_without_being_asked(
    opened: OpenDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zramd.device.cleaning.RECLAIM_SECONDS", 0.01)
    path = tmp_path / "other"
    path.touch()
    os.truncate(path, 16 * SEGMENT)
    opened.set_backing(path)
    write(opened.device, 0, make_data("random", 1, SIZE))
    write_back(opened.device)
    assert path.stat().st_blocks * 512 > SIZE
    with opened.device:
        opened.device.discard(0, SIZE)
    # The label, and the segment that is being filled.
    while path.stat().st_blocks * 512 > SEGMENT + PAGE_SIZE:
        time.sleep(0.01)


def test_neighbours_are_read_together(opened: OpenDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    device, contents = opened.device, read(opened.device, 0, SIZE)
    assert device.backing is not None
    write_back(device)
    reads: list[int] = []
    read_medium = device.backing.medium.read

    def count(buffer: memoryview, offset: int) -> None:
        reads.append(len(buffer))
        read_medium(buffer, offset)

    monkeypatch.setattr(device.backing.medium, "read", count)
    assert read(device, 0, 64 * PAGE_SIZE) == contents[: 64 * PAGE_SIZE]
    # 48 of them have an object, of 1.7 KiB on average.
    assert len(reads) <= 4
    assert sum(reads) < 64 * PAGE_SIZE


class BadMedium(Medium):
    """Fails to read and write where it is told to, or hangs until `works` is set."""

    bad_reads: range = range(0)
    bad_writes = False

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.entered, self.works = threading.Event(), threading.Event()
        self.works.set()

    @contextmanager
    def _open(self) -> Iterator[int]:
        with super()._open() as fd:
            self.entered.set()
            self.works.wait()
            yield fd

    def read(self, buffer: memoryview, offset: int) -> None:
        if offset < self.bad_reads.stop and offset + len(buffer) > self.bad_reads.start:
            raise OSError(errno.EIO, "Input/output error")
        super().read(buffer, offset)

    def write(self, buffer: memoryview, offset: int) -> None:
        if self.bad_writes:
            raise OSError(errno.EIO, "Input/output error")
        super().write(buffer, offset)


def bad_medium(device: Device) -> BadMedium:
    """Let the store of a device be on a bad medium."""
    assert device.backing is not None
    path = device.backing.medium.path
    device.backing.medium.close()
    device.backing.medium = made = BadMedium(path)
    return made


@pytest.fixture
def bad(opened: OpenDevice) -> BadMedium:
    return bad_medium(opened.device)


def test_a_block_that_cannot_be_read_costs_only_its_pages(opened: OpenDevice, bad: BadMedium) -> None:
    device, contents = opened.device, read(opened.device, 0, SIZE)
    write_back(device)
    with device:
        lost = (device.entry(101) & ENTRY_HANDLE_MASK) << 4
    bad.bad_reads = range(lost, lost + 1)
    failed = set()
    for page in range(PAGES):
        try:
            assert read(device, page * PAGE_SIZE, PAGE_SIZE) == contents[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
        except PageError:
            failed.add(page)
    assert {index for index, found in device.fetch(list(range(PAGES))).items() if found.page is None} == failed
    assert 101 in failed
    assert len(failed) <= 16  # as many small pages as share a block
    stat = device.io_stat()
    # Those that were read with them were not counted.
    assert (stat.failed_reads, stat.failed_backing_reads) == (len(failed), 2 * len(failed))
    # A write of part of such a page fails, and one of all of it is what mends it.
    with pytest.raises(PageError):
        write(device, 101 * PAGE_SIZE + 5, bytearray(7))
    write(device, 101 * PAGE_SIZE, make_data("text", 1, PAGE_SIZE))
    assert read(device, 101 * PAGE_SIZE, PAGE_SIZE) == make_data("text", 1, PAGE_SIZE)


def test_cleaning_leaves_what_cannot_be_read(opened: OpenDevice, bad: BadMedium) -> None:
    device = opened.device
    assert device.backing is not None
    write_back(device)
    bad.bad_reads = range(SEGMENT, 2 * SEGMENT)
    before = backed(device)
    clean(device, device.backing)
    bad.bad_reads = range(0)
    assert backed(device) == before
    read(device, 0, SIZE)


def test_a_segment_that_cannot_be_written_leaves_its_pages_in_memory(opened: OpenDevice, bad: BadMedium) -> None:
    device, contents, before = opened.device, read(opened.device, 0, SIZE), opened.device.mm_stat()
    with device:
        device.writeback = type(device.writeback)(limit=1000, limited=True)
    bad.bad_writes = True
    with pytest.raises(OSError, match="Input/output"):
        write_back(device)
    assert device.mm_stat() == before
    assert device.writeback.limit == 1000
    assert read(device, 0, SIZE) == contents
    bad.bad_writes = False
    assert write_back(device).written == PAGES * 3 // 4
    assert read(device, 0, SIZE) == contents


def test_a_store_that_hangs_holds_up_only_who_reads_from_it(opened: OpenDevice, bad: BadMedium) -> None:
    device = opened.device
    write_back(device, WritebackType.ANY, 0)
    bad.entered.clear()
    bad.works.clear()

    def serve(sock: socket.socket) -> None:
        Transmission(sock, device, None).run()

    with Peer(serve) as waiting, Peer(serve) as other:
        waiting.client.sendall(SIMPLE.request(READ, 1, 0, PAGE_SIZE))
        bad.entered.wait()
        for cookie, kind in ((1, "half"), (2, "random")):
            other.client.sendall(SIMPLE.request(READ, cookie, cookie * PAGE_SIZE, PAGE_SIZE))
            assert receive(other.client, REPLY_BYTES) == SIMPLE.done(cookie)
            assert receive(other.client, PAGE_SIZE) == make_data(kind, cookie, PAGE_SIZE)
        # Pages that wait may be written, and counters looked at.
        other.client.sendall(SIMPLE.write(3, 0, bytes(make_data("text", 5, PAGE_SIZE))))
        assert receive(other.client, REPLY_BYTES) == SIMPLE.done(3)
        assert device.bd_stat().pages == 0
        assert device.mm_stat() == recount(device, device.mm_stat())
        bad.works.set()
        assert receive(waiting.client, REPLY_BYTES) == SIMPLE.done(1)
        assert receive(waiting.client, PAGE_SIZE) == make_data("text", 5, PAGE_SIZE)


def test_a_store_that_hangs_holds_up_no_reset(medium: Path, tmp_path: Path) -> None:
    words = Words(tmp_path / "state")
    words.set("backing_dev", str(medium))
    words.set("disksize", "1M")
    device = words.disk.require_opened().device
    write(device, 0, make_data("text", 1, SIZE))
    bad = bad_medium(device)
    bad.works.clear()
    work = threading.Thread(target=words.set, args=("writeback", "page_indexes=0-99"))
    work.start()
    bad.entered.wait()
    words.set("reset", "1")
    words.set("disksize", "2M")
    assert attributes.read(words.served, "mm_stat").split() == ["0"] * 9
    assert attributes.read(words.served, "bd_stat").split() == ["0"] * 3
    # What still writes to it has it.
    with pytest.raises(OSError, match="another zramd has it"):
        words.disk.require_opened().set_backing(medium)
    bad.works.set()
    work.join()
    words.set("backing_dev", str(medium))
    assert words.disk.bd_stat().pages == 0


@pytest.mark.parametrize("how", ["missing", "another's", "damaged"])
def test_a_store_that_is_gone_costs_only_its_pages(how: str, opened: OpenDevice, medium: Path, tmp_path: Path) -> None:
    write_back(opened.device, WritebackType.HUGE)
    opened.close()
    if how == "missing":
        medium.unlink()
    else:
        with medium.open("r+b") as file:
            file.write(bytes(PAGE_SIZE if how == "another's" else 10))
    again = OpenDevice(RegionStore(tmp_path / "state"), Wanted())
    device = again.device
    assert read(device, 0, 2 * PAGE_SIZE) == make_data("text", 0, PAGE_SIZE) + make_data("half", 1, PAGE_SIZE)
    with pytest.raises(PageError, match="backing store, which is missing"):
        read(device, 2 * PAGE_SIZE, PAGE_SIZE)
    assert device.io_stat().failed_backing_reads == 1
    write(device, 2 * PAGE_SIZE, make_data("text", 2, PAGE_SIZE))
    with device:
        device.discard(4 * PAGE_SIZE, SIZE - 4 * PAGE_SIZE)
    assert device.bd_stat().pages == 0
    assert read(device, 2 * PAGE_SIZE, PAGE_SIZE) == make_data("text", 2, PAGE_SIZE)
    again.close()


def test_clients_read_and_change_parts_of_what_is_written_back(opened: OpenDevice) -> None:
    device = opened.device
    expected = bytearray(read(device, 0, SIZE))
    write_back(device)
    stream = b"".join(SIMPLE.request(READ, page, page * PAGE_SIZE, PAGE_SIZE) for page in range(PAGES))
    # In one batch with writes: each request sees those before it.
    stream += SIMPLE.write(1000, 5, b"part") + SIMPLE.request(READ, 1001, 0, 3 * PAGE_SIZE)
    stream += SIMPLE.write(1002, 8 * PAGE_SIZE - 3, b"across") + SIMPLE.request(
        READ, 1003, 7 * PAGE_SIZE, 2 * PAGE_SIZE
    )
    stream += SIMPLE.request(READ, 1004, 100, 50)
    with Peer(lambda sock: Transmission(sock, device, None).run()) as peer:
        sender = threading.Thread(target=peer.client.sendall, args=(stream,))
        sender.start()
        for page in range(PAGES):
            assert receive(peer.client, REPLY_BYTES) == SIMPLE.done(page)
            assert receive(peer.client, PAGE_SIZE) == expected[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
        expected[5:9] = b"part"
        assert receive(peer.client, REPLY_BYTES) == SIMPLE.done(1000)
        assert receive(peer.client, REPLY_BYTES) == SIMPLE.done(1001)
        assert receive(peer.client, 3 * PAGE_SIZE) == expected[: 3 * PAGE_SIZE]
        expected[8 * PAGE_SIZE - 3 : 8 * PAGE_SIZE + 3] = b"across"
        assert receive(peer.client, REPLY_BYTES) == SIMPLE.done(1002)
        assert receive(peer.client, REPLY_BYTES) == SIMPLE.done(1003)
        assert receive(peer.client, 2 * PAGE_SIZE) == expected[7 * PAGE_SIZE : 9 * PAGE_SIZE]
        assert receive(peer.client, REPLY_BYTES) == SIMPLE.done(1004)
        assert receive(peer.client, 50) == expected[100:150]
        sender.join()
    stat = device.request_stat()
    assert (stat.reads, stat.writes) == (1 + PAGES + 3, PAGES + 2)
    assert device.mm_stat() == recount(device, device.mm_stat())


def test_a_client_is_told_of_what_cannot_be_read_and_of_the_rest_nothing_is_lost(
    opened: OpenDevice, bad: BadMedium
) -> None:
    device = opened.device
    write_back(device, WritebackType.ANY, 0, 1)
    bad.bad_reads = range(16 * SEGMENT)
    expected = make_data("random", 2, PAGE_SIZE)
    with Peer(lambda sock: Transmission(sock, device, None).run()) as peer:
        peer.client.sendall(b"".join(SIMPLE.request(READ, page, page * PAGE_SIZE, PAGE_SIZE) for page in (0, 1, 2)))
        for page in (0, 1):
            assert receive(peer.client, REPLY_BYTES) == SIMPLE.error(page, Error.EIO)
        assert receive(peer.client, REPLY_BYTES) == SIMPLE.done(2)
        assert receive(peer.client, PAGE_SIZE) == expected
    stat = device.io_stat()
    assert (stat.failed_reads, stat.failed_backing_reads) == (2, 2)


def test_clients_read_while_pages_are_written_back_and_cleaned(opened: OpenDevice) -> None:
    device = opened.device
    assert device.backing is not None
    expected = read(device, 0, SIZE)
    generator = random.Random(3)
    wrong: list[int] = []

    def serve_reads() -> None:
        with Peer(lambda sock: Transmission(sock, device, None).run()) as peer:
            for cookie in range(600):
                page = generator.randrange(PAGES)
                peer.client.sendall(SIMPLE.request(READ, cookie, page * PAGE_SIZE, PAGE_SIZE))
                assert receive(peer.client, REPLY_BYTES) == SIMPLE.done(cookie)
                if receive(peer.client, PAGE_SIZE) != expected[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]:
                    wrong.append(page)

    reader = threading.Thread(target=serve_reads)
    reader.start()
    rounds = 0
    while reader.is_alive():
        write_back(device)
        clean(device, device.backing)
        for page in random.Random(rounds).sample(range(PAGES), PAGES // 2):
            write(device, page * PAGE_SIZE, bytearray(expected[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]))
        rounds += 1
    reader.join()
    assert not wrong
    assert rounds > 1
    assert device.mm_stat() == recount(device, device.mm_stat())


def test_block_status_shows_it(opened: OpenDevice) -> None:
    device = opened.device
    write_back(device, WritebackType.ANY, 0, 1)
    with device:
        runs = device.states(0, 4)
    assert extents(runs, Context.STATE, 0, 4 * PAGE_SIZE, one=False)[0] == (2 * PAGE_SIZE, PageState.WRITTEN_BACK)
    assert extents(runs, Context.ALLOCATION, 0, 4 * PAGE_SIZE, one=False)[0] == (3 * PAGE_SIZE, 0)


# The words


class Words:
    """A disk and its control words."""

    def __init__(self, directory: Path | None = None) -> None:
        self.disk = Disk("zram0", directory)
        self.served = Served(self.disk, (), Path("/admin"))

    def set(self, name: str, value: str) -> None:
        control.write(self.served, name, value)

    def refuses(self, name: str, value: str, error: str) -> None:
        with pytest.raises(AttributeRefusedError, match=f"^{error} "):
            self.set(name, value)

    def read(self, name: str) -> str:
        return attributes.read(self.served, name)


@pytest.fixture
def words() -> Words:
    return Words()


def test_what_backing_dev_takes(words: Words, medium: Path, tmp_path: Path) -> None:
    assert words.read("backing_dev") == "none\n"
    words.refuses("backing_dev", "/dev/null", "ENOTBLK")
    words.refuses("backing_dev", str(tmp_path), "EISDIR")
    words.refuses("backing_dev", str(tmp_path / "nothing"), "ENOENT")
    words.refuses("backing_dev", "relative", "EINVAL")
    (tmp_path / "small").write_bytes(bytes(PAGE_SIZE))
    words.refuses("backing_dev", str(tmp_path / "small"), "EINVAL")
    other = Medium(medium)
    words.refuses("backing_dev", str(medium), "EBUSY")
    other.close()
    words.set("backing_dev", f"{medium}\n")
    assert words.read("backing_dev") == f"{medium}\n"
    words.set("disksize", "1M")
    write(words.disk.require_opened().device, 0, make_data("text", 1, PAGE_SIZE))
    words.set("writeback", "page_index=0")
    # It holds pages.
    for value in ("none", str(tmp_path / "other")):
        words.refuses("backing_dev", value, "EBUSY")
    write(words.disk.require_opened().device, 0, make_data("text", 2, PAGE_SIZE))
    words.set("backing_dev", "none")
    assert words.read("backing_dev") == "none\n"
    words.set("backing_dev", str(medium))
    words.set("writeback", "page_index=0")
    assert read(words.disk.require_opened().device, 0, PAGE_SIZE) == make_data("text", 2, PAGE_SIZE)
    words.set("writeback_limit", "77")
    words.set("reset", "1")
    # As in the kernel, which forgets the device, and keeps the limit.
    assert words.read("backing_dev") == "none\n"
    assert words.read("writeback_limit") == "77\n"
    assert words.read("bd_stat").split() == ["0", "0", "0"]


def test_what_writeback_refuses_and_in_which_order(words: Words, medium: Path) -> None:
    words.refuses("writeback", "nonsense", "EINVAL")
    words.set("disksize", "1M")
    words.refuses("writeback", "nonsense", "ENODEV")
    words.set("backing_dev", str(medium))
    for value in (
        "nonsense",
        "type=",
        "type=cold",
        "page_index=x",
        "page_index=0x10",
        "page_indexes=5",
        "page_indexes=a-b",
    ):
        words.refuses("writeback", value, "EINVAL")
    for value in ("page_index=256", "page_indexes=0-256", "page_indexes=7-6"):
        words.refuses("writeback", value, "ERANGE")
    for value in ("idle", "huge", "huge_idle", "incompressible", "type=idle", "page_index=010", "future=1"):
        words.set("writeback", value)


def test_ranges_and_types() -> None:
    kind = WritebackType
    everything = Selection(kind.IDLE, 0, 99)
    assert parse_selections("idle", 100) == parse_selections("type=idle page_index=x", 100) == [everything]
    assert parse_selections("page_index=03 page_indexes=5-09", 100) == [
        Selection(kind.ANY, 3, 3),
        Selection(kind.ANY, 5, 9),
    ]
    # A type means the last range before it.
    assert parse_selections("page_indexes=5-9 huge", 100)[-1] == Selection(kind.HUGE, 5, 9)


def test_the_settings_of_writeback(words: Words, medium: Path) -> None:
    assert words.read("writeback_batch_size") == "32\n"
    assert words.read("compressed_writeback") == "1\n"
    for value in ("1", "y", "on"):
        words.set("compressed_writeback", value)
    for value in ("0", "no", "maybe", ""):
        words.refuses("compressed_writeback", value, "EINVAL")
    words.refuses("writeback_batch_size", "0", "EINVAL")
    words.set("writeback_batch_size", "1")
    words.refuses("writeback_limit", "-1", "EINVAL")
    words.set("writeback_limit", "2")
    words.set("writeback_limit_enable", "7")
    words.set("backing_dev", str(medium))
    words.set("disksize", "1M")
    settings = [words.read(name) for name in ("writeback_limit", "writeback_limit_enable", "writeback_batch_size")]
    assert settings == ["2\n", "1\n", "1\n"]
    device = words.disk.require_opened().device
    write(device, 0, make_data("random", 1, 4 * PAGE_SIZE))
    words.refuses("writeback", "huge", "EIO")
    assert words.read("writeback_limit") == "0\n"
    assert device.bd_stat().pages == 2
    assert "".join(block_state(device)).count(" .wh...\n") == 2
    words.set("writeback_limit_enable", "0")
    words.set("writeback", "huge")
    assert device.bd_stat().pages == 4
    assert words.read("bd_stat") == f"{5:8d} {0:8d} {device.bd_stat().writes:8d}\n"


def test_a_full_store_is_named(words: Words, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.touch()
    os.truncate(small, 4 * SEGMENT)
    words.set("backing_dev", str(small))
    words.set("disksize", "1M")
    write(words.disk.require_opened().device, 0, make_data("random", 1, SIZE))
    words.refuses("writeback", "huge", "ENOSPC")


def test_a_disk_that_grows_keeps_what_is_written_back(medium: Path, tmp_path: Path) -> None:
    words = Words(tmp_path / "state")
    words.set("backing_dev", str(medium))
    words.set("disksize", "1M")
    write(words.disk.require_opened().device, 0, make_data("text", 1, SIZE))
    words.set("writeback", "page_indexes=0-99")
    words.set("grow", "2M")
    device = words.disk.require_opened().device
    assert device.bd_stat().pages == 100
    assert read(device, 0, SIZE) == make_data("text", 1, SIZE)
    words.set("reset", "1")
