import contextlib
import logging
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.nbd_bytes import (
    ABORT,
    ACK,
    ERR_INVALID,
    ERR_UNKNOWN,
    ERR_UNSUP,
    EXPORT_NAME,
    FIXED_NEWSTYLE,
    FLUSH,
    GO,
    GREETING,
    INFO,
    INFO_REPLY,
    LIST,
    NO_ZEROES,
    SERVER,
    Peer,
    client_flags,
    exchange,
    info_request,
    option,
    option_reply,
    receive,
    receive_rest,
    reply,
    request,
)
from zramd.device.disk import Disk
from zramd.device.opening import OpenDevice
from zramd.device.wanted import Wanted
from zramd.listeners import listen_unix
from zramd.memory import RegionStore
from zramd.nbd.export import Export, Exports
from zramd.nbd.handshake import Handshake
from zramd.nbd.limits import DEFAULT_LIMITS, Limits
from zramd.nbd.protocol import SessionError
from zramd.nbd.server import Server

MAX_OPTION_LENGTH, MAX_OPTIONS = Limits().option, Limits().options
SIZE_AND_FLAGS = struct.pack(">QH", 64 << 20, 0b1101_0110_1101)
GOODBYE = option_reply(ABORT, ACK)

NAME, DESCRIPTION, BLOCK_SIZE = 1, 2, 3


@pytest.fixture
def exports(opened: OpenDevice) -> Exports:
    """Return two exports of one device; the first is the default."""
    disk = Disk("disk", None)
    disk.opened = opened
    return Exports([Export("disk", "a disk in memory", disk), Export("zwölf", "", disk)])


@pytest.fixture
def uuid(opened: OpenDevice) -> bytes:
    return str(opened.device.identity.uuid).encode()


def shake_hands(sock: socket.socket, exports: Exports) -> Export | None:
    """Run a handshake. Return the export that the client connected to, if it did."""
    connected: list[Export] = []

    def connect(export: Export) -> OpenDevice:
        assert export.disk.opened is not None
        connected.append(export)
        return export.disk.opened

    session = Handshake(sock, exports, connect).run()
    assert (session is not None) == bool(connected)
    return connected[0] if connected else None


@pytest.fixture
def server_path(tmp_path: Path, exports: Exports) -> Iterator[Path]:
    """Return the socket of a whole server, which must end in time."""
    with serving(tmp_path, exports) as path:
        yield path


@contextlib.contextmanager
def serving(directory: Path, exports: Exports, limits: Limits = DEFAULT_LIMITS) -> Iterator[Path]:
    path = directory / "nbd"
    server = Server(exports, limits)
    server.accept_on(listen_unix(path))
    yield path
    assert server.stop(10)


def negotiate(exports: Exports, *pieces: bytes) -> tuple[bytes, object]:
    """Return all that the server sent, and how the handshake ended."""
    with Peer(lambda sock: shake_hands(sock, exports)) as peer:
        return exchange(peer.client, *pieces), peer.join()


def information(kind: int, *wanted: bytes) -> bytes:
    """Return the replies to an INFO or GO that succeeds; the block sizes come unasked."""
    sizes = struct.pack(">HIII", BLOCK_SIZE, 1, 4096, 64 << 20)
    replies = (struct.pack(">H", 0) + SIZE_AND_FLAGS, *wanted, sizes)
    return b"".join(option_reply(kind, INFO_REPLY, data) for data in replies) + option_reply(kind, ACK)


def parse_option_replies(data: bytes) -> list[tuple[int, int, bytes]]:
    """Return (option, reply type, data) of each option reply in a stream."""
    replies = []
    while data:
        magic, kind, reply_type, length = struct.unpack_from(">QIII", data)
        assert magic == 0x3E889045565A9
        replies.append((kind, reply_type, data[20 : 20 + length]))
        data = data[20 + length :]
    return replies


def test_the_server_greets_before_the_client_says_anything(exports: Exports) -> None:
    with Peer(lambda sock: shake_hands(sock, exports)) as peer:
        assert receive(peer.client, 18) == b"NBDMAGIC" + b"IHAVEOPT" + b"\0\3"


@pytest.mark.parametrize("flags", [4, 7, 1 << 31 | 3, 0xFFFFFFFF])
def test_unknown_client_flags_end_the_session(exports: Exports, flags: int) -> None:
    sent, outcome = negotiate(exports, client_flags(flags) + option(EXPORT_NAME, b"disk"))
    assert sent == GREETING
    assert isinstance(outcome, SessionError)


@pytest.mark.parametrize("flags", [0, FIXED_NEWSTYLE])
def test_export_name_is_followed_by_124_zeros(exports: Exports, flags: int) -> None:
    sent, outcome = negotiate(exports, client_flags(flags) + option(EXPORT_NAME, b"disk"))
    assert sent == GREETING + SIZE_AND_FLAGS + bytes(124)
    assert outcome is exports.find("disk")


@pytest.mark.parametrize("flags", [NO_ZEROES, FIXED_NEWSTYLE | NO_ZEROES])
def test_export_name_has_no_zeros_once_the_client_said_so(exports: Exports, flags: int) -> None:
    sent, outcome = negotiate(exports, client_flags(flags) + option(EXPORT_NAME, b"disk"))
    assert sent == GREETING + SIZE_AND_FLAGS
    assert outcome is exports.find("disk")


@pytest.mark.parametrize(("name", "found"), [("", "disk"), ("disk", "disk"), ("zwölf", "zwölf")])
@pytest.mark.parametrize("kind", [EXPORT_NAME, GO])
def test_an_export_is_found_by_name_and_the_first_by_the_empty_name(
    exports: Exports, kind: int, name: str, found: str
) -> None:
    data = name.encode() if kind == EXPORT_NAME else info_request(name.encode())
    _, outcome = negotiate(exports, client_flags() + option(kind, data))
    assert outcome is exports.find(found)


@pytest.mark.parametrize("kind", [EXPORT_NAME, GO])
def test_an_export_is_found_by_the_uuid_of_its_device(exports: Exports, uuid: bytes, kind: int) -> None:
    data = uuid if kind == EXPORT_NAME else info_request(uuid)
    _, outcome = negotiate(exports, client_flags() + option(kind, data))
    assert outcome is exports.find("disk")


@pytest.mark.parametrize("change", [bytes.upper, lambda uuid: uuid.replace(b"-", b""), lambda uuid: uuid[::-1]])
def test_another_uuid_names_no_export(exports: Exports, uuid: bytes, change: Callable[[bytes], bytes]) -> None:
    sent, outcome = negotiate(exports, client_flags() + option(GO, info_request(change(uuid))) + option(ABORT))
    assert parse_option_replies(sent[len(GREETING) :])[0][:2] == (GO, ERR_UNKNOWN)
    assert outcome is None


def test_a_disk_without_a_size_has_no_uuid() -> None:
    export = Export("zram0", "text", Disk("zram0", None))
    sent, _ = negotiate(Exports([export]), client_flags() + option(LIST) + option(ABORT))
    assert sent == GREETING + option_reply(LIST, SERVER, b"\0\0\0\5zram0text") + option_reply(LIST, ACK) + GOODBYE


@pytest.mark.parametrize("kind", [EXPORT_NAME, GO])
def test_a_disk_that_is_made_anew_while_it_is_asked_for_by_uuid_is_not_given(
    exports: Exports, uuid: bytes, kind: int
) -> None:
    data = uuid if kind == EXPORT_NAME else info_request(uuid)
    anew = OpenDevice(RegionStore(None), Wanted(disksize=1 << 20))
    with contextlib.closing(anew), Peer(lambda sock: Handshake(sock, exports, lambda _: anew).run()) as peer:
        assert exchange(peer.client, client_flags() + option(kind, data)) == GREETING
        assert isinstance(peer.join(), SessionError)


@pytest.mark.parametrize(
    "name", [b"other", b"disk ", b"DISK", b"x" * 4096, b"x" * 4097, b"x" * 100_000], ids=lambda name: str(len(name))
)
def test_export_name_of_an_unknown_export_ends_the_session(exports: Exports, name: bytes) -> None:
    sent, outcome = negotiate(exports, client_flags() + option(EXPORT_NAME, name))
    assert sent == GREETING
    assert isinstance(outcome, SessionError)


@pytest.mark.parametrize("name", [b"\xff\xfe", b"di\0sk", b"disk\0", b"\xc3"])
def test_export_name_that_is_no_text_ends_the_session_and_is_no_defect(exports: Exports, name: bytes) -> None:
    sent, outcome = negotiate(exports, client_flags() + option(EXPORT_NAME, name))
    assert sent == GREETING
    assert isinstance(outcome, SessionError)


def test_list_gives_every_export_with_its_description(exports: Exports, uuid: bytes) -> None:
    sent, outcome = negotiate(exports, client_flags() + option(LIST) + option(ABORT))
    assert sent == (
        GREETING
        + option_reply(LIST, SERVER, b"\0\0\0\4disk" + b"a disk in memory, UUID " + uuid)
        + option_reply(LIST, SERVER, b"\0\0\0\6" + "zwölf".encode() + b"UUID " + uuid)
        + option_reply(LIST, ACK)
        + GOODBYE
    )
    assert outcome is None


def test_list_with_data_is_invalid_and_the_handshake_goes_on(exports: Exports) -> None:
    sent, outcome = negotiate(exports, client_flags() + option(LIST, b"x") + option(LIST) + option(ABORT))
    replies = parse_option_replies(sent[len(GREETING) :])
    assert replies[0][:2] == (LIST, ERR_INVALID)
    assert [kind for _, kind, _ in replies[1:]] == [SERVER, SERVER, ACK, ACK]
    assert outcome is None


def test_info_then_go_say_the_same_and_only_go_ends_the_handshake(exports: Exports) -> None:
    data = info_request(b"disk", BLOCK_SIZE)
    sent, outcome = negotiate(exports, client_flags(FIXED_NEWSTYLE) + option(INFO, data) + option(GO, data))
    assert sent == GREETING + information(INFO) + information(GO)
    assert outcome is exports.find("disk")


@pytest.mark.parametrize(
    ("types", "wanted"),
    [
        ((), ()),
        ((NAME,), (b"\0\1disk",)),
        ((DESCRIPTION,), (b"\0\2a disk in memory, UUID ",)),
        ((BLOCK_SIZE,), ()),
        ((NAME, DESCRIPTION, BLOCK_SIZE), (b"\0\1disk", b"\0\2a disk in memory, UUID ")),
        ((DESCRIPTION, NAME, NAME, 0, 0xFFFF, 4711), (b"\0\1disk", b"\0\2a disk in memory, UUID ")),
    ],
    ids=str,
)
def test_info_gives_the_types_asked_for_and_ignores_unknown_ones(
    exports: Exports, uuid: bytes, types: tuple[int, ...], wanted: tuple[bytes, ...]
) -> None:
    wanted = tuple(info + uuid if info.endswith(b"UUID ") else info for info in wanted)
    sent, _ = negotiate(exports, client_flags() + option(INFO, info_request(b"disk", *types)) + option(ABORT))
    assert sent == GREETING + information(INFO, *wanted) + GOODBYE


def test_the_default_export_tells_its_real_name(exports: Exports) -> None:
    sent, _ = negotiate(exports, client_flags() + option(GO, info_request(b"", NAME)))
    assert sent == GREETING + information(GO, b"\0\1disk")


@pytest.mark.parametrize("kind", [INFO, GO])
@pytest.mark.parametrize("name", [b"other", b"x" * 4096], ids=len)
def test_an_unknown_export_is_told_without_information_and_the_handshake_goes_on(
    exports: Exports, kind: int, name: bytes
) -> None:
    sent, outcome = negotiate(
        exports, client_flags() + option(kind, info_request(name, NAME)) + option(GO, info_request(b"disk"))
    )
    first, *rest = parse_option_replies(sent[len(GREETING) :])
    assert first[:2] == (kind, ERR_UNKNOWN)
    assert len(first[2]) <= 4096
    assert b"".join(option_reply(*answer) for answer in rest) == information(GO)
    assert outcome is exports.find("disk")


MALFORMED = {
    "empty": b"",
    "too short": b"\0\0\0\0\0",
    "name length 0xffffffff": b"\xff\xff\xff\xffdisk\0\0",
    "name length 0xfffffff0": b"\xff\xff\xff\xf0disk\0\0",
    "name length one too long": b"\0\0\0\5disk\0\0",
    "name length eats the count": b"\0\0\0\6disk\0\0",
    "trailing byte": info_request(b"disk", 1) + b"\0",
    "trailing type": info_request(b"disk", 1) + b"\0\1",
    "count too high": b"\0\0\0\4disk\0\2\0\1",
    "count 0xffff": b"\0\0\0\4disk\xff\xff",
    "count too low": b"\0\0\0\4disk\0\0\0\1",
    "name of 4097 bytes": info_request(b"x" * 4097),
    "name of 64 KiB": info_request(b"x" * 65536),
    "not UTF-8": info_request(b"\xff\xfe"),
    "half a character": info_request(b"disk\xc3"),
    "NUL in the name": info_request(b"di\0sk"),
}


@pytest.mark.parametrize("kind", [INFO, GO])
@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_info_and_go_are_invalid_and_the_handshake_goes_on(exports: Exports, kind: int, data: bytes) -> None:
    sent, outcome = negotiate(exports, client_flags() + option(kind, data) + option(ABORT))
    first, last = parse_option_replies(sent[len(GREETING) :])
    assert first[:2] == (kind, ERR_INVALID)
    assert last == (ABORT, ACK, b"")
    assert outcome is None


@pytest.mark.parametrize("kind", [0, 4, 12, 0xFFFFFFFF])
@pytest.mark.parametrize("data", [b"", b"anything", bytes(MAX_OPTION_LENGTH)], ids=len)
def test_an_unknown_option_is_swallowed_and_the_handshake_goes_on(exports: Exports, kind: int, data: bytes) -> None:
    sent, outcome = negotiate(exports, client_flags() + option(kind, data) + option(GO, info_request(b"")))
    first, *rest = parse_option_replies(sent[len(GREETING) :])
    assert first[:2] == (kind, ERR_UNSUP)
    assert b"".join(option_reply(*answer) for answer in rest) == information(GO)
    assert outcome is exports.find("disk")


@pytest.mark.parametrize("data", [b"", b"ignored"])
def test_abort_is_acknowledged_and_ends_the_session(exports: Exports, data: bytes) -> None:
    sent, outcome = negotiate(exports, client_flags() + option(ABORT, data) + option(LIST))
    assert sent == GREETING + GOODBYE
    assert outcome is None


@pytest.mark.parametrize("magic", [b"IHAVEOPU", bytes(8), b"NBDMAGIC", b"GET / HT"])
def test_a_wrong_option_magic_ends_the_session(exports: Exports, magic: bytes) -> None:
    sent, outcome = negotiate(exports, client_flags() + magic + option(LIST)[8:])
    assert sent == GREETING
    assert isinstance(outcome, SessionError)


@pytest.mark.parametrize("kind", [EXPORT_NAME, ABORT, LIST, GO, 4711])
@pytest.mark.parametrize("length", [MAX_OPTION_LENGTH + 1, 33 << 20, 0xFFFFFFFF])
def test_an_option_over_the_cap_ends_the_session_before_its_data(exports: Exports, kind: int, length: int) -> None:
    header = b"IHAVEOPT" + struct.pack(">II", kind, length)
    sent, outcome = negotiate(exports, client_flags() + header)
    assert sent == GREETING
    assert isinstance(outcome, SessionError)
    assert "too long" in str(outcome)


def test_a_client_cannot_send_options_for_ever(exports: Exports) -> None:
    sent, outcome = negotiate(exports, client_flags() + option(4711) * (MAX_OPTIONS + 1))
    assert len(parse_option_replies(sent[len(GREETING) :])) == MAX_OPTIONS
    assert isinstance(outcome, SessionError)


@pytest.mark.parametrize("flags", [0, NO_ZEROES])
@pytest.mark.parametrize("kind", [ABORT, LIST, INFO, GO, 8])
def test_a_client_without_fixed_newstyle_may_send_only_export_name(exports: Exports, flags: int, kind: int) -> None:
    sent, outcome = negotiate(exports, client_flags(flags) + option(kind))
    assert sent == GREETING
    assert isinstance(outcome, SessionError)


DIALOGUE = (
    client_flags()
    + option(LIST)
    + option(4711)
    + option(INFO, info_request(b"zw\xc3\xb6lf", NAME))
    + option(GO, info_request(b"disk", DESCRIPTION, BLOCK_SIZE))
)


def test_a_handshake_split_at_any_byte_gives_the_same_bytes(exports: Exports, uuid: bytes) -> None:
    whole, _ = negotiate(exports, DIALOGUE)
    assert whole.endswith(information(GO, b"\0\2a disk in memory, UUID " + uuid))
    for split in range(1, len(DIALOGUE)):
        sent, outcome = negotiate(exports, DIALOGUE[:split], DIALOGUE[split:])
        assert sent == whole, f"split at {split}"
        assert outcome is exports.find("disk")


def test_a_handshake_sent_byte_by_byte_gives_the_same_bytes(exports: Exports) -> None:
    whole, _ = negotiate(exports, DIALOGUE)
    sent, _ = negotiate(exports, *(DIALOGUE[at : at + 1] for at in range(len(DIALOGUE))))
    assert sent == whole


@pytest.mark.parametrize("export", [EXPORT_NAME, GO])
def test_requests_sent_right_behind_the_handshake_are_served(server_path: Path, export: int) -> None:
    data = b"disk" if export == EXPORT_NAME else info_request(b"disk")
    answer = SIZE_AND_FLAGS if export == EXPORT_NAME else information(GO)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(server_path))
        sent = exchange(sock, client_flags() + option(export, data) + request(FLUSH, 7))
    assert sent == GREETING + answer + reply(7)


@pytest.mark.parametrize("how", [socket.SHUT_WR, None], ids=["half-close", "close"])
def test_a_client_that_leaves_at_any_byte_of_a_handshake_hurts_nobody(
    server_path: Path, how: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    for length in range(len(DIALOGUE) + 1):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(server_path))
            sock.sendall(DIALOGUE[:length])
            if how is not None:
                sock.shutdown(how)
                receive_rest(sock)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(server_path))
        assert exchange(sock, client_flags() + option(LIST) + option(ABORT)).endswith(GOODBYE)
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_a_client_that_says_nothing_does_not_keep_others_waiting(server_path: Path) -> None:
    idle = [socket.socket(socket.AF_UNIX) for _ in range(60)]
    try:
        for sock in idle:
            sock.connect(str(server_path))
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(server_path))
            assert exchange(sock, client_flags() + option(ABORT)) == GREETING + GOODBYE
    finally:
        for sock in idle:
            sock.close()


def test_a_client_that_never_chooses_is_disconnected(tmp_path: Path, exports: Exports) -> None:
    limits = Limits(handshake_seconds=0.05)
    with serving(tmp_path, exports, limits) as path, socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(60)
        sock.connect(str(path))
        sock.sendall(client_flags())
        assert receive_rest(sock) == GREETING


def test_a_client_that_dribbles_bytes_is_disconnected_when_the_time_of_a_handshake_is_over(
    tmp_path: Path, exports: Exports
) -> None:
    limits = Limits(handshake_seconds=0.3)
    with serving(tmp_path, exports, limits) as path, socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        receive(sock, len(GREETING))
        sock.sendall(client_flags() + b"IHAVEOPT" + struct.pack(">II", 4711, MAX_OPTION_LENGTH))
        deadline = time.monotonic() + 60
        while not select.select([sock], [], [], 0.05)[0]:
            assert time.monotonic() < deadline, "the server waits for ever while a byte comes now and then"
            with contextlib.suppress(BrokenPipeError):  # it may be over since
                sock.sendall(b"x")
        assert receive_rest(sock) == b""


def test_stopping_the_server_ends_a_handshake(tmp_path: Path, exports: Exports) -> None:
    path = tmp_path / "stopped"
    server = Server(exports)
    server.accept_on(listen_unix(path))
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(60)
        sock.connect(str(path))
        assert receive(sock, len(GREETING)) == GREETING
        stopper = threading.Thread(target=server.stop, args=(10,))
        stopper.start()
        assert receive_rest(sock) == b""
        stopper.join()
    assert len(server) == 0


def test_stopping_the_server_at_the_moment_a_client_connects_is_no_error(
    tmp_path: Path, exports: Exports, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(exports)
    ended: list[object] = []

    def stop() -> None:
        try:
            ended.append(server.stop(10))
        except Exception as error:
            ended.append(error)

    stopper = threading.Thread(target=stop)

    class LateThread(threading.Thread):
        def start(self) -> None:
            if self.name == "nbd":
                stopper.start()
                # Whether it gets past this client or waits for it.
                stopper.join(0.2)
            super().start()

    monkeypatch.setattr("zramd.listeners.threading.Thread", LateThread)
    server.accept_on(listen_unix(tmp_path / "nbd"))
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(60)
        sock.connect(str(tmp_path / "nbd"))
        assert receive_rest(sock) in (b"", GREETING)
    stopper.join()
    assert ended == [True]
