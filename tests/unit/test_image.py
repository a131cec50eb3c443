"""Saving and restoring a disk: what is refused, what a failure leaves, and what both engines write."""

import errno
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from tests.property.test_device import DICTIONARY, make_data, read, recount, write
from zramd.backing.store import SEGMENT
from zramd.device import snapshot
from zramd.device.cleaning import clean
from zramd.device.codecs import CodecError, Parameters
from zramd.device.counters import MmStat
from zramd.device.disk import Disk
from zramd.device.entry import size_of
from zramd.device.fetching import PageError
from zramd.device.image import VERSION, ImageError, pack_chunk
from zramd.device.life import BusyError, UninitialisedError
from zramd.device.opening import OpenDevice
from zramd.device.recompression import Recompression
from zramd.device.snapshot import CHUNK_PAGES, Snapshot, SnapshotLostError
from zramd.device.wanted import Wanted
from zramd.device.writeback import Selection, WritebackType
from zramd.device.zram import Device
from zramd.layout import (
    ENTRY_HANDLE_MASK,
    ENTRY_IDLE,
    ENTRY_INCOMPRESSIBLE,
    ENTRY_STATE_MASK,
    ENTRY_STATE_SHIFT,
    PAGE_SIZE,
    PageState,
)
from zramd.memory import RegionStore

KINDS = ["text", "half", "random", "zero", "pattern"]


def make_disk(directory: Path | None = None, *, integrity: bool = False) -> Disk:
    """Return a disk with pages of every kind, in three chunks of the table, of several codecs and with all marks."""
    disk = Disk("zram0", directory, integrity=integrity)
    disk.set_parameters(Parameters(3, DICTIONARY))
    disk.set_algorithm("zstd", 1)
    disk.set_parameters(Parameters(19, DICTIONARY), 1)
    disk.initialise(4 * CHUNK_PAGES * PAGE_SIZE)
    device = device_of(disk)
    for page in (*range(40), *range(CHUNK_PAGES - 5, CHUNK_PAGES + 5), 4 * CHUNK_PAGES - 1):
        write(device, page * PAGE_SIZE, make_data(KINDS[page % 5], page, PAGE_SIZE))
    disk.recompress(Recompression(max_pages=12))
    disk.set_algorithm("lz4hc")
    write(device, 0, make_data("text", 77, 2 * PAGE_SIZE))
    disk.mark_idle(None)
    return disk


def device_of(disk: Disk) -> Device:
    return disk.require_opened().device


def save(disk: Disk) -> bytes:
    fd = os.memfd_create("image")
    try:
        disk.save(fd)
        return os.pread(fd, os.fstat(fd).st_size, 0)
    finally:
        os.close(fd)


def restore(disk: Disk, image: bytes, disksize: int = 0) -> None:
    fd = os.memfd_create("image")
    try:
        os.write(fd, image)
        os.lseek(fd, 0, os.SEEK_SET)
        disk.restore(fd, disksize)
    finally:
        os.close(fd)


def reading(image: bytes) -> Iterator[int]:
    """Yield the end of a pipe that an image comes from."""
    out, into = os.pipe()

    def write_all() -> None:
        with open(into, "wb") as file:
            file.write(image)

    thread = threading.Thread(target=write_all)
    thread.start()
    yield out
    thread.join()
    os.close(out)


@pytest.fixture
def disk() -> Disk:
    return make_disk()


@pytest.fixture
def image(disk: Disk) -> bytes:
    return save(disk)


@pytest.mark.parametrize(("integrity", "asked"), [(False, False), (True, False), (False, True)])
def test_a_restored_disk_is_the_one_that_was_saved(integrity: bool, asked: bool) -> None:
    disk = make_disk(integrity=integrity)
    device = device_of(disk)
    with device:
        entries = {page: entry & ~ENTRY_HANDLE_MASK for page, entry in device.entries()}
    assert {entry & (ENTRY_IDLE | ENTRY_INCOMPRESSIBLE) for entry in entries.values()} >= {0, ENTRY_IDLE}
    image = save(disk)
    other = Disk("zram1", None, integrity=asked)
    restore(other, image)
    found = device_of(other)
    before, after = disk.mm_stat(), other.mm_stat()
    assert after == recount(found, after)
    for name in ("orig_data_size", "compr_data_size", "same_pages", "huge_pages"):
        assert getattr(after, name) == getattr(before, name)
    assert after.mem_used_max == after.mem_used_total
    with found:
        assert {page: entry & ~ENTRY_HANDLE_MASK for page, entry in found.entries()} == entries
    assert read(found, 0, found.disksize) == read(device, 0, device.disksize)
    assert found.identity.integrity == (integrity or asked)
    assert [other.algorithm(priority) for priority in range(4)] == ["lz4hc", "zstd", None, None]
    made = found.identity.algorithms.codecs
    assert [chosen and chosen.key for chosen in made] == [
        chosen and chosen.key for chosen in device.identity.algorithms.codecs
    ]
    assert sum(chosen is not None and chosen.dictionary == DICTIONARY for chosen in made) == 2
    # It goes on as any disk does.
    write(found, 0, make_data("half", 5, 8 * PAGE_SIZE))
    other.recompress(Recompression())
    assert other.mm_stat() == recount(found, other.mm_stat())


def test_a_restored_disk_is_kept_as_any(tmp_path: Path, image: bytes, disk: Disk) -> None:
    kept = Disk("zram0", tmp_path / "state")
    restore(kept, image)
    assert kept.leave()
    kept.require_opened().close()
    opened = OpenDevice(RegionStore(tmp_path / "state"), Wanted())
    assert opened.recovered
    assert read(opened.device, 0, disk.disksize) == read(device_of(disk), 0, disk.disksize)
    for found, saved in zip(
        opened.device.identity.algorithms.codecs, device_of(disk).identity.algorithms.codecs, strict=True
    ):
        assert (found and found.key) == (saved and saved.key)
    assert opened.device.identity.codec.name == disk.algorithm() == "lz4hc"
    opened.close()


def test_what_recompression_made_is_restored_however_large_it_is() -> None:
    disk, other = Disk("zram0", None), Disk("zram1", None)
    disk.set_algorithm("zstd", 1)
    disk.initialise(1 << 20)
    device = device_of(disk)
    # Huge for lz4, and for zstd just below the largest size class, where a write would have left it huge.
    limit = device.pool.geometry.huge_limit
    noise = random.Random(1).randbytes(PAGE_SIZE)
    pages = [noise[:length].ljust(PAGE_SIZE, b"\0") for length in range(limit - 20, limit + 8)]
    write(device, 0, bytearray(b"".join(pages)))
    disk.recompress(Recompression())
    with device:
        sizes = [size_of(entry) for _, entry in device.entries()]
    assert any(limit <= size < PAGE_SIZE for size in sizes)
    restore(other, save(disk))
    assert read(device_of(other), 0, len(pages) * PAGE_SIZE) == b"".join(pages)


def test_a_restored_disk_has_a_uuid_of_its_own(disk: Disk, image: bytes) -> None:
    # A client that has used the saved disk since must not go on with an earlier state of it.
    other = Disk("zram1", None)
    restore(other, image)
    assert device_of(other).identity.uuid != device_of(disk).identity.uuid


def test_empty_pages_take_nothing() -> None:
    disk = Disk("zram0", None)
    disk.initialise(1 << 40)
    empty = len(save(disk))
    assert empty < 500
    device = device_of(disk)
    write(device, 1 << 39, bytearray(512 * PAGE_SIZE))  # all the same: a run
    assert len(save(disk)) < empty + 50
    with device:
        device.discard(1 << 39, 512 * PAGE_SIZE)
    assert len(save(disk)) == empty
    other = Disk("zram1", None)
    restore(other, save(disk))
    assert (other.disksize, other.mm_stat().orig_data_size) == (1 << 40, 0)


def test_both_engines_save_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(
        "zramd.native.engine", reason="no compiled engine: install gcc, liblz4-dev, libzstd-dev, and zramd again"
    )
    image = save(make_disk(integrity=True))
    found = []
    for engine in ("python", "native"):
        monkeypatch.setenv("ZRAMD_ENGINE", engine)
        disk = Disk("zram0", None)
        restore(disk, image)
        device = device_of(disk)
        with Snapshot(device) as taken:
            # Of these it is the copies that are read.
            write(device, 0, make_data("half", 9, 20 * PAGE_SIZE))
            with device:
                device.discard(20 * PAGE_SIZE, CHUNK_PAGES * PAGE_SIZE)
            found.append(list(taken.chunks()))
    assert found[0] == found[1]
    parts = [pack_chunk(*chunk)[0] for chunk in found[0]]
    assert b"".join(part for chunk in parts for part in chunk) in image


# What is refused


def refuses(image: bytes, words: str) -> None:
    disk = Disk("zram0", None)
    with pytest.raises(ImageError, match=words) as caught:
        restore(disk, image)
    assert "\n" not in str(caught.value)
    assert disk.opened is None
    with pytest.raises(UninitialisedError), disk.connected(lambda: None):
        pass


def test_damage_of_any_byte_is_refused(image: bytes) -> None:
    generator = random.Random(1)
    positions = {*range(80), *range(len(image) - 64, len(image)), *generator.sample(range(len(image)), 200)}
    for position in positions:
        damaged = bytearray(image)
        damaged[position] ^= 1 << generator.randrange(8)
        refuses(bytes(damaged), "damaged|not a disk|version|cut short|its header")


def test_a_file_that_is_cut_short_anywhere_is_refused(image: bytes) -> None:
    generator = random.Random(2)
    for length in (0, 1, 7, 8, 15, 16, len(image) - 17, len(image) - 16, len(image) - 1):
        refuses(image[:length], "cut short")
    for length in generator.sample(range(len(image)), 60):
        refuses(image[:length], "cut short")


def test_what_is_no_image_is_refused_by_what_it_is(image: bytes) -> None:
    refuses(bytes(4096), "not a disk saved by zramd")
    refuses(b"\x7fELF" + bytes(4096), "not a disk saved by zramd")
    refuses(image[:8] + (VERSION + 1).to_bytes(4, "little") + image[12:], f"version {VERSION + 1}.*knows {VERSION}")
    refuses(image + b"\0", "behind its end")


def test_chunks_in_another_order_are_refused(image: bytes) -> None:
    starts = [start for start in range(len(image)) if image.startswith(b"CHNK", start)]
    starts.append(image.index(b"TAIL"))
    parts = [image[start:end] for start, end in pairwise(starts)]
    assert len(parts) == 3
    for changed in ([parts[1], parts[0], parts[2]], parts[:2], [*parts, parts[2]], [parts[0], *parts]):
        refuses(image[: starts[0]] + b"".join(changed) + image[starts[-1] :], "not in order|whole is wrong")


def test_a_disk_that_holds_data_or_has_a_client_is_not_restored_over(disk: Disk, image: bytes) -> None:
    contents = read(device_of(disk), 0, disk.disksize)
    with pytest.raises(BusyError, match="reset it first"):
        restore(disk, image)
    assert read(device_of(disk), 0, disk.disksize) == contents
    other = Disk("zram1", None)
    other.initialise(1 << 20)
    with other.connected(lambda: None), pytest.raises(BusyError, match="connections to zram1: 1"):
        restore(other, image)
    assert other.disksize == 1 << 20
    restore(other, image)
    assert other.disksize == disk.disksize


def test_the_disk_may_be_larger_than_the_saved_one_but_not_smaller(disk: Disk, image: bytes) -> None:
    size = disk.disksize
    for asked, words in ((size - PAGE_SIZE, "can have"), (1 << 60, "can have")):
        with pytest.raises(ImageError, match=words):
            restore(Disk("zram1", None), image, asked)
    other = Disk("zram1", None)
    restore(other, image, 2 * size)
    assert other.disksize == 2 * size
    assert read(device_of(other), 0, size) == read(device_of(disk), 0, size)
    write(device_of(other), size, make_data("text", 1, PAGE_SIZE))
    larger = Disk("zram2", None)
    larger.initialise(2 * size)
    restore(larger, image)
    assert larger.disksize == 2 * size


def test_a_larger_disk_is_found_by_a_server_that_is_started_as_before(tmp_path: Path, image: bytes, disk: Disk) -> None:
    kept = Disk("zram0", tmp_path / "state")
    kept.open(Wanted(1 << 20))
    kept.reset()
    restore(kept, image)
    assert kept.leave()
    kept.require_opened().close()
    opened = OpenDevice(RegionStore(tmp_path / "state"), Wanted(1 << 20))
    assert (opened.recovered, opened.device.disksize) == (True, disk.disksize)
    opened.close()


def test_a_disk_that_is_to_have_another_chain_size_refuses(image: bytes) -> None:
    with pytest.raises(ValueError, match="chain size 8"):
        restore(Disk("zram1", None, 4), image)


def test_the_memory_limit_holds_for_what_is_restored(disk: Disk, image: bytes) -> None:
    other = Disk("zram1", None)
    other.set_mem_limit(disk.mm_stat().mem_used_total // 2)
    with pytest.raises(OSError, match="mem_limit") as caught:
        restore(other, image)
    assert caught.value.errno == errno.ENOSPC
    assert other.opened is None
    other.set_mem_limit(disk.mm_stat().mem_used_total)
    restore(other, image)
    assert other.mm_stat().mem_limit == disk.mm_stat().mem_used_total


def test_a_restore_that_fails_leaves_nothing_behind(tmp_path: Path, image: bytes) -> None:
    disk = Disk("zram0", tmp_path / "state")
    disk.initialise(1 << 20)
    disk.set_mem_limit(1 << 30)
    disk.set_writeback(lambda settings: replace(settings, limit=5))
    (tmp_path / "store").touch()
    os.truncate(tmp_path / "store", 4 * SEGMENT)
    disk.set_backing(tmp_path / "store")
    with pytest.raises(ImageError):
        restore(disk, image[:-1])
    assert disk.opened is None
    assert list((tmp_path / "state").iterdir()) == []
    # What the next one must not exceed, and where it may write to, is as before.
    assert (disk.mm_stat().mem_limit, disk.writeback.limit) == (1 << 30, 5)
    assert disk.backing_path == tmp_path / "store"
    disk.initialise(1 << 20)
    assert disk.mm_stat().orig_data_size == 0


KILLED = """
import os, signal, sys
from pathlib import Path
from zramd.device.disk import Disk
from zramd.device.zram import Device

def die(device):
    os.kill(os.getpid(), signal.SIGKILL)

Device.note_filled = die
Disk("zram0", Path(sys.argv[1])).restore(sys.stdin.fileno())
"""
"""A restore that dies when all pages are in place."""


def test_nothing_is_left_of_a_restore_that_was_killed(
    tmp_path: Path, image: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    state = tmp_path / "state"
    done = subprocess.run([sys.executable, "-c", KILLED, state], input=image, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (state / "page_table").stat().st_blocks
    # With fewer regions than the saved disk has: nothing of the others stays.
    opened = OpenDevice(RegionStore(state), Wanted(1 << 20, chain_size=4))
    assert {path.name for path in state.iterdir()} == {region.name for region in opened.regions}
    assert not opened.recovered
    assert "a restore was cut short" in caplog.text
    assert read(opened.device, 0, 1 << 20) == bytes(1 << 20)
    assert opened.device.mm_stat() == MmStat()
    opened.close()


# While the disk is used


def test_pages_that_are_written_back_are_saved_as_what_they_are(disk: Disk, tmp_path: Path) -> None:
    device = device_of(disk)
    before, contents = disk.mm_stat(), read(device, 0, disk.disksize)
    medium = tmp_path / "medium"
    medium.touch()
    os.truncate(medium, 16 * SEGMENT)
    disk.set_backing(medium)

    def write_back(first: int, last: int) -> None:
        disk.write_back(lambda _: [Selection(WritebackType.ANY, first, last)])

    write_back(0, CHUNK_PAGES)
    with Snapshot(device) as taken:
        # Elsewhere, gone, and in memory no longer: all of them are saved as what they were.
        write(device, 0, make_data("half", 9, 10 * PAGE_SIZE))
        with device:
            device.discard(10 * PAGE_SIZE, 10 * PAGE_SIZE)
        write_back(0, 4 * CHUNK_PAGES)
        assert device.backing is not None
        clean(device, device.backing)
        write_back(0, 4 * CHUNK_PAGES)
        chunks = list(taken.chunks())
    write(device, 0, bytearray(contents[: 40 * PAGE_SIZE]))
    stored = {
        chunk * CHUNK_PAGES + n: entry for chunk, entries, _ in chunks for n, entry in enumerate(entries) if entry
    }
    states = [entry >> ENTRY_STATE_SHIFT & ENTRY_STATE_MASK for entry in stored.values()]
    assert PageState.WRITTEN_BACK not in states
    assert len(states) * PAGE_SIZE == before.orig_data_size
    assert states.count(PageState.HUGE) == before.huge_pages
    assert sum(len(data) for _, _, data in chunks) == before.compr_data_size + 8 * sum(
        entry >> ENTRY_STATE_SHIFT & ENTRY_STATE_MASK == PageState.SAME_FILLED and size_of(entry) == 8
        for entry in stored.values()
    )
    write_back(0, 4 * CHUNK_PAGES)
    other = Disk("zram1", None)
    restore(other, save(disk))
    assert read(device_of(other), 0, disk.disksize) == contents
    assert other.mm_stat() == recount(device_of(other), other.mm_stat())


def test_a_backing_store_that_is_missing_fails_the_save_with_the_page(disk: Disk, tmp_path: Path) -> None:
    medium = tmp_path / "medium"
    medium.touch()
    os.truncate(medium, 16 * SEGMENT)
    disk.set_backing(medium)
    disk.write_back(lambda _: [Selection(WritebackType.ANY, 5, 5)])
    device = device_of(disk)
    with device:
        backing, device.backing = device.backing, None
    with pytest.raises(PageError, match="page 5 is on the backing store, which is missing"):
        save(disk)
    device.backing = backing
    assert save(disk)


def test_a_save_stops_when_it_is_not_wanted_any_more(disk: Disk) -> None:
    fd = os.memfd_create("image")
    with pytest.raises(OSError, match="cancel") as caught:
        disk.save(fd, lambda: True)
    assert caught.value.errno == errno.ECANCELED
    os.close(fd)
    assert save(disk)


def test_a_target_that_fails_fails_the_save_and_nothing_else(disk: Disk) -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(OSError, match="No space"):
        disk.save(fd)
    os.close(fd)
    out, into = os.pipe()
    os.close(out)
    with pytest.raises(BrokenPipeError):
        disk.save(into)
    os.close(into)
    assert disk.works.under_way() == []
    assert save(disk)


def test_whatever_goes_wrong_while_it_is_written_it_is_not_taken_for_saved(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("zramd.device.saving._Output._write", fail)
    with pytest.raises(MemoryError):
        save(disk)


def test_a_pipe_that_nobody_reads_holds_up_only_its_own_save(disk: Disk) -> None:
    for page in range(600):
        write(device_of(disk), page * PAGE_SIZE, make_data("random", page, PAGE_SIZE))
    out, into = os.pipe()
    calls = iter(range(20))
    with pytest.raises(OSError, match="cancel"):
        disk.save(into, lambda: next(calls, None) is None)
    write(device_of(disk), 0, make_data("text", 1, PAGE_SIZE))
    assert save(disk)
    os.close(out)
    os.close(into)


def test_an_image_comes_through_a_pipe_as_well(disk: Disk, image: bytes) -> None:
    other = Disk("zram1", None)
    for fd in reading(image):
        other.restore(fd)
    assert read(device_of(other), 0, disk.disksize) == read(device_of(disk), 0, disk.disksize)


def test_a_restore_that_waits_for_a_pipe_can_be_cancelled(image: bytes) -> None:
    out, into = os.pipe()
    os.write(into, image[:2000])
    disk = Disk("zram1", None)
    looks = iter(range(3))
    with pytest.raises(OSError, match="cancel"):
        disk.restore(out, is_cancelled=lambda: next(looks, None) is None)
    assert disk.opened is None
    os.close(out)
    os.close(into)


def test_writes_go_on_when_there_is_no_memory_left_for_copies(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "AHEAD_BYTES", -PAGE_SIZE)
    device = device_of(disk)
    with Snapshot(device) as taken:
        write(device, 2 * PAGE_SIZE, make_data("half", 3, 4 * PAGE_SIZE))
        assert read(device, 2 * PAGE_SIZE, 4 * PAGE_SIZE) == make_data("half", 3, 4 * PAGE_SIZE)
        with pytest.raises(SnapshotLostError, match="more was overwritten"):
            list(taken.chunks())
    assert save(disk)


def test_a_save_of_a_disk_that_is_reset_ends(disk: Disk) -> None:
    with Snapshot(device_of(disk)) as taken:
        chunks = taken.chunks()
        next(chunks)
        disk.reset()
        with pytest.raises(SnapshotLostError, match="was reset"):
            next(chunks)


def test_a_damaged_page_is_not_saved_as_if_it_were_whole() -> None:
    disk = make_disk(integrity=True)
    device = device_of(disk)
    entry = dict(device.entries())[2]
    device.pool.map(entry & ENTRY_HANDLE_MASK, 100)[50] ^= 1
    with pytest.raises(PageError, match="page 2 is damaged"):
        save(disk)
    with Snapshot(device) as taken:
        write(device, 2 * PAGE_SIZE, make_data("text", 1, PAGE_SIZE))
        with pytest.raises(CodecError, match="page 2 is damaged"):
            list(taken.chunks())
    assert save(disk)


def test_one_save_at_a_time(disk: Disk) -> None:
    fd = os.memfd_create("image")

    def again() -> bool:
        with pytest.raises(BusyError, match="save is under way"):
            disk.save(fd)
        return True

    with pytest.raises(OSError, match="cancel"):
        disk.save(fd, again)
    os.close(fd)


def test_each_save_is_of_one_moment_while_a_client_writes() -> None:
    """A client writes growing numbers to the pages in turn: at each moment they are so many in a row."""
    disk = Disk("zram0", None)
    pages = 3000
    disk.initialise(pages * PAGE_SIZE)
    device = device_of(disk)
    noise = random.Random(1).randbytes(1000)

    def contents(number: int) -> bytearray:
        return bytearray((number.to_bytes(8, "little") + noise[: number % 1000]).ljust(PAGE_SIZE, b"z"))

    for number in range(pages):
        write(device, number * PAGE_SIZE, contents(number))
    ended = threading.Event()

    def write_on() -> None:
        number = pages
        while not ended.is_set():
            write(device, number % pages * PAGE_SIZE, contents(number))
            number += 1

    writer = threading.Thread(target=write_on)
    writer.start()
    try:
        images = [save(disk) for _ in range(5)]
    finally:
        ended.set()
        writer.join()
    firsts = []
    for image in images:
        other = Disk("zram1", None)
        restore(other, image)
        data = read(device_of(other), 0, pages * PAGE_SIZE)
        numbers = sorted(int.from_bytes(data[start : start + 8], "little") for start in range(0, len(data), PAGE_SIZE))
        assert numbers == list(range(numbers[0], numbers[0] + pages))
        assert all(data[n % pages * PAGE_SIZE :][:PAGE_SIZE] == contents(n) for n in numbers[:: pages // 50])
        firsts.append(numbers[0])
    assert firsts == sorted(set(firsts))
