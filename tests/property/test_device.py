"""The device against a plain bytearray, and its counters against a recount from the regions."""

import os
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch
from uuid import UUID

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from zramd.backing.objects import units_of
from zramd.backing.store import SEGMENT
from zramd.device.algorithms import codec_number
from zramd.device.cleaning import clean, reclaim
from zramd.device.codecs import codec
from zramd.device.counters import BdStat, IoStat, MmStat, RequestStat, WritebackSettings
from zramd.device.disk import Disk
from zramd.device.fetching import Fetched, NotInMemoryError
from zramd.device.idle import mark_idle
from zramd.device.opening import CodecInUseError, OpenDevice
from zramd.device.pages import NoSpaceError
from zramd.device.recompression import Recompression, Recompressor
from zramd.device.slices import in_slices
from zramd.device.state import uptime
from zramd.device.survey import Survey, take_survey
from zramd.device.training import Training, train
from zramd.device.wanted import Wanted
from zramd.device.work import Work, WorkKind
from zramd.device.writeback import LimitError, Selection, Writeback, WritebackType
from zramd.device.zram import Device
from zramd.layout import (
    CODECS,
    ENTRY_HANDLE_MASK,
    ENTRY_IDLE,
    ENTRY_INCOMPRESSIBLE,
    ENTRY_SIZE_MASK,
    ENTRY_SIZE_SHIFT,
    ENTRY_STATE_MASK,
    ENTRY_STATE_SHIFT,
    PAGE_SIZE,
    PRIORITIES,
    DeviceRecord,
    PageState,
)
from zramd.memory import RegionStore
from zramd.policy.loop import Policy
from zramd.policy.rules import Mode, Rules, Watermark

PAGES = 96
SIZE = PAGES * PAGE_SIZE
SEGMENTS = 4
"""Of the backing store: as few as can hold the disk."""

offsets = st.integers(0, SIZE - 1)
lengths = st.one_of(st.integers(0, 3 * PAGE_SIZE), st.integers(0, 24).map(lambda pages: pages * PAGE_SIZE))
contents = st.sampled_from(["zero", "pattern", "short pattern", "text", "half", "random"])


def make_data(kind: str, seed: int, length: int) -> bytearray:
    generator = random.Random(seed)
    if kind == "zero":
        return bytearray(length)
    if kind == "pattern":
        return bytearray(generator.randbytes(8) * (length // 8 + 1))[:length]
    if kind == "short pattern":
        return bytearray(generator.randbytes(16) * (length // 16 + 1))[:length]
    if kind == "text":
        words = [b"page", b"slot", b"handle", b"zspage", b"class", b"huge"]
        # Each is at least 5 bytes with its blank.
        return bytearray(b" ".join(generator.choice(words) for _ in range(length // 5 + 1)))[:length]
    if kind == "half":
        return bytearray(b"".join(generator.randbytes(2048) + bytes(2048) for _ in range(length // PAGE_SIZE + 1)))[
            :length
        ]
    return bytearray(generator.randbytes(length))


Action = Callable[[dict[int, Fetched]], None]


def fetching(device: Device, action: Action) -> None:
    """Carry out what may need pages of the backing store, as a connection does."""
    fetched: dict[int, Fetched] = {}
    while True:
        try:
            with device:
                action(fetched)
            return
        except NotInMemoryError as error:
            fetched.update(device.fetch(error.pages))


def write(device: Device, offset: int, data: bytearray) -> None:
    stream = device.stream(data)
    prepared = stream.prepare(0, len(data), offset)
    fetching(device, lambda fetched: device.write(stream, 0, len(data), offset, prepared, fetched))


def read(device: Device, offset: int, length: int) -> bytes:
    out: list[bytes | memoryview] = []
    fetching(device, lambda fetched: device.read(offset, length, out, fetched))
    return b"".join(out)


def recount(device: Device, before: MmStat) -> MmStat:
    """Count everything anew from the page table and the pool's zspages; lifetime counters are taken over."""
    stored = compressed = same = huge = backed = units = 0
    with device.lock:
        for _, entry in device.entries():
            state = entry >> ENTRY_STATE_SHIFT & ENTRY_STATE_MASK
            stored += 1
            same += state == PageState.SAME_FILLED
            if state == PageState.WRITTEN_BACK:
                backed += 1
                units += units_of(entry >> ENTRY_SIZE_SHIFT & ENTRY_SIZE_MASK)
            huge += state == PageState.HUGE
            if state in (PageState.COMPRESSED, PageState.HUGE):
                length = entry >> ENTRY_SIZE_SHIFT & ENTRY_SIZE_MASK
                compressed += length
                assert len(device.pool.map(entry & ENTRY_HANDLE_MASK, length)) == length
        pages = sum(arena.pages for arena in device.pool.arenas for owner in arena.size_class if owner)
        assert sum(sum(arena.used) for arena in device.pool.arenas) == stored - same - backed
        assert device.record[DeviceRecord.BACKED_PAGES] == backed
        if device.backing:
            assert device.backing.records[0] == sum(device.backing.records[2::2]) == units
    return MmStat(
        orig_data_size=stored * PAGE_SIZE,
        compr_data_size=compressed,
        mem_used_total=pages * PAGE_SIZE,
        mem_limit=before.mem_limit,
        mem_used_max=before.mem_used_max,
        same_pages=same,
        pages_compacted=before.pages_compacted,
        huge_pages=huge,
        huge_pages_since=before.huge_pages_since,
    )


DICTIONARY = bytes(make_data("text", 99, 4096))
EVERYTHING = [Selection(WritebackType.ANY, 0, PAGES - 1)]
CUT_SHORT = [
    WorkKind.COMPACT,
    WorkKind.RECOMPRESS,
    WorkKind.WRITEBACK,
    WorkKind.IDLE,
    WorkKind.SURVEY,
    WorkKind.TRAIN,
]
POLICIES = [
    Rules(Mode.ON, idle_after=0, recompression=Recompression(idle=True)),
    Rules(Mode.ON, idle_after=600, recompression=Recompression(huge=True)),
    # Memory is short from the first byte on, so what is idle goes at once.
    Rules(Mode.ON, idle_after=0, writeback_after=600, high=Watermark(size=1), write_budget=1 << 60),
    Rules(Mode.DRY_RUN, idle_after=0, writeback_after=600, high=Watermark(size=1), write_budget=1 << 60),
]


class CancelledWork(Work):
    """Work that is cancelled once it has been asked so many times whether it is."""

    def __init__(self, kind: WorkKind, looks: int) -> None:
        self._looks = looks
        super().__init__(kind)

    @property
    def cancelled(self) -> bool:
        self._looks -= 1
        return self._looks < 0

    @cancelled.setter
    def cancelled(self, value: bool) -> None:
        assert not value


class DeviceMachine(RuleBasedStateMachine):
    algorithm = "lz4"
    segments = SEGMENTS

    def __init__(self) -> None:
        super().__init__()
        self.directory = TemporaryDirectory(dir="/dev/shm")
        self.medium = Path(self.directory.name) / "medium"
        self.medium.touch()
        os.truncate(self.medium, self.segments * SEGMENT)
        self.expected = bytearray(SIZE)
        self.notify_free = 0
        self.peak = 0
        self.recompressed = False
        self.opened = self._open()
        self.limited = False

    @property
    def device(self) -> Device:
        return self.opened.device

    def _open(self) -> OpenDevice:
        made = codec(self.algorithm)
        wanted = Wanted(disksize=SIZE, codec=made, integrity=self.algorithm == "zstd", backing=self.medium)
        return OpenDevice(RegionStore(Path(self.directory.name) / "state"), wanted)

    @initialize(kind=contents, seed=st.integers(0, 5))
    def fill(self, kind: str, seed: int) -> None:
        data = make_data(kind, seed, SIZE // 2)
        write(self.device, 0, data)
        self.expected[: SIZE // 2] = data

    @precondition(lambda self: not self.limited)
    @rule(offset=offsets, length=lengths, kind=contents, seed=st.integers(0, 1000), aligned=st.booleans())
    def write(self, offset: int, length: int, kind: str, seed: int, aligned: bool) -> None:
        if aligned:
            offset -= offset % PAGE_SIZE
        data = make_data(kind, seed, min(length, SIZE - offset))
        write(self.device, offset, data)
        self.expected[offset : offset + len(data)] = data

    @rule(offset=offsets, length=lengths)
    def discard(self, offset: int, length: int) -> None:
        length = min(length, SIZE - offset)
        with self.device:
            self.device.discard(offset, length)
        first, end = -(-offset // PAGE_SIZE), (offset + length) // PAGE_SIZE
        if end > first:
            self.expected[first * PAGE_SIZE : end * PAGE_SIZE] = bytes((end - first) * PAGE_SIZE)
            self.notify_free += end - first

    @precondition(lambda self: not self.limited)
    @rule(offset=offsets, length=lengths)
    def write_zeroes(self, offset: int, length: int) -> None:
        length = min(length, SIZE - offset)
        fetching(self.device, lambda fetched: self.device.write_zeroes(offset, length, fetched=fetched))
        self.expected[offset : offset + length] = bytes(length)
        self.notify_free += max(0, (offset + length) // PAGE_SIZE - -(-offset // PAGE_SIZE))

    @rule(offset=offsets, length=lengths)
    def read(self, offset: int, length: int) -> None:
        length = min(length, SIZE - offset)
        assert read(self.device, offset, length) == self.expected[offset : offset + length]

    @rule(pages=st.integers(0, PAGES), seed=st.integers(0, 100), first=st.integers(0, PAGES - 1))
    def write_at_the_limit(self, pages: int, seed: int, first: int) -> None:
        """With a limit, a write stops at the first page that does not fit; the pages before it are written."""
        used = self.device.mm_stat().mem_used_total
        self.device.set_mem_limit(used + 3 * PAGE_SIZE)
        failed = self.device.io_stat().failed_writes
        data = make_data("random", seed, min(pages, PAGES - first) * PAGE_SIZE)
        try:
            write(self.device, first * PAGE_SIZE, data)
        except NoSpaceError:
            failed += 1
        assert self.device.io_stat().failed_writes == failed
        for page in range(len(data) // PAGE_SIZE):
            start = (first + page) * PAGE_SIZE
            written = data[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
            if read(self.device, start, PAGE_SIZE) != written:
                break
            self.expected[start : start + PAGE_SIZE] = written
        assert self.device.mm_stat().mem_used_total <= used + 3 * PAGE_SIZE
        self.device.set_mem_limit(0)

    @rule()
    def compact(self) -> None:
        before = self.device.mm_stat()
        self.device.compact()
        after = self.device.mm_stat()
        freed = after.pages_compacted - before.pages_compacted
        assert after == replace(
            before, mem_used_total=before.mem_used_total - freed * PAGE_SIZE, pages_compacted=after.pages_compacted
        )

    @rule(
        priority=st.integers(0, 3),
        made=st.sampled_from([("lz4", 1), ("lz4", 8), ("lz4hc", 9), ("zstd", 1), ("zstd", 9)]),
        dictionary=st.booleans(),
    )
    def choose_algorithm(self, priority: int, made: tuple[str, int], dictionary: bool) -> None:
        algorithms = self.device.identity.algorithms
        before = algorithms.at(priority)
        try:
            self.opened.set_algorithm(priority, codec(*made, DICTIONARY if dictionary else b""))
        except CodecInUseError:
            assert algorithms.at(priority) is before
            assert all(self.device.codec_pages(number) for number in (priority, priority + 4))
            kept = [algorithms.codecs[number] for number in (priority, priority + 4)]
            assert (made[0], DICTIONARY if dictionary else b"") not in [found.format for found in kept if found]
        else:
            chosen = algorithms.at(priority)
            assert chosen is not None
            assert (chosen.name, chosen.level) == made

    @rule(idle=st.booleans(), huge=st.booleans(), threshold=st.sampled_from([0, 1000, 3000]), pages=st.integers(0, 200))
    def recompress(self, idle: bool, huge: bool, threshold: int, pages: int) -> None:
        if not self.device.identity.algorithms.secondary:
            return
        before = self.device.mm_stat()
        self.recompressed = True
        outcome = Recompressor(self.device, Recompression(idle, huge, threshold, pages)).run()
        after = self.device.mm_stat()
        assert outcome.recompressed <= outcome.tried <= min(pages, outcome.candidates)
        assert before.compr_data_size - after.compr_data_size == outcome.bytes_before - outcome.bytes_after
        assert after.orig_data_size == before.orig_data_size
        assert (after.huge_pages_since, after.mem_used_max) == (before.huge_pages_since, before.mem_used_max)
        assert after.huge_pages <= before.huge_pages

    @rule(kind=st.sampled_from(WritebackType), first=st.integers(0, PAGES - 1), pages=st.integers(1, PAGES))
    def write_back(self, kind: WritebackType, first: int, pages: int) -> None:
        device = self.device
        assert device.backing is not None
        before = device.mm_stat(), device.bd_stat()
        selection = Selection(kind, first, min(first + pages, PAGES) - 1)
        outcome = Writeback(device, device.backing, [selection]).run()
        assert outcome.written == outcome.candidates == device.bd_stat().pages - before[1].pages
        after = device.mm_stat()
        assert after.compr_data_size == before[0].compr_data_size - outcome.bytes_written
        assert after.orig_data_size == before[0].orig_data_size
        with device:
            assert not any(kind.matches(device.entry(page)) for page in range(first, selection.last + 1))

    @rule(limit=st.integers(0, PAGES))
    def write_back_up_to_a_limit(self, limit: int) -> None:
        device = self.device
        assert device.backing is not None
        with device:
            device.writeback = WritebackSettings(limit, limited=True)
        work = Writeback(device, device.backing, EVERYTHING)
        try:
            work.run()
        except LimitError:
            assert work.outcome.written == limit < work.outcome.candidates
        else:
            assert work.outcome.written == work.outcome.candidates <= limit
        with device:
            assert device.writeback.limit == limit - work.outcome.written
            device.writeback = WritebackSettings()

    @rule(kind=st.sampled_from(CUT_SHORT), looks=st.integers(0, 8))
    def cut_work_short(self, kind: WorkKind, looks: int) -> None:
        """Cancel work once it has looked so many times whether it is; pages keep what they hold, wherever they are."""
        device, work = self.device, CancelledWork(kind, looks)
        assert device.backing is not None
        if kind is WorkKind.COMPACT:
            device.compact(work)
        elif kind is WorkKind.RECOMPRESS:
            self.recompressed = True
            Recompressor(device, Recompression(), work).run()
        elif kind is WorkKind.WRITEBACK:
            Writeback(device, device.backing, EVERYTHING, work).run()
        elif kind is WorkKind.IDLE:
            in_slices(device, mark_idle(device, None, work))
        elif kind is WorkKind.SURVEY:
            in_slices(device, take_survey(device, [0], 0, uptime(), Survey(), work))
        else:
            self._train(work)

    def _train(self, work: Work) -> Training | None:
        with patch("zramd.device.training.MIN_SAMPLES", 1), suppress(ValueError):
            return train(self.device, 1024, (1,), work)
        return None  # too few pages, or such that no dictionary can be made of them

    @rule(priority=st.integers(0, 3))
    def train_and_install(self, priority: int) -> None:
        made = self._train(Work(WorkKind.TRAIN))
        if made:
            with suppress(CodecInUseError):
                self.opened.set_algorithm(priority, codec("zstd", 1, made.dictionary))

    @rule(policy=st.sampled_from(POLICIES))
    def let_the_policy_act(self, policy: Rules) -> None:
        disk = Disk("zram0", None)
        disk.opened = self.opened
        self.recompressed = True
        acting = Policy(disk, policy, lambda: None)
        decision = acting.step()
        for _ in range(2):
            if acting._worker:
                acting._worker.join()
            decision = acting.step()
        if acting._worker:
            acting._worker.join()
        assert decision.reasons

    @rule()
    def survey(self) -> None:
        device, found = self.device, Survey()
        in_slices(device, take_survey(device, [0], 0, uptime(), found, Work(WorkKind.SURVEY)))
        highest = max(device.identity.algorithms.secondary, default=0)
        with device:
            objects = [entry for _, entry in device.entries() if WritebackType.ANY.matches(entry)]
        untried = [
            entry
            for entry in objects
            if not entry & ENTRY_INCOMPRESSIBLE and codec_number(entry) % PRIORITIES < highest
        ]
        assert (found.objects, found.idle, found.improvable) == (len(objects), {0: len(objects)}, {0: len(untried)})
        assert found.huge == sum(map(WritebackType.HUGE.matches, untried)) == found.improvable_huge[0]

    @rule()
    def clean_the_store(self) -> None:
        device, before = self.device, self.device.bd_stat()
        assert device.backing is not None
        clean(device, device.backing)
        reclaim(device, device.backing)
        assert (device.bd_stat().count, device.bd_stat().pages) == (before.count, before.pages)

    @rule(everything=st.booleans())
    def mark_idle(self, everything: bool) -> None:
        in_slices(self.device, mark_idle(self.device, None if everything else 0))
        with self.device:
            for _, entry in self.device.entries():
                is_object = entry >> ENTRY_STATE_SHIFT & ENTRY_STATE_MASK in (PageState.COMPRESSED, PageState.HUGE)
                assert bool(entry & ENTRY_IDLE) == (everything and is_object)

    @rule()
    def restart(self) -> None:
        before = self._facts()
        self.opened.close()
        self.opened = self._open()
        assert self.opened.recovered
        after = self._facts()
        # Counted when pages are recovered, but not when they are recompressed.
        assert after == (replace(before[0], mem_used_max=after[0].mem_used_max), *before[1:])

    def _facts(self) -> tuple[MmStat, IoStat, BdStat, RequestStat, UUID]:
        device = self.device
        return device.mm_stat(), device.io_stat(), device.bd_stat(), device.request_stat(), device.identity.uuid

    @invariant()
    def counters_equal_a_recount(self) -> None:
        stat = self.device.mm_stat()
        assert stat == recount(self.device, stat)
        # What recompression takes is not noted (Linux 6.18).
        assert stat.mem_used_max >= (self.peak if self.recompressed else max(self.peak, stat.mem_used_total))
        self.peak = stat.mem_used_max
        assert self.device.io_stat().notify_free == self.notify_free
        with self.device:
            compressed = [
                codec_number(entry)
                for _, entry in self.device.entries()
                if 0 < entry >> ENTRY_SIZE_SHIFT & ENTRY_SIZE_MASK < PAGE_SIZE
            ]
        assert [self.device.codec_pages(number) for number in range(CODECS)] == list(
            map(compressed.count, range(CODECS))
        )

    def teardown(self) -> None:
        assert read(self.device, 0, SIZE) == self.expected
        self.opened.close()
        self.directory.cleanup()


class ZstdMachine(DeviceMachine):
    algorithm = "zstd"


TestDevice = DeviceMachine.TestCase
TestZstdDevice = ZstdMachine.TestCase
