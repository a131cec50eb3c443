import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import start_server
from tests.nbd_bytes import (
    ACK,
    ERR_INVALID,
    ERR_POLICY,
    ERR_SHUTDOWN,
    ERR_TLS_REQD,
    ERR_UNKNOWN,
    GO,
    GREETING,
    INFO_REPLY,
    LIST,
    READ,
    REPLY_BYTES,
    client_flags,
    info_request,
    option,
    option_reply,
    receive,
    reply,
    request,
)
from zramd.device.disk import Disk
from zramd.device.opening import OpenDevice
from zramd.listeners import listen_tcp, listen_unix
from zramd.nbd.client import ClientError, Connection, UnknownExportError, connect, negotiate
from zramd.nbd.export import Export, Exports
from zramd.nbd.identity import find_uuid
from zramd.nbd.server import Server
from zramd.nbd.uri import UriError, parse_uri

SIZE, FLAGS = 64 << 20, 0b101
DESCRIPTION, BLOCK_SIZE = 2, 3


def info(kind: int, rest: bytes) -> bytes:
    return option_reply(GO, INFO_REPLY, struct.pack(">H", kind) + rest)


def export(size: int = SIZE, flags: int = FLAGS) -> bytes:
    return info(0, struct.pack(">QH", size, flags))


def sizes(minimum: int = 1, payload: int = 64 << 20) -> bytes:
    return info(BLOCK_SIZE, struct.pack(">III", minimum, 4096, payload))


DONE = option_reply(GO, ACK)
ANSWER = export() + info(DESCRIPTION, b"a disk") + sizes() + DONE


def negotiated(*said: bytes, name: str = "zram0", seconds: float = 30) -> tuple[Connection | Exception, bytes]:
    """Return what a client makes of all that a server says, and what it says itself."""
    server, client = socket.socketpair()
    with server, client:
        for piece in said:
            server.sendall(piece)
        outcome: Connection | Exception
        try:
            outcome = negotiate(client, name, seconds)
        except (ClientError, OSError) as error:
            outcome = error
        client.shutdown(socket.SHUT_WR)
        return outcome, receive(server, 1 << 16)


def refusal(*said: bytes) -> str:
    outcome, _ = negotiated(GREETING, *said)
    assert isinstance(outcome, ClientError)
    assert "\n" not in str(outcome)
    return str(outcome)


def test_the_client_asks_for_one_export_and_what_it_has_to_know() -> None:
    outcome, said = negotiated(GREETING, ANSWER, name="zwölf")
    assert said == client_flags(3) + option(GO, info_request("zwölf".encode(), DESCRIPTION, BLOCK_SIZE))
    assert isinstance(outcome, Connection)
    assert (outcome.size, outcome.flags, outcome.description, outcome.payload) == (SIZE, FLAGS, "a disk", 64 << 20)


def test_only_what_is_offered_is_taken_up() -> None:
    _, said = negotiated(b"NBDMAGICIHAVEOPT\0\1", ANSWER)
    assert said.startswith(client_flags(1))


def test_what_comes_behind_the_handshake_is_left_for_the_kernel() -> None:
    server, client = socket.socketpair()
    with server, client:
        server.sendall(GREETING + ANSWER + b"more")
        negotiate(client, "")
        assert client.recv(100) == b"more"


def test_an_answer_that_comes_byte_by_byte_is_understood() -> None:
    server, client = socket.socketpair()

    def dribble() -> None:
        for byte in GREETING + ANSWER:
            server.sendall(bytes([byte]))

    with server, client:
        thread = threading.Thread(target=dribble)
        thread.start()
        assert negotiate(client, "").size == SIZE
        thread.join()


@pytest.mark.parametrize("greeting", [b"HTTP/1.1 400 Bad R", b"NBDMAGIC" + bytes(10), bytes(18)])
def test_what_is_no_nbd_server_is_told(greeting: bytes) -> None:
    outcome, said = negotiated(greeting)
    assert isinstance(outcome, ClientError)
    assert said == b""


def test_a_server_without_fixed_newstyle_is_refused() -> None:
    outcome, _ = negotiated(b"NBDMAGICIHAVEOPT\0\2")
    assert isinstance(outcome, ClientError)


def test_unknown_information_is_passed_over() -> None:
    outcome, _ = negotiated(GREETING, info(4711, b"x" * 100), ANSWER)
    assert isinstance(outcome, Connection)


def test_without_block_sizes_the_protocol_s_default_holds() -> None:
    outcome, _ = negotiated(GREETING, export(), DONE)
    assert isinstance(outcome, Connection)
    assert (outcome.payload, outcome.description) == (32 << 20, "")


BREAKS = {
    "wrong magic": bytes(20),
    "reply to another option": option_reply(LIST, ACK),
    "reply of 4 GiB": option_reply(GO, INFO_REPLY)[:-4] + b"\xff\xff\xff\xff",
    "reply one byte too long": option_reply(GO, INFO_REPLY, bytes(4099)),
    "no export": DONE,
    "ACK with data": export() + option_reply(GO, ACK, b"x"),
    "information without a type": option_reply(GO, INFO_REPLY, b"\0") + DONE,
    "export too short": info(0, bytes(9)),
    "export too long": info(0, bytes(11)),
    "block sizes too short": export() + info(BLOCK_SIZE, bytes(11)),
    "flags that are not valid": export(flags=4),
    "reply of an unknown type": option_reply(GO, 7),
    "information for ever": export() * 65,
}


@pytest.mark.parametrize("said", BREAKS.values(), ids=BREAKS.keys())
def test_a_server_that_breaks_the_protocol_is_not_believed(said: bytes) -> None:
    assert "breaks the protocol" in refusal(said)


@pytest.mark.parametrize("size", [0, 1, 4095, 4097, 1 << 63, (1 << 64) - 4096])
def test_a_size_that_no_device_can_have_is_refused(size: int) -> None:
    assert str(size) in refusal(export(size))


@pytest.mark.parametrize(("minimum", "payload"), [(8192, 1 << 20), (1, 4095), (1, 0)])
def test_a_server_that_takes_no_pages_is_refused(minimum: int, payload: int) -> None:
    assert "4096" in refusal(export(), sizes(minimum, payload))


def test_an_unknown_export_is_an_error_of_its_own() -> None:
    outcome, _ = negotiated(GREETING, option_reply(GO, ERR_UNKNOWN, b"no such export"))
    assert isinstance(outcome, UnknownExportError)
    assert "no such export" in str(outcome)


@pytest.mark.parametrize(
    ("kind", "said", "shown"),
    [
        (ERR_SHUTDOWN, b"the server is shutting down", "the server is shutting down"),
        (ERR_POLICY, b"", "error 2"),
        (ERR_POLICY, b"\x1b[2J\n\xff", "?[2J?\ufffd"),
        (ERR_INVALID, b"x" * 4096, "x" * 4096),
        (ERR_TLS_REQD, b"", "requires TLS"),
    ],
)
def test_a_refusal_is_shown_as_one_line_of_text(kind: int, said: bytes, shown: str) -> None:
    assert shown in refusal(option_reply(GO, kind, said))


@pytest.mark.parametrize("cut", [0, 17, 18, 19, 18 + len(ANSWER) - 1])
def test_a_server_that_leaves_is_an_error(cut: int) -> None:
    server, client = socket.socketpair()
    with client:
        with server:
            server.sendall((GREETING + ANSWER)[:cut])
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            negotiate(client, "")


def test_a_server_that_says_nothing_is_given_up() -> None:
    outcome, _ = negotiated(GREETING, seconds=0.01)
    assert isinstance(outcome, TimeoutError)


# With a server


@pytest.fixture
def serving(opened: OpenDevice) -> Iterator[tuple[Server, OpenDevice]]:
    disk = Disk("zram0", None)
    disk.opened = opened
    server = Server(Exports([Export("zram0", "a disk", disk)]))
    yield server, opened
    assert server.stop(30)


def check(connection: Connection, opened: OpenDevice) -> None:
    with connection.sock as sock:
        assert sock.gettimeout() is None
        assert connection.size == opened.device.disksize
        assert find_uuid(connection.description) == str(opened.device.identity.uuid)
        sock.sendall(request(READ, 1, 0, 4096))
        assert receive(sock, REPLY_BYTES + 4096) == reply(1, bytes(4096))


def test_a_connection_by_name_or_uuid_is_ready_for_requests(serving: tuple[Server, OpenDevice], tmp_path: Path) -> None:
    server, opened = serving
    path = tmp_path / "nbd"
    server.accept_on(listen_unix(path))
    for name in ("", "zram0", str(opened.device.identity.uuid)):
        check(connect([str(path)], name), opened)
    with pytest.raises(UnknownExportError):
        connect([str(path)], "0f3c9a52-6d1b-4f0e-9c55-3a1f6f2f7a10")


def test_over_tcp_the_first_address_that_answers_is_taken(serving: tuple[Server, OpenDevice]) -> None:
    server, opened = serving
    (listener,) = listen_tcp("127.0.0.1", 0)
    port = listener.getsockname()[1]
    server.accept_on(listener)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        closed = unused.getsockname()[1]
        connection = connect([("127.0.0.1", closed), ("127.0.0.1", port)], "")
        assert connection.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        check(connection, opened)


def test_where_nobody_answers_the_last_reason_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        connect([("127.0.0.1", 1), str(tmp_path / "absent")], "")


def test_the_grown_disk_keeps_its_uuid(tmp_path: Path) -> None:
    with contextlib.ExitStack() as undo:
        server = start_server(tmp_path, "--size", "8M", "--state", str(tmp_path / "state"), volatile=False)
        undo.callback(server.stop)
        before = connect([str(server.unix)], "")
        undo.enter_context(before.sock)
        server.ask("grow 16M")
        uuid = find_uuid(before.description)
        assert uuid
        after = connect([str(server.unix)], uuid)
        undo.enter_context(after.sock)
        assert (before.size, after.size) == (8 << 20, 16 << 20)


# URIs


@pytest.mark.parametrize(
    ("uri", "address", "name"),
    [
        ("nbd+unix:///?socket=/run/zramd/zram0.nbd", "/run/zramd/zram0.nbd", ""),
        ("nbd+unix:///zram1?socket=/a%20b/%C3%B6.nbd", "/a b/ö.nbd", "zram1"),
        ("nbd+unix:///a%2Fb%3F?socket=/s", "/s", "a/b?"),
        ("nbd://127.0.0.1", ("127.0.0.1", 10809), ""),
        ("nbd://127.0.0.1:10810/zram1", ("127.0.0.1", 10810), "zram1"),
        ("nbd://[::1]:7/", ("::1", 7), ""),
    ],
)
def test_a_uri_leads_to_an_address_and_a_name(uri: str, address: object, name: str) -> None:
    assert parse_uri(uri) == ([address], name)


def test_a_relative_socket_is_one_of_this_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_uri("nbd+unix:///?socket=a.nbd") == ([str(tmp_path / "a.nbd")], "")


def test_a_host_is_looked_up_once_and_for_all() -> None:
    addresses, _ = parse_uri("nbd://localhost:7")
    assert ("127.0.0.1", 7) in addresses or ("::1", 7) in addresses


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("nbds://127.0.0.1", "cannot do TLS"),
        ("nbds+unix:///?socket=/s", "cannot do TLS"),
        ("/run/zramd/zram0.nbd", "no NBD URI"),
        ("http://127.0.0.1", "no NBD URI"),
        ("nbd+vsock://1", "no NBD URI"),
        ("nbd+unix:///", "one socket"),
        ("nbd+unix:///?socket=", "one socket"),
        ("nbd+unix:///?socket=/a&socket=/b", "one socket"),
        ("nbd+unix:///?socket=/a&tls-certificates=/b", "one socket"),
        ("nbd+unix://host/?socket=/a", "one socket"),
        ("nbd+unix:///?socket", "bad query field"),
        ("nbd://", "a host"),
        ("nbd:///zram0", "a host"),
        ("nbd://ann@127.0.0.1", "a host"),
        ("nbd://127.0.0.1?tls=1", "a host"),
        ("nbd://127.0.0.1:99999", "ort"),
        ("nbd://[::1", "IPv6"),
        ("nbd://host.invalid", "not the address of a host"),
    ],
)
def test_any_other_uri_is_refused_in_one_line_that_names_it(uri: str, says: str) -> None:
    with pytest.raises(UriError) as caught:
        parse_uri(uri)
    assert uri in str(caught.value)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
