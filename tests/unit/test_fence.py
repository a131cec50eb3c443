"""What becomes of requests whose client is gone: see the fence in zramd/nbd/transmission.py."""

import socket
import threading
from collections.abc import Iterator

import pytest

from tests.nbd_bytes import DISC, HEADER_BYTES, TRIM, WRITE, request, wait_until_taken, write_request
from tests.property.test_device import make_data, read, write
from zramd.device.opening import OpenDevice
from zramd.layout import PAGE_SIZE
from zramd.nbd.protocol import ClientLeftError
from zramd.nbd.transmission import Transmission

OLD = make_data("text", 1, 1 << 20)
NEW = make_data("text", 2, 1 << 20)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    client, server = socket.socketpair()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
    with client, server:
        yield client, server


def serve(server: socket.socket, opened: OpenDevice) -> None:
    Transmission(server, opened.device, opened.flush).run()


def page_writes(count: int) -> bytes:
    pages = (bytes(NEW[number * PAGE_SIZE : (number + 1) * PAGE_SIZE]) for number in range(count))
    return b"".join(write_request(number, number * PAGE_SIZE, page) for number, page in enumerate(pages))


@pytest.mark.parametrize(
    "sent",
    [page_writes(32), write_request(1, 0, bytes(NEW)), request(TRIM, 1, 0, 1 << 20), page_writes(8) + b"%"],
    ids=["32 writes", "a long write", "a long trim", "writes and a part of a header"],
)
def test_nothing_is_applied_for_a_client_that_is_gone(
    opened: OpenDevice, pair: tuple[socket.socket, socket.socket], sent: bytes
) -> None:
    client, server = pair
    write(opened.device, 0, OLD)
    client.sendall(sent)
    client.close()
    with pytest.raises(ClientLeftError, match="dropped"):
        serve(server, opened)
    assert read(opened.device, 0, len(OLD)) == OLD


@pytest.mark.parametrize(
    ("sent", "length"),
    [(page_writes(32), 32 * PAGE_SIZE), (write_request(1, 0, bytes(NEW[: 300 << 10])), 300 << 10)],
    ids=["32 writes", "one write"],
)
def test_a_client_that_said_disconnect_gets_all_it_asked_for(
    opened: OpenDevice, pair: tuple[socket.socket, socket.socket], sent: bytes, length: int
) -> None:
    client, server = pair
    write(opened.device, 0, OLD)
    client.sendall(sent + request(DISC, 99))
    client.close()
    serve(server, opened)
    assert read(opened.device, 0, len(OLD)) == NEW[:length] + OLD[length:]


def test_a_client_that_said_disconnect_and_left_answers_unread_gets_the_rest(
    opened: OpenDevice, pair: tuple[socket.socket, socket.socket]
) -> None:
    client, server = pair
    sent = page_writes(32)
    answered, received = 10 * (28 + PAGE_SIZE), 20 * (28 + PAGE_SIZE)
    client.sendall(sent[:answered])
    thread = threading.Thread(target=serve, args=(server, opened))
    thread.start()
    client.recv(1, socket.MSG_PEEK)
    with opened.device.lock:
        client.sendall(sent[answered:received])
        wait_until_taken(client)
        client.sendall(sent[received:] + request(DISC, 99))
        client.close()
    thread.join(60)
    assert not thread.is_alive()
    assert read(opened.device, 0, 32 * PAGE_SIZE) == NEW[: 32 * PAGE_SIZE]


def test_a_client_that_only_stops_sending_gets_its_answers(
    opened: OpenDevice, pair: tuple[socket.socket, socket.socket]
) -> None:
    client, server = pair
    client.sendall(page_writes(32))
    client.shutdown(socket.SHUT_WR)
    serve(server, opened)
    assert len(client.recv(65536)) == 32 * 16
    assert read(opened.device, 0, 32 * PAGE_SIZE) == NEW[: 32 * PAGE_SIZE]


def test_a_server_that_stops_receiving_over_tcp_applies_and_answers_what_it_has(opened: OpenDevice) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as client:
        server, _ = listener.accept()
        with server:
            client.sendall(page_writes(4))
            wait_until_taken(client)
            server.shutdown(socket.SHUT_RD)
            serve(server, opened)
            assert len(client.recv(65536)) == 4 * 16
    assert read(opened.device, 0, 4 * PAGE_SIZE) == NEW[: 4 * PAGE_SIZE]


@pytest.mark.parametrize(
    "no_request",
    [bytes(len(request(DISC, 0))), b"\0" + request(WRITE, 5, 0, HEADER_BYTES)[1:]],
    ids=["zeros", "a write but for its magic"],
)
def test_a_disconnect_behind_what_is_no_request_does_not_count(
    pair: tuple[socket.socket, socket.socket], opened: OpenDevice, no_request: bytes
) -> None:
    client, server = pair
    client.sendall(page_writes(4) + no_request + request(DISC, 5))
    client.close()
    with pytest.raises(ClientLeftError):
        serve(server, opened)
    assert read(opened.device, 0, 4 * PAGE_SIZE) == bytes(4 * PAGE_SIZE)
