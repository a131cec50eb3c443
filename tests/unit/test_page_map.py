import random
from collections import Counter
from collections.abc import Iterator

import pytest

from zramd.device import page_map
from zramd.device.codecs import codec
from zramd.device.opening import OpenDevice
from zramd.device.page_map import MOST_CELLS, PageKind, PageMap, map_pages
from zramd.device.wanted import Wanted
from zramd.device.zram import Device
from zramd.layout import (
    ENTRY_IDLE,
    ENTRY_INCOMPRESSIBLE,
    ENTRY_SIZE_SHIFT,
    ENTRY_STATE_SHIFT,
    PAGE_SHIFT,
    TABLE_CHUNK_SHIFT,
    PageState,
)
from zramd.memory import RegionStore

CHUNK = 1 << TABLE_CHUNK_SHIFT
KINDS = {
    PageKind.SAME_FILLED: PageState.SAME_FILLED << ENTRY_STATE_SHIFT | 1,
    PageKind.COMPRESSED: PageState.COMPRESSED << ENTRY_STATE_SHIFT | 1700 << ENTRY_SIZE_SHIFT | 0xFFFFFFFFFF,
    PageKind.HUGE: PageState.HUGE << ENTRY_STATE_SHIFT | 4096 << ENTRY_SIZE_SHIFT | ENTRY_INCOMPRESSIBLE,
    PageKind.WRITTEN_BACK: PageState.WRITTEN_BACK << ENTRY_STATE_SHIFT | 3 << 56 | 77,
    PageKind.COMPRESSED_IDLE: PageState.COMPRESSED << ENTRY_STATE_SHIFT | ENTRY_IDLE,
    PageKind.HUGE_IDLE: PageState.HUGE << ENTRY_STATE_SHIFT | ENTRY_IDLE | 4096 << ENTRY_SIZE_SHIFT,
}


@pytest.fixture
def device() -> Iterator[Device]:
    """Return a device of 1 GiB and 5 pages: a table with a last chunk that is not whole."""
    opened = OpenDevice(RegionStore(None), Wanted(disksize=(1 << 30) + (5 << PAGE_SHIFT), codec=codec("lz4")))
    yield opened.device
    opened.device._table.words[:] = memoryview(bytes(len(opened.device._table.words) * 8)).cast("Q")
    opened.close()


def fill(device: Device, first: int, kinds: list[PageKind]) -> None:
    for index, kind in enumerate(kinds, first):
        if kind:
            device._table.make_ready(index >> TABLE_CHUNK_SHIFT)
            device._table.words[index] = KINDS[kind]


def counted(found: PageMap | None) -> list[Counter[PageKind]]:
    assert found is not None
    assert all(len(column) == len(found) for column in found.counts.values())
    return [Counter({kind: found.counts[kind][cell] for kind in PageKind}) for cell in range(len(found))]


def test_each_cell_has_as_many_pages_of_each_kind_as_its_part_of_the_device(device: Device) -> None:
    pages = device.disksize >> PAGE_SHIFT
    model = [PageKind.EMPTY] * pages
    generator = random.Random(8)
    for first, count in ((0, 3), (100, 1500), (70_000, 5000), (pages - 4, 4)):
        kinds = generator.choices(list(PageKind), k=count)
        model[first : first + count] = kinds
        fill(device, first, kinds)
    found = map_pages(device)
    assert found is not None
    assert (found.pages, found.cell_pages, len(found)) == (pages, 256, 1025)
    assert found.looked_at == found.in_use == sum(device.ready_chunks()) * CHUNK
    for cells in (MOST_CELLS, 1024, 100, 2, 1):
        coarser = found.coarser(cells)
        assert max(1, cells // 2) <= len(coarser) <= cells
        assert counted(coarser) == [
            Counter(model[first : first + coarser.cell_pages]) for first in range(0, pages, coarser.cell_pages)
        ]


def test_of_a_large_device_as_much_is_looked_at_and_the_counts_of_a_cell_still_add_up(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_map, "MOST_CELLS", 8)
    monkeypatch.setattr(page_map, "MOST_CHUNKS", 24)
    for chunk in range(200):
        kind = PageKind.HUGE if chunk < 128 else PageKind.COMPRESSED_IDLE
        fill(device, chunk * CHUNK, [kind] * (CHUNK // 2))
    found = map_pages(device)
    assert found is not None
    assert (found.cell_pages, len(found)) == (1 << 16, 5)
    assert (found.in_use, found.looked_at) == (200 * CHUNK, 8 * CHUNK)
    assert [(cell[PageKind.HUGE], cell[PageKind.COMPRESSED_IDLE]) for cell in counted(found)] == [
        (1 << 15, 0),
        (0, 72 * CHUNK // 2),
        (0, 0),
        (0, 0),
        (0, 0),
    ]
    assert [cell.total() for cell in counted(found)] == [1 << 16] * 4 + [5]
