import socket
from collections.abc import Callable, Iterator
from http import HTTPStatus

import pytest

from zramd.listeners import listen_tcp
from zramd.status import http
from zramd.status.http import Answer, HttpError, HttpServer, Request


def refuse(request: Request) -> Answer:
    raise HttpError(HTTPStatus.CONFLICT, f"not {request.query['what']}")


PATHS = {
    "/": lambda _: Answer(b"body"),
    "/refuse": refuse,
    "/echo": lambda request: Answer(repr(request.query).encode()),
}


@pytest.fixture
def ask() -> Iterator[Callable[[bytes], bytes]]:
    """Return what sends bytes to a server of PATHS and returns all that it answers."""
    server = HttpServer(PATHS)
    (listener,) = listen_tcp("127.0.0.1", 0)
    address = listener.getsockname()
    server.accept_on(listener)

    def ask(sent: bytes) -> bytes:
        with socket.create_connection(address, timeout=10) as sock:
            sock.sendall(sent)
            return b"".join(iter(lambda: sock.recv(65536), b""))

    yield ask
    assert server.stop(5)


HOST = b"Host: 127.0.0.1:8080\r\n\r\n"


def test_a_whole_answer_by_its_bytes(ask: Callable[[bytes], bytes]) -> None:
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 4\r\n"
        b"Content-Security-Policy: default-src 'none'; frame-ancestors 'none'\r\nCache-Control: no-store\r\n"
        b"Cross-Origin-Resource-Policy: same-origin\r\nReferrer-Policy: no-referrer\r\n"
        b"X-Content-Type-Options: nosniff\r\nConnection: close\r\n\r\n"
    )
    assert ask(b"GET / HTTP/1.1\r\n" + HOST) == head + b"body"
    assert ask(b"HEAD / HTTP/1.1\r\n" + HOST) == head
    assert ask(b"GET /echo?a=1&b=%20&c= HTTP/1.0\nhost: [::1]\n\n").endswith(b"\r\n\r\n{'a': '1', 'b': ' ', 'c': ''}")


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"POST / HTTP/1.1\r\nContent-Length: 3\r\n" + HOST + b"abc", 405),
        (b"BREW / HTTP/1.1\r\n" + HOST, 405),
        (b"GET /nothing HTTP/1.1\r\n" + HOST, 404),
        (b"GET /refuse?what=me HTTP/1.1\r\n" + HOST, 409),
        (b"GET http://127.0.0.1/ HTTP/1.1\r\n" + HOST, 400),
        (b"mm_stat\n\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + HOST, 400),
        (b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nno field\r\n" + HOST, 400),
        (b"GET / HTTP/1.1\r\nHost: zramd.example\r\n\r\n", 421),
        (b"GET / HTTP/1.1\r\nHost: 127.0.0.1.zramd.example:80\r\n\r\n", 421),
        (b"GET / HTTP/1.1\r\nHost: 192.0.2.1\r\n\r\n", 421),
        (b"GET / HTTP/1.1\r\nHost: LOCALHOST:1\r\n\r\n", 200),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * http.MAX_HEAD + b"\r\n" + HOST, 431),
    ],
)
def test_what_a_request_is_answered_with(ask: Callable[[bytes], bytes], sent: bytes, status: int) -> None:
    answer = ask(sent)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert answer.endswith(b"\n" if status >= 400 else b"body")
    assert (b"\r\nAllow: GET, HEAD\r\n" in answer) == (status == 405)


def test_who_does_not_finish_a_request_is_told_so(
    ask: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "RECEIVE_SECONDS", 0.05)
    assert ask(b"GET / HTT").startswith(b"HTTP/1.1 408 ")
    assert ask(b"") == b""


def test_a_unix_socket_may_go_by_any_name() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(b" / HTTP/1.1\r\nHost: d\r\n\r\n")
        ours.shutdown(socket.SHUT_WR)
        http.answer_request(theirs, PATHS, b"GET")
        assert ours.recv(65536).startswith(b"HTTP/1.1 200 OK\r\n")
