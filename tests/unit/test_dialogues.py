import contextlib
import logging
import random
import socket
import struct
import threading
import time
import tracemalloc
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.nbd_bytes import (
    ABORT,
    ACK,
    BLOCK_STATUS,
    CACHE,
    DISC,
    EINVAL,
    ERR_EXT_HEADER_REQD,
    ERR_INVALID,
    ERR_POLICY,
    ERR_UNKNOWN,
    ERR_UNSUP,
    EXPORT_NAME,
    EXTENDED,
    EXTENDED_HEADERS,
    FLUSH,
    GO,
    GREETING,
    INFO,
    INFO_REPLY,
    LIST,
    META_CONTEXT,
    NO_HOLE,
    PAYLOAD_LEN,
    READ,
    REQ_ONE,
    SERVER,
    SET_META_CONTEXT,
    SIMPLE,
    STARTTLS,
    STRUCTURED,
    STRUCTURED_REPLY,
    TRIM,
    WRITE_ZEROES,
    Dialect,
    client_flags,
    context_request,
    exchange,
    info_request,
    option,
    option_reply,
    receive,
    receive_rest,
    request,
    without_option_texts,
)
from tests.property.test_device import make_data, read
from zramd.device.codecs import codec
from zramd.device.disk import Disk
from zramd.device.opening import OpenDevice
from zramd.device.wanted import Wanted
from zramd.listeners import listen_tcp, listen_unix
from zramd.memory import RegionStore
from zramd.nbd.export import Export, Exports
from zramd.nbd.handshake import Handshake, Session
from zramd.nbd.limits import DEFAULT_LIMITS, Limits
from zramd.nbd.server import Server

PAGE = 4096
KIB, MIB = 1 << 10, 1 << 20
SMALL_SIZE = 16 * PAGE
UUID = b"0f3c9a52-6d1b-4f0e-9c55-3a1f6f2f7a10"
TEXT = bytes(make_data("text", 1, 64 * KIB))
RAW = bytes(make_data("random", 2, 4 * MIB))


@pytest.fixture
def small() -> Iterator[OpenDevice]:
    """Return a device of 16 pages."""
    opened = OpenDevice(RegionStore(None), Wanted(disksize=SMALL_SIZE, codec=codec("lz4")))
    yield opened
    opened.close()


def exports_of(opened: OpenDevice) -> Exports:
    opened.device.identity = replace(opened.device.identity, uuid=uuid.UUID(UUID.decode()))
    disk = Disk("disk", None)
    disk.opened = opened
    return Exports([Export("disk", "a disk", disk), Export("locked", "", disk, read_only=True)])


@contextlib.contextmanager
def serving(opened: OpenDevice, limits: Limits = DEFAULT_LIMITS) -> Iterator[Server]:
    """Run a whole server, which must end in time and have nobody left."""
    server = Server(exports_of(opened), limits)
    try:
        yield server
    finally:
        assert server.stop(60)
    assert len(server) == 0


@pytest.fixture(autouse=True)
def no_defects(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Check that nothing a client did was an error that the server had not expected."""
    yield
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


def join(server: Server) -> socket.socket:
    """Return a client's end of a new connection."""
    client, served = socket.socketpair()
    client.settimeout(60)
    server.adopt(served)
    return client


def converse(server: Server, *pieces: bytes) -> bytes:
    with join(server) as client:
        return exchange(client, *pieces)


def enter(server: Server, dialect: Dialect = SIMPLE) -> socket.socket:
    """Return a connection to the default export in transmission."""
    client = join(server)
    start(client, dialect)
    # Only an answer to a request says that the server has left the handshake behind.
    client.sendall(dialect.request(CACHE, 0))
    assert receive(client, len(dialect.done(0))) == dialect.done(0)
    return client


def start(client: socket.socket, dialect: Dialect) -> None:
    chosen = {SIMPLE: b"", STRUCTURED: option(STRUCTURED_REPLY), EXTENDED: option(EXTENDED_HEADERS)}[dialect]
    if dialect.structured:
        chosen += option(SET_META_CONTEXT, context_request(b"", b"base:allocation", b"zramd:state"))
    client.sendall(client_flags() + chosen + option(GO, info_request(b"")))
    assert receive(client, len(GREETING)) == GREETING
    kind = reply_type = 0
    while (kind, reply_type) != (GO, ACK):
        _, kind, reply_type, length = struct.unpack(">QIII", receive(client, 20))
        assert reply_type < 1 << 31
        receive(client, length)


def check_alive(server: Server) -> None:
    """Check that a new client is served."""
    answer = converse(server, client_flags() + option(EXPORT_NAME) + SIMPLE.request(FLUSH, 5) + SIMPLE.request(DISC, 6))
    assert answer.startswith(GREETING)
    assert answer.endswith(SIMPLE.done(5))


# Whole sessions

WRITABLE, DF, BLOCK_STATUS_PAYLOAD = 0b1101_0110_1101, 1 << 7, 1 << 12


def information(kind: int, flags: int) -> bytes:
    about = option_reply(kind, INFO_REPLY, struct.pack(">HQH", 0, SMALL_SIZE, flags))
    sizes = option_reply(kind, INFO_REPLY, struct.pack(">HIII", 3, 1, 4096, 64 << 20))
    return about + sizes + option_reply(kind, ACK)


def selected(*contexts: tuple[int, bytes]) -> bytes:
    replies = (option_reply(SET_META_CONTEXT, META_CONTEXT, struct.pack(">I", at) + name) for at, name in contexts)
    return b"".join(replies) + option_reply(SET_META_CONTEXT, ACK)


def transmission(dialect: Dialect) -> list[tuple[bytes, bytes]]:
    """Return requests and their replies, in this order however they are sent: none is refused, none is flushed."""
    text = TEXT[:70]
    return [
        (dialect.request(TRIM, 1, 0, SMALL_SIZE), dialect.done(1)),
        (dialect.write(2, 4060, text), dialect.done(2, 4060)),
        (dialect.request(READ, 3, 4060, 70), dialect.content(3, 4060, text)),
        (dialect.request(WRITE_ZEROES, 4, 4100, 5, NO_HOLE), dialect.done(4, 4100)),
        (
            dialect.request(READ, 5, 4050, 60),
            dialect.content(5, 4050, bytes(10) + text[:40] + bytes(5) + text[45:50]),
        ),
        (dialect.request(CACHE, 6, 1, 4096), dialect.done(6, 1)),
        (dialect.request(READ, 7, 20_000, 100), dialect.content(7, 20_000, 100)),
    ]


END = (FLUSH, 99)
ALLOCATION_NAME, STATE_NAME = b"base:allocation", b"zramd:state"

DIALOGUES: dict[str, tuple[Dialect, list[tuple[bytes, bytes]], list[tuple[bytes, bytes]]]] = {
    "simple": (
        SIMPLE,
        [
            (
                option(LIST),
                option_reply(LIST, SERVER, b"\0\0\0\4diska disk, UUID " + UUID)
                + option_reply(LIST, SERVER, b"\0\0\0\6locked" + b"UUID " + UUID)
                + option_reply(LIST, ACK),
            ),
            (option(STARTTLS), option_reply(STARTTLS, ERR_POLICY)),
            (option(4711, b"data"), option_reply(4711, ERR_UNSUP)),
            (option(INFO, b"x"), option_reply(INFO, ERR_INVALID)),
            (option(EXPORT_NAME, b"disk"), struct.pack(">QH", SMALL_SIZE, WRITABLE)),
        ],
        transmission(SIMPLE),
    ),
    "structured": (
        STRUCTURED,
        [
            (option(SET_META_CONTEXT, context_request(b"")), option_reply(SET_META_CONTEXT, ERR_INVALID)),
            (option(STRUCTURED_REPLY), option_reply(STRUCTURED_REPLY, ACK)),
            (option(INFO, info_request(b"none")), option_reply(INFO, ERR_UNKNOWN)),
            (
                option(SET_META_CONTEXT, context_request(b"disk", b"base:", STATE_NAME, b"qemu:x", ALLOCATION_NAME)),
                selected((1, ALLOCATION_NAME), (2, STATE_NAME)),
            ),
            (option(GO, info_request(b"disk")), information(GO, WRITABLE | DF)),
        ],
        [
            *transmission(STRUCTURED),
            (
                STRUCTURED.request(BLOCK_STATUS, 8, 4095, 20_000),
                STRUCTURED.status(8, 4095, {1: [(4097, 0), (15_903, 3)], 2: [(4097, 2), (15_903, 0)]}),
            ),
            (
                STRUCTURED.request(BLOCK_STATUS, 9, 4095, 20_000, REQ_ONE),
                STRUCTURED.status(9, 4095, {1: [(4097, 0)], 2: [(4097, 2)]}),
            ),
        ],
    ),
    "extended": (
        EXTENDED,
        [
            (option(EXTENDED_HEADERS, b"x"), option_reply(EXTENDED_HEADERS, ERR_INVALID)),
            (option(EXTENDED_HEADERS), option_reply(EXTENDED_HEADERS, ACK)),
            (option(STRUCTURED_REPLY), option_reply(STRUCTURED_REPLY, ERR_EXT_HEADER_REQD)),
            (
                option(SET_META_CONTEXT, context_request(b"", STATE_NAME, ALLOCATION_NAME)),
                selected((1, ALLOCATION_NAME), (2, STATE_NAME)),
            ),
            (option(INFO, info_request(b"disk")), information(INFO, WRITABLE | DF | BLOCK_STATUS_PAYLOAD)),
            (option(GO, info_request(b"")), information(GO, WRITABLE | DF | BLOCK_STATUS_PAYLOAD)),
        ],
        [
            *transmission(EXTENDED),
            (
                EXTENDED.request(BLOCK_STATUS, 8, 12, 30_000),
                EXTENDED.status(8, 12, {1: [(8180, 0), (21_820, 3)], 2: [(8180, 2), (21_820, 0)]}),
            ),
            (
                EXTENDED.request(BLOCK_STATUS, 9, 8000, 12, PAYLOAD_LEN) + struct.pack(">QI", 1000, 2),
                EXTENDED.status(9, 8000, {2: [(192, 2), (808, 0)]}),
            ),
            (
                EXTENDED.request(BLOCK_STATUS, 10, 8000, 16, PAYLOAD_LEN) + struct.pack(">QII", 1000, 2, 3),
                EXTENDED.error(10, EINVAL, 8000),
            ),
        ],
    ),
}

every_dialogue = pytest.mark.parametrize(("dialect", "options", "requests"), DIALOGUES.values(), ids=DIALOGUES.keys())
Steps = list[tuple[bytes, bytes]]


def spoken(dialect: Dialect, options: Steps, requests: Steps) -> tuple[bytes, bytes]:
    """Return what a client says in the handshake, and in the transmission up to DISC."""
    shake = client_flags() + b"".join(said for said, _ in options)
    return shake, b"".join(said for said, _ in requests) + dialect.request(*END) + dialect.request(DISC, 100)


@every_dialogue
def test_a_whole_session_split_at_any_byte_is_answered_with_the_same_bytes(
    small: OpenDevice, dialect: Dialect, options: Steps, requests: Steps
) -> None:
    shake, rest = spoken(dialect, options, requests)
    stream = shake + rest
    with serving(small) as server:
        shaken = converse(server, shake)
        whole = converse(server, stream)
        assert whole.startswith(shaken)
        answers = b"".join(answer for _, answer in requests) + dialect.done(99)
        assert dialect.without_texts(whole[len(shaken) :]) == answers
        *others, (_, last) = options
        answers = b"".join(answer for _, answer in others)
        assert shaken.startswith(GREETING)
        assert shaken.endswith(last)
        assert without_option_texts(shaken[len(GREETING) : len(shaken) - len(last)]) == answers
        for split in range(1, len(stream)):
            assert converse(server, stream[:split], stream[split:]) == whole, f"split at {split}"


@every_dialogue
def test_a_whole_session_sent_byte_by_byte_is_answered_with_the_same_bytes(
    small: OpenDevice, dialect: Dialect, options: Steps, requests: Steps
) -> None:
    stream = b"".join(spoken(dialect, options, requests))
    with serving(small) as server:
        whole = converse(server, stream)
        assert len(whole) > 500
        assert converse(server, *(stream[at : at + 1] for at in range(len(stream)))) == whole


@every_dialogue
def test_a_client_that_closes_at_any_byte_of_a_session_hurts_nobody(
    small: OpenDevice, dialect: Dialect, options: Steps, requests: Steps
) -> None:
    stream = b"".join(spoken(dialect, options, requests))
    with serving(small) as server:
        for length in range(len(stream)):
            with join(server) as client:
                client.sendall(stream[:length])
        check_alive(server)


@every_dialogue
def test_a_client_that_half_closes_at_any_byte_gets_the_beginning_of_its_answers(
    small: OpenDevice, dialect: Dialect, options: Steps, requests: Steps
) -> None:
    stream = b"".join(spoken(dialect, options, requests))
    with serving(small) as server:
        whole = converse(server, stream)
        before = 0
        for length in range(len(stream)):
            answer = converse(server, stream[:length])
            assert whole.startswith(answer)
            assert len(answer) >= before
            before = len(answer)
        # All that lacks is nothing: DISC has no answer.
        assert before == len(whole)


# Clients that leave


def test_clients_that_reset_in_the_middle_of_a_reply_do_not_disturb_another(opened: OpenDevice) -> None:
    (listener,) = listen_tcp("127.0.0.1", 0)
    address = listener.getsockname()
    over = threading.Event()
    rounds: list[int] = []
    with serving(opened) as server, enter(server) as other:
        server.accept_on(listener)
        other.sendall(SIMPLE.write(1, 0, RAW))
        assert receive(other, 16) == SIMPLE.done(1)

        def work() -> None:
            number = 0
            while not over.is_set() or number < 50:
                data = RAW[number : number + 5000]
                other.sendall(SIMPLE.write(number, 32 * MIB, data) + SIMPLE.request(READ, number, 32 * MIB, 5000))
                if receive(other, 32 + 5000) != SIMPLE.done(number) + SIMPLE.content(number, 0, data):
                    return
                number += 1
            rounds.append(number)

        worker = threading.Thread(target=work)
        worker.start()
        try:
            for round_ in range(12):
                dialect = [SIMPLE, STRUCTURED, EXTENDED][round_ % 3]
                with socket.create_connection(address) as client:
                    client.settimeout(60)
                    start(client, dialect)
                    client.sendall(b"".join(dialect.request(READ, at, 0, 4 * MIB) for at in range(8)))
                    received = receive(client, 100_000 + round_)
                    begin = received.index(RAW[:100])
                    assert received[begin:] == RAW[: len(received) - begin]
                    # Closing now is a reset.
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        finally:
            over.set()
            worker.join(60)
        assert rounds
        check_alive(server)


@pytest.mark.parametrize("dialect", [SIMPLE, STRUCTURED, EXTENDED], ids=str)
def test_disconnect_behind_32_writes_leaves_them_all_done_and_the_socket_closed(
    opened: OpenDevice, dialect: Dialect
) -> None:
    writes = b"".join(dialect.write(at, at * PAGE, RAW[at * PAGE : (at + 1) * PAGE]) for at in range(32))
    with serving(opened) as server:
        with enter(server, dialect) as client:
            client.sendall(writes + dialect.request(DISC, 99))
            assert receive_rest(client) == b"".join(dialect.done(at, at * PAGE) for at in range(32))
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                client.sendall(dialect.request(FLUSH, 1))
        with enter(server) as reader:
            reader.sendall(SIMPLE.request(READ, 1, 0, 32 * PAGE))
            assert receive(reader, 16 + 32 * PAGE) == SIMPLE.content(1, 0, RAW[: 32 * PAGE])


def test_disconnect_over_tcp_behind_32_writes_is_the_same(opened: OpenDevice) -> None:
    (listener,) = listen_tcp("127.0.0.1", 0)
    writes = b"".join(SIMPLE.write(at, at * PAGE, RAW[at * PAGE : (at + 1) * PAGE]) for at in range(32))
    with serving(opened) as server:
        server.accept_on(listener)
        with socket.create_connection(listener.getsockname()) as client:
            client.settimeout(60)
            start(client, SIMPLE)
            client.sendall(writes + SIMPLE.request(DISC, 99))
            client.shutdown(socket.SHUT_WR)
            assert receive_rest(client) == b"".join(SIMPLE.done(at) for at in range(32))
    assert read(opened.device, 0, 32 * PAGE) == RAW[: 32 * PAGE]


def test_200_clients_that_connect_and_leave_at_once_hurt_nobody(small: OpenDevice, tmp_path: Path) -> None:
    with serving(small) as server:
        server.accept_on(listen_unix(tmp_path / "nbd"))
        for _ in range(200):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(tmp_path / "nbd"))
        check_alive(server)


def test_stopping_a_server_that_holds_60_idle_clients_lets_them_all_go(small: OpenDevice) -> None:
    with contextlib.ExitStack() as held:
        server = Server(exports_of(small))
        idle = [held.enter_context(join(server)) for _ in range(40)]
        for client in idle:
            assert receive(client, len(GREETING)) == GREETING
        idle += [held.enter_context(enter(server, [SIMPLE, STRUCTURED, EXTENDED][at % 3])) for at in range(20)]
        assert server.stop(60)
        assert [receive_rest(client) for client in idle] == [b""] * 60
        assert len(server) == 0


# Limits


def test_one_handshake_too_many_ends_the_oldest_and_nobody_in_transmission(small: OpenDevice) -> None:
    with contextlib.ExitStack() as held:
        server = held.enter_context(serving(small, Limits(handshakes=4)))
        good = [held.enter_context(enter(server, dialect)) for dialect in (SIMPLE, STRUCTURED, EXTENDED)]
        idle: list[socket.socket] = []
        for _ in range(12):
            # Whoever was greeted is counted.
            idle.append(held.enter_context(join(server)))
            assert receive(idle[-1], len(GREETING)) == GREETING
        # The oldest have been ended, the last four have not.
        assert [receive_rest(client) for client in idle[:8]] == [b""] * 8
        check_alive(server)
        assert receive_rest(idle[8]) == b""
        for client in idle[9:]:
            client.sendall(client_flags() + option(ABORT))
            assert receive_rest(client) == option_reply(ABORT, ACK)
        for client, dialect in zip(good, (SIMPLE, STRUCTURED, EXTENDED), strict=True):
            client.sendall(dialect.request(CACHE, 7) + dialect.request(DISC, 8))
            assert receive_rest(client) == dialect.done(7)


def test_64_handshakes_may_stall_and_a_new_client_still_gets_in(small: OpenDevice) -> None:
    with contextlib.ExitStack() as held:
        server = held.enter_context(serving(small))
        idle: list[socket.socket] = []
        for _ in range(DEFAULT_LIMITS.handshakes):
            client = held.enter_context(join(server))
            idle.append(client)
            # Whoever was greeted is counted, so that this is their order.
            assert receive(client, len(GREETING)) == GREETING
            client.sendall(client_flags() + option(LIST)[:15])
        check_alive(server)
        # Only one had to give way.
        assert receive_rest(idle[0]) == b""
        for client in idle[1:]:
            client.sendall(option(LIST)[15:] + option(ABORT))
            assert receive_rest(client).endswith(option_reply(LIST, ACK) + option_reply(ABORT, ACK))


def test_connections_over_the_limit_are_closed_and_room_is_given_again(
    small: OpenDevice, caplog: pytest.LogCaptureFixture
) -> None:
    with contextlib.ExitStack() as held:
        server = held.enter_context(serving(small, Limits(connections=3)))
        good = [held.enter_context(enter(server)) for _ in range(3)]
        for _ in range(5):
            with join(server) as refused:
                assert receive_rest(refused) == b""
        for client in good:
            client.sendall(SIMPLE.request(CACHE, 7))
            assert receive(client, 16) == SIMPLE.done(7)
        good[1].sendall(SIMPLE.request(DISC, 8))
        assert receive_rest(good[1]) == b""
        # Its place is free when its socket is closed, or before.
        check_alive(server)
    assert len([record for record in caplog.records if "more than 3 connections" in record.getMessage()]) == 1


def test_the_largest_payload_of_the_limits_holds_for_reads_and_writes(opened: OpenDevice) -> None:
    with serving(opened, Limits(payload=MIB)) as server:
        for dialect in (SIMPLE, STRUCTURED, EXTENDED):
            stream = (
                dialect.write(1, 0, RAW[:MIB])
                + dialect.write(2, 0, bytes(MIB + 1))
                + dialect.request(READ, 3, 0, MIB + 1)
                + dialect.request(WRITE_ZEROES, 4, 8 * MIB, 8 * MIB)
                + dialect.request(READ, 5, 0, 1)
                + dialect.request(DISC, 6)
            )
            with enter(server, dialect) as client:
                sender = threading.Thread(target=client.sendall, args=(stream,))
                sender.start()
                assert dialect.without_texts(receive_rest(client)) == (
                    dialect.done(1)
                    + dialect.error(2, EINVAL)
                    + dialect.error(3, EINVAL)
                    + dialect.done(4, 8 * MIB)
                    + dialect.content(5, 0, RAW[:1])
                )
                sender.join()


SELECTION = EXTENDED.request(BLOCK_STATUS, 1, 0, 12, PAYLOAD_LEN) + struct.pack(">QI", 64 * PAGE, 2)
STREAMS = {
    "short reads": (SIMPLE, SIMPLE.request(READ, 1, 0, PAGE)),
    "long reads": (STRUCTURED, STRUCTURED.request(READ, 1, 0, 4 * MIB)),
    "what is refused": (EXTENDED, EXTENDED.request(4711, 1)),
    "caches": (EXTENDED, EXTENDED.request(CACHE, 1)),
    "status": (STRUCTURED, STRUCTURED.request(BLOCK_STATUS, 1, 0, 16 * PAGE)),
    "status of a selection": (EXTENDED, SELECTION),
}


@pytest.mark.parametrize(("dialect", "asked"), STREAMS.values(), ids=STREAMS.keys())
def test_a_client_that_never_reads_is_read_from_no_more_and_costs_no_more_memory(
    opened: OpenDevice, dialect: Dialect, asked: bytes
) -> None:
    limits = Limits(memory=512 * KIB)
    with serving(opened, limits) as server, enter(server) as other:
        other.sendall(SIMPLE.write(1, 0, RAW))
        assert receive(other, 16) == SIMPLE.done(1)
        tracemalloc.start()
        try:
            with enter(server, dialect) as greedy:
                assert send_until_stuck(greedy, asked, 16 * MIB) < 16 * MIB
                other.sendall(SIMPLE.request(READ, 2, 5, 10))
                assert receive(other, 26) == SIMPLE.content(2, 5, RAW[5:15])
            # Its replies, a long read of one piece, and as many objects.
            assert tracemalloc.get_traced_memory()[1] < 4 * limits.memory
        finally:
            tracemalloc.stop()
        check_alive(server)


def send_until_stuck(client: socket.socket, asked: bytes, most: int) -> int:
    """Send requests until the server takes no more of them, or has taken `most` bytes. Return how many were sent."""
    block = asked * (64 * KIB // len(asked))
    client.setblocking(False)
    sent = tries = 0
    while sent < most and tries < 20:
        try:
            sent += client.send(block[sent % len(block) :])
            tries = 0
        except BlockingIOError:
            tries += 1
            time.sleep(0.01)
    return sent


# Garbage


@pytest.mark.parametrize("seed", range(16))
def test_garbage_ends_its_own_session_and_no_other(small: OpenDevice, seed: int) -> None:
    generator = random.Random(seed)
    garbage = [generator.randbytes(generator.choice([1, 20, 28, 32, 100, 5000])) for _ in range(4)]
    magics = [b"\x25\x60\x95\x13", b"\x21\xe4\x1c\x71", b"IHAVEOPT"]
    with serving(small, Limits(handshake_seconds=60)) as server, enter(server) as other:
        for data in garbage:
            sent = converse(server, data)
            assert sent.startswith(GREETING)
            sent = converse(server, client_flags() + data)
            assert sent == GREETING
            # Half right is worse than wrong.
            kind, length = generator.randrange(13), generator.randrange(200)
            converse(server, client_flags() + b"IHAVEOPT" + struct.pack(">II", kind, length) + data)
            for dialect in (SIMPLE, STRUCTURED, EXTENDED):
                for begin in (
                    b"",
                    magics[dialect.extended],
                    magics[dialect.extended] + generator.randbytes(1) + b"\0\0",
                ):
                    with enter(server, dialect) as client:
                        exchange(client, begin + data)
            other.sendall(request(CACHE, 1))
            assert receive(other, 16) == SIMPLE.done(1)
        check_alive(server)


def test_each_byte_of_a_session_may_be_any_other_and_the_server_goes_on(small: OpenDevice) -> None:
    generator = random.Random(1)
    dialect, options, requests = DIALOGUES["extended"]
    stream = b"".join(spoken(dialect, options, requests))
    with serving(small) as server:
        for at in range(len(stream)):
            changed = bytearray(stream)
            changed[at] ^= generator.randrange(1, 256)
            assert converse(server, bytes(changed)).startswith(GREETING)
        check_alive(server)


def test_a_client_whose_choice_was_answered_is_no_handshake_any_more(
    opened: OpenDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = threading.Event()
    run = Handshake.run

    def run_late(handshake: Handshake) -> Session | None:
        session = run(handshake)
        late.wait(60)
        return session

    monkeypatch.setattr(Handshake, "run", run_late)
    with serving(opened, Limits(handshakes=1)) as server, join(server) as good:
        start(good, SIMPLE)
        with join(server) as second:
            receive(second, len(GREETING))
            late.set()
            good.sendall(SIMPLE.request(CACHE, 7))
            assert receive(good, 16) == SIMPLE.done(7)
