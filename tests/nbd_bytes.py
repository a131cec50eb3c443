"""NBD as bytes: frames as a client packs and reads them. Nothing of the server's own constants is used here."""

import contextlib
import fcntl
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

GREETING = b"NBDMAGICIHAVEOPT\x00\x03"
FIXED_NEWSTYLE, NO_ZEROES = 1, 2

EXPORT_NAME, ABORT, LIST, INFO, GO = 1, 2, 3, 6, 7
ACK, SERVER, INFO_REPLY = 1, 2, 3
ERR_UNSUP, ERR_INVALID, ERR_UNKNOWN = 0x80000001, 0x80000003, 0x80000006

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES = range(7)
FUA, NO_HOLE = 1, 2
EIO, EINVAL, ENOSPC = 5, 22, 28

PEEK_EXPORT, STARTTLS, STRUCTURED_REPLY, LIST_META_CONTEXT, SET_META_CONTEXT, EXTENDED_HEADERS = 4, 5, 8, 9, 10, 11
META_CONTEXT = 4
ERR_POLICY, ERR_TLS_REQD, ERR_SHUTDOWN = 0x80000002, 0x80000005, 0x80000007
ERR_TOO_BIG, ERR_EXT_HEADER_REQD = 0x80000009, 0x8000000A

BLOCK_STATUS = 7
DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = 4, 8, 16, 32
EPERM, EOVERFLOW, ENOTSUP = 1, 75, 95
FLAGS = {
    READ: FUA,
    WRITE: FUA,
    FLUSH: FUA,
    TRIM: FUA,
    CACHE: FUA,
    WRITE_ZEROES: FUA | NO_HOLE | FAST_ZERO,
    BLOCK_STATUS: FUA | REQ_ONE,
}
"""What each command may have with every framing: DF needs chunks, PAYLOAD_LEN extended headers."""

NO_CHUNK, DATA_CHUNK, HOLE_CHUNK, STATUS_CHUNK, LONG_STATUS_CHUNK = 0, 1, 2, 5, 6
ERROR_CHUNK, ERROR_OFFSET_CHUNK = 0x8001, 0x8002

HEADER_BYTES = 28
REPLY_BYTES = 16


def client_flags(flags: int = FIXED_NEWSTYLE | NO_ZEROES) -> bytes:
    return struct.pack(">I", flags)


def option(kind: int, data: bytes = b"") -> bytes:
    return b"IHAVEOPT" + struct.pack(">II", kind, len(data)) + data


def option_reply(kind: int, reply_type: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, kind, reply_type, len(data)) + data


def info_request(name: bytes, *types: int) -> bytes:
    return struct.pack(">I", len(name)) + name + struct.pack(f">H{len(types)}H", len(types), *types)


def context_request(name: bytes, *queries: bytes) -> bytes:
    """Return the data of LIST_META_CONTEXT or SET_META_CONTEXT."""
    strings = b"".join(struct.pack(">I", len(query)) + query for query in queries)
    return struct.pack(">I", len(name)) + name + struct.pack(">I", len(queries)) + strings


def without_option_texts(stream: bytes) -> bytes:
    """Return option replies with the texts of errors left out, which may say anything."""
    kept = b""
    while stream:
        magic, kind, reply_type, length = struct.unpack_from(">QIII", stream)
        assert magic == 0x3E889045565A9
        data, stream = stream[20 : 20 + length], stream[20 + length :]
        assert len(data) == length
        if reply_type >= 1 << 31:
            assert 0 < len(data.decode()) <= 4096
            data = b""
        kept += option_reply(kind, reply_type, data)
    return kept


def request(command: int, cookie: int, offset: int = 0, length: int = 0, flags: int = 0) -> bytes:
    return struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length)


def write_request(cookie: int, offset: int, payload: bytes, flags: int = 0) -> bytes:
    return request(WRITE, cookie, offset, len(payload), flags) + payload


def reply(cookie: int, data: bytes = b"", error: int = 0) -> bytes:
    return struct.pack(">IIQ", 0x67446698, error, cookie) + data


@dataclass(frozen=True)
class Dialect:
    """One of the three ways to frame requests and replies, which a client and a server agree on."""

    name: str
    structured: bool
    extended: bool

    def __str__(self) -> str:
        return self.name

    def request(self, command: int, cookie: int, offset: int = 0, length: int = 0, flags: int = 0) -> bytes:
        if self.extended:
            return struct.pack(">IHHQQQ", 0x21E41C71, flags, command, cookie, offset, length)
        return request(command, cookie, offset, length, flags)

    def write(self, cookie: int, offset: int, payload: bytes, flags: int = 0) -> bytes:
        if self.extended:
            flags |= PAYLOAD_LEN
        return self.request(WRITE, cookie, offset, len(payload), flags) + payload

    def chunk(self, kind: int, cookie: int, start: int, payload: bytes = b"", *, last: bool = True) -> bytes:
        """Return a chunk of the reply to a request at `start`."""
        if self.extended:
            return struct.pack(">IHHQQQ", 0x6E8A278C, last, kind, cookie, start, len(payload)) + payload
        return struct.pack(">IHHQI", 0x668E33EF, last, kind, cookie, len(payload)) + payload

    def done(self, cookie: int, start: int = 0) -> bytes:
        return self.chunk(NO_CHUNK, cookie, start) if self.extended else reply(cookie)

    def error(self, cookie: int, number: int, start: int = 0, offset: int | None = None) -> bytes:
        """Return an error, its text left out."""
        if not self.structured:
            return reply(cookie, error=number)
        if offset is None:
            return self.chunk(ERROR_CHUNK, cookie, start, struct.pack(">IH", number, 0))
        return self.chunk(ERROR_OFFSET_CHUNK, cookie, start, struct.pack(">IHQ", number, 0, offset))

    def content(self, cookie: int, start: int, *parts: bytes | int, whole: bool = True) -> bytes:
        """Return the reply to a read at `start` that finds data and holes of so many zeros, or its beginning."""
        if not self.structured:
            return reply(cookie, b"".join(bytes(part) for part in parts))
        if not parts:
            return self.chunk(NO_CHUNK, cookie, start)
        chunks, offset = [], start
        for number, part in enumerate(parts, 1):
            last = whole and number == len(parts)
            if isinstance(part, int):
                chunks.append(self.chunk(HOLE_CHUNK, cookie, start, struct.pack(">QI", offset, part), last=last))
                offset += part
            else:
                chunks.append(self.chunk(DATA_CHUNK, cookie, start, struct.pack(">Q", offset) + part, last=last))
                offset += len(part)
        return b"".join(chunks)

    def status(self, cookie: int, start: int, found: dict[int, list[tuple[int, int]]]) -> bytes:
        """Return the reply to a BLOCK_STATUS: extents of (length, status) for each context id."""
        chunks = []
        for number, (context, extents) in enumerate(found.items(), 1):
            if self.extended:
                kind, payload = LONG_STATUS_CHUNK, struct.pack(">II", context, len(extents))
            else:
                kind, payload = STATUS_CHUNK, struct.pack(">I", context)
            payload += b"".join(struct.pack(">QQ" if self.extended else ">II", *extent) for extent in extents)
            chunks.append(self.chunk(kind, cookie, start, payload, last=number == len(found)))
        return b"".join(chunks)

    def parse(self, stream: bytes) -> list[tuple[int, int, int, int, bytes]]:
        """Return (flags, type, cookie, start, payload) of each chunk; a simple reply is of the type -1."""
        assert self.structured
        chunks = []
        while stream:
            start = 0
            if not self.extended and stream.startswith(b"\x67\x44\x66\x98"):
                _, error, cookie = struct.unpack_from(">IIQ", stream)
                chunks.append((1, -1, cookie, 0, struct.pack(">I", error)))
                stream = stream[REPLY_BYTES:]
                continue
            if self.extended:
                magic, flags, kind, cookie, start, length = struct.unpack_from(">IHHQQQ", stream)
                assert magic == 0x6E8A278C
                stream = stream[32:]
            else:
                magic, flags, kind, cookie, length = struct.unpack_from(">IHHQI", stream)
                assert magic == 0x668E33EF
                stream = stream[20:]
            chunks.append((flags, kind, cookie, start, stream[:length]))
            assert len(stream) >= length
            stream = stream[length:]
        return chunks

    def without_texts(self, stream: bytes) -> bytes:
        """Return a stream of replies with the texts of errors left out, which may say anything."""
        if not self.structured:
            return stream
        kept = b""
        for flags, kind, cookie, start, payload in self.parse(stream):
            if kind == -1:
                kept += reply(cookie, error=int.from_bytes(payload))
                continue
            if kind in (ERROR_CHUNK, ERROR_OFFSET_CHUNK):
                number, length = struct.unpack_from(">IH", payload)
                assert 0 < len(payload[6 : 6 + length].decode()) <= 4096
                payload = struct.pack(">IH", number, 0) + payload[6 + length :]
            kept += self.chunk(kind, cookie, start, payload, last=bool(flags))
            assert flags in (0, 1)
        return kept


SIMPLE = Dialect("simple", structured=False, extended=False)
STRUCTURED = Dialect("structured", structured=True, extended=False)
EXTENDED = Dialect("extended", structured=True, extended=True)


def receive(sock: socket.socket, length: int) -> bytes:
    """Receive exactly `length` bytes, or what came before the end."""
    data = bytearray(length)
    position = 0
    while position < length:
        count = sock.recv_into(memoryview(data)[position:])
        if not count:
            break
        position += count
    return bytes(data[:position])


def receive_rest(sock: socket.socket) -> bytes:
    """Receive until the other side closes; a Unix socket closed with unread data resets, after what was sent."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := sock.recv(1 << 20):
            parts.append(part)
    return b"".join(parts)


def exchange(sock: socket.socket, *pieces: bytes) -> bytes:
    """Send all pieces and half-close, while receiving until the other side closes."""

    def send() -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for number, piece in enumerate(pieces):
                if number:
                    wait_until_taken(sock)
                sock.sendall(piece)
            sock.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        return receive_rest(sock)
    finally:
        sender.join()


def wait_until_taken(sock: socket.socket) -> None:
    """Wait until the other side has received everything sent so far."""
    left = bytearray(4)
    while fcntl.ioctl(sock, termios.TIOCOUTQ, left) == 0 and any(left):
        time.sleep(0)


def waiting(sock: socket.socket) -> int:
    """Return how many bytes have come in and are not yet received."""
    count = bytearray(4)
    fcntl.ioctl(sock, termios.FIONREAD, count)
    return int.from_bytes(count, "little")


def connect(path: Path) -> socket.socket:
    """Return a connection to the default export, ready for requests."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(60)
    sock.connect(str(path))
    sock.sendall(client_flags() + option(EXPORT_NAME))
    receive(sock, len(GREETING) + 10)
    return sock


class Peer:
    """Something that serves one end of a socket pair in a thread; `client` is the other end.

    `outcome` is, after `join`, what it returned or the exception that ended it.
    """

    def __init__(self, serve: Callable[[socket.socket], object]) -> None:
        self.client, self._served = socket.socketpair()
        self.client.settimeout(60)
        self._serve = serve
        self._outcome: object = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with self._served:
            try:
                self._outcome = self._serve(self._served)
            except Exception as error:
                # Without its traceback, whose frames would keep views of the device's memory.
                error.__cause__ = error.__context__ = None
                self._outcome = error.with_traceback(None)

    def join(self) -> object:
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self._outcome

    def __enter__(self) -> "Peer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()
        self._thread.join(60)
