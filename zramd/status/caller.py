"""Who is connected to a status or admin socket: the lines that come from there, and what comes with them."""

import os
import select
import socket
from types import TracebackType

MAX_DESCRIPTORS = 1
"""That may come with a line."""


class Caller:
    """A connected client; a context, at whose end the descriptors that nobody took are closed."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._descriptors: list[int] = []

    def receive(self, most: int) -> bytes:
        """Return up to so many of the next bytes, none if the client asks no more."""
        data, descriptors, _, _ = socket.recv_fds(self._sock, most, MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
        if descriptors:
            self._close()
            self._descriptors = descriptors
        return data

    def descriptor(self) -> int:
        """Return the descriptor that came last; it stays open until another one comes or the client leaves.

        Raises:
            ValueError: there was none.
        """
        if not self._descriptors:
            raise ValueError("a descriptor has to come with this line (SCM_RIGHTS): zramd save and restore send one")
        return self._descriptors[-1]

    def is_gone(self) -> bool:
        """Say whether the client has closed the connection, and waits for no answer. Lines without end do not count."""
        poll = select.poll()
        poll.register(self._sock, 0)
        return any(events & select.POLLHUP for _, events in poll.poll(0))

    def __enter__(self) -> "Caller":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        for fd in self._descriptors:
            os.close(fd)
        self._descriptors.clear()
