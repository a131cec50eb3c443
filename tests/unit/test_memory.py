import errno
from pathlib import Path

import pytest

from zramd.layout import PAGE_SIZE, TABLE_CHUNK_SHIFT
from zramd.memory import NoMemoryError, RegionStore, SparseTable, is_memory_backed


def test_a_region_is_sparse_until_populated_and_after_being_punched() -> None:
    region = RegionStore(None).open("sparse", 1 << 40, create=True)
    assert list(region.data_ranges()) == []
    region.populate(8 * PAGE_SIZE, 2 * PAGE_SIZE)
    region.words[8 * PAGE_SIZE // 8] = 5
    assert list(region.data_ranges()) == [(8 * PAGE_SIZE, 10 * PAGE_SIZE)]
    region.punch(8 * PAGE_SIZE, PAGE_SIZE)
    assert list(region.data_ranges()) == [(9 * PAGE_SIZE, 10 * PAGE_SIZE)]
    region.close()


def test_no_room_is_an_error_and_not_a_signal(small_tmpfs: Path) -> None:
    store = RegionStore(small_tmpfs / "state")
    region = store.open("arena", 16 << 20, create=True)
    with pytest.raises(NoMemoryError, match="no memory left"):
        region.populate(0, 16 << 20)
    region.close()
    store.close()


def test_a_table_is_ready_only_where_it_was_made_ready() -> None:
    region = RegionStore(None).open("table", 1 << 30, create=True)
    table = SparseTable(region)
    per_chunk = 1 << TABLE_CHUNK_SHIFT
    table.make_ready(1)
    table.words[per_chunk] = 7
    assert [chunk for chunk, ready in enumerate(table.ready) if ready] == [1]
    again = SparseTable(region)
    assert again.ready == table.ready
    region.close()


def test_regions_are_private_and_stay(tmp_path: Path) -> None:
    store = RegionStore(tmp_path / "state")
    region = store.open("superblock", PAGE_SIZE, create=True)
    region.words[3] = 7
    region.close()
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "state" / "superblock").stat().st_mode & 0o777 == 0o600
    region = store.open("superblock", PAGE_SIZE, create=False)
    assert region.words[3] == 7
    region.close()
    store.close()


def test_one_process_has_the_directory(tmp_path: Path) -> None:
    first = RegionStore(tmp_path / "state")
    with pytest.raises(OSError, match="another zramd") as caught:
        RegionStore(tmp_path / "state")
    assert caught.value.errno == errno.EBUSY
    first.close()
    RegionStore(tmp_path / "state").close()


def test_a_directory_open_to_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir(mode=0o755)
    with pytest.raises(OSError, match="private"):
        RegionStore(tmp_path / "state")


def test_a_region_of_another_size_is_refused(tmp_path: Path) -> None:
    store = RegionStore(tmp_path / "state")
    store.open("arena1", 4 * PAGE_SIZE, create=True).close()
    with pytest.raises(OSError, match="instead of"):
        store.open("arena1", 8 * PAGE_SIZE, create=False)
    store.close()


def test_the_mount_table_tells_memory_from_disk() -> None:
    assert is_memory_backed(Path("/dev/shm"))  # noqa: S108
    assert not is_memory_backed(Path("/proc"))


def test_a_region_stays_out_of_core_dumps() -> None:
    region = RegionStore(None).open("secret", 64 * PAGE_SIZE, create=True)
    smaps = Path("/proc/self/smaps").read_text().split("zramd-secret", 1)[1]
    flags = next(line for line in smaps.splitlines() if line.startswith("VmFlags"))
    assert "dd" in flags.split()
    region.close()
