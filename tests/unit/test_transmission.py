import itertools
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.nbd_bytes import (
    CACHE,
    DISC,
    EINVAL,
    EIO,
    ENOSPC,
    FLUSH,
    FUA,
    HEADER_BYTES,
    NO_HOLE,
    READ,
    REPLY_BYTES,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    Peer,
    exchange,
    receive,
    receive_rest,
    reply,
    request,
    wait_until_taken,
    waiting,
    write_request,
)
from tests.property.test_device import make_data
from zramd.device.codecs import codec
from zramd.device.opening import OpenDevice
from zramd.device.wanted import Wanted
from zramd.device.zram import Device
from zramd.layout import ENTRY_HANDLE_MASK, ENTRY_SIZE_MASK, ENTRY_SIZE_SHIFT
from zramd.memory import RegionStore
from zramd.nbd.limits import Limits
from zramd.nbd.protocol import SessionError
from zramd.nbd.transmission import DISCARD_SLICE, SWALLOW, Transmission

MAXIMUM_PAYLOAD = Limits().payload
MAX_SWALLOW = SWALLOW * MAXIMUM_PAYLOAD
BUFFER_SIZE, MAX_REPLY = Limits().buffer, Limits().reply
PAGE = 4096
MIB = 1 << 20
SIZE = 64 * MIB
TEXT = bytes(make_data("text", 1, 64 << 10))
RAW = bytes(make_data("random", 2, 64 << 10))


@dataclass
class Export:
    """What a transmission works on."""

    device: Device
    flush: Callable[[], None] | None


def make_export(opened: OpenDevice) -> Export:
    return Export(opened.device, opened.flush)


@pytest.fixture
def export(opened: OpenDevice) -> Export:
    return make_export(opened)


@pytest.fixture
def large() -> Iterator[Export]:
    """Return an export of 256 MiB: longer than any payload."""
    opened = OpenDevice(RegionStore(None), Wanted(disksize=256 * MIB, codec=codec("lz4")))
    yield make_export(opened)
    opened.close()


def serve(export: Export) -> Peer:
    return Peer(lambda sock: Transmission(sock, export.device, export.flush).run())


def talk(export: Export, *pieces: bytes) -> bytes:
    """Return the replies to a stream of requests, after which the client half-closes and the session ends well."""
    with serve(export) as peer:
        replies = exchange(peer.client, *pieces)
        assert peer.join() is None
    return replies


def read_back(export: Export, offset: int, length: int) -> bytes:
    replies = talk(export, request(READ, 1, offset, length))
    assert replies[:REPLY_BYTES] == reply(1)
    return replies[REPLY_BYTES:]


def parse_replies(data: bytes, lengths: dict[int, int]) -> dict[int, tuple[int, bytes]]:
    """Return {cookie: (error, data)} of a stream of replies; `lengths` says how much the reads among them return."""
    replies: dict[int, tuple[int, bytes]] = {}
    position = 0
    while position < len(data):
        magic, error, cookie = struct.unpack_from(">IIQ", data, position)
        assert magic == 0x67446698
        assert cookie not in replies
        position += REPLY_BYTES
        length = 0 if error else lengths.get(cookie, 0)
        replies[cookie] = error, data[position : position + length]
        position += length
    assert position == len(data)
    return replies


# One request at a time


def test_a_write_is_read_back(export: Export) -> None:
    assert talk(export, write_request(1, 0, TEXT) + request(READ, 2, 0, len(TEXT))) == reply(1) + reply(2, TEXT)


def test_what_was_never_written_reads_as_zeros(export: Export) -> None:
    assert talk(export, request(READ, 9, SIZE - 5000, 5000)) == reply(9, bytes(5000))


@pytest.mark.parametrize(("offset", "length"), [(1, 1), (4095, 2), (4095, 4098), (5, 4091), (4096, 1), (3, 20000)])
def test_a_write_of_parts_of_pages_leaves_the_rest_alone(export: Export, offset: int, length: int) -> None:
    new = RAW[:length]
    talk(export, write_request(1, 0, TEXT), write_request(2, offset, new))
    assert read_back(export, 0, len(TEXT)) == TEXT[:offset] + new + TEXT[offset + length :]


def test_flush_and_cache_are_answered(export: Export) -> None:
    replies = talk(export, request(FLUSH, 1) + request(CACHE, 2, 4096, 8192))
    assert parse_replies(replies, {}) == {1: (0, b""), 2: (0, b"")}


def test_trim_gives_whole_pages_back_and_leaves_parts_of_pages_alone(export: Export) -> None:
    talk(export, write_request(1, 0, TEXT))
    assert talk(export, request(TRIM, 2, 4000, 9000)) == reply(2)
    assert read_back(export, 0, len(TEXT)) == TEXT[:4096] + bytes(8192) + TEXT[12288:]
    assert export.device.mm_stat().orig_data_size == len(TEXT) - 8192


@pytest.mark.parametrize("flags", [0, NO_HOLE, FUA, FUA | NO_HOLE])
@pytest.mark.parametrize(("offset", "length"), [(0, 8192), (4000, 9000), (5, 10), (4090, 12), (4096, 1), (1, 4095)])
def test_write_zeroes_makes_exactly_its_range_read_as_zeros(
    export: Export, flags: int, offset: int, length: int
) -> None:
    talk(export, write_request(1, 0, TEXT))
    assert talk(export, request(WRITE_ZEROES, 2, offset, length, flags)) == reply(2)
    assert read_back(export, 0, len(TEXT)) == TEXT[:offset] + bytes(length) + TEXT[offset + length :]


@pytest.mark.parametrize("command", [READ, FLUSH, TRIM, CACHE, WRITE_ZEROES])
def test_fua_is_accepted_on_every_command(export: Export, command: int) -> None:
    answer = reply(3, bytes(4096)) if command == READ else reply(3)
    assert talk(export, request(command, 3, 4096, 4096, FUA)) == answer


def test_fua_is_accepted_on_a_write(export: Export) -> None:
    assert talk(export, write_request(3, 4096, TEXT, FUA)) == reply(3)


@pytest.mark.parametrize("cookie", [0, 1, 0x0102030405060708, 2**64 - 1])
@pytest.mark.parametrize("command", [READ, FLUSH, TRIM, CACHE, WRITE_ZEROES, 4711])
def test_a_reply_carries_the_cookie_of_its_request(export: Export, command: int, cookie: int) -> None:
    error = EINVAL if command == 4711 else 0
    assert talk(export, request(command, cookie, 0, 0)) == reply(cookie, error=error)


def test_a_cookie_may_be_used_twice_at_once(export: Export) -> None:
    stream = write_request(5, 0, TEXT[:4096]) + request(READ, 5, 0, 10) + request(READ, 5, 10, 10)
    assert talk(export, stream) == reply(5) + reply(5, TEXT[:10]) + reply(5, TEXT[10:20])


@pytest.mark.parametrize("offset", [0, 4095, SIZE - 1, SIZE])
@pytest.mark.parametrize("command", [READ, WRITE, TRIM, CACHE, WRITE_ZEROES])
def test_a_request_of_no_bytes_does_nothing_and_the_session_goes_on(export: Export, command: int, offset: int) -> None:
    assert talk(export, request(command, 1, offset, 0) + request(FLUSH, 2)) == reply(1) + reply(2)
    assert export.device.mm_stat().orig_data_size == 0


# What is refused

OUT_OF_BOUNDS = [
    (SIZE - 4096, 8192),
    (SIZE - 1, 2),
    (SIZE, 1),
    (SIZE + 4096, 4096),
    (2**32 - 4096, 8192),
    (2**63 - 1, 1),
    (2**63, 4096),
    (2**64 - 4096, 4096),
    (2**64 - 1, 1),
    (2**64 - 1, 2),
    (2**64 - 4096, 8192),
]


@pytest.mark.parametrize(("offset", "length"), OUT_OF_BOUNDS)
@pytest.mark.parametrize(
    ("command", "error"), [(READ, EINVAL), (TRIM, EINVAL), (CACHE, EINVAL), (WRITE_ZEROES, ENOSPC)]
)
def test_a_request_beyond_the_end_is_refused(
    export: Export, command: int, error: int, offset: int, length: int
) -> None:
    talk(export, write_request(1, SIZE - 4096, TEXT[:4096]))
    stream = request(command, 2, offset, length) + request(FLUSH, 3)
    assert parse_replies(talk(export, stream), {}) == {2: (error, b""), 3: (0, b"")}
    assert read_back(export, SIZE - 4096, 4096) == TEXT[:4096]


@pytest.mark.parametrize(("offset", "length"), OUT_OF_BOUNDS)
def test_a_write_beyond_the_end_is_swallowed_and_writes_nothing(export: Export, offset: int, length: int) -> None:
    stream = write_request(2, offset, RAW[:length]) + request(FLUSH, 3)
    assert parse_replies(talk(export, stream), {}) == {2: (ENOSPC, b""), 3: (0, b"")}
    assert export.device.mm_stat().orig_data_size == 0


@pytest.mark.parametrize("command", [TRIM, WRITE_ZEROES, CACHE, READ])
@pytest.mark.parametrize("offset", [0, 1, 2**32, 2**64 - 2**32 + 1])
def test_the_longest_length_is_refused_where_it_is_beyond_the_end(export: Export, command: int, offset: int) -> None:
    error = ENOSPC if command == WRITE_ZEROES else EINVAL
    stream = request(command, 1, offset, 2**32 - 1) + request(FLUSH, 2)
    assert parse_replies(talk(export, stream), {}) == {1: (error, b""), 2: (0, b"")}


@pytest.mark.parametrize("command", [7, 8, 9, 255, 0xFFFF])
def test_an_unknown_command_is_refused_and_the_session_goes_on(export: Export, command: int) -> None:
    stream = request(command, 1, 2**64 - 1, 2**32 - 1) + request(FLUSH, 2)
    assert parse_replies(talk(export, stream), {}) == {1: (EINVAL, b""), 2: (0, b"")}


UNKNOWN_FLAGS = [
    *((command, 1 << bit) for command in (READ, FLUSH, TRIM, CACHE) for bit in (1, 2, 3, 4, 5, 15)),
    *((WRITE_ZEROES, 1 << bit) for bit in (2, 3, 5, 15)),
    (READ, FUA | 4),
    (WRITE_ZEROES, 0xFFFF),
]


@pytest.mark.parametrize(("command", "flags"), UNKNOWN_FLAGS)
def test_unknown_flags_are_refused_and_the_session_goes_on(export: Export, command: int, flags: int) -> None:
    talk(export, write_request(1, 0, TEXT))
    stream = request(command, 2, 0, 4096, flags) + request(FLUSH, 3)
    assert parse_replies(talk(export, stream), {}) == {2: (EINVAL, b""), 3: (0, b"")}
    assert read_back(export, 0, len(TEXT)) == TEXT


@pytest.mark.parametrize("flags", [NO_HOLE, 4, 8, 16, 32, 0x8000, 0xFFFF])
@pytest.mark.parametrize("length", [0, 4096, MIB])
def test_a_write_with_unknown_flags_is_swallowed_and_writes_nothing(export: Export, flags: int, length: int) -> None:
    stream = write_request(2, 0, b"x" * length, flags) + request(FLUSH, 3)
    assert parse_replies(talk(export, stream), {}) == {2: (EINVAL, b""), 3: (0, b"")}
    assert export.device.mm_stat().orig_data_size == 0


@pytest.mark.parametrize("length", [MAXIMUM_PAYLOAD + 1, MAX_SWALLOW])
def test_a_write_over_the_largest_payload_is_swallowed_and_writes_nothing(large: Export, length: int) -> None:
    replies = talk(large, request(WRITE, 1, 0, length), b"x" * length, request(FLUSH, 2))
    assert replies == reply(1, error=EINVAL) + reply(2)
    assert large.device.mm_stat().orig_data_size == 0


@pytest.mark.parametrize("length", [MAX_SWALLOW + 1, 2**32 - 1])
def test_a_write_too_long_to_swallow_ends_the_session_before_its_payload(large: Export, length: int) -> None:
    with serve(large) as peer:
        peer.client.sendall(request(FLUSH, 1) + request(WRITE, 2, 0, length))
        assert receive_rest(peer.client) == reply(1)
        assert isinstance(peer.join(), SessionError)


def test_a_read_over_the_largest_payload_is_refused(large: Export) -> None:
    stream = request(READ, 1, 0, MAXIMUM_PAYLOAD + 1) + request(READ, 2, 0, 2**32 - 1) + request(FLUSH, 3)
    assert parse_replies(talk(large, stream), {}) == {1: (EINVAL, b""), 2: (EINVAL, b""), 3: (0, b"")}


@pytest.mark.parametrize("magic", [bytes(4), b"\x25\x60\x95\x14", b"\x21\xe4\x1c\x71", b"GET "])
def test_a_wrong_magic_ends_the_session_after_what_came_before_is_answered(export: Export, magic: bytes) -> None:
    wrong = magic + request(FLUSH, 2)[4:]
    with serve(export) as peer:
        assert exchange(peer.client, write_request(1, 0, TEXT) + wrong + request(FLUSH, 3)) == reply(1)
        assert isinstance(peer.join(), SessionError)
    assert read_back(export, 0, len(TEXT)) == TEXT


# How a session ends


def test_disconnect_answers_what_came_before_and_then_closes(export: Export) -> None:
    stream = write_request(1, 0, TEXT) + request(READ, 2, 0, 100) + request(FLUSH, 3) + request(DISC, 4)
    with serve(export) as peer:
        peer.client.sendall(stream + request(READ, 5, 0, 100))
        assert receive_rest(peer.client) == reply(1) + reply(2, TEXT[:100]) + reply(3)
        assert peer.join() is None


def test_disconnect_behind_long_requests_loses_none_of_them(export: Export) -> None:
    data = bytes(make_data("text", 3, 2 * MIB))
    stream = write_request(1, 77, data) + request(READ, 2, 77, len(data)) + request(DISC, 3)
    with serve(export) as peer:
        threading.Thread(target=peer.client.sendall, args=(stream,), daemon=True).start()
        assert receive_rest(peer.client) == reply(1) + reply(2, data)
        assert peer.join() is None


def test_a_client_that_closes_without_disconnect_is_no_error(export: Export) -> None:
    with serve(export) as peer:
        peer.client.close()
        assert peer.join() is None


@pytest.mark.parametrize("length", [1, 4, 27])
def test_the_end_in_the_middle_of_a_header_ends_the_session(export: Export, length: int) -> None:
    assert talk(export, request(FLUSH, 1) + request(FLUSH, 2)[:length]) == reply(1)


@pytest.mark.parametrize("received", [0, 1, 4096, 65535])
def test_the_end_in_the_middle_of_a_payload_writes_nothing_of_it(export: Export, received: int) -> None:
    talk(export, write_request(1, 0, TEXT))
    assert talk(export, request(FLUSH, 2) + write_request(3, 0, RAW)[: HEADER_BYTES + received]) == reply(2)
    assert read_back(export, 0, len(TEXT)) == TEXT


def test_the_end_in_the_middle_of_a_long_payload_ends_the_session_without_an_answer(export: Export) -> None:
    with serve(export) as peer:
        assert exchange(peer.client, request(WRITE, 1, 0, 4 * MIB) + bytes(3 * MIB)) == b""
        assert isinstance(peer.join(), SessionError)
    assert read_back(export, 3 * MIB, MIB) == bytes(MIB)


def test_a_client_that_leaves_without_taking_its_replies_hurts_nobody(export: Export) -> None:
    talk(export, write_request(1, 0, RAW))
    with serve(export) as peer:
        peer.client.sendall(b"".join(request(READ, cookie, 0, len(RAW)) for cookie in range(200)))
        receive(peer.client, 100)
        peer.client.close()
        assert isinstance(peer.join(), OSError)
    assert read_back(export, 0, len(RAW)) == RAW


# Flush


def test_fua_and_flush_are_answered_only_after_the_medium_has_the_data(opened: OpenDevice) -> None:
    answered: list[int] = []
    peers: list[Peer] = []
    export = Export(opened.device, lambda: answered.append(waiting(peers[0].client)))
    with serve(export) as peer:
        peers.append(peer)
        for number, stream in enumerate(
            [
                request(FLUSH, 1),
                write_request(2, 0, TEXT[:4096], FUA),
                write_request(3, 0, TEXT[:5000] * 300, FUA),
                request(TRIM, 4, 0, 4096, FUA),
                request(WRITE_ZEROES, 5, 0, 4096, FUA),
                request(WRITE_ZEROES, 6, 0, SIZE, FUA),
            ],
            1,
        ):
            peer.client.sendall(stream)
            assert receive(peer.client, REPLY_BYTES) == reply(number)
            assert answered == [0] * number


def test_only_what_asks_for_durability_flushes(opened: OpenDevice) -> None:
    def flush() -> None:
        pytest.fail("nobody asked for it")

    export = Export(opened.device, flush)
    stream = write_request(1, 0, TEXT) + request(READ, 2, 0, 1) + request(TRIM, 3, 0, SIZE) + request(CACHE, 4)
    assert talk(export, stream) == reply(1) + reply(2, TEXT[:1]) + reply(3) + reply(4)


def test_a_flush_that_fails_is_an_error_of_all_who_asked_and_the_session_goes_on(opened: OpenDevice) -> None:
    def flush() -> None:
        raise OSError(EIO, "the disk is gone")

    export = Export(opened.device, flush)
    stream = write_request(1, 0, TEXT, FUA) + write_request(2, 0, TEXT) + request(FLUSH, 3) + request(READ, 4, 0, 9)
    assert parse_replies(talk(export, stream), {4: 9}) == {
        1: (EIO, b""),
        2: (0, b""),
        3: (EIO, b""),
        4: (0, TEXT[:9]),
    }


# Long requests


@pytest.mark.parametrize(("offset", "length"), [(0, MIB), (12345, MIB + 1), (4095, 33 * MIB + 17), (0, SIZE)])
def test_a_write_longer_than_the_buffer_is_read_back_by_a_read_longer_than_a_reply(
    export: Export, offset: int, length: int
) -> None:
    data = (TEXT + RAW[:12289] + bytes(50_001)) * (length // 127_826 + 1)
    data = data[:length]
    with serve(export) as peer:
        stream = write_request(1, offset, data) + request(READ, 2, offset, length) + request(FLUSH, 3)
        replies = exchange(peer.client, stream)
    assert replies[:REPLY_BYTES] == reply(1)
    assert replies[-REPLY_BYTES:] == reply(3)
    assert replies[REPLY_BYTES:-REPLY_BYTES] == reply(2, data)
    if offset:
        assert read_back(export, 0, offset) == bytes(offset)
        assert read_back(export, offset + length, 4096) == bytes(4096)


@pytest.mark.parametrize("before", [0, 1, 3])
@pytest.mark.parametrize("length", [BUFFER_SIZE + less for less in (-4096, -57, -56, -55, -29, -28, -27, -1, 0, 1)])
def test_writes_around_the_size_of_the_buffer_are_whole(export: Export, before: int, length: int) -> None:
    data = (RAW * (length // len(RAW) + 1))[:length]
    stream = request(CACHE, 9) * before + write_request(1, 100, data) + request(READ, 2, 100, length)
    assert talk(export, stream) == reply(9) * before + reply(1) + reply(2, data)


@pytest.mark.parametrize("length", [MAX_REPLY - 1, MAX_REPLY, MAX_REPLY + 1, 5 * MAX_REPLY + 17])
@pytest.mark.parametrize("offset", [0, 4095])
def test_reads_around_the_largest_reply_are_whole(export: Export, offset: int, length: int) -> None:
    data = bytes(make_data("half", 4, 6 * MIB))
    talk(export, write_request(1, 0, data))
    stream = request(READ, 1, offset, length) + request(READ, 2, 7, 20)
    assert talk(export, stream) == reply(1, data[offset : offset + length]) + reply(2, data[7:27])


@pytest.mark.parametrize("command", [TRIM, WRITE_ZEROES])
@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (5000, DISCARD_SLICE + 1),
        (4095, 3 * DISCARD_SLICE),
        (1, 9 * MIB),
        (0, 2 * DISCARD_SLICE),
        (MIB - 1, 5 * MIB + 2),
    ],
)
def test_long_trims_and_zeroes_with_ragged_ends_clear_just_their_range(
    export: Export, command: int, offset: int, length: int
) -> None:
    data = TEXT * 256
    talk(export, write_request(1, 0, data))
    assert talk(export, request(command, 1, offset, length) + request(FLUSH, 2)) == reply(1) + reply(2)
    end = offset + length
    if command == TRIM:
        offset, end = -(-offset // PAGE) * PAGE, end // PAGE * PAGE
    assert read_back(export, 0, len(data)) == data[:offset] + bytes(end - offset) + data[end:]


# Damaged pages and lack of room


def damage(export: Export, page: int) -> None:
    """Overwrite the compressed bytes of a page in the pool."""
    entry = dict(export.device.entries())[page]
    size = entry >> ENTRY_SIZE_SHIFT & ENTRY_SIZE_MASK
    export.device.pool.map(entry & ENTRY_HANDLE_MASK, size)[:] = b"\xff" * size


def test_a_damaged_page_is_an_error_of_the_reads_that_touch_it(export: Export) -> None:
    talk(export, write_request(1, 0, TEXT))
    damage(export, 2)
    stream = (
        request(READ, 1, 0, 8192)
        + request(READ, 2, 0, len(TEXT))
        + request(READ, 3, 8192, 1)
        + request(READ, 4, 12287, 2)
        + request(READ, 5, 12288, 4096)
    )
    assert parse_replies(talk(export, stream), {1: 8192, 5: 4096}) == {
        1: (0, TEXT[:8192]),
        2: (EIO, b""),
        3: (EIO, b""),
        4: (EIO, b""),
        5: (0, TEXT[12288:16384]),
    }


def test_a_damaged_page_cannot_be_changed_in_part_but_written_whole_or_zeroed(export: Export) -> None:
    talk(export, write_request(1, 0, TEXT))
    damage(export, 2)
    damage(export, 3)
    stream = write_request(1, 8200, b"x") + request(WRITE_ZEROES, 2, 8200, 1)
    assert parse_replies(talk(export, stream), {}) == {1: (EIO, b""), 2: (EIO, b"")}
    stream = write_request(3, 8192, RAW[:4096]) + request(TRIM, 4, 12288, 4096)
    assert talk(export, stream) == reply(3) + reply(4)
    assert read_back(export, 0, len(TEXT)) == TEXT[:8192] + RAW[:4096] + bytes(4096) + TEXT[16384:]


def test_a_long_read_of_a_damaged_page_ends_that_session_without_wrong_data(export: Export) -> None:
    data = TEXT * 64
    talk(export, write_request(1, 0, data))
    damage(export, 600)
    with serve(export) as peer:
        answer = exchange(peer.client, request(READ, 1, 0, len(data)) + request(FLUSH, 2))
        assert isinstance(peer.join(), SessionError)
    assert len(answer) < REPLY_BYTES + 600 * PAGE
    assert reply(1, data).startswith(answer)
    assert read_back(export, 0, 600 * PAGE) == data[: 600 * PAGE]


def test_a_long_write_that_meets_a_damaged_page_answers_an_error_and_stays_in_step(export: Export) -> None:
    talk(export, write_request(1, 0, TEXT))
    damage(export, 0)
    assert talk(export, write_request(1, 1, RAW * 32) + request(FLUSH, 2)) == reply(1, error=EIO) + reply(2)


def test_at_the_memory_limit_a_write_is_refused_and_old_data_stay(export: Export) -> None:
    talk(export, write_request(1, 0, RAW))
    export.device.set_mem_limit(len(RAW))
    stream = write_request(1, 0, RAW[4096:8192]) + write_request(2, MIB, RAW[:4096]) + request(READ, 3, 0, len(RAW))
    assert parse_replies(talk(export, stream), {3: len(RAW)}) == {1: (ENOSPC, b""), 2: (ENOSPC, b""), 3: (0, RAW)}
    assert read_back(export, MIB, 4096) == bytes(4096)
    stream = request(TRIM, 1, 0, 8192) + write_request(2, MIB, RAW[:4096]) + request(READ, 3, MIB, 4096)
    assert talk(export, stream) == reply(1) + reply(2) + reply(3, RAW[:4096])


def test_a_long_write_that_runs_into_the_memory_limit_stays_in_step(export: Export) -> None:
    export.device.set_mem_limit(MIB)
    data = bytes(make_data("random", 5, 4 * MIB))
    assert talk(export, write_request(1, 0, data) + request(FLUSH, 2)) == reply(1, error=ENOSPC) + reply(2)
    kept = read_back(export, 0, len(data))
    assert kept == data[:MIB] + bytes(3 * MIB)


def test_write_zeroes_of_a_part_of_a_page_at_the_memory_limit_is_refused(export: Export) -> None:
    talk(export, write_request(1, 0, RAW))
    export.device.set_mem_limit(len(RAW))
    stream = request(WRITE_ZEROES, 1, 0, 1) + request(WRITE_ZEROES, 2, 4096, 4096)
    assert parse_replies(talk(export, stream), {}) == {1: (ENOSPC, b""), 2: (0, b"")}
    assert read_back(export, 0, len(RAW)) == RAW[:4096] + bytes(4096) + RAW[8192:]


# Streams of requests


@dataclass(frozen=True)
class Request:
    """A request, and what the disk makes of it."""

    command: int
    offset: int = 0
    length: int = 0
    flags: int = 0
    payload: bytes = b""

    def pack(self, cookie: int) -> bytes:
        return request(self.command, cookie, self.offset, self.length, self.flags) + self.payload

    def apply(self, disk: bytearray) -> tuple[int, bytes]:
        """Change `disk` and return the error number and the data of the reply."""
        end = self.offset + self.length
        allowed = FUA | NO_HOLE if self.command == WRITE_ZEROES else FUA
        if self.flags & ~allowed or self.command > WRITE_ZEROES:
            return EINVAL, b""
        if self.command == FLUSH:
            return 0, b""
        if end > len(disk):
            return (ENOSPC if self.command in (WRITE, WRITE_ZEROES) else EINVAL), b""
        if self.command == READ:
            return 0, bytes(disk[self.offset : end])
        if self.command == WRITE:
            disk[self.offset : end] = self.payload
        elif self.command == WRITE_ZEROES:
            disk[self.offset : end] = bytes(self.length)
        elif self.command == TRIM:
            first, last = -(-self.offset // PAGE) * PAGE, end // PAGE * PAGE
            if last > first:
                disk[first:last] = bytes(last - first)
        return 0, b""


def random_request(generator: random.Random, disksize: int, longest: int) -> Request:
    command = generator.choices([READ, WRITE, FLUSH, TRIM, CACHE, WRITE_ZEROES, 4711], [30, 30, 5, 10, 5, 10, 3], k=1)[
        0
    ]
    offset, length = generator.randrange(disksize), generator.randrange(longest)
    if generator.random() < 0.5:
        offset, length = offset // PAGE * PAGE, -(-length // PAGE) * PAGE
    if generator.random() < 0.9:
        length = min(length, disksize - offset)
    chosen = Request(command, offset, length, generator.choice([0] * 8 + [FUA, NO_HOLE, 0x8000]))
    if command == WRITE:
        kind = generator.choice(["zero", "pattern", "half", "random"])
        chosen = replace(chosen, payload=bytes(make_data(kind, generator.randrange(1000), length)))
    return chosen


def expected_replies(requests: list[Request], disk: bytearray) -> dict[int, tuple[int, bytes]]:
    return {cookie: chosen.apply(disk) for cookie, chosen in enumerate(requests)}


def check(export: Export, requests: list[Request], pieces: list[bytes]) -> None:
    """Send requests, as bytes cut up anyhow, to an empty disk, and compare all replies and the disk afterwards."""
    disk = bytearray(export.device.disksize)
    expected = expected_replies(requests, disk)
    lengths = {cookie: chosen.length for cookie, chosen in enumerate(requests) if chosen.command == READ}
    assert parse_replies(talk(export, *pieces), lengths) == expected
    assert read_back(export, 0, len(disk)) == disk


def stream_of(requests: list[Request]) -> bytes:
    return b"".join(chosen.pack(cookie) for cookie, chosen in enumerate(requests))


def run_on_a_small_disk(requests: list[Request], pieces: list[bytes]) -> None:
    opened = OpenDevice(RegionStore(None), Wanted(disksize=16 * PAGE, codec=codec("lz4")))
    try:
        check(make_export(opened), requests, pieces)
    finally:
        opened.close()


def test_a_stream_split_at_any_byte_gives_the_same_replies() -> None:
    requests = [
        Request(WRITE, 4070, 50, payload=TEXT[:50]),
        Request(READ, 4060, 70),
        Request(READ, 16 * PAGE, 1),
        Request(WRITE, 0, 20, NO_HOLE, RAW[:20]),
        Request(4711, 5, 5),
        Request(WRITE, 16 * PAGE - 10, 20, 0, RAW[:20]),
        Request(WRITE_ZEROES, 4096, 10, FUA),
        Request(TRIM, 0, 4096),
        Request(FLUSH),
        Request(CACHE, 0, 4096),
        Request(READ, 4060, 70),
    ]
    stream = stream_of(requests)
    opened = OpenDevice(RegionStore(None), Wanted(disksize=16 * PAGE, codec=codec("lz4")))
    try:
        for split in range(1, len(stream)):
            check(make_export(opened), requests, [stream[:split], stream[split:]])
            talk(make_export(opened), request(TRIM, 1, 0, 16 * PAGE))
    finally:
        opened.close()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 40), cuts=st.lists(st.integers(0, 2**20), max_size=20))
def test_a_stream_cut_into_any_pieces_gives_the_replies_that_the_protocol_asks_for(
    seed: int, count: int, cuts: list[int]
) -> None:
    generator = random.Random(seed)
    requests = [random_request(generator, 16 * PAGE, 3 * PAGE) for _ in range(count)]
    stream = stream_of(requests)
    edges = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    run_on_a_small_disk(requests, [stream[start:end] for start, end in itertools.pairwise(edges)])


@pytest.mark.parametrize("longest", [2 * PAGE, 64 * PAGE, 256 * PAGE], ids=["short", "mixed", "long"])
def test_300_pipelined_requests_are_carried_out_in_order(longest: int) -> None:
    generator = random.Random(longest)
    opened = OpenDevice(RegionStore(None), Wanted(disksize=8 * MIB, codec=codec("lz4")))
    requests = [random_request(generator, 8 * MIB, longest) for _ in range(300)]
    try:
        check(make_export(opened), requests, [stream_of(requests)])
    finally:
        opened.close()


def test_more_replies_than_one_system_call_takes_are_all_sent(export: Export) -> None:
    talk(export, write_request(1, 0, TEXT))
    stream = b"".join(request(READ, cookie, cookie, 1) for cookie in range(5000))
    expected = b"".join(reply(cookie, TEXT[cookie : cookie + 1]) for cookie in range(5000))
    assert talk(export, stream) == expected


def test_replies_that_the_socket_takes_in_parts_arrive_whole(export: Export) -> None:
    talk(export, write_request(1, 0, TEXT))

    def serve_slowly(sock: socket.socket) -> None:
        # With a timeout, a send returns as soon as the small buffer is full.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
        sock.settimeout(60)
        Transmission(sock, export.device, export.flush).run()

    generator = random.Random(6)
    ranges = [(generator.randrange(30_000), generator.randrange(9000)) for _ in range(600)]
    with Peer(serve_slowly) as peer:
        stream = b"".join(request(READ, cookie, *where) for cookie, where in enumerate(ranges))
        replies = exchange(peer.client, stream)
        assert peer.join() is None
    assert replies == b"".join(
        reply(cookie, TEXT[offset : offset + length]) for cookie, (offset, length) in enumerate(ranges)
    )


def test_a_client_that_does_not_read_holds_up_nobody_and_gets_everything_afterwards(export: Export) -> None:
    data = RAW * 16
    talk(export, write_request(1, 0, data))
    with serve(export) as peer:
        peer.client.sendall(b"".join(request(READ, cookie, 0, MIB) for cookie in range(64)))
        full = 0
        while not full or waiting(peer.client) > full:
            full = waiting(peer.client)
            time.sleep(0.01)
        # Replies that nobody takes are not piled up in memory.
        assert export.device.request_stat().reads < 8
        assert read_back(export, 0, len(RAW)) == RAW
        talk(export, write_request(1, MIB, TEXT))
        for cookie in range(64):
            assert receive(peer.client, REPLY_BYTES) == reply(cookie)
            assert receive(peer.client, MIB) == data
        peer.client.sendall(request(READ, 99, MIB, 10))
        assert receive(peer.client, REPLY_BYTES + 10) == reply(99, TEXT[:10])


def test_a_request_is_answered_while_the_next_one_is_still_incomplete(export: Export) -> None:
    with serve(export) as peer:
        peer.client.sendall(write_request(1, 0, TEXT) + write_request(2, 0, RAW)[:5000])
        assert receive(peer.client, REPLY_BYTES) == reply(1)
        peer.client.sendall(write_request(2, 0, RAW)[5000:] + request(FLUSH, 3)[:10])
        assert receive(peer.client, REPLY_BYTES) == reply(2)
        wait_until_taken(peer.client)
        peer.client.sendall(request(FLUSH, 3)[10:])
        assert receive(peer.client, REPLY_BYTES) == reply(3)


def test_what_one_connection_was_answered_another_one_reads(export: Export) -> None:
    with serve(export) as writer, serve(export) as reader:
        for number in range(200):
            page = RAW[number * 100 : number * 100 + 4096]
            writer.client.sendall(write_request(number, number % 7 * 4096, page))
            assert receive(writer.client, REPLY_BYTES) == reply(number)
            reader.client.sendall(request(READ, number, number % 7 * 4096, 4096))
            assert receive(reader.client, REPLY_BYTES + 4096) == reply(number, page)


def test_what_was_compressed_before_the_algorithm_changed_is_compressed_anew(
    opened: OpenDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    parse = Transmission._parse

    def parse_and_change(self: Transmission) -> object:
        parsed = parse(self)
        # No page has a codec yet: the second change gives the number of the first codec to another.
        for name in ("lz4hc", "zstd"):
            opened.set_algorithm(0, codec(name))
        return parsed

    monkeypatch.setattr(Transmission, "_parse", parse_and_change)
    pages = [TEXT[start : start + PAGE] for start in range(0, 8 * PAGE, PAGE)]
    # The first is for the loop that sees all requests, of both engines.
    sent = write_request(0, 100 * PAGE + 1, b"part")
    sent += b"".join(write_request(number, number * PAGE, page) for number, page in enumerate(pages, 1))
    with Peer(lambda sock: Transmission(sock, opened.device, None).run()) as peer:
        peer.client.sendall(sent)
        for number in range(len(pages) + 1):
            assert receive(peer.client, REPLY_BYTES) == reply(number)
        for number, page in enumerate(pages, 1):
            peer.client.sendall(request(READ, number, number * PAGE, PAGE))
            assert receive(peer.client, REPLY_BYTES + PAGE) == reply(number, page)
