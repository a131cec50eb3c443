"""HTTP for those who read: GET and HEAD of a table of paths, one request a connection.

    GET /data.json HTTP/1.1        the path is looked up in the table; its function gets what follows a ?
    Host: 127.0.0.1:8080           over TCP, must be a loopback address or localhost
    Accept: text/plain             goes to the function too

The rules are those of RFC 9110 and 9112. No request changes anything, and the body of one is not read.
"""

import ipaddress
import re
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import parse_qsl

from zramd.listeners import Connections

MAX_HEAD = 8192
"""Bytes in a request's line and fields."""
MAX_CLIENTS = 16
RECEIVE_SECONDS = 5.0
"""For all of a request. A browser also opens connections ahead of need, and leaves them unused."""
SEND_SECONDS = 5.0
"""For all of an answer."""
MAX_DRAINED = 65536
"""Bytes that a client sent too much and that are still read: to close a connection with them could lose the answer."""
DRAIN_SECONDS = 1.0
NO_CONTENT = "default-src 'none'; frame-ancestors 'none'"
"""The Content-Security-Policy of what is no page."""

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]"
_REQUEST = re.compile(rb"(%b{1,32}) (/[!-~]*) HTTP/1\.[0-9]" % _TOKEN)
_FIELD = re.compile(rb"(%b+):[ \t]*([\t -~\x80-\xff]*?)[ \t]*" % _TOKEN)
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z.-]+)(?::[0-9]{1,5})?")


class HttpError(Exception):
    """A request that is refused: a status, and a line that says why."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True, slots=True)
class Answer:
    """What is at a path; `policy` is its Content-Security-Policy."""

    body: bytes
    kind: str = "application/json"
    policy: str = NO_CONTENT


@dataclass(frozen=True, slots=True)
class Request:
    """What a path is asked: the fields of the query, and the media types that are accepted, in lower case."""

    query: dict[str, str]
    accept: str = ""


Paths = Mapping[str, Callable[[Request], Answer]]
"""What makes the answer, by path; it may raise HttpError."""


class HttpServer(Connections):
    """Answers from a table of paths those who connect by TCP, and know this server by a loopback address."""

    def __init__(self, paths: Paths) -> None:
        super().__init__("http", MAX_CLIENTS, lambda sock: answer_request(sock, paths))


def answer_request(sock: socket.socket, paths: Paths, received: bytes = b"") -> None:
    """Answer the one request of a connection, of which `received` has come already.

    Raises:
        OSError: the client went away, or was too slow.
    """
    with_body = True
    try:
        head = _receive_head(sock, received)
        if not head:
            return
        method, target, fields = _parse(head)
        with_body = method != "HEAD"
        if sock.family != socket.AF_UNIX:
            _check_host([value for name, value in fields if name == "host"])
        accept = ",".join(value for name, value in fields if name == "accept")
        status, answer = HTTPStatus.OK, _find(paths, method, target, accept.lower())
    except HttpError as error:
        status, answer = error.status, Answer(f"{error}\n".encode(), "text/plain; charset=utf-8")
    sock.settimeout(SEND_SECONDS)
    sock.sendall(_head_of(status, answer) + answer.body * with_body)
    sock.shutdown(socket.SHUT_WR)
    _drain(sock)


def _receive_head(sock: socket.socket, received: bytes) -> bytes:
    """Return a request without the blank line that ends it, nothing if none came."""
    end = time.monotonic() + RECEIVE_SECONDS
    while True:
        head, blank, _ = received.replace(b"\r\n", b"\n").partition(b"\n\n")
        if blank and len(head) <= MAX_HEAD:
            return head
        if len(received) > MAX_HEAD:
            raise HttpError(
                HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"a request has at most {MAX_HEAD} bytes before its body"
            )
        sock.settimeout(max(0.001, end - time.monotonic()))
        try:
            part = sock.recv(MAX_HEAD)
        except TimeoutError:
            if not received:
                return b""
            raise HttpError(
                HTTPStatus.REQUEST_TIMEOUT, f"the request was not whole after {RECEIVE_SECONDS:.0f} s"
            ) from None
        if not part:
            return b""
        received += part


def _parse(head: bytes) -> tuple[str, str, list[tuple[str, str]]]:
    """Return the method, the target, and the fields: names in lower case, and values."""
    first, *lines = head.split(b"\n")
    if not (request := _REQUEST.fullmatch(first)):
        raise HttpError(HTTPStatus.BAD_REQUEST, "this is no request: it starts with GET /PATH HTTP/1.1")
    fields = [
        (field[1].decode().lower(), field[2].decode("latin-1")) for field in map(_FIELD.fullmatch, lines) if field
    ]
    if len(fields) < len(lines):
        raise HttpError(HTTPStatus.BAD_REQUEST, "a line of the request is no field: NAME: VALUE")
    return request[1].decode(), request[2].decode(), fields


def _check_host(hosts: list[str]) -> None:
    """Refuse who knows this server by any other name than a loopback address: a web site may have given it that name.

    The port may be any: it is that of a forwarding, perhaps.
    """
    if len(hosts) != 1 or not (host := _HOST.fullmatch(hosts[0])):
        raise HttpError(HTTPStatus.BAD_REQUEST, "a request has one field Host")
    name = host[1].strip("[]").lower()
    try:
        loopback = name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise HttpError(HTTPStatus.MISDIRECTED_REQUEST, "this server is localhost or a loopback address, nothing else")


def _find(paths: Paths, method: str, target: str, accept: str) -> Answer:
    path, _, query = target.partition("?")
    if path not in paths:
        raise HttpError(HTTPStatus.NOT_FOUND, f"no such path; there are: {' '.join(paths)}")
    if method not in ("GET", "HEAD"):
        raise HttpError(HTTPStatus.METHOD_NOT_ALLOWED, "nothing can be changed here: only GET and HEAD")
    return paths[path](Request(dict(parse_qsl(query, keep_blank_values=True)), accept))


def _head_of(status: HTTPStatus, answer: Answer) -> bytes:
    fields = {
        "Content-Type": answer.kind,
        "Content-Length": str(len(answer.body)),
        "Content-Security-Policy": answer.policy,
        "Cache-Control": "no-store",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Connection": "close",
    }
    if status is HTTPStatus.METHOD_NOT_ALLOWED:
        fields["Allow"] = "GET, HEAD"
    lines = [f"HTTP/1.1 {status.value} {status.phrase}", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def _drain(sock: socket.socket) -> None:
    end, left = time.monotonic() + DRAIN_SECONDS, MAX_DRAINED
    while left > 0 and (seconds := end - time.monotonic()) > 0:
        sock.settimeout(seconds)
        try:
            part = sock.recv(MAX_DRAINED)
        except OSError:
            return  # it has its answer, or wants none
        if not part:
            return
        left -= len(part)
