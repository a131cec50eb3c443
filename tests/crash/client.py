"""A client that knows what each of its pages may be when the server has died at any moment."""

import random
import socket
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

from tests.nbd_bytes import (
    EXPORT_NAME,
    GREETING,
    NO_HOLE,
    READ,
    REPLY_BYTES,
    SIMPLE,
    TRIM,
    WRITE_ZEROES,
    client_flags,
    option,
    receive,
)
from zramd.layout import PAGE_SIZE, WORD

BATCH = 24
EMPTY = bytes(PAGE_SIZE)
PAUSE_SECONDS = 0.002
"""Between two attempts to connect."""


@cache
def _noise() -> bytes:
    return random.Random(0).randbytes(1 << 18)


class Client:
    """Writes, trims, zeroes and reads `pages` pages from page `first` on, which are its own.

    `possible` holds, for each, what was answered last and whatever was sent since. `answered` counts requests.
    """

    def __init__(self, seed: int, first: int, pages: int) -> None:
        self._generator = random.Random(seed)
        self._serial = 0
        self._first = first
        self._pages = pages
        self.answered = 0
        self.forget()

    def forget(self) -> None:
        """Expect every page to be empty."""
        self.possible: list[list[bytes]] = [[EMPTY] for _ in range(self._pages)]

    def expect(self, disk: bytes) -> None:
        """Expect each page to be what it is on a disk."""
        start, end = self._first * PAGE_SIZE, (self._first + self._pages) * PAGE_SIZE
        self.possible = [[disk[at : at + PAGE_SIZE]] for at in range(start, end, PAGE_SIZE)]

    def run(self, unix: Path, gone: Callable[[], bool]) -> None:
        """Send batches until the server is gone."""
        while not gone():
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                sock.settimeout(60)
                try:
                    enter(sock, unix)
                    self._look(sock)
                    while True:
                        self._batch(sock)
                except (FileNotFoundError, ConnectionError, EOFError):
                    time.sleep(PAUSE_SECONDS)

    def _look(self, sock: socket.socket) -> None:
        """Read what may be one thing or another."""
        unsure = [page for page, held in enumerate(self.possible) if len(held) > 1]
        requests = (SIMPLE.request(READ, page, (self._first + page) * PAGE_SIZE, PAGE_SIZE) for page in unsure)
        sock.sendall(b"".join(requests))
        for page in unsure:
            assert receive_all(sock, REPLY_BYTES) == SIMPLE.done(page)
            self._find(page, receive_all(sock, PAGE_SIZE))

    def _find(self, page: int, content: bytes) -> None:
        held = self.possible[page]
        assert content in held, f"page {self._first + page} is none of the {len(held)} that it may be"
        self.possible[page] = [content]

    def _batch(self, sock: socket.socket) -> None:
        requests = [self._request(cookie) for cookie in range(BATCH)]
        sock.sendall(b"".join(frame for frame, _, _, _ in requests))
        for cookie, (_, page, contents, wanted) in enumerate(requests):
            assert receive_all(sock, REPLY_BYTES) == SIMPLE.done(cookie)
            if wanted is not None:
                assert receive_all(sock, PAGE_SIZE) == wanted, f"page {self._first + page} was read wrong"
            self.answered += 1
            for number, content in enumerate(contents, page):
                # Requests of one connection that hit a page are carried out in order.
                held = self.possible[number]
                del held[: held.index(content)]

    def _request(self, cookie: int) -> tuple[bytes, int, list[bytes], bytes | None]:
        """Return a request, the first page that it changes, what they become, and what it reads."""
        generator = self._generator
        kind = generator.choices(["write", "trim", "trim much", "zero", "part", "read"], [60, 12, 0.5, 4, 6, 18], k=1)[
            0
        ]
        count = {"trim much": self._pages // 3, "part": 1, "read": 1}.get(kind) or generator.choice([1, 1, 1, 4])
        page = generator.randrange(self._pages - count)
        offset, length = (self._first + page) * PAGE_SIZE, count * PAGE_SIZE
        latest = self.possible[page][-1]
        if kind == "read":
            return SIMPLE.request(READ, cookie, offset, PAGE_SIZE), page, [], latest
        if kind == "part":
            start = generator.randrange(PAGE_SIZE)
            data = self._content()[start : start + generator.randrange(1, PAGE_SIZE)]
            frame = SIMPLE.write(cookie, offset + start, data)
            contents = [latest[:start] + data + latest[start + len(data) :]]
        elif kind == "write":
            contents = [self._content() for _ in range(count)]
            frame = SIMPLE.write(cookie, offset, b"".join(contents))
        else:
            contents = [EMPTY] * count
            if kind == "zero":
                frame = SIMPLE.request(WRITE_ZEROES, cookie, offset, length, generator.choice([0, NO_HOLE]))
            else:
                frame = SIMPLE.request(TRIM, cookie, offset, length)
        for number, content in enumerate(contents, page):
            self.possible[number].append(content)
        return frame, page, contents, None

    def _content(self) -> bytes:
        """Return a page that no other page is like, unless it is of zeros."""
        generator, noise = self._generator, _noise()
        self._serial += 1
        stamp = (self._serial << 16 | self._first + 1).to_bytes(WORD, "little")
        start = generator.randrange(len(noise) - PAGE_SIZE)
        kind = generator.random()
        if kind < 0.1:
            return EMPTY
        if kind < 0.2:
            return stamp * (PAGE_SIZE // WORD)
        length = PAGE_SIZE if kind < 0.3 else generator.randrange(WORD, 3500)
        return (stamp + noise[start : start + length - WORD]).ljust(PAGE_SIZE, b"\0")

    def check(self, disk: bytes) -> None:
        """Check what a recovered disk holds, and go on from there."""
        for page in range(self._pages):
            start = (self._first + page) * PAGE_SIZE
            self._find(page, disk[start : start + PAGE_SIZE])


def enter(sock: socket.socket, unix: Path) -> None:
    """Connect to the default export.

    Raises:
        OSError: there is no server.
        EOFError: it has gone.
    """
    sock.connect(str(unix))
    sock.sendall(client_flags() + option(EXPORT_NAME))
    receive_all(sock, len(GREETING) + 10)


def receive_all(sock: socket.socket, length: int) -> bytes:
    data = receive(sock, length)
    if len(data) < length:
        raise EOFError
    return data
