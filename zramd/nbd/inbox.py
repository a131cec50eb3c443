"""What a client has sent: the receive buffer, and whether the client is still there.

The fence: a client that has lost its connection sends what was not answered again, on another, and may then overwrite
it there. So nothing is applied for a client that is gone; whether it is gone is looked at under the device's lock, and
whatever it does elsewhere comes after that. Only one that took its leave (DISC) is owed all that it had asked for.
"""

import select
import socket
from time import monotonic_ns

from zramd.nbd.protocol import (
    EXTENDED_REQUEST,
    EXTENDED_REQUEST_MAGIC,
    REQUEST,
    REQUEST_MAGIC,
    ClientLeftError,
    Command,
    CommandFlag,
)

_TCP_ESTABLISHED = 1  # the first byte of Linux's struct tcp_info is the state

Header = tuple[int, int, int, int, int, int]
"""(magic, flags, command, cookie, offset, length), as REQUEST and EXTENDED_REQUEST unpack it."""


class Inbox:
    """A socket and the buffer that it is received into.

    Attributes:
        header: how a request starts; `extended` says which of the two it is.
        start: what is received and not yet consumed lies from here
        end: to here.
        received: bytes since the start of the session.
        received_at: when the last of them came (`monotonic_ns`).
        poll_events: what to ask poll for, to learn that the peer is gone.
        payload_left: of a long request: the next one starts this far behind `start`.
        leaving: the client has said DISC.
    """

    def __init__(self, sock: socket.socket, buffer: memoryview, *, extended: bool) -> None:
        self.extended = extended
        self.header = EXTENDED_REQUEST if extended else REQUEST
        self.magic = EXTENDED_REQUEST_MAGIC if extended else REQUEST_MAGIC
        self.buffer = buffer
        self.start = self.end = self.received = self.received_at = 0
        self.payload_left = 0
        self.leaving = False
        self._sock = sock
        self._poll = select.poll()
        # With no events asked for, a full close (HUP) or an error of a Unix peer; TCP needs to be asked for its FIN.
        self.poll_events = 0 if sock.family == socket.AF_UNIX else select.POLLRDHUP
        self._poll.register(sock, self.poll_events)

    def receive(self) -> bool:
        """Receive more; say whether there was any. The unconsumed part moves to the front when room gets short."""
        size = len(self.buffer)
        if self.start == self.end:
            self.start = self.end = 0
        elif size - self.end < size // 4:
            rest = self.end - self.start
            self.buffer[:rest] = self.buffer[self.start : self.end]
            self.start, self.end = 0, rest
        return self._receive(0)

    def _receive(self, flags: int) -> bool:
        """Receive into the free end of the buffer; say whether there was anything."""
        try:
            count = self._sock.recv_into(self.buffer[self.end :], 0, flags)
        except ConnectionResetError:
            # A Unix peer that left replies unread: what it had sent can still be received.
            count = self._sock.recv_into(self.buffer[self.end :], 0, flags)
        self.end += count
        self.received += count
        self.received_at = monotonic_ns()
        return count > 0

    def has_payload(self, flags: int, command: int) -> bool:
        """Say whether `length` in the header is that of a payload."""
        return bool(flags & CommandFlag.PAYLOAD_LEN) if self.extended else command == Command.WRITE

    def require_client(self) -> None:
        """Check that the client is still there, or has said DISC. The caller holds the device's lock.

        Raises:
            ClientLeftError: it is gone.
        """
        if self._poll.poll(0) and self._peer_left() and not self.said_disconnect():
            raise ClientLeftError("the client left; what it had asked for and not seen answered is dropped")

    def _peer_left(self) -> bool:
        """Say whether what poll reports is the peer's doing: for TCP, our own end of receiving looks the same."""
        if self.poll_events == 0:
            return True
        return self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != _TCP_ESTABLISHED

    def said_disconnect(self) -> bool:
        """Say whether a client that is gone had said DISC, as far as the buffer can hold what it sent."""
        if self.leaving:
            return True
        try:
            while self._receive(socket.MSG_DONTWAIT):
                pass
        except OSError:
            return False
        position = self.start + self.payload_left
        while self.end - position >= self.header.size:
            magic, flags, command, _, _, length = self.header.unpack_from(self.buffer, position)
            if magic != self.magic:
                return False
            if command == Command.DISC:
                return True
            position += self.header.size + (length if self.has_payload(flags, command) else 0)
        return False
