"""A connection without a kernel: what the client sends comes in as the test likes, what the server sends is kept."""

import select
import socket
from typing import Any

MOST_SENT = 2 << 20
"""Bytes that the client takes in transmission; then it is gone."""


class Wire(socket.socket):
    """The server's end of a connection whose client sends `data`, and then no more.

    `step` bytes come in at once at most, and `most` are taken by one gathered send. The client leaves when it has sent
    `leave` bytes; it does so without a word, or with one if there was a DISC among them.

    Attributes:
        sent: what the server sent.
        taken: bytes of `data` that the server received in calls before the client left, or all it received.
        gone: the client has left.
        cut: it has left because it was sent too much.
    """

    def __init__(self, data: bytes, step: int, most: int, leave: int | None) -> None:
        ours, self._peer = socket.socketpair()
        super().__init__(ours.family, ours.type, ours.proto, ours.detach())
        self._data = memoryview(data)
        self._step = step
        self._most = most
        self._leave = leave
        self._position = 0
        self.sent = bytearray()
        self.taken = 0
        self.gone = self.cut = False

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        """Receive as a socket would, up to the end of the data."""
        part = self._data[self._position : self._position + min(len(buffer), self._step)]
        buffer[: len(part)] = part
        self._position += len(part)
        if self._leave is not None and self._position >= self._leave:
            self._go()
        if not self.gone:
            self.taken = self._position
        return len(part)

    def _go(self) -> None:
        if not self.gone:
            self.gone = True
            self._peer.close()
            watch = select.poll()
            watch.register(self.fileno(), 0)
            assert watch.poll(0)

    def sendmsg(self, buffers: Any, *_: Any) -> int:
        """Take some of the buffers' bytes, unless the client is gone."""
        if len(self.sent) > MOST_SENT:
            self.cut = True
            self._go()
        if self.gone:
            raise BrokenPipeError
        count = 0
        for buffer in buffers:
            part = memoryview(buffer)[: self._most - count]
            self.sent += part
            count += len(part)
        return count

    def sendall(self, data: Any, *_: Any) -> None:
        """Take all, even if the client is gone: a handshake does not notice."""
        self.sent += data

    def settimeout(self, _: float | None) -> None:
        """Ignore the timeout: nothing blocks."""

    def close(self) -> None:
        """Close both ends."""
        self._peer.close()
        super().close()
