"""What a client may take of the server."""

from dataclasses import dataclass

from zramd.nbd.protocol import MAX_STRING

LEAST_MEMORY = 32 << 10
"""Of a connection: a page has to fit in half of what it receives into."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a server, and of each of its connections. Sizes are in bytes.

    Attributes:
        handshake_seconds: a client that has not chosen an export by then is disconnected.
        option: data in an option; a longer one ends the session. Nothing legal is as long as the default.
        options: options in one handshake.
        name: length of an export's name; the protocol allows no longer ones than the default.
        payload: of a read or write; also the maximum block size that is advertised.
        connections: how many at a time; one more is closed before it costs a thread.
        handshakes: how many of them may not have chosen an export yet; one more, and the oldest of these is closed, so
            that clients that stall do not keep out those that do not.
        memory: what a connection takes for its buffers: a quarter to receive in, as much for compressed pages, and half
            for replies before they are sent. The kernel holds up to as much again of replies that the client leaves
            unread. With the compiled engine, requests that it leaves to the other one can take three quarters more.
    """

    handshake_seconds: float = 10.0
    option: int = 1 << 20
    options: int = 1024
    name: int = MAX_STRING
    payload: int = 64 << 20
    connections: int = 256
    handshakes: int = 64
    memory: int = 2 << 20

    def __post_init__(self) -> None:
        if self.memory < LEAST_MEMORY:
            raise ValueError(f"a connection needs {LEAST_MEMORY} bytes of memory, not {self.memory}")

    @property
    def buffer(self) -> int:
        """Bytes received at once at most. A write that is not longer than this is applied as a whole."""
        return self.memory // 4

    @property
    def reply(self) -> int:
        """Bytes of replies gathered before they are sent.

        Also of work done under one hold of the lock, a page being added for each request: at 4 KiB each and with the
        default that is 128 requests and about a millisecond.
        """
        return self.memory // 2


DEFAULT_LIMITS = Limits()
