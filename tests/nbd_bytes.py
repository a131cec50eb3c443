"""NBD as bytes: frames as a client packs and reads them. Nothing of the server's own constants is used here."""

import contextlib
import fcntl
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable
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


def request(command: int, cookie: int, offset: int = 0, length: int = 0, flags: int = 0) -> bytes:
    return struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length)


def write_request(cookie: int, offset: int, payload: bytes, flags: int = 0) -> bytes:
    return request(WRITE, cookie, offset, len(payload), flags) + payload


def reply(cookie: int, data: bytes = b"", error: int = 0) -> bytes:
    return struct.pack(">IIQ", 0x67446698, error, cookie) + data


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
