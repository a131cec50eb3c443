"""The crash rule: at every state that the regions pass through, recovery finds each page wholly old or wholly new.

A trace function looks at the regions after every line that the device runs, as a kill -9 there would leave them, and
each state is then recovered by a device of its own.
"""

import os
import random
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import TYPE_CHECKING

import pytest

import zramd
from tests.property.test_device import make_data, read, recount, write
from zramd.device.algorithms import PRIMARY
from zramd.device.codecs import codec
from zramd.device.opening import CodecInUseError, OpenDevice
from zramd.device.wanted import Wanted
from zramd.layout import PAGE_SIZE
from zramd.memory import Region, RegionStore

if TYPE_CHECKING:
    from _typeshed import TraceFunction

PAGES = 24
SIZE = PAGES * PAGE_SIZE
OPERATIONS = 60
PACKAGE = str(Path(zramd.__file__).parent)


@dataclass(frozen=True)
class State:
    """What the regions held at one moment: (name, size, populated parts) of each."""

    regions: list[tuple[str, int, list[tuple[int, bytes]]]]

    def write_to(self, directory: Path) -> None:
        directory.mkdir(mode=0o700)
        for name, size, parts in self.regions:
            fd = os.open(directory / name, os.O_RDWR | os.O_CREAT, 0o600)
            os.ftruncate(fd, size)
            for offset, data in parts:
                os.pwrite(fd, data, offset)
            os.close(fd)


def snapshot(regions: list[Region]) -> State:
    return State(
        [
            (r.name, r.size, [(start, os.pread(r.fd, end - start, start)) for start, end in r.data_ranges()])
            for r in regions
        ]
    )


def fingerprint(regions: list[Region]) -> int:
    crc = 0
    for region in regions:
        for start, end in region.data_ranges():
            crc = zlib.crc32(region.bytes[start:end], crc ^ start & 0xFFFFFFFF)
    return crc


@contextmanager
def every_state(regions: list[Region]) -> Iterator[list[State]]:
    """Collect each state that the regions are in while the body runs."""
    states: list[State] = []
    last = fingerprint(regions)

    def after_line(_frame: FrameType, _event: str, _argument: object) -> "TraceFunction":
        nonlocal last
        now = fingerprint(regions)
        if now != last:
            last = now
            states.append(snapshot(regions))
        return after_line

    def trace(frame: FrameType, _event: str, _argument: object) -> "TraceFunction | None":
        return after_line if frame.f_code.co_filename.startswith(PACKAGE) else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield states
    finally:
        sys.settrace(before)
    states.append(snapshot(regions))


def check(state: State, old: bytes, new: bytes, generator: random.Random) -> None:
    """Recover a state; every page is old or new, the counters equal a recount, and the device works."""
    with TemporaryDirectory(dir="/dev/shm") as name:
        state.write_to(Path(name) / "state")
        opened = OpenDevice(RegionStore(Path(name) / "state"), Wanted())
        assert opened.recovered
        content = bytearray(read(opened.device, 0, SIZE))
        for start in range(0, SIZE, PAGE_SIZE):
            page = content[start : start + PAGE_SIZE]
            assert page in (old[start : start + PAGE_SIZE], new[start : start + PAGE_SIZE]), (
                f"page {start // PAGE_SIZE}"
            )
        stat = opened.device.mm_stat()
        assert stat == recount(opened.device, stat)
        assert stat.mem_used_max >= stat.mem_used_total
        assert stat.huge_pages_since >= stat.huge_pages
        for seed in range(6):
            start = generator.randrange(PAGES) * PAGE_SIZE
            data = make_data(generator.choice(["half", "random", "text"]), seed, PAGE_SIZE)
            write(opened.device, start, data)
            content[start : start + PAGE_SIZE] = data
        assert read(opened.device, 0, SIZE) == content
        opened.close()


@pytest.mark.parametrize(("algorithm", "chain_size"), [("lz4", 8), ("zstd", 4)])
def test_a_kill_at_any_line_leaves_each_page_old_or_new(algorithm: str, chain_size: int, tmp_path: Path) -> None:
    generator = random.Random(chain_size)
    wanted = Wanted(SIZE, codec(algorithm), chain_size)
    opened = OpenDevice(RegionStore(tmp_path / "state"), wanted)
    regions = opened.regions
    device = opened.device
    expected = bytes(SIZE)
    seen = 0
    for number in range(OPERATIONS):
        offset = generator.randrange(SIZE)
        length = min(generator.randrange(1, 3 * PAGE_SIZE), SIZE - offset)
        if generator.random() < 0.6:
            offset -= offset % PAGE_SIZE
            length = PAGE_SIZE
        kind = generator.choice(["zero", "pattern", "text", "half", "random", "discard", "write zeroes"])
        with every_state(regions) as states:
            if kind == "discard":
                with device:
                    device.discard(offset, length)
            elif kind == "write zeroes":
                with device:
                    device.write_zeroes(offset, length)
            else:
                write(device, offset, make_data(kind, number, length))
        after = read(device, 0, SIZE)
        for state in states:
            check(state, expected, after, generator)
        expected = after
        seen += len(states)
    assert seen > 3 * OPERATIONS
    opened.close()


def test_a_kill_at_any_line_of_a_compaction_loses_nothing(tmp_path: Path) -> None:
    generator = random.Random(5)
    opened = OpenDevice(RegionStore(tmp_path / "state"), Wanted(SIZE, codec("lz4"), 8))
    device = opened.device
    for page in range(PAGES):
        # Of one size class, with several objects in a zspage.
        data = generator.randbytes(1100).ljust(PAGE_SIZE, b"z")
        write(device, page * PAGE_SIZE, bytearray(data))
    with device:
        for page in generator.sample(range(PAGES), PAGES * 2 // 3):
            device.discard(page * PAGE_SIZE, PAGE_SIZE)
    expected = read(device, 0, SIZE)
    with every_state(opened.regions) as states:
        device.compact()
    assert device.mm_stat().pages_compacted > 0
    assert len(states) > 6
    for state in states:
        check(state, expected, expected, generator)
    opened.close()


def test_a_kill_at_any_line_of_a_change_of_algorithm_loses_nothing(tmp_path: Path) -> None:
    generator = random.Random(6)
    dictionaries = [bytes(make_data("text", seed, 8192)) for seed in range(4)]
    opened = OpenDevice(RegionStore(tmp_path / "state"), Wanted(SIZE, codec("zstd", 3, dictionaries[0])))
    for page in range(PAGES):
        write(opened.device, page * PAGE_SIZE, make_data("text", page, PAGE_SIZE))
    expected = read(opened.device, 0, SIZE)
    # The second has pages of its own; the third gives its place up for the fourth.
    for number, dictionary in enumerate([*dictionaries[1:], b""]):
        with every_state(opened.regions) as states:
            opened.set_algorithm(PRIMARY, codec("zstd", 3, dictionary))
        assert len(states) > 2
        for state in states:
            check(state, expected, expected, generator)
        if number == 0:
            write(opened.device, 0, bytearray(expected[:PAGE_SIZE]))
            with opened.device:
                opened.device.discard(PAGE_SIZE, SIZE - PAGE_SIZE)
            expected = expected[:PAGE_SIZE] + bytes(SIZE - PAGE_SIZE)
    # Back to one that has pages, at another level.
    write(opened.device, 0, bytearray(expected[:PAGE_SIZE]))
    opened.set_algorithm(PRIMARY, codec("lz4"))
    write(opened.device, PAGE_SIZE, bytearray(expected[:PAGE_SIZE]))
    expected = expected[:PAGE_SIZE] * 2 + expected[2 * PAGE_SIZE :]
    with every_state(opened.regions) as states:
        opened.set_algorithm(PRIMARY, codec("zstd", 9))
    for state in states:
        check(state, expected, expected, generator)
    assert opened.device.codec_pages(opened.device.identity.algorithms.number(PRIMARY)) == 1
    opened.close()


def test_an_algorithm_that_gets_its_first_page_while_another_is_to_take_its_place_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = (codec("zstd", 3, bytes(make_data("text", seed, 8192))) for seed in range(3))
    opened = OpenDevice(RegionStore(tmp_path / "state"), Wanted(SIZE, first))
    data = make_data("text", 9, PAGE_SIZE)
    write(opened.device, 0, data)
    opened.set_algorithm(PRIMARY, second)
    make = OpenDevice._new_dictionary

    def make_late(self: OpenDevice, dictionary: bytes) -> Region:
        write(self.device, PAGE_SIZE, data)
        return make(self, dictionary)

    monkeypatch.setattr(OpenDevice, "_new_dictionary", make_late)
    with pytest.raises(CodecInUseError):
        opened.set_algorithm(PRIMARY, third)
    assert read(opened.device, 0, 2 * PAGE_SIZE) == data * 2
    opened.close()
    opened = OpenDevice(RegionStore(tmp_path / "state"), Wanted())
    assert read(opened.device, 0, 2 * PAGE_SIZE) == data * 2
    opened.close()
