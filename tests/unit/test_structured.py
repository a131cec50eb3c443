import random
import struct
import tracemalloc
from collections.abc import Iterator

import pytest

from tests.nbd_bytes import (
    BLOCK_STATUS,
    CACHE,
    DF,
    EINVAL,
    EIO,
    ENOSPC,
    ENOTSUP,
    EOVERFLOW,
    EPERM,
    ERROR_CHUNK,
    ERROR_OFFSET_CHUNK,
    EXTENDED,
    FAST_ZERO,
    FLAGS,
    FLUSH,
    FUA,
    NO_HOLE,
    PAYLOAD_LEN,
    READ,
    SIMPLE,
    STRUCTURED,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    Dialect,
    Peer,
    exchange,
    receive,
    receive_rest,
)
from tests.property.test_device import make_data, read
from zramd.device.codecs import codec
from zramd.device.opening import OpenDevice
from zramd.device.wanted import Wanted
from zramd.device.zram import Device
from zramd.layout import ENTRY_HANDLE_MASK, ENTRY_SIZE_MASK, ENTRY_SIZE_SHIFT
from zramd.memory import RegionStore
from zramd.nbd.block_status import Context
from zramd.nbd.limits import DEFAULT_LIMITS, Limits
from zramd.nbd.protocol import SessionError
from zramd.nbd.terms import Mode, Terms
from zramd.nbd.transmission import Transmission

PAGE = 4096
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
SIZE = 64 * MIB
TEXT = bytes(make_data("text", 1, 64 * KIB))
RAW = bytes(make_data("random", 2, 64 * KIB))
MODES = {SIMPLE: Mode.SIMPLE, STRUCTURED: Mode.STRUCTURED, EXTENDED: Mode.EXTENDED}
SMALL = Limits(memory=256 * KIB, payload=MIB)
"""Buffers that short requests fill: 64 KiB are received and 128 KiB answered at once."""

every_dialect = pytest.mark.parametrize("dialect", [SIMPLE, STRUCTURED, EXTENDED], ids=str)
dialects_with_chunks = pytest.mark.parametrize("dialect", [STRUCTURED, EXTENDED], ids=str)


@pytest.fixture
def huge() -> Iterator[OpenDevice]:
    """Return a device of 6 GiB, almost all of it empty."""
    opened = OpenDevice(RegionStore(None), Wanted(disksize=6 * GIB, codec=codec("lz4")))
    yield opened
    opened.close()


def serve(
    opened: OpenDevice,
    dialect: Dialect,
    contexts: tuple[Context, ...] = (),
    *,
    read_only: bool = False,
    limits: Limits = DEFAULT_LIMITS,
) -> Peer:
    terms = Terms(MODES[dialect], contexts, read_only)
    return Peer(lambda sock: Transmission(sock, opened.device, opened.flush, terms, limits).run())


def talk(
    opened: OpenDevice,
    dialect: Dialect,
    stream: bytes,
    contexts: tuple[Context, ...] = (),
    *,
    read_only: bool = False,
    limits: Limits = DEFAULT_LIMITS,
) -> bytes:
    """Return the replies to a stream of requests, after which the client half-closes and the session ends well.

    The texts of errors are left out.
    """
    with serve(opened, dialect, contexts, read_only=read_only, limits=limits) as peer:
        replies = exchange(peer.client, stream)
        assert peer.join() is None
    return dialect.without_texts(replies)


def fill(opened: OpenDevice, data: bytes, offset: int = 0) -> None:
    assert talk(opened, SIMPLE, SIMPLE.write(1, offset, data)) == SIMPLE.done(1)


def contents(opened: OpenDevice, length: int, offset: int = 0) -> bytes:
    return read(opened.device, offset, length)


def damage(device: Device, page: int) -> None:
    """Overwrite the compressed bytes of a page in the pool."""
    entry = dict(device.entries())[page]
    size = entry >> ENTRY_SIZE_SHIFT & ENTRY_SIZE_MASK
    device.pool.map(entry & ENTRY_HANDLE_MASK, size)[:] = b"\xff" * size


# Commands and their flags


@every_dialect
def test_each_command_is_answered_in_the_dialect(opened: OpenDevice, dialect: Dialect) -> None:
    start = 0x1122334455
    stream = (
        dialect.write(1, 4096, TEXT)
        + dialect.request(READ, 2, 5000, 100)
        + dialect.request(TRIM, 3, 8192, 4096)
        + dialect.request(CACHE, 4, 12288, 1)
        + dialect.request(WRITE_ZEROES, 5, 16384, 8192)
        + dialect.request(READ, 6, 4096, 24576)
        + dialect.request(FLUSH, 7, start)
    )
    assert talk(opened, dialect, stream) == (
        dialect.done(1, 4096)
        + dialect.content(2, 5000, TEXT[904:1004])
        + dialect.done(3, 8192)
        + dialect.done(4, 12288)
        + dialect.done(5, 16384)
        + dialect.content(6, 4096, TEXT[:4096], 4096, TEXT[8192:12288], 8192, TEXT[20480:24576])
        + dialect.done(7, start)
    )


ALLOWED = FLAGS | {8: 0, 0xFFFF: 0}


@every_dialect
@pytest.mark.parametrize("command", [*ALLOWED])
def test_a_flag_is_accepted_where_it_means_something_and_else_refused(
    opened: OpenDevice, dialect: Dialect, command: int
) -> None:
    allowed = ALLOWED[command] | (DF if dialect.structured and command == READ else 0)
    contexts = (Context.STATE,) if dialect.structured else ()
    after = {WRITE: RAW[:PAGE], TRIM: bytes(PAGE), WRITE_ZEROES: bytes(PAGE)}.get(command, TEXT[:PAGE])
    good = dialect.done(1)
    if command == READ:
        good = dialect.content(1, 0, TEXT[:PAGE])
    elif command == BLOCK_STATUS:
        good = dialect.status(1, 0, {2: [(PAGE, 2)]}) if contexts else dialect.error(1, EINVAL)
    for bit in range(16):
        flag = 1 << bit
        if dialect.extended and flag == PAYLOAD_LEN:
            continue  # below
        fill(opened, TEXT[: 2 * PAGE])
        if command == WRITE:
            asked = dialect.write(1, 0, RAW[:PAGE], flag)
        else:
            asked = dialect.request(command, 1, 0, PAGE, flag)
        answer = good if flag & allowed else dialect.error(1, EINVAL)
        assert talk(opened, dialect, asked + dialect.request(FLUSH, 2), contexts) == answer + dialect.done(2)
        assert contents(opened, 2 * PAGE) == (after if flag & allowed else TEXT[:PAGE]) + TEXT[PAGE : 2 * PAGE]


@every_dialect
@pytest.mark.parametrize("flags", [0x8000, 0x0042])
@pytest.mark.parametrize("command", [WRITE, TRIM, WRITE_ZEROES])
def test_a_refused_request_changes_nothing(opened: OpenDevice, dialect: Dialect, command: int, flags: int) -> None:
    fill(opened, TEXT)
    bad = dialect.write(1, 0, RAW, flags) if command == WRITE else dialect.request(command, 1, 0, len(TEXT), flags)
    stream = bad + dialect.request(FLUSH, 2, 7)
    assert talk(opened, dialect, stream) == dialect.error(1, EINVAL) + dialect.done(2, 7)
    assert contents(opened, len(TEXT)) == TEXT


@every_dialect
@pytest.mark.parametrize("cookie", [0, 1, 0x0102030405060708, 2**64 - 1])
def test_every_reply_carries_the_cookie(opened: OpenDevice, dialect: Dialect, cookie: int) -> None:
    fill(opened, TEXT)
    for asked, answer in [
        (dialect.request(READ, cookie, 0, 5), dialect.content(cookie, 0, TEXT[:5])),
        (dialect.request(READ, cookie, SIZE, 1), dialect.error(cookie, EINVAL, SIZE)),
        (dialect.request(FLUSH, cookie), dialect.done(cookie)),
        (dialect.request(4711, cookie, 3), dialect.error(cookie, EINVAL, 3)),
        (dialect.write(cookie, SIZE, b"x"), dialect.error(cookie, ENOSPC, SIZE)),
    ]:
        assert talk(opened, dialect, asked) == answer


@every_dialect
def test_unknown_commands_are_refused_and_the_session_stays_in_step(opened: OpenDevice, dialect: Dialect) -> None:
    commands = [8, 9, 255, 256, 0xFFFF]
    stream = b"".join(dialect.request(command, command, 5, 2**32 - 1) for command in commands)
    replies = talk(opened, dialect, stream + dialect.request(FLUSH, 2))
    assert replies == b"".join(dialect.error(command, EINVAL, 5) for command in commands) + dialect.done(2)


@dialects_with_chunks
def test_an_error_says_in_text_what_is_wrong(opened: OpenDevice, dialect: Dialect) -> None:
    stream = dialect.request(READ, 1, SIZE - 1, 2) + dialect.request(4711, 2) + dialect.request(TRIM, 3, flags=0x80)
    with serve(opened, dialect) as peer:
        chunks = dialect.parse(exchange(peer.client, stream))
    texts = [payload[6:].decode() for _, _, _, _, payload in chunks]
    assert [struct.unpack_from(">IH", payload) for *_, payload in chunks] == [(EINVAL, len(text)) for text in texts]
    assert [flags for flags, *_ in chunks] == [1, 1, 1]
    assert str(SIZE) in texts[0]
    assert "4711" in texts[1]
    assert "0x80" in texts[2]


# Reading

LAYOUT = TEXT[:PAGE] + bytes(PAGE) + b"\7" * PAGE + RAW[:PAGE] + bytes(2 * PAGE) + TEXT[PAGE : 2 * PAGE]
"""Pages: text, zeros, same-filled, random, two that are trimmed, text."""
PATTERN_AND_RAW = LAYOUT[2 * PAGE : 4 * PAGE]
READS: list[tuple[int, int, list[bytes | int]]] = [
    (0, PAGE, [TEXT[:PAGE]]),
    (0, 1, [TEXT[:1]]),
    (PAGE - 1, 1, [TEXT[PAGE - 1 : PAGE]]),
    (PAGE, PAGE, [PAGE]),
    (PAGE + 1, 1, [1]),
    (2 * PAGE - 1, 1, [1]),
    (2 * PAGE, PAGE, [b"\7" * PAGE]),
    (2 * PAGE + 17, 3, [b"\7" * 3]),
    (3 * PAGE, PAGE, [RAW[:PAGE]]),
    (4 * PAGE, 2 * PAGE, [2 * PAGE]),
    (4 * PAGE + 5, 2 * PAGE - 10, [2 * PAGE - 10]),
    (PAGE - 1, 2, [TEXT[PAGE - 1 : PAGE], 1]),
    (2 * PAGE - 1, 2, [1, b"\7"]),
    (100, PAGE, [TEXT[100:PAGE], 100]),
    (PAGE - 10, PAGE + 20, [TEXT[PAGE - 10 : PAGE], PAGE, b"\7" * 10]),
    (0, 7 * PAGE, [TEXT[:PAGE], PAGE, PATTERN_AND_RAW, 2 * PAGE, TEXT[PAGE : 2 * PAGE]]),
    (1, 7 * PAGE - 2, [TEXT[1:PAGE], PAGE, PATTERN_AND_RAW, 2 * PAGE, TEXT[PAGE : 2 * PAGE - 1]]),
    (PAGE + 1000, 4 * PAGE, [PAGE - 1000, PATTERN_AND_RAW, PAGE + 1000]),
    (6 * PAGE, 3 * PAGE, [TEXT[PAGE : 2 * PAGE], 2 * PAGE]),
    (32 * MIB + 1, 300_000, [300_000]),
    (SIZE - 1, 1, [1]),
]


@pytest.fixture
def laid_out(opened: OpenDevice) -> OpenDevice:
    stream = SIMPLE.write(1, 0, LAYOUT) + SIMPLE.request(TRIM, 2, 4 * PAGE, 2 * PAGE)
    assert talk(opened, SIMPLE, stream) == SIMPLE.done(1) + SIMPLE.done(2)
    return opened


@every_dialect
@pytest.mark.parametrize(("offset", "length", "parts"), READS)
def test_pages_of_zeros_are_read_as_holes_and_all_else_as_data(
    laid_out: OpenDevice, dialect: Dialect, offset: int, length: int, parts: list[bytes | int]
) -> None:
    stream = dialect.request(READ, 1, offset, length) + dialect.request(READ, 2, 0, 1)
    expected = dialect.content(1, offset, *parts) + dialect.content(2, 0, TEXT[:1])
    assert talk(laid_out, dialect, stream) == expected


@dialects_with_chunks
@pytest.mark.parametrize(("offset", "length", "parts"), READS)
def test_df_makes_it_one_chunk_with_the_zeros_written_out(
    laid_out: OpenDevice, dialect: Dialect, offset: int, length: int, parts: list[bytes | int]
) -> None:
    whole = parts if len(parts) == 1 else [b"".join(bytes(part) for part in parts)]
    stream = dialect.request(READ, 1, offset, length, DF) + dialect.request(READ, 2, 0, 1, DF | FUA)
    expected = dialect.content(1, offset, *whole) + dialect.content(2, 0, TEXT[:1])
    assert talk(laid_out, dialect, stream) == expected


@dialects_with_chunks
@pytest.mark.parametrize("limits", [DEFAULT_LIMITS, Limits(memory=MIB)], ids=["default", "small"])
def test_the_longest_read_without_fragments_fits_the_buffer_and_longer_ones_overflow(
    opened: OpenDevice, dialect: Dialect, limits: Limits
) -> None:
    fill(opened, TEXT, 0)
    longest = limits.buffer - (32 if dialect.extended else 28)
    assert longest >= 64 * KIB
    stream = dialect.request(READ, 1, 0, longest, DF) + dialect.request(READ, 2, 0, longest + 1, DF)
    assert talk(opened, dialect, stream + dialect.request(READ, 3, 0, 9, DF), limits=limits) == (
        dialect.content(1, 0, TEXT + bytes(longest - len(TEXT)))
        + dialect.error(2, EOVERFLOW)
        + dialect.content(3, 0, TEXT[:9])
    )
    replies = talk(opened, dialect, dialect.request(READ, 1, MIB, longest, DF), limits=limits)
    assert replies == dialect.content(1, MIB, longest)


@every_dialect
@pytest.mark.parametrize("flags", [0, DF, FUA])
@pytest.mark.parametrize("offset", [0, 1, SIZE])
def test_a_read_of_nothing_has_an_answer_without_contents(
    opened: OpenDevice, dialect: Dialect, offset: int, flags: int
) -> None:
    if flags == DF and not dialect.structured:
        flags = 0
    stream = dialect.request(READ, 1, offset, 0, flags) + dialect.request(FLUSH, 2)
    assert talk(opened, dialect, stream) == dialect.content(1, offset) + dialect.done(2)


def assemble(dialect: Dialect, stream: bytes, cookie: int, start: int, length: int) -> bytes:
    """Return what the chunks of a read that succeeds contain; check all that the protocol asks of them."""
    found: dict[int, bytes] = {}
    chunks = dialect.parse(stream)
    assert [flags for flags, *_ in chunks] == [0] * (len(chunks) - 1) + [1]
    for _, kind, of, at, payload in chunks:
        assert of == cookie
        assert not dialect.extended or at == start
        offset = int.from_bytes(payload[:8])
        assert kind in (1, 2)
        data = payload[8:] if kind == 1 else bytes(int.from_bytes(payload[8:12]))
        assert data
        assert kind == 1 or len(payload) == 12
        assert offset not in found
        found[offset] = data
    position = start
    for offset in sorted(found):
        assert offset == position
        position += len(found[offset])
    assert position == start + length
    return b"".join(found[offset] for offset in sorted(found))


@dialects_with_chunks
@pytest.mark.parametrize("limits", [DEFAULT_LIMITS, SMALL], ids=["default", "small"])
def test_reads_of_any_length_are_covered_by_their_chunks(opened: OpenDevice, dialect: Dialect, limits: Limits) -> None:
    generator = random.Random(3)
    kinds = ["zero", "pattern", "text", "random"]
    data = b"".join(bytes(make_data(generator.choice(kinds), page, PAGE)) for page in range(600))
    fill(opened, data)
    disk = data + bytes(MIB)
    ranges = [(0, 600 * PAGE), (4095, MIB), (1, limits.reply), (0, limits.reply), (4095, limits.reply + 1)]
    ranges += [(generator.randrange(599 * PAGE), generator.randrange(1, MIB)) for _ in range(40)]
    for cookie, (offset, length) in enumerate(ranges):
        length = min(length, limits.payload)
        replies = talk(opened, dialect, dialect.request(READ, cookie, offset, length), limits=limits)
        assert assemble(dialect, replies, cookie, offset, length) == disk[offset : offset + length]


@dialects_with_chunks
def test_a_read_longer_than_a_reply_is_cut_at_pages(opened: OpenDevice, dialect: Dialect) -> None:
    data = RAW * 4  # two replies
    fill(opened, data)
    stream = dialect.request(READ, 1, 4095, 2 * SMALL.reply - 4095 + 1)
    expected = dialect.content(1, 4095, data[4095 : SMALL.reply], data[SMALL.reply : 2 * SMALL.reply], 1)
    assert talk(opened, dialect, stream + dialect.request(READ, 2, 0, 1), limits=SMALL) == (
        expected + dialect.content(2, 0, data[:1])
    )


# Reading what is damaged


@dialects_with_chunks
@pytest.mark.parametrize("flags", [0, DF])
def test_a_damaged_page_is_an_error_chunk_of_the_reads_that_touch_it(
    opened: OpenDevice, dialect: Dialect, flags: int
) -> None:
    fill(opened, TEXT)
    damage(opened.device, 2)
    stream = (
        dialect.request(READ, 1, 0, 8192, flags)
        + dialect.request(READ, 2, 5, 16384, flags)
        + dialect.request(READ, 3, 12287, 1, flags)
        + dialect.request(READ, 4, 12288, 4096, flags)
    )
    assert talk(opened, dialect, stream) == (
        dialect.content(1, 0, TEXT[:8192])
        + dialect.error(2, EIO, 5)
        + dialect.error(3, EIO, 12287)
        + dialect.content(4, 12288, TEXT[12288:16384])
    )


@dialects_with_chunks
@pytest.mark.parametrize("page", [0, 31], ids=str)
def test_a_long_read_that_is_damaged_at_its_beginning_is_an_error_and_nothing_else(
    opened: OpenDevice, dialect: Dialect, page: int
) -> None:
    fill(opened, TEXT * 8)
    damage(opened.device, page)
    length = 3 * SMALL.reply
    stream = dialect.request(READ, 1, 0, length) + dialect.request(READ, 2, 40 * PAGE, 1)
    assert talk(opened, dialect, stream, limits=SMALL) == (
        dialect.error(1, EIO, 0, 0) + dialect.content(2, 40 * PAGE, (TEXT * 8)[40 * PAGE :][:1])
    )


@dialects_with_chunks
@pytest.mark.parametrize(("page", "good"), [(32, 1), (63, 1), (64, 2), (95, 2)])
def test_a_long_read_that_is_damaged_later_ends_with_an_error_chunk_and_stays_in_step(
    opened: OpenDevice, dialect: Dialect, page: int, good: int
) -> None:
    data = TEXT * 8
    fill(opened, data)
    damage(opened.device, page)
    pieces = [data[at : at + SMALL.reply] for at in range(0, good * SMALL.reply, SMALL.reply)]
    stream = dialect.request(READ, 1, 0, 3 * SMALL.reply) + dialect.request(FLUSH, 2)
    assert talk(opened, dialect, stream, limits=SMALL) == (
        dialect.content(1, 0, *pieces, whole=False) + dialect.error(1, EIO, 0, good * SMALL.reply) + dialect.done(2)
    )


@dialects_with_chunks
def test_where_in_a_long_read_the_error_lies_is_inside_the_read(opened: OpenDevice, dialect: Dialect) -> None:
    fill(opened, TEXT * 8)
    damage(opened.device, 70)
    with serve(opened, dialect, limits=SMALL) as peer:
        chunks = dialect.parse(exchange(peer.client, dialect.request(READ, 1, 4095, 3 * SMALL.reply)))
    flags, kind, _, _, payload = chunks[-1]
    assert (flags, kind) == (1, ERROR_OFFSET_CHUNK)
    assert 4095 + 2 * SMALL.reply - 4095 <= int.from_bytes(payload[-8:]) <= 70 * PAGE
    assert ERROR_CHUNK not in [kind for _, kind, *_ in chunks]


# Payloads with extended headers


@pytest.mark.parametrize("length", [0, 1, PAGE, DEFAULT_LIMITS.buffer, 2**32, 2**63, 2**64 - 1])
@pytest.mark.parametrize("flags", [0, FUA])
def test_a_write_without_payload_len_is_refused_and_has_no_payload(opened: OpenDevice, flags: int, length: int) -> None:
    fill(opened, TEXT)
    stream = EXTENDED.request(WRITE, 1, 0, length, flags) + EXTENDED.request(READ, 2, 0, 9)
    assert talk(opened, EXTENDED, stream) == EXTENDED.error(1, EINVAL) + EXTENDED.content(2, 0, TEXT[:9])
    assert contents(opened, len(TEXT)) == TEXT


@pytest.mark.parametrize("length", [0, 5, PAGE, DEFAULT_LIMITS.buffer - 32, DEFAULT_LIMITS.buffer - 31, MIB + 1])
@pytest.mark.parametrize("command", [READ, FLUSH, TRIM, CACHE, WRITE_ZEROES, 8, 4711])
def test_a_payload_where_none_belongs_is_swallowed_and_refused(opened: OpenDevice, command: int, length: int) -> None:
    fill(opened, TEXT)
    payload = EXTENDED.request(TRIM, 66, 0, len(TEXT)) * (length // 32 + 1)
    stream = EXTENDED.request(command, 1, 0, length, PAYLOAD_LEN) + payload[:length] + EXTENDED.request(FLUSH, 2)
    assert talk(opened, EXTENDED, stream) == EXTENDED.error(1, EINVAL) + EXTENDED.done(2)
    assert contents(opened, len(TEXT)) == TEXT


@every_dialect
@pytest.mark.parametrize("length", [SMALL.payload + 1, 2 * SMALL.payload])
def test_a_payload_over_the_limit_is_swallowed_and_refused(opened: OpenDevice, dialect: Dialect, length: int) -> None:
    fill(opened, TEXT)
    stream = dialect.write(1, 0, bytes(length)) + dialect.request(FLUSH, 2)
    assert talk(opened, dialect, stream, limits=SMALL) == dialect.error(1, EINVAL) + dialect.done(2)
    assert contents(opened, len(TEXT)) == TEXT


@every_dialect
def test_a_payload_of_the_limit_is_written_and_read(opened: OpenDevice, dialect: Dialect) -> None:
    data = RAW * (SMALL.payload // len(RAW))
    stream = dialect.write(1, 4095, data) + dialect.request(READ, 2, 4095, SMALL.payload + 1)
    assert talk(opened, dialect, stream, limits=SMALL) == dialect.done(1, 4095) + dialect.error(2, EINVAL, 4095)
    assert contents(opened, len(data), 4095) == data


TOO_LONG = [
    (SIMPLE, WRITE, 2 * SMALL.payload + 1, 0),
    (SIMPLE, WRITE, 2**32 - 1, 0),
    (STRUCTURED, WRITE, 2**32 - 1, 0),
    *(
        (EXTENDED, command, length, PAYLOAD_LEN)
        for command in (WRITE, READ, FLUSH, BLOCK_STATUS, 4711)
        for length in (2 * SMALL.payload + 1, 2**32, 2**63, 2**64 - 1)
    ),
]


@pytest.mark.parametrize(("dialect", "command", "length", "flags"), TOO_LONG, ids=str)
def test_a_payload_too_long_to_swallow_ends_the_session_without_being_waited_or_made_room_for(
    opened: OpenDevice, dialect: Dialect, command: int, length: int, flags: int
) -> None:
    contexts = (Context.STATE,) if dialect.extended else ()
    tracemalloc.start()
    try:
        with serve(opened, dialect, contexts, limits=SMALL) as peer:
            # The payload never comes, and the client does not close.
            peer.client.sendall(dialect.request(FLUSH, 1) + dialect.request(command, 2, 0, length, flags) + bytes(99))
            assert receive_rest(peer.client) == dialect.done(1)
            assert isinstance(peer.join(), SessionError)
        assert tracemalloc.get_traced_memory()[1] < 2 * SMALL.payload
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("dialect", "other"), [(SIMPLE, EXTENDED), (STRUCTURED, EXTENDED), (EXTENDED, SIMPLE)], ids=str
)
@pytest.mark.parametrize("command", [READ, WRITE, FLUSH, 2])
def test_the_header_of_the_other_dialect_ends_the_session_after_what_came_before(
    opened: OpenDevice, dialect: Dialect, other: Dialect, command: int
) -> None:
    stream = dialect.write(1, 0, TEXT) + other.request(command, 2, 0, 8) + bytes(8) + dialect.write(3, 0, RAW)
    with serve(opened, dialect) as peer:
        assert exchange(peer.client, stream) == dialect.done(1)
        assert isinstance(peer.join(), SessionError)
    assert contents(opened, len(TEXT)) == TEXT


# Lengths of 64 bits


def test_lengths_over_4_gib_work_for_what_carries_no_payload(huge: OpenDevice) -> None:
    far = 5 * GIB
    fill(huge, TEXT)
    fill(huge, TEXT, far)
    before = huge.device.mm_stat().orig_data_size
    stream = (
        EXTENDED.request(CACHE, 1, 1, 6 * GIB - 1)
        + EXTENDED.request(READ, 2, far, 10)
        + EXTENDED.request(TRIM, 3, PAGE, far)
        + EXTENDED.request(READ, 4, far, PAGE + 10)
        + EXTENDED.request(WRITE_ZEROES, 5, 10, far + len(TEXT))
        + EXTENDED.request(READ, 6, far + len(TEXT) - PAGE, PAGE)
    )
    assert before == 2 * len(TEXT)
    assert talk(huge, EXTENDED, stream) == (
        EXTENDED.done(1, 1)
        + EXTENDED.content(2, far, TEXT[:10])
        + EXTENDED.done(3, PAGE)
        + EXTENDED.content(4, far, PAGE, TEXT[PAGE : PAGE + 10])
        + EXTENDED.done(5, 10)
        + EXTENDED.content(6, far + len(TEXT) - PAGE, PAGE)
    )
    assert contents(huge, PAGE) == TEXT[:10] + bytes(PAGE - 10)
    # A page at the beginning, and the one that was written in part at the end.
    assert huge.device.mm_stat().orig_data_size == 2 * PAGE


def test_lengths_over_4_gib_are_not_cut_to_32_bits(huge: OpenDevice) -> None:
    fill(huge, TEXT)
    stream = (
        EXTENDED.request(READ, 1, 0, 2**32)
        + EXTENDED.request(READ, 2, 0, 2**32 + 5, DF)
        + EXTENDED.request(TRIM, 3, 2 * GIB, 2**32 + PAGE)
        + EXTENDED.request(WRITE_ZEROES, 4, 2 * GIB + 1, 2**32)
        + EXTENDED.request(CACHE, 5, 0, 2**33)
        + EXTENDED.request(READ, 6, 2**32, 2**32)
    )
    errors = [EINVAL, EINVAL, EINVAL, ENOSPC, EINVAL, EINVAL]
    starts = [0, 0, 2 * GIB, 2 * GIB + 1, 0, 2**32]
    replies = talk(huge, EXTENDED, stream)
    assert replies == b"".join(
        EXTENDED.error(cookie, *what) for cookie, what in enumerate(zip(errors, starts, strict=True), 1)
    )
    assert contents(huge, len(TEXT)) == TEXT


OVERFLOWS = [
    (SIZE, 1),
    (SIZE - 1, 2),
    (1, SIZE),
    (2**32, 1),
    (2**63 - 1, 1),
    (2**63, 2**31),
    (2**64 - 1, 1),
    (2**64 - 1, 2**32 - 1),
    (2**64 - 4096, 4096),
    (2**64 - 4096, 8192),
]


@every_dialect
@pytest.mark.parametrize(
    ("command", "error"), [(READ, EINVAL), (TRIM, EINVAL), (CACHE, EINVAL), (WRITE_ZEROES, ENOSPC), (WRITE, ENOSPC)]
)
def test_what_is_beyond_the_end_is_refused_whatever_offset_and_length_add_up_to(
    opened: OpenDevice, dialect: Dialect, command: int, error: int
) -> None:
    fill(opened, TEXT, 0)
    ranges = OVERFLOWS
    if dialect.extended and command != WRITE:
        ranges = [*ranges, (0, 2**64 - 1), (2**64 - 1, 2**64 - 1), (1, 2**64 - 1), (2**63, 2**63)]
    if command == WRITE:
        ranges = [(offset, min(length, MIB)) for offset, length in ranges if offset > 1]
    for offset, length in ranges:
        if command == WRITE:
            asked = dialect.write(1, offset, b"x" * length)
        else:
            asked = dialect.request(command, 1, offset, length)
        replies = talk(opened, dialect, asked + dialect.request(FLUSH, 2))
        assert replies == dialect.error(1, error, offset) + dialect.done(2), (offset, length)
    assert contents(opened, len(TEXT)) == TEXT
    assert opened.device.mm_stat().orig_data_size == len(TEXT)


# Read-only exports


@every_dialect
@pytest.mark.parametrize("length", [0, 1, PAGE, len(RAW), DEFAULT_LIMITS.buffer, MIB + 5])
def test_a_read_only_export_permits_no_change_and_swallows_what_was_to_be_written(
    opened: OpenDevice, dialect: Dialect, length: int
) -> None:
    fill(opened, TEXT)
    payload = (RAW * 17)[:length]
    stream = (
        dialect.write(1, 0, payload)
        + dialect.request(FLUSH, 2)
        + dialect.write(3, 7, payload, FUA)
        + dialect.request(TRIM, 4, 0, length)
        + dialect.request(WRITE_ZEROES, 5, 0, length)
        + dialect.request(WRITE_ZEROES, 6, 0, length, NO_HOLE)
        + dialect.request(WRITE_ZEROES, 7, 0, length, FAST_ZERO)
    )
    replies = talk(opened, dialect, stream, read_only=True)
    answers = [dialect.error(1, EPERM), dialect.done(2), dialect.error(3, EPERM, 7)]
    answers += [dialect.error(cookie, EPERM) for cookie in (4, 5, 6, 7)]
    # A refusal may overtake the flush.
    assert len(replies) == sum(map(len, answers))
    assert all(answer in replies for answer in answers)
    assert contents(opened, len(TEXT)) == TEXT
    assert opened.device.mm_stat().orig_data_size == len(TEXT)


@every_dialect
def test_a_read_only_export_is_read_as_any_other(opened: OpenDevice, dialect: Dialect) -> None:
    fill(opened, TEXT)
    contexts = (Context.STATE,) if dialect.structured else ()
    stream = dialect.request(READ, 1, 5, 10) + dialect.request(FLUSH, 2) + dialect.request(CACHE, 3, 0, PAGE, FUA)
    expected = dialect.content(1, 5, TEXT[5:15]) + dialect.done(2) + dialect.done(3)
    if contexts:
        stream += dialect.request(BLOCK_STATUS, 4, 0, PAGE)
        expected += dialect.status(4, 0, {2: [(PAGE, 2)]})
    assert talk(opened, dialect, stream, contexts, read_only=True) == expected


# Zeros


@every_dialect
@pytest.mark.parametrize("flags", [FAST_ZERO, FAST_ZERO | NO_HOLE, FAST_ZERO | FUA])
@pytest.mark.parametrize(
    ("offset", "length", "error"),
    [
        (0, PAGE, 0),
        (PAGE - 1, PAGE + 1, 0),
        (PAGE, 2 * PAGE, 0),
        (1, 2 * PAGE, 0),
        (0, 1, ENOTSUP),
        (0, PAGE - 1, ENOTSUP),
        (1, PAGE - 1, ENOTSUP),
        (1, PAGE, ENOTSUP),
        (1, 2 * PAGE - 2, ENOTSUP),
        (PAGE - 1, 2, ENOTSUP),
        (SIZE - 1, 2, ENOSPC),
        (2**64 - 1, 1, ENOSPC),
    ],
)
def test_fast_zero_zeroes_where_there_is_a_whole_page_and_else_touches_nothing(
    opened: OpenDevice, dialect: Dialect, flags: int, offset: int, length: int, error: int
) -> None:
    fill(opened, TEXT)
    replies = talk(opened, dialect, dialect.request(WRITE_ZEROES, 1, offset, length, flags))
    if error:
        assert replies == dialect.error(1, error, offset)
        assert contents(opened, len(TEXT)) == TEXT
    else:
        assert replies == dialect.done(1, offset)
        assert contents(opened, len(TEXT)) == TEXT[:offset] + bytes(length) + TEXT[offset + length :]


@dialects_with_chunks
@pytest.mark.parametrize("length", [2 * PAGE, 2 * MIB], ids=["short", "long"])
def test_zeros_leave_holes_unless_the_client_wants_none(opened: OpenDevice, dialect: Dialect, length: int) -> None:
    fill(opened, TEXT * (5 * MIB // len(TEXT)))
    stream = (
        dialect.request(WRITE_ZEROES, 1, 0, length)
        + dialect.request(WRITE_ZEROES, 2, length, length, NO_HOLE)
        + dialect.request(BLOCK_STATUS, 3, 0, 2 * length + PAGE)
    )
    assert talk(opened, dialect, stream, (Context.ALLOCATION,)) == (
        dialect.done(1) + dialect.done(2, length) + dialect.status(3, 0, {1: [(length, 3), (length, 2), (PAGE, 0)]})
    )
    assert contents(opened, 2 * length + PAGE) == bytes(2 * length) + TEXT[2 * length % len(TEXT) :][:PAGE]
    assert opened.device.mm_stat().same_pages == length // PAGE


# Errors of the medium and of memory


@every_dialect
def test_a_flush_that_fails_is_an_error_of_all_who_asked(opened: OpenDevice, dialect: Dialect) -> None:
    def flush() -> None:
        raise OSError(EIO, "the disk is gone")

    stream = (
        dialect.write(1, 5, TEXT, FUA)
        + dialect.write(2, 0, b"x")
        + dialect.request(READ, 3, 0, 1)
        + dialect.request(FLUSH, 4, 9)
        + dialect.request(TRIM, 5, PAGE, PAGE, FUA)
    )
    terms = Terms(MODES[dialect])
    with Peer(lambda sock: Transmission(sock, opened.device, flush, terms).run()) as peer:
        replies = dialect.without_texts(exchange(peer.client, stream))
        assert peer.join() is None
    assert replies == (
        dialect.done(2)
        + dialect.content(3, 0, b"x")
        + dialect.error(1, EIO, 5)
        + dialect.error(4, EIO, 9)
        + dialect.error(5, EIO, PAGE)
    )


@every_dialect
def test_fua_is_answered_when_the_medium_has_the_data(opened: OpenDevice, dialect: Dialect) -> None:
    flushed: list[bytes] = []
    terms = Terms(MODES[dialect])
    device = opened.device

    def serve_and_note() -> Peer:
        return Peer(lambda sock: Transmission(sock, device, lambda: flushed.append(contents(opened, 8)), terms).run())

    with serve_and_note() as peer:
        answers = exchange(peer.client, dialect.write(1, 0, TEXT) + dialect.write(2, 0, RAW[:8], FUA))
    assert answers == dialect.done(1) + dialect.done(2)
    assert flushed == [RAW[:8]]


@every_dialect
def test_without_room_a_write_is_refused_and_the_session_stays_in_step(opened: OpenDevice, dialect: Dialect) -> None:
    fill(opened, RAW)
    opened.device.set_mem_limit(len(RAW))
    long = RAW * 16
    stream = (
        dialect.write(1, 0, RAW[PAGE : 2 * PAGE])
        + dialect.write(2, MIB, long)
        + dialect.request(WRITE_ZEROES, 3, 1, 1)
        + dialect.request(READ, 4, 0, len(RAW))
    )
    assert talk(opened, dialect, stream) == (
        dialect.error(1, ENOSPC)
        + dialect.error(2, ENOSPC, MIB)
        + dialect.error(3, ENOSPC, 1)
        + dialect.content(4, 0, RAW)
    )


@every_dialect
def test_a_damaged_page_cannot_be_changed_in_part(opened: OpenDevice, dialect: Dialect) -> None:
    fill(opened, TEXT)
    damage(opened.device, 1)
    stream = (
        dialect.write(1, PAGE + 5, b"x")
        + dialect.request(WRITE_ZEROES, 2, PAGE, 5)
        + dialect.write(3, PAGE, RAW[:PAGE])
        + dialect.request(READ, 4, PAGE, PAGE)
    )
    assert talk(opened, dialect, stream) == (
        dialect.error(1, EIO, PAGE + 5)
        + dialect.error(2, EIO, PAGE)
        + dialect.done(3, PAGE)
        + dialect.content(4, PAGE, RAW[:PAGE])
    )


@dialects_with_chunks
def test_each_of_several_errors_says_what_it_is_about(opened: OpenDevice, dialect: Dialect) -> None:
    fill(opened, TEXT)
    for page in (2, 5):
        damage(opened.device, page)
    opened.device.set_mem_limit(PAGE)
    with serve(opened, dialect) as peer:
        stream = (
            dialect.request(READ, 1, 2 * PAGE, PAGE)
            + dialect.write(2, MIB, RAW)
            + dialect.request(READ, 3, 5 * PAGE, PAGE)
            + dialect.request(READ, 4, PAGE, PAGE)
        )
        *errors, good = dialect.parse(exchange(peer.client, stream))
        assert peer.join() is None
    texts = [payload[6:].decode() for _, kind, _, _, payload in errors if kind == ERROR_CHUNK]
    assert len(texts) == 3
    for text, words in zip(texts, ("page 2 is damaged", f"limit of {PAGE} bytes", "page 5 is damaged"), strict=True):
        assert words in text
    assert good[2] == 4


# Many requests


@every_dialect
@pytest.mark.parametrize("length", [1, PAGE, 20 * PAGE])
def test_256_requests_in_flight_are_all_answered(opened: OpenDevice, dialect: Dialect, length: int) -> None:
    data = TEXT + RAW + bytes(20 * PAGE)
    fill(opened, data)
    stream = expected = b""
    for cookie in range(256):
        offset = cookie * 97 % (32 * PAGE)
        stream += dialect.request(READ, cookie, offset, length)
        part = data[offset : offset + length]
        if dialect.structured and offset + length > 32 * PAGE:
            begin = 32 * PAGE - offset
            expected += dialect.content(cookie, offset, part[:begin], length - begin)
        else:
            expected += dialect.content(cookie, offset, part)
    with serve(opened, dialect) as peer:
        # All are sent before an answer is taken; they fit the socket.
        peer.client.sendall(stream)
        assert receive(peer.client, len(expected)) == expected


@every_dialect
def test_one_cookie_may_be_that_of_all(opened: OpenDevice, dialect: Dialect) -> None:
    stream = b"".join(dialect.write(7, page * PAGE, TEXT[page : page + PAGE]) for page in range(64))
    stream += b"".join(dialect.request(READ, 7, page * PAGE, PAGE) for page in range(64))
    expected = b"".join(dialect.done(7, page * PAGE) for page in range(64))
    expected += b"".join(dialect.content(7, page * PAGE, TEXT[page : page + PAGE]) for page in range(64))
    assert talk(opened, dialect, stream) == expected


@pytest.mark.parametrize("dialect", [SIMPLE, STRUCTURED, EXTENDED], ids=str)
@pytest.mark.parametrize("length", [MIB + 1, 2 * MIB - 32])
def test_a_payload_over_the_limit_is_refused_though_the_buffer_would_hold_it(
    opened: OpenDevice, dialect: Dialect, length: int
) -> None:
    stream = dialect.request(READ, 1, 0, length) + dialect.write(2, 0, b"x" * length) + dialect.request(FLUSH, 3)
    limits = Limits(payload=MIB, memory=8 * MIB)
    wanted = dialect.error(1, EINVAL) + dialect.error(2, EINVAL) + dialect.done(3)
    assert talk(opened, dialect, stream, limits=limits) == wanted
    assert read(opened.device, 0, PAGE) == bytes(PAGE)
