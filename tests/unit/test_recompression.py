"""Recompression: which pages it takes, what it makes of them, and how it is asked for (Linux 6.18's rules)."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.property.test_device import DICTIONARY, make_data, read, recount, write
from zramd.device.algorithms import codec_number
from zramd.device.codecs import codec
from zramd.device.disk import Disk
from zramd.device.idle import mark_idle
from zramd.device.opening import OpenDevice
from zramd.device.recompression import Recompression, Recompressor
from zramd.device.slices import in_slices
from zramd.device.wanted import Wanted
from zramd.device.zram import Device
from zramd.layout import ENTRY_IDLE, ENTRY_INCOMPRESSIBLE, ENTRY_SIZE_MASK, ENTRY_SIZE_SHIFT, PAGE_SIZE
from zramd.memory import RegionStore
from zramd.status import attributes, control
from zramd.status.attributes import AttributeRefusedError, Served

PAGES = 64
KINDS = ["text", "half", "random", "zero"]


@pytest.fixture
def opened() -> Iterator[OpenDevice]:
    wanted = Wanted(1 << 20, codec("lz4"), secondary={1: codec("zstd", 3), 2: codec("zstd", 19)})
    opened = OpenDevice(RegionStore(None), wanted)
    for page in range(PAGES):
        write(opened.device, page * PAGE_SIZE, make_data(KINDS[page % 4], page, PAGE_SIZE))
    yield opened
    opened.close()


def entries(device: Device) -> dict[int, int]:
    with device:
        return dict(device.entries())


def test_pages_become_smaller_and_stay_what_they_are(opened: OpenDevice) -> None:
    device = opened.device
    before, contents = device.mm_stat(), read(device, 0, 1 << 20)
    outcome = Recompressor(device, Recompression()).run()
    after = device.mm_stat()
    assert read(device, 0, 1 << 20) == contents
    assert after == recount(device, after)
    assert outcome.tried == outcome.candidates == 48
    assert outcome.recompressed >= 16
    assert after.compr_data_size < before.compr_data_size * 0.95
    assert after.mem_used_total <= before.mem_used_total
    # All of the text, by the first codec that made progress.
    assert {codec_number(entry) for page, entry in entries(device).items() if page % 4 == 0} == {1}
    # Nothing made progress with noise, and the highest codec was tried: it is not tried again.
    assert all(entry & ENTRY_INCOMPRESSIBLE for page, entry in entries(device).items() if page % 4 == 2)
    assert Recompressor(device, Recompression()).run().candidates < outcome.candidates


def test_a_page_that_is_written_anew_can_be_recompressed_again(opened: OpenDevice) -> None:
    device = opened.device
    Recompressor(device, Recompression(huge=True)).run()
    assert entries(device)[2] & ENTRY_INCOMPRESSIBLE
    write(device, 2 * PAGE_SIZE, make_data("text", 1, PAGE_SIZE))
    assert not entries(device)[2] & ENTRY_INCOMPRESSIBLE
    assert codec_number(entries(device)[2]) == 0


def test_idle_pages_are_those_that_nobody_has_touched(opened: OpenDevice) -> None:
    device = opened.device
    in_slices(device, mark_idle(device, None))
    idle = {page for page, entry in entries(device).items() if entry & ENTRY_IDLE}
    assert idle == {page for page in range(PAGES) if page % 4 != 3}
    read(device, 0, PAGE_SIZE)
    write(device, PAGE_SIZE, make_data("half", 7, PAGE_SIZE))
    outcome = Recompressor(device, Recompression(idle=True)).run()
    assert outcome.candidates == len(idle) - 2
    assert codec_number(entries(device)[0]) == codec_number(entries(device)[1]) == 0
    # An attempt is a touch.
    assert not any(entry & ENTRY_IDLE for entry in entries(device).values())


def test_age_marks_what_was_not_touched_since_and_unmarks_the_rest(opened: OpenDevice) -> None:
    device = opened.device
    with device:
        now = device.access_times(0, PAGES)
        for page in range(0, PAGES, 8):
            device._times[page] = now[page] - 100
    in_slices(device, mark_idle(device, None))
    in_slices(device, mark_idle(device, max(now) - 50))
    assert {page for page, entry in entries(device).items() if entry & ENTRY_IDLE} == set(range(0, PAGES, 8))


def test_only_huge_pages(opened: OpenDevice) -> None:
    device = opened.device
    huge = device.mm_stat().huge_pages
    assert huge == 16
    outcome = Recompressor(device, Recompression(huge=True)).run()
    assert outcome.candidates == huge


@pytest.mark.parametrize("threshold", [500, 2000])
def test_the_threshold_is_for_the_object_before_and_after(opened: OpenDevice, threshold: int) -> None:
    device = opened.device
    before = entries(device)
    outcome = Recompressor(device, Recompression(threshold=threshold)).run()
    changed = {page for page, entry in entries(device).items() if codec_number(entry) != codec_number(before[page])}
    assert len(changed) == outcome.recompressed
    for page in changed:
        assert before[page] >> 40 & 0x1FFF >= threshold > entries(device)[page] >> 40 & 0x1FFF


def test_the_largest_come_first_and_attempts_are_counted(opened: OpenDevice) -> None:
    device = opened.device
    outcome = Recompressor(device, Recompression(max_pages=3)).run()
    assert outcome.tried == 3
    tried = {page for page, entry in entries(device).items() if entry & ENTRY_INCOMPRESSIBLE}
    # The huge ones, the last of them first.
    assert tried == {62, 58, 54}
    assert Recompressor(device, Recompression(max_pages=0)).run().tried == 0


def test_one_codec_may_be_chosen(opened: OpenDevice) -> None:
    device = opened.device
    Recompressor(device, Recompression(priority=2)).run()
    assert {codec_number(entry) for page, entry in entries(device).items() if page % 4 == 0} == {2}


def test_cancelled_it_stops_and_leaves_all_pages_whole(opened: OpenDevice) -> None:
    device = opened.device
    contents = read(device, 0, 1 << 20)
    work = Recompressor(device, Recompression())
    work.work.cancelled = True
    assert work.run().tried == 0
    assert read(device, 0, 1 << 20) == contents
    # As when the disk grows meanwhile.
    device.retired = True
    assert Recompressor(device, Recompression()).run().cancelled
    device.retired = False


def test_a_codec_that_changes_under_a_recompression_is_not_given_the_pages_of_the_one_before(
    opened: OpenDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = opened.device
    contents = read(device, 0, 1 << 20)
    Recompressor(device, Recompression(max_pages=40, priority=1)).run()
    assert device.codec_pages(1)
    opened.set_algorithm(1, codec("zstd", 9, DICTIONARY))
    work = Recompressor(device, Recompression(priority=1))
    # The number 5 has no page yet, while 1 has: the next codec gets it, in the middle of a batch of text.
    monkeypatch.setattr("zramd.device.recompression.pause", lambda: None)
    taken = work._take
    changes = iter([codec("lz4hc", 9)])

    def take(batch: list[int]) -> list[tuple[int, int, bytes]]:
        found = taken(batch)
        if any(page % 4 == 0 for page, _, _ in found):
            for chosen in changes:
                opened.set_algorithm(1, chosen)
        return found

    monkeypatch.setattr(work, "_take", take)
    work.run()
    assert device.identity.algorithms.number(1) == 5
    assert read(device, 0, 1 << 20) == contents


class Words:
    """A disk and its control words."""

    def __init__(self) -> None:
        self.disk = Disk("zram0", None)
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


def test_secondary_algorithms_are_chosen_by_priority(words: Words) -> None:
    assert words.read("recomp_algorithm") == ""
    words.set("recomp_algorithm", "algo=zstd")
    words.set("recomp_algorithm", "algo=lz4hc priority=3")
    assert words.read("recomp_algorithm") == "#1: lz4 lz4hc [zstd] \n#3: lz4 [lz4hc] zstd \n"
    for value in ("zstd", "priority=1", "algo=zstd priority=0", "algo=zstd priority=4", "algo=nothing", "algo="):
        words.refuses("recomp_algorithm", value, "EINVAL")
    words.set("algorithm_params", "algo=zstd level=12")
    words.set("algorithm_params", "priority=3 level=4")
    words.refuses("algorithm_params", "algo=zstd priority=3 level=4", "EINVAL")
    words.refuses("algorithm_params", "priority=2 level=4", "EINVAL")
    words.set("disksize", "1M")
    device = words.disk.require_opened().device
    assert {priority: made.level for priority, made in device.identity.algorithms.secondary.items()} == {1: 12, 3: 4}


def test_what_recompress_and_idle_refuse(words: Words) -> None:
    for name, value in (("idle", "all"), ("idle", "1"), ("recompress", "type=idle")):
        words.refuses(name, value, "EINVAL")
    words.set("disksize", "1M")
    words.refuses("recompress", "type=huge", "EINVAL")  # with what?
    words.set("recomp_algorithm", "algo=zstd")
    for value in (
        "type=",
        "type=cold",
        "threshold=4096",
        "threshold=x",
        "algo=lz4hc",
        "priority=2",
        "max_pages=-",
        "max_pages=-1",
        "max_pages=0x10",
    ):
        words.refuses("recompress", value, "EINVAL")
    for value in ("all of it", "x", "-1", "1_0", "0b1", ""):
        words.refuses("idle", value, "EINVAL")
    for value in ("all", "0", "010", "0x10"):
        words.set("idle", value)
    for value in (
        "type=idle",
        "type=huge_idle threshold=100 max_pages=5",
        "priority=0",
        "algo=zstd",
        "max_pages=010",
        "future=1 type=huge",
    ):
        words.set("recompress", value)
    # The priority is where the kernel begins to look for the name.
    words.refuses("recompress", "algo=zstd priority=2", "EINVAL")
    words.set("recomp_algorithm", "algo=zstd priority=3")
    assert control.parse_recompression(words.disk, "priority=2 algo=zstd").priority == 3


def test_the_algorithm_changes_under_pages_that_keep_theirs(words: Words) -> None:
    words.set("disksize", "1M")
    device = words.disk.require_opened().device
    contents = b"".join(bytes(make_data("text", page, PAGE_SIZE)) for page in range(8))
    stream = device.stream(bytearray(contents))
    prepared = stream.prepare(0, len(contents), 0)
    words.set("comp_algorithm", "zstd")
    words.set("algorithm_params", "level=9")
    assert words.read("comp_algorithm") == "lz4 lz4hc [zstd] \n"
    # What was compressed before the change is stored after it.
    with device:
        device.write(stream, 0, len(contents), 0, prepared)
    made = device.identity.algorithms.primary
    assert (made.name, made.level) == ("zstd", 9)
    assert read(device, 0, len(contents)) == contents
    words.set("comp_algorithm", "lz4")
    write(device, 0, bytearray(contents[:PAGE_SIZE]))
    assert len({codec_number(entry) for entry in entries(device).values()}) == 2
    words.refuses("comp_algorithm", "lz4hc", "EBUSY")
    assert read(device, 0, len(contents)) == contents
    # One that pages have already, and any level of it, needs no room of its own.
    words.set("comp_algorithm", "zstd")
    words.set("algorithm_params", "level=-5")
    write(device, PAGE_SIZE, bytearray(contents[PAGE_SIZE : 2 * PAGE_SIZE]))
    assert (
        device.identity.algorithms.primary.level,
        len({codec_number(entry) for entry in entries(device).values()}),
    ) == (-5, 2)
    words.set("comp_algorithm", "lz4")
    assert read(device, 0, len(contents)) == contents


def test_an_object_that_takes_a_whole_page_only_for_its_header_is_found_again(tmp_path: Path) -> None:
    wanted = Wanted(1 << 20, codec("lz4"), chain_size=4, secondary={1: codec("zstd", 3)})
    opened = OpenDevice(RegionStore(tmp_path / "state"), wanted)
    limit = opened.device.pool.geometry.huge_limit
    for page in range(PAGES):
        # lz4 makes too little of them, and zstd just enough for a smaller class of some of them but for the header.
        data = make_data("random", page, limit - 40 + page)
        write(opened.device, page * PAGE_SIZE, data.ljust(PAGE_SIZE, b"z"))
    Recompressor(opened.device, Recompression()).run()
    found = entries(opened.device).values()
    sizes = {entry >> ENTRY_SIZE_SHIFT & ENTRY_SIZE_MASK for entry in found if codec_number(entry)}
    assert any(limit <= size < PAGE_SIZE for size in sizes)
    opened.device.reset_mem_used_max()
    before, contents = opened.device.mm_stat(), read(opened.device, 0, 1 << 20)
    opened.close()
    opened = OpenDevice(RegionStore(tmp_path / "state"), Wanted())
    assert read(opened.device, 0, 1 << 20) == contents
    assert opened.device.mm_stat() == before
    opened.close()
