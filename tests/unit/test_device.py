import os
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.property.test_device import make_data, read, write
from zramd.device.fetching import PageError
from zramd.device.opening import OpenDevice
from zramd.device.pages import NoSpaceError
from zramd.device.superblock import StateError
from zramd.device.wanted import Wanted
from zramd.layout import ENTRY_HANDLE_MASK, ENTRY_STATE_SHIFT, HANDLE_IN_USE, PAGE_SIZE, PageState, Superblock
from zramd.memory import NoMemoryError, Region, RegionError, RegionStore

RAW = make_data("random", 1, PAGE_SIZE)
EIGHT_BYTES = bytearray(b"01234567" * 512)


def state_of(opened: OpenDevice, page: int) -> PageState:
    entries = dict(opened.device.entries())
    return PageState(entries.get(page, 0) >> ENTRY_STATE_SHIFT & 7)


@pytest.mark.parametrize(
    ("page", "state"),
    [
        (bytearray(PAGE_SIZE), PageState.SAME_FILLED),
        (EIGHT_BYTES, PageState.SAME_FILLED),
        (bytearray(b"0123" * 1024), PageState.SAME_FILLED),
        (bytearray(b"0123456789abcdef" * 256), PageState.COMPRESSED),
        (EIGHT_BYTES[:-1] + b"x", PageState.COMPRESSED),
        (EIGHT_BYTES[:2048] + b"x" + EIGHT_BYTES[2049:], PageState.COMPRESSED),
        (RAW, PageState.HUGE),
    ],
    ids=["zero", "8 bytes", "4 bytes", "16 bytes", "last byte differs", "middle byte differs", "random"],
)
def test_a_page_is_stored_as_the_kernel_stores_it(opened: OpenDevice, page: bytearray, state: PageState) -> None:
    write(opened.device, 5 * PAGE_SIZE, page)
    assert state_of(opened, 5) is state
    assert read(opened.device, 5 * PAGE_SIZE, PAGE_SIZE) == page


def test_a_zero_page_takes_no_memory_at_all(opened: OpenDevice) -> None:
    write(opened.device, 0, bytearray(64 * PAGE_SIZE))
    stat = opened.device.mm_stat()
    assert (stat.orig_data_size, stat.compr_data_size, stat.mem_used_total, stat.same_pages) == (
        64 * PAGE_SIZE,
        0,
        0,
        64,
    )


def test_an_overwrite_shows_both_copies_in_mem_used_max(opened: OpenDevice) -> None:
    write(opened.device, 0, RAW)
    opened.device.reset_mem_used_max()
    assert opened.device.mm_stat().mem_used_max == PAGE_SIZE
    write(opened.device, 0, make_data("random", 2, PAGE_SIZE))
    stat = opened.device.mm_stat()
    assert (stat.mem_used_total, stat.mem_used_max, stat.huge_pages, stat.huge_pages_since) == (4096, 8192, 1, 2)


def test_the_limit_is_on_whole_zspages_and_rounds_up_to_pages(opened: OpenDevice) -> None:
    device = opened.device
    device.set_mem_limit(5000)
    assert device.mm_stat().mem_limit == 8192
    write(device, 0, make_data("random", 1, 2 * PAGE_SIZE))
    with pytest.raises(NoSpaceError, match="memory limit of 8192"):
        write(device, 2 * PAGE_SIZE, RAW)
    stat = device.mm_stat()
    assert (stat.mem_used_total, stat.mem_used_max) == (8192, 12288)


def test_at_the_limit_the_old_page_stays_and_same_filled_pages_still_fit(opened: OpenDevice) -> None:
    device = opened.device
    old = make_data("random", 1, 2 * PAGE_SIZE)
    write(device, 0, old)
    device.set_mem_limit(8192)
    with pytest.raises(NoSpaceError):
        write(device, 0, make_data("random", 3, PAGE_SIZE))
    assert read(device, 0, 2 * PAGE_SIZE) == old
    write(device, 0, bytearray(PAGE_SIZE))
    assert device.mm_stat().mem_used_total == 4096


def test_a_write_over_several_pages_stops_at_the_limit_and_counts_one_failure(opened: OpenDevice) -> None:
    device = opened.device
    device.set_mem_limit(4 * PAGE_SIZE)
    data = make_data("random", 9, 8 * PAGE_SIZE)
    with pytest.raises(NoSpaceError):
        write(device, 0, data)
    assert read(device, 0, 8 * PAGE_SIZE) == data[: 4 * PAGE_SIZE] + bytes(4 * PAGE_SIZE)
    assert device.io_stat().failed_writes == 1


def test_discard_counts_every_page_and_write_zeroes_frees_them(opened: OpenDevice) -> None:
    device = opened.device
    write(device, 0, RAW)
    with device:
        device.discard(0, 10 * PAGE_SIZE)
    assert device.io_stat().notify_free == 10
    write(device, 0, RAW)
    with device:
        device.write_zeroes(0, PAGE_SIZE)
    assert state_of(opened, 0) is PageState.EMPTY
    assert device.io_stat().notify_free == 11
    assert device.mm_stat().mem_used_total == 0


def test_a_page_discarded_in_part_keeps_its_data(opened: OpenDevice) -> None:
    write(opened.device, 0, RAW)
    with opened.device:
        opened.device.discard(1, PAGE_SIZE - 1)
        opened.device.discard(0, PAGE_SIZE - 1)
    assert read(opened.device, 0, PAGE_SIZE) == RAW


def test_a_damaged_page_is_an_error_and_others_are_not(opened: OpenDevice) -> None:
    device = opened.device
    text = make_data("text", 1, 2 * PAGE_SIZE)
    write(device, 0, text)
    handle = dict(device.entries())[0] & ENTRY_HANDLE_MASK
    view = device.pool.map(handle, 16)
    view[:] = b"\xff" * 16
    with pytest.raises(PageError, match="page 0 is damaged"):
        read(device, 0, PAGE_SIZE)
    assert device.io_stat().failed_reads == 1
    assert read(device, PAGE_SIZE, PAGE_SIZE) == text[PAGE_SIZE:]


def test_a_device_of_1_tib_is_made_at_once_in_little_memory() -> None:
    """In a process of its own: resident memory is a matter of the whole process."""
    code = (
        "from zramd.device.opening import *; from zramd.memory import NoMemoryError, Region, RegionError, RegionStore\n"
        "opened = OpenDevice(RegionStore(None), Wanted(disksize=1 << 40)); device = opened.device\n"
        "data = bytearray(4096); data[0] = 1; stream = device.stream(data)\n"
        "out = []\n"
        "with device:\n"
        "    for offset in range(0, 1 << 40, 1 << 32):\n"
        "        device.write(stream, 0, 4096, offset, stream.prepare(0, 4096, offset))\n"
        "    device.read((1 << 40) - 4096, 4096, out); device.discard(0, 1 << 39)\n"
        "assert out == [bytes(4096)]\n"
        "assert device.io_stat().notify_free == 1 << 27\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmRSS')))\n"
    )

    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(result.stdout) < 100 << 10


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """Return a state directory with one compressed, one huge and one patterned page in it."""
    opened = open_state(tmp_path / "state")
    write(opened.device, 0, make_data("text", 1, PAGE_SIZE))
    write(opened.device, PAGE_SIZE, RAW)
    write(opened.device, 2 * PAGE_SIZE, EIGHT_BYTES)
    opened.close()
    return tmp_path / "state"


def open_state(directory: Path, wanted: Wanted | None = None) -> OpenDevice:
    return OpenDevice(RegionStore(directory), wanted or Wanted(disksize=16 << 20))


def patch_word(path: Path, word: int, value: int) -> None:
    with path.open("r+b") as file:
        file.seek(word * 8)
        file.write(struct.pack("<Q", value))


def read_word(path: Path, word: int) -> int:
    with path.open("rb") as file:
        file.seek(word * 8)
        (value,) = struct.unpack("<Q", file.read(8))
    return int(value)


def test_kept_state_is_found_again_without_being_asked_for(state: Path) -> None:
    opened = open_state(state, Wanted())
    assert opened.recovered
    assert opened.device.disksize == 16 << 20
    assert read(opened.device, 0, 3 * PAGE_SIZE) == make_data("text", 1, PAGE_SIZE) + RAW + EIGHT_BYTES
    opened.close()


@pytest.mark.parametrize(
    ("wanted", "complaint"),
    [
        (Wanted(disksize=32 << 20), "16777216 bytes"),
        (Wanted(chain_size=4), "chain size 8"),
    ],
)
def test_kept_state_that_is_not_what_was_asked_for_is_refused(state: Path, wanted: Wanted, complaint: str) -> None:
    with pytest.raises(StateError, match=complaint):
        open_state(state, wanted)
    open_state(state).close()


@pytest.mark.parametrize(
    ("region", "word", "value", "complaint"),
    [
        ("superblock", Superblock.MAGIC, 77, "not zramd's"),
        ("superblock", Superblock.VERSION, 99, "version 99"),
        ("superblock", Superblock.CHAIN_SIZE, 77, "damaged"),
        ("superblock", Superblock.CODECS, 77, "damaged"),
        ("page_table", 0, 1 << 60, "entry of page 0"),
        ("page_table", 0, PageState.COMPRESSED << ENTRY_STATE_SHIFT | 1, "entry of page 0"),
        ("page_table", 4, PageState.HUGE << ENTRY_STATE_SHIFT | 4096 << 40 | 2, "handle 2"),
        ("page_table", 4, PageState.HUGE << ENTRY_STATE_SHIFT | 4096 << 40 | 2000000, "handle 2000000"),
        ("page_table", 4, PageState.WRITTEN_BACK << ENTRY_STATE_SHIFT, "entry of page 4"),
        ("handles", 1, 0, "handle 1"),
        ("handles", 1, (1 << 32) - 1 << 32 | HANDLE_IN_USE, "handle 1"),
        ("handles", 2, 254 << 16 | 1 << 63 | HANDLE_IN_USE, "handle 2"),
    ],
)
def test_damaged_state_is_refused(state: Path, region: str, word: int, value: int, complaint: str) -> None:
    patch_word(state / region, word, value)
    with pytest.raises(StateError, match=complaint):
        open_state(state)


def test_a_header_of_another_object_is_refused(state: Path) -> None:
    opened = open_state(state)
    (arena,) = (arena for arena in opened.device.pool.arenas if any(arena.size_class) and arena.pages > 1)
    name = arena.region.name
    opened.close()
    assert read_word(state / name, 0) == 1 << 1 | 1
    patch_word(state / name, 0, 9 << 1 | 1)
    with pytest.raises(StateError, match="carries another handle"):
        open_state(state)


def test_an_object_that_no_entry_reaches_is_free_after_a_restart(state: Path) -> None:
    patch_word(state / "page_table", 0, 0)
    patch_word(state / "page_table", 1, 0)
    opened = open_state(state)
    assert opened.device.mm_stat().mem_used_total == 0
    write(opened.device, 0, RAW)
    assert read(opened.device, 0, PAGE_SIZE) == RAW
    opened.close()


def test_a_device_whose_making_was_cut_short_is_made_anew(tmp_path: Path) -> None:
    open_state(tmp_path / "state").close()
    patch_word(tmp_path / "state" / "superblock", Superblock.MAGIC, 0)
    opened = open_state(tmp_path / "state", Wanted(disksize=32 << 20))
    assert not opened.recovered
    opened.close()


@pytest.mark.parametrize("left", [None, 0, PAGE_SIZE], ids=["missing", "empty", "hole"])
def test_regions_without_their_superblock_are_refused_and_kept(state: Path, left: int | None) -> None:
    (state / "superblock").unlink()
    if left is not None:
        (state / "superblock").touch()
        os.truncate(state / "superblock", left)
    with pytest.raises(StateError, match="no superblock"):
        open_state(state)
    assert read_word(state / "page_table", 0) != 0


def test_state_in_use_when_the_machine_went_down_is_refused(state: Path) -> None:
    patch_word(state / "superblock", Superblock.BOOT_ID, 77)
    with pytest.raises(StateError, match="the machine went down"):
        open_state(state)


def test_state_that_was_left_in_order_is_good_after_a_restart_of_the_machine(state: Path) -> None:
    opened = open_state(state)
    opened.leave()
    opened.close()
    assert [read_word(state / "superblock", Superblock.BOOT_ID + word) for word in range(2)] == [0, 0]
    opened = open_state(state)
    assert read(opened.device, PAGE_SIZE, PAGE_SIZE) == RAW
    opened.close()


def test_memory_that_cannot_be_given_back_is_used_again(
    opened: OpenDevice, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise RegionError("cannot punch")

    device = opened.device
    data = make_data("random", 1, 2048 * PAGE_SIZE)
    write(device, 0, data)
    monkeypatch.setattr(Region, "punch", refuse)
    with device:
        device.discard(0, 2048 * PAGE_SIZE)
    stat = device.mm_stat()
    assert (stat.orig_data_size, stat.mem_used_total, stat.huge_pages) == (0, 0, 0)
    assert [record.getMessage() for record in caplog.records] == ["memory stays allocated: cannot punch"]
    write(device, 0, data)
    assert read(device, 0, 2048 * PAGE_SIZE) == data


def test_a_full_tmpfs_refuses_writes_and_loses_nothing(small_tmpfs: Path) -> None:
    opened = open_state(small_tmpfs / "state")
    pages = fill(opened)
    assert pages > 400
    assert os.statvfs(small_tmpfs).f_bavail < 16
    # As after a kill -9: nothing is closed in order.
    opened.close()
    opened = open_state(small_tmpfs / "state")
    for page in range(pages):
        assert read(opened.device, page * PAGE_SIZE, PAGE_SIZE) == make_data("random", page, PAGE_SIZE)
    with opened.device:
        opened.device.discard(0, 16 << 20)
    assert fill(opened) == pages
    opened.close()


def fill(opened: OpenDevice) -> int:
    """Write pages until there is no room, and return how many fitted."""
    for page in range(512):
        try:
            write(opened.device, page * PAGE_SIZE, make_data("random", page, PAGE_SIZE))
        except NoSpaceError:
            return page
    pytest.fail("the tmpfs was not filled")


def test_a_start_on_a_full_tmpfs_is_an_error_each_time(small_tmpfs: Path) -> None:
    (small_tmpfs / "state").mkdir(mode=0o700)
    ballast = os.open(small_tmpfs / "ballast", os.O_WRONLY | os.O_CREAT)
    with suppress(OSError):
        while True:
            os.write(ballast, bytes(PAGE_SIZE))
    os.close(ballast)
    for _ in range(2):
        with pytest.raises((NoMemoryError, OSError)):
            open_state(small_tmpfs / "state")
