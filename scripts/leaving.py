"""Clients that connect and leave, each in the middle of something else; and a good one, with a shadow of its pages.

Run as a program, it is the good one: the arguments as JSON, and a socket as standard input, on which a line is answered
with how it went, once every page has been compared.
"""

import json
import os
import random
import select
import socket
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import nbd
from frames import FLAGS, GO, LeftError, done, enter, option, receive, request
from stalling import Helper

from zramd.layout import PAGE_SIZE
from zramd.nbd.protocol import GREETING, SIMPLE_REPLY, Command, Option

SHADOW = 16 << 20
"""Bytes from the start of the disk that belong to the good client."""
TORN = 16 << 20
TORN_BYTES = 64 << 10
"""Where writes are cut short; as they fit the buffer of a connection, nothing of them may be applied."""
QUEUED = 32 << 20
PLACES = 16
WRITES = 8
"""Where writes stand before a DISC: each time elsewhere, in one of the places, 8 pages long."""
HALF = 48 << 20
FILLED = 128 << 20
FILLED_BYTES = 1 << 20
"""What the long replies are made of."""
SECONDS = 20.0
LINGER = struct.pack("ii", 1, 0)


class LostError(Exception):
    """The server owed a client something and did not deliver."""


class Leavers:
    """Connects, leaves, and looks at what the server owed.

    `reader` is another client, which stays.
    """

    def __init__(self, unix: Path, tcp: tuple[str, int], reader: nbd.NBD) -> None:
        self._unix = unix
        self._tcp = tcp
        self._reader = reader
        self.kinds: dict[str, Callable[[socket.socket, int], None]] = {
            "at once": _at_once,
            "after half the greeting": _after_half_the_greeting,
            "in the handshake": _in_the_handshake,
            "after GO": _after_go,
            "in a write's payload": _in_a_payload,
            "in a reply of 1 MiB": _in_a_reply,
            "after DISC behind 8 writes": self._after_disc,
            "after half a close": self._after_half_a_close,
        }

    def leave(self, number: int) -> str:
        """Connect for the `number`th time, over each transport in turn, and leave. Return the kind.

        Raises:
            LostError, LeftError, OSError: the server did not do what it should.
        """
        transport, kind = divmod(number, len(self.kinds))
        name = list(self.kinds)[kind]
        try:
            with self._connect(over_tcp=transport % 2 == 1) as sock:
                self.kinds[name](sock, number)
                if sock.family != socket.AF_UNIX:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER)
        except (LeftError, OSError) as error:
            raise LostError(f"{name}: {error}") from error
        return name

    def _connect(self, *, over_tcp: bool) -> socket.socket:
        sock = socket.socket(socket.AF_INET if over_tcp else socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(SECONDS)
        sock.connect(self._tcp if over_tcp else str(self._unix))
        return sock

    def _after_disc(self, sock: socket.socket, number: int) -> None:
        enter(sock)
        place = QUEUED + number // len(self.kinds) % PLACES * WRITES * PAGE_SIZE
        writes = self._write(sock, number, place, request(Command.DISC, 0))
        if receive(sock, WRITES * SIMPLE_REPLY.size) != b"".join(map(done, range(WRITES))) or sock.recv(1):
            raise LostError(f"number {number}: DISC behind {WRITES} writes, and not just they were answered")
        self._require(place, writes, number)

    def _after_half_a_close(self, sock: socket.socket, number: int) -> None:
        enter(sock)
        writes = self._write(sock, number, HALF, request(Command.READ, WRITES, HALF, WRITES * PAGE_SIZE))
        sock.shutdown(socket.SHUT_WR)
        answers = bytearray()
        try:
            while part := sock.recv(1 << 20):
                answers += part
        except ConnectionResetError:
            # With TCP, whoever half-closes is taken for gone; its requests may be dropped, and so unread.
            if sock.family == socket.AF_UNIX:
                raise
        expected = b"".join(map(done, range(WRITES))) + done(WRITES) + writes
        owed = expected if sock.family == socket.AF_UNIX else expected[: len(answers)]
        if answers != owed:
            raise LostError(f"number {number}: half-closed, and answered {len(answers)} of {len(expected)} bytes")
        if answers == expected:
            self._require(HALF, writes, number)

    def _write(self, sock: socket.socket, number: int, place: int, rest: bytes) -> bytes:
        """Send some writes and the rest at once. Return all their payloads."""
        chance = random.Random(number)  # noqa: S311 (it must repeat)
        pages = [chance.randbytes(1024) * (PAGE_SIZE // 1024) for _ in range(WRITES)]
        headers = (request(Command.WRITE, cookie, place + cookie * PAGE_SIZE, PAGE_SIZE) for cookie in range(WRITES))
        sock.sendall(b"".join(header + page for header, page in zip(headers, pages, strict=True)) + rest)
        return b"".join(pages)

    def _require(self, place: int, expected: bytes, number: int) -> None:
        if bytes(self._reader.pread(len(expected), place)) != expected:
            raise LostError(f"number {number}: its writes were answered, and are not there")

    def clear_torn(self) -> None:
        """Make where writes are cut short zeros."""
        self._reader.zero(TORN_BYTES, TORN)

    def require_nothing_torn(self) -> None:
        """Check that no write was applied that did not arrive whole.

        Raises:
            LostError: one was.
        """
        if any(self._reader.pread(TORN_BYTES, TORN)):
            raise LostError("a write whose client left in the middle of it was applied in part")


def _at_once(_sock: socket.socket, _number: int) -> None:
    pass


def _after_half_the_greeting(sock: socket.socket, _number: int) -> None:
    receive(sock, GREETING.size // 2)


def _after_go(sock: socket.socket, _number: int) -> None:
    enter(sock)


def _in_the_handshake(sock: socket.socket, number: int) -> None:
    receive(sock, GREETING.size)
    talk = FLAGS + option(Option.STRUCTURED_REPLY) + option(Option.LIST) + GO[len(FLAGS) :]
    sock.sendall(talk[: 1 + number // 8 % (len(talk) - 1)])


def _in_a_payload(sock: socket.socket, number: int) -> None:
    enter(sock)
    payload = os.urandom(TORN_BYTES - 1)
    sock.sendall(request(Command.WRITE, 1, TORN, TORN_BYTES) + payload[: number * 997 % TORN_BYTES])


def _in_a_reply(sock: socket.socket, number: int) -> None:
    enter(sock)
    sock.sendall(request(Command.READ, 1, FILLED, FILLED_BYTES))
    receive(sock, SIMPLE_REPLY.size + number * 99991 % FILLED_BYTES)


class Shadow:
    """A client that knows what its part of the disk holds."""

    PAUSE_MS = 1
    """Between two operations: it is there to see errors, not to make load."""

    def __init__(self, uri: str) -> None:
        self._client = nbd.NBD()
        self._client.connect_uri(uri)
        self._random = random.Random(0)  # noqa: S311 (it must repeat)
        self._expected = bytearray()
        self._operations = 0
        self._failure = ""

    def run(self, control: int) -> None:
        """Read, write and trim; compare everything and answer what comes in on the descriptor `control`, to its end."""
        poll = select.poll()
        poll.register(control, select.POLLIN)
        try:
            self._fill()
        except nbd.Error as error:
            self._failure = str(error)
        while True:
            asked = poll.poll(self.PAUSE_MS)
            if asked and not os.read(control, 4096):
                return
            if not self._failure:
                try:
                    self._step()
                    if asked:
                        self._compare(0, SHADOW)
                except nbd.Error as error:
                    self._failure = str(error)
            if asked:
                answer = {"operations": self._operations, "failure": self._failure}
                os.write(control, json.dumps(answer).encode() + b"\n")

    def _fill(self) -> None:
        for offset in range(0, SHADOW, PAGE_SIZE):
            self._expected += self._random.randbytes(1024) * (PAGE_SIZE // 1024)
            self._client.pwrite(bytes(self._expected[offset:]), offset)

    def _step(self) -> None:
        length = self._random.choice([512, PAGE_SIZE, 3 * PAGE_SIZE, 64 << 10])
        offset = self._random.randrange(0, SHADOW - length + 1, 512)
        match self._random.randrange(8):
            case 0 | 1 | 2 | 3:
                self._compare(offset, length)
            case 4 | 5 | 6:
                data = self._random.randbytes(512) * (length // 512)
                self._client.pwrite(data, offset)
                self._expected[offset : offset + length] = data
            case _:
                self._client.zero(length, offset)
                self._expected[offset : offset + length] = bytes(length)
        self._operations += 1

    def _compare(self, start: int, length: int) -> None:
        for offset in range(start, start + length, 1 << 20):
            piece = min(1 << 20, start + length - offset)
            if self._client.pread(piece, offset) != self._expected[offset : offset + piece]:
                self._failure = f"operation {self._operations}: the {piece} bytes at {offset} are not what was written"


def shadow(uri: str) -> Helper:
    """Return the good client, which answers with `operations` and `failure`."""
    return Helper(__file__, uri)


if __name__ == "__main__":
    Shadow(*json.loads(sys.argv[1])).run(sys.stdin.fileno())
