"""Checksums: whatever is changed in a stored page, reading it is an error, and no other page is."""

import random
from collections.abc import Iterator

import pytest

from tests.property.test_device import make_data, read, write
from zramd.device.codecs import codec
from zramd.device.fetching import PageError
from zramd.device.opening import OpenDevice
from zramd.device.recompression import Recompression, Recompressor
from zramd.device.superblock import StateError, load_identity
from zramd.device.wanted import Wanted
from zramd.layout import ENTRY_HANDLE_MASK, PAGE_SIZE, Superblock
from zramd.memory import RegionStore

PAGES = 8
KINDS = ["text", "half", "random", "zero"]


@pytest.fixture(params=["lz4", "zstd"])
def opened(request: pytest.FixtureRequest) -> Iterator[OpenDevice]:
    wanted = Wanted(1 << 20, codec(request.param), secondary={1: codec("zstd", 19)}, integrity=True)
    opened = OpenDevice(RegionStore(None), wanted)
    for page in range(PAGES):
        write(opened.device, page * PAGE_SIZE, make_data(KINDS[page % 4], page, PAGE_SIZE))
    yield opened
    opened.close()


def entry_of(opened: OpenDevice, page: int) -> int:
    with opened.device as _:
        return opened.device.entry(page)


def flip_a_bit(opened: OpenDevice, page: int, generator: random.Random) -> None:
    entry = entry_of(opened, page)
    data = opened.device.pool.map(entry & ENTRY_HANDLE_MASK, entry >> 40 & 0x1FFF)
    data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)


@pytest.mark.parametrize("page", [0, 1, 2])
@pytest.mark.parametrize("seed", range(20))
def test_any_bit_that_flips_is_an_error_of_that_page_alone(opened: OpenDevice, page: int, seed: int) -> None:
    before = read(opened.device, 0, PAGES * PAGE_SIZE)
    flip_a_bit(opened, page, random.Random(seed))
    with pytest.raises(PageError, match=f"page {page} is damaged"):
        read(opened.device, 0, PAGES * PAGE_SIZE)
    assert opened.device.io_stat().failed_reads == 1
    for other in set(range(PAGES)) - {page}:
        start = other * PAGE_SIZE
        assert read(opened.device, start, PAGE_SIZE) == before[start : start + PAGE_SIZE]
    start = page * PAGE_SIZE
    write(opened.device, start, bytearray(before[start : start + PAGE_SIZE]))
    assert read(opened.device, 0, PAGES * PAGE_SIZE) == before


def test_a_damaged_page_is_not_recompressed_into_a_right_one(opened: OpenDevice) -> None:
    flip_a_bit(opened, 2, random.Random(1))
    with pytest.raises(PageError, match="page 2 is damaged: its checksum is wrong"):
        Recompressor(opened.device, Recompression(huge=True)).run()
    with pytest.raises(PageError):
        read(opened.device, 2 * PAGE_SIZE, PAGE_SIZE)


def test_checksums_follow_compaction_recompression_and_many_handles(opened: OpenDevice) -> None:
    device = opened.device
    expected: dict[int, bytes] = {}
    for number in range(200):
        page = number % 100 + PAGES
        data = make_data(KINDS[number % 3], number, PAGE_SIZE)
        write(device, page * PAGE_SIZE, data)
        expected[page] = bytes(data)
    with device:
        device.discard(0, PAGES * PAGE_SIZE)
    device.compact()
    Recompressor(device, Recompression()).run()
    for page, content in expected.items():
        assert read(device, page * PAGE_SIZE, PAGE_SIZE) == content


def test_features_of_a_later_version_are_refused(opened: OpenDevice) -> None:
    words = opened.regions[0].words
    words[Superblock.FEATURES] |= 1 << 40
    with pytest.raises(StateError, match="features"):
        load_identity(words, lambda *_: b"")
