import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.nbd_bytes import (
    BLOCK_STATUS,
    DF,
    EINVAL,
    EXTENDED,
    FLUSH,
    FUA,
    NO_HOLE,
    PAYLOAD_LEN,
    REQ_ONE,
    SIMPLE,
    STRUCTURED,
    TRIM,
    WRITE_ZEROES,
    Dialect,
    exchange,
)
from tests.property.test_device import make_data
from tests.unit.test_structured import (
    GIB,
    MIB,
    PAGE,
    RAW,
    SIZE,
    SMALL,
    TEXT,
    dialects_with_chunks,
    every_dialect,
    fill,
    serve,
    talk,
)
from zramd.device.codecs import codec
from zramd.device.opening import OpenDevice
from zramd.device.states import Run
from zramd.device.wanted import Wanted
from zramd.device.zram import Device
from zramd.memory import RegionStore
from zramd.nbd.block_status import Context

ALLOCATION, STATE = 1, 2
BOTH = (Context.ALLOCATION, Context.STATE)
HOLE, ZERO, DATA = 3, 2, 0
EMPTY, SAME_FILLED, COMPRESSED, HUGE = range(4)

LAYOUT = [
    (TEXT[:PAGE], DATA, COMPRESSED),
    (TEXT[PAGE : 2 * PAGE], DATA, COMPRESSED),
    (bytes(PAGE), ZERO, SAME_FILLED),
    (b"\7" * PAGE, DATA, SAME_FILLED),
    (RAW[:PAGE], DATA, HUGE),
    (None, HOLE, EMPTY),
    (None, HOLE, EMPTY),
    (bytes(PAGE), ZERO, SAME_FILLED),
    (bytes(PAGE), ZERO, SAME_FILLED),
    (TEXT[:PAGE], DATA, COMPRESSED),
]
"""Pages: what is written, and their status in the two contexts."""


@pytest.fixture
def laid_out(opened: OpenDevice) -> OpenDevice:
    fill(opened, b"".join(data or RAW[:PAGE] for data, _, _ in LAYOUT))
    empty = SIMPLE.request(TRIM, 1, 5 * PAGE, 2 * PAGE)
    assert talk(opened, SIMPLE, empty) == SIMPLE.done(1)
    return opened


Extents = list[tuple[int, int]]
WHOLE = len(LAYOUT) * PAGE
RANGES: dict[str, tuple[int, int, Extents, Extents]] = {
    "a page": (0, PAGE, [(PAGE, DATA)], [(PAGE, COMPRESSED)]),
    "a byte": (5, 1, [(1, DATA)], [(1, COMPRESSED)]),
    "two alike": (0, 2 * PAGE, [(2 * PAGE, DATA)], [(2 * PAGE, COMPRESSED)]),
    "zeros and a pattern": (
        2 * PAGE,
        2 * PAGE,
        [(PAGE, ZERO), (PAGE, DATA)],
        [(2 * PAGE, SAME_FILLED)],
    ),
    "all": (
        0,
        WHOLE,
        [(2 * PAGE, DATA), (PAGE, ZERO), (2 * PAGE, DATA), (2 * PAGE, HOLE), (2 * PAGE, ZERO), (PAGE, DATA)],
        [
            (2 * PAGE, COMPRESSED),
            (2 * PAGE, SAME_FILLED),
            (PAGE, HUGE),
            (2 * PAGE, EMPTY),
            (2 * PAGE, SAME_FILLED),
            (PAGE, COMPRESSED),
        ],
    ),
    "parts of pages at both ends": (
        PAGE + 100,
        4 * PAGE,
        [(PAGE - 100, DATA), (PAGE, ZERO), (2 * PAGE, DATA), (100, HOLE)],
        [(PAGE - 100, COMPRESSED), (2 * PAGE, SAME_FILLED), (PAGE, HUGE), (100, EMPTY)],
    ),
    "two bytes of two pages": (
        5 * PAGE - 1,
        2,
        [(1, DATA), (1, HOLE)],
        [(1, HUGE), (1, EMPTY)],
    ),
    "behind the last one written": (
        WHOLE - PAGE,
        SIZE - WHOLE + PAGE,
        [(PAGE, DATA), (SIZE - WHOLE, HOLE)],
        [(PAGE, COMPRESSED), (SIZE - WHOLE, EMPTY)],
    ),
    "what nobody has touched": (32 * MIB + 1, MIB, [(MIB, HOLE)], [(MIB, EMPTY)]),
    "the last byte": (SIZE - 1, 1, [(1, HOLE)], [(1, EMPTY)]),
}


@dialects_with_chunks
@pytest.mark.parametrize("flags", [0, FUA])
@pytest.mark.parametrize(("offset", "length", "allocation", "state"), RANGES.values(), ids=RANGES.keys())
def test_extents_say_what_pages_are_in_each_context(
    laid_out: OpenDevice,
    dialect: Dialect,
    flags: int,
    offset: int,
    length: int,
    allocation: Extents,
    state: Extents,
) -> None:
    stream = dialect.request(BLOCK_STATUS, 9, offset, length, flags) + dialect.request(FLUSH, 10)
    for contexts, found in [
        ((Context.ALLOCATION,), {ALLOCATION: allocation}),
        ((Context.STATE,), {STATE: state}),
        (BOTH, {ALLOCATION: allocation, STATE: state}),
    ]:
        assert talk(laid_out, dialect, stream, contexts) == dialect.status(9, offset, found) + dialect.done(10)


@dialects_with_chunks
@pytest.mark.parametrize("flags", [REQ_ONE, REQ_ONE | FUA])
@pytest.mark.parametrize(("offset", "length", "allocation", "state"), RANGES.values(), ids=RANGES.keys())
def test_req_one_is_answered_with_the_first_extent_of_each_context(
    laid_out: OpenDevice,
    dialect: Dialect,
    flags: int,
    offset: int,
    length: int,
    allocation: Extents,
    state: Extents,
) -> None:
    stream = dialect.request(BLOCK_STATUS, 9, offset, length, flags)
    found = {ALLOCATION: allocation[:1], STATE: state[:1]}
    assert talk(laid_out, dialect, stream, BOTH) == dialect.status(9, offset, found)


@pytest.mark.parametrize(("offset", "length", "allocation", "state"), RANGES.values(), ids=RANGES.keys())
def test_a_payload_selects_contexts_and_gives_the_length(
    laid_out: OpenDevice, offset: int, length: int, allocation: Extents, state: Extents
) -> None:
    both = {ALLOCATION: allocation, STATE: state}
    for flags, number in [(0, None), (REQ_ONE, 1)]:
        for ids in ([ALLOCATION], [STATE], [ALLOCATION, STATE], [STATE, ALLOCATION]):
            found = {context: extents[:number] for context, extents in both.items() if context in ids}
            stream = selection(1, offset, length, *ids, flags=flags) + EXTENDED.request(FLUSH, 2)
            expected = EXTENDED.status(1, offset, found) + EXTENDED.done(2)
            assert talk(laid_out, EXTENDED, stream, BOTH) == expected, (flags, ids)


def selection(cookie: int, offset: int, length: int, *ids: int, flags: int = 0) -> bytes:
    """Return a BLOCK_STATUS for `length` bytes in the contexts of some ids."""
    return with_payload(cookie, offset, struct.pack(f">Q{len(ids)}I", length, *ids), flags)


def with_payload(cookie: int, offset: int, payload: bytes, flags: int = 0) -> bytes:
    return EXTENDED.request(BLOCK_STATUS, cookie, offset, len(payload), flags | PAYLOAD_LEN) + payload


# What is refused


@every_dialect
@pytest.mark.parametrize("length", [0, 1, PAGE, 2**32 - 1])
@pytest.mark.parametrize("flags", [0, REQ_ONE, DF, NO_HOLE])
def test_without_a_context_there_is_no_status(opened: OpenDevice, dialect: Dialect, flags: int, length: int) -> None:
    stream = dialect.request(BLOCK_STATUS, 1, 5, length, flags) + dialect.request(FLUSH, 2)
    assert talk(opened, dialect, stream) == dialect.error(1, EINVAL, 5) + dialect.done(2)


@pytest.mark.parametrize("payload", [b"", bytes(8), struct.pack(">QI", PAGE, 1), bytes(MIB)], ids=len)
def test_without_a_context_a_selection_is_swallowed_and_refused(opened: OpenDevice, payload: bytes) -> None:
    stream = with_payload(1, 5, payload) + EXTENDED.request(FLUSH, 2)
    assert talk(opened, EXTENDED, stream) == EXTENDED.error(1, EINVAL, 5) + EXTENDED.done(2)


OUTSIDE = [
    (0, 0),
    (SIZE, 0),
    (SIZE, 1),
    (SIZE - 1, 2),
    (0, SIZE + 1),
    (2**63, 1),
    (2**64 - 1, 1),
    (2**64 - 1, 2**32 - 1),
]


@dialects_with_chunks
@pytest.mark.parametrize("flags", [0, REQ_ONE])
@pytest.mark.parametrize(("offset", "length"), OUTSIDE)
def test_a_range_that_is_empty_or_beyond_the_end_is_refused(
    opened: OpenDevice, dialect: Dialect, flags: int, offset: int, length: int
) -> None:
    stream = dialect.request(BLOCK_STATUS, 1, offset, length, flags) + dialect.request(FLUSH, 2)
    assert talk(opened, dialect, stream, BOTH) == dialect.error(1, EINVAL, offset) + dialect.done(2)


@pytest.mark.parametrize(
    ("offset", "length"), [*OUTSIDE, (0, 2**64 - 1), (1, 2**64 - 1), (2**64 - 1, 2**64 - 1), (2**63, 2**63)]
)
def test_a_selection_of_a_range_that_is_empty_or_beyond_the_end_is_refused(
    opened: OpenDevice, offset: int, length: int
) -> None:
    stream = selection(1, offset, length, STATE) + EXTENDED.request(FLUSH, 2)
    assert talk(opened, EXTENDED, stream, BOTH) == EXTENDED.error(1, EINVAL, offset) + EXTENDED.done(2)
    if length >= SIZE:
        stream = EXTENDED.request(BLOCK_STATUS, 1, offset, length) + EXTENDED.request(FLUSH, 2)
        assert talk(opened, EXTENDED, stream, BOTH) == EXTENDED.error(1, EINVAL, offset) + EXTENDED.done(2)


@pytest.mark.parametrize(
    "ids", [[0], [3], [0xFFFFFFFF], [1, 3], [3, 1], [1, 1], [2, 1, 2], [1, 2, 3], [1, 2] * 40, [0] * 40], ids=str
)
def test_a_selection_of_unknown_or_repeated_contexts_is_refused(laid_out: OpenDevice, ids: list[int]) -> None:
    stream = selection(1, 5, PAGE, *ids) + EXTENDED.request(FLUSH, 2)
    assert talk(laid_out, EXTENDED, stream, BOTH) == EXTENDED.error(1, EINVAL, 5) + EXTENDED.done(2)


@pytest.mark.parametrize(("context", "other"), [(Context.ALLOCATION, STATE), (Context.STATE, ALLOCATION)])
def test_a_selection_of_a_context_that_was_not_chosen_is_refused(
    laid_out: OpenDevice, context: Context, other: int
) -> None:
    stream = selection(1, 0, PAGE, other) + EXTENDED.request(FLUSH, 2)
    assert talk(laid_out, EXTENDED, stream, (context,)) == EXTENDED.error(1, EINVAL) + EXTENDED.done(2)


@pytest.mark.parametrize("size", [*range(12), 13, 14, 15, 17, 1001])
def test_a_selection_of_a_wrong_size_is_refused(laid_out: OpenDevice, size: int) -> None:
    payload = (struct.pack(">QII", PAGE, STATE, ALLOCATION) + bytes(1000))[:size]
    stream = with_payload(1, 0, payload) + EXTENDED.request(FLUSH, 2)
    assert talk(laid_out, EXTENDED, stream, BOTH) == EXTENDED.error(1, EINVAL) + EXTENDED.done(2)


@pytest.mark.parametrize("size", [SMALL.buffer - 32, SMALL.buffer - 28, SMALL.buffer, SMALL.payload, 2 * SMALL.payload])
def test_a_selection_as_long_as_the_buffer_is_swallowed_and_refused(laid_out: OpenDevice, size: int) -> None:
    stream = with_payload(1, 0, bytes(size)) + EXTENDED.request(FLUSH, 2)
    replies = talk(laid_out, EXTENDED, stream, BOTH, limits=SMALL)
    assert replies == EXTENDED.error(1, EINVAL) + EXTENDED.done(2)


# Long ranges


@pytest.fixture
def wide() -> Iterator[OpenDevice]:
    """Return a device of 6 GiB with a page at the beginning, one at 5 GiB, and nothing else."""
    opened = OpenDevice(RegionStore(None), Wanted(disksize=6 * GIB, codec=codec("lz4")))
    fill(opened, TEXT[:PAGE])
    fill(opened, TEXT[:PAGE], 5 * GIB)
    yield opened
    opened.close()


def test_ranges_over_4_gib_have_one_extent_of_that_length(wide: OpenDevice) -> None:
    stream = (
        EXTENDED.request(BLOCK_STATUS, 1, 0, 6 * GIB)
        + EXTENDED.request(BLOCK_STATUS, 2, PAGE, 6 * GIB - PAGE, REQ_ONE)
        + EXTENDED.request(BLOCK_STATUS, 3, PAGE + 1, 2**32)
        + selection(4, PAGE, 5 * GIB, ALLOCATION)
    )
    last = GIB - PAGE
    assert talk(wide, EXTENDED, stream, BOTH) == (
        EXTENDED.status(
            1,
            0,
            {
                ALLOCATION: [(PAGE, DATA), (5 * GIB - PAGE, HOLE), (PAGE, DATA), (last, HOLE)],
                STATE: [(PAGE, COMPRESSED), (5 * GIB - PAGE, EMPTY), (PAGE, COMPRESSED), (last, EMPTY)],
            },
        )
        + EXTENDED.status(2, PAGE, {ALLOCATION: [(5 * GIB - PAGE, HOLE)], STATE: [(5 * GIB - PAGE, EMPTY)]})
        + EXTENDED.status(3, PAGE + 1, {ALLOCATION: [(2**32, HOLE)], STATE: [(2**32, EMPTY)]})
        + EXTENDED.status(4, PAGE, {ALLOCATION: [(5 * GIB - PAGE, HOLE), (PAGE, DATA)]})
    )
    stream = STRUCTURED.request(BLOCK_STATUS, 1, 1, 2**32 - 1) + STRUCTURED.request(
        BLOCK_STATUS, 2, 5 * GIB - 1, 2**30, REQ_ONE
    )
    assert talk(wide, STRUCTURED, stream, (Context.ALLOCATION,)) == (
        STRUCTURED.status(1, 1, {ALLOCATION: [(PAGE - 1, DATA), (2**32 - PAGE, HOLE)]})
        + STRUCTURED.status(2, 5 * GIB - 1, {ALLOCATION: [(1, HOLE)]})
    )


@dialects_with_chunks
def test_a_range_with_very_many_extents_is_answered_piece_by_piece(dialect: Dialect) -> None:
    pages = 20_000
    opened = OpenDevice(RegionStore(None), Wanted(disksize=pages * PAGE, codec=codec("lz4")))
    try:
        half = (b"\7" * PAGE + bytes(PAGE)) * (pages // 8)
        for quarter in range(4):
            fill(opened, half, quarter * len(half))
        found: Extents = []
        offset = 0
        layout, begin = (">QQ", 8) if dialect.extended else (">II", 4)
        while offset < pages * PAGE:
            asked = dialect.request(BLOCK_STATUS, 1, offset, pages * PAGE - offset)
            with serve(opened, dialect, (Context.ALLOCATION,)) as peer:
                ((flags, _, _, _, payload),) = dialect.parse(exchange(peer.client, asked))
            assert flags == 1
            extents = [(length, status) for length, status in struct.iter_unpack(layout, payload[begin:])]
            assert extents
            found += extents
            offset += sum(length for length, _ in extents)
        assert found == [(PAGE, DATA), (PAGE, ZERO)] * (pages // 2)
    finally:
        opened.close()


# A model


@dataclass
class Page:
    """What a page is made up of, as the model has it."""

    data: bytes = bytes(PAGE)
    is_empty: bool = True

    def state(self, opened: OpenDevice) -> int:
        if self.is_empty:
            return EMPTY
        if self.data == self.data[:8] * (PAGE // 8):
            return SAME_FILLED
        stored = opened.device.identity.codec.compressor(bytearray(self.data))(0)
        return HUGE if len(stored) >= opened.device.pool.geometry.huge_limit else COMPRESSED

    def allocation(self) -> int:
        if self.is_empty:
            return HOLE
        return DATA if any(self.data) else ZERO


class Model:
    """A disk as a list of pages."""

    def __init__(self, pages: int) -> None:
        self.pages = [Page() for _ in range(pages)]

    def write(self, offset: int, data: bytes) -> None:
        while data:
            number, start = divmod(offset, PAGE)
            page = self.pages[number]
            part = data[: PAGE - start]
            self.pages[number] = Page(page.data[:start] + part + page.data[start + len(part) :], is_empty=False)
            offset, data = offset + len(part), data[len(part) :]

    def trim(self, offset: int, length: int) -> None:
        for number in range(-(-offset // PAGE), (offset + length) // PAGE):
            self.pages[number] = Page()

    def extents(self, opened: OpenDevice, context: int, offset: int, length: int) -> Extents:
        touched = range(offset // PAGE, -(-(offset + length) // PAGE))
        statuses = [
            self.pages[number].allocation() if context == ALLOCATION else self.pages[number].state(opened)
            for number in touched
        ]
        found = [(len(list(run)) * PAGE, status) for status, run in groupby(statuses)]
        # Cut off what lies before and behind the range.
        found[0] = found[0][0] - offset % PAGE, found[0][1]
        found[-1] = found[-1][0] - (-(offset + length)) % PAGE, found[-1][1]
        return found


PAGES = 24
ranges = st.tuples(st.integers(0, PAGES * PAGE - 1), st.integers(1, PAGES * PAGE), st.booleans()).map(
    lambda drawn: clipped(*drawn)
)


def clipped(offset: int, length: int, is_aligned: bool) -> tuple[int, int]:
    if is_aligned:
        offset, length = offset // PAGE * PAGE, -(-length // PAGE) * PAGE
    return offset, min(length, PAGES * PAGE - offset)


changes = st.tuples(st.sampled_from(["zero", "pattern", "text", "random", "trim", "zeroes", "no hole"]), ranges)
questions = st.tuples(ranges, st.booleans(), st.sampled_from([None, [1], [2], [1, 2], [2, 1]]))


@settings(max_examples=120)
@given(
    changes=st.lists(changes, max_size=25),
    questions=st.lists(questions, min_size=1, max_size=8),
    contexts=st.sampled_from([(Context.ALLOCATION,), (Context.STATE,), BOTH]),
    extended=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_extents_of_any_range_are_those_of_a_model_after_any_changes(
    changes: list[tuple[str, tuple[int, int]]],
    questions: list[tuple[tuple[int, int], bool, list[int] | None]],
    contexts: tuple[Context, ...],
    extended: bool,
    seed: int,
) -> None:
    dialect = EXTENDED if extended else STRUCTURED
    generator = random.Random(seed)
    model = Model(PAGES)
    opened = OpenDevice(RegionStore(None), Wanted(disksize=PAGES * PAGE, codec=codec("lz4")))
    stream = expected = b""
    try:
        for cookie, (kind, (offset, length)) in enumerate(changes):
            if kind == "trim":
                stream += dialect.request(TRIM, cookie, offset, length)
                model.trim(offset, length)
            elif kind in ("zeroes", "no hole"):
                stream += dialect.request(WRITE_ZEROES, cookie, offset, length, NO_HOLE if kind == "no hole" else 0)
                zero_parts(model, offset, length, leaves_holes=kind == "zeroes")
            else:
                data = bytes(make_data(kind, generator.randrange(1000), length))
                stream += dialect.write(cookie, offset, data)
                model.write(offset, data)
            expected += dialect.done(cookie, offset)
        for cookie, ((offset, length), one, ids) in enumerate(questions, 1000):
            flags = REQ_ONE if one else 0
            chosen = [int(context) for context in contexts]
            if extended and ids and set(ids) <= set(chosen):
                stream += selection(cookie, offset, length, *ids, flags=flags)
                chosen = sorted(ids)
            else:
                stream += dialect.request(BLOCK_STATUS, cookie, offset, length, flags)
            found = {context: model.extents(opened, context, offset, length) for context in chosen}
            if one:
                found = {context: extents[:1] for context, extents in found.items()}
            expected += dialect.status(cookie, offset, found)
        assert talk(opened, dialect, stream, contexts) == expected
    finally:
        opened.close()


def zero_parts(model: Model, offset: int, length: int, *, leaves_holes: bool) -> None:
    """Write zeros to what are parts of pages; whole pages become empty, or zeros too."""
    first, end = -(-offset // PAGE) * PAGE, (offset + length) // PAGE * PAGE
    if not leaves_holes or first >= end:
        model.write(offset, bytes(length))
        return
    model.write(offset, bytes(first - offset))
    model.trim(first, end - first)
    model.write(end, bytes(offset + length - end))


def test_each_look_at_the_table_has_a_hold_of_the_lock_to_itself_however_long_its_range(
    opened: OpenDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    states, leave = Device.states, Device.__exit__

    def look(device: Device, first: int, end: int) -> list[Run]:
        looks[-1] += 1
        return states(device, first, end)

    def hold(device: Device, *reason: object) -> None:
        leave(device, *reason)
        looks.append(0)

    looks.append(0)
    monkeypatch.setattr(Device, "states", look)
    monkeypatch.setattr(Device, "__exit__", hold)
    selection = struct.pack(">QII", SIZE, 1, 2)
    asked = EXTENDED.request(BLOCK_STATUS, 1, 0, len(selection), PAYLOAD_LEN) + selection
    talk(opened, EXTENDED, asked * 20, contexts=BOTH)
    assert sum(looks) == 20
    assert max(looks) == 1
