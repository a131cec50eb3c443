"""The client's half of a handshake: as much of it as it takes to hand the socket to a kernel.

The kernel knows simple replies and compact headers only, so nothing but GO is asked for. What the server says is
checked before it is believed. It imports next to nothing, for the sake of processes that live in locked memory.
"""

import socket
import time

from zramd.nbd.protocol import (
    CLIENT_FLAGS,
    GREETING,
    IHAVEOPT,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    MAX_STRING,
    NBDMAGIC,
    OPTION,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    U16,
    U32,
    HandshakeFlag,
    Info,
    Option,
    OptionReply,
    TransmissionFlag,
)

Address = str | tuple[str, int]
"""The path of a Unix socket, or a numeric host and a port: a name might not be found when it is needed."""

HANDSHAKE_SECONDS = 10.0
BLOCK_SIZE = 4096
"""Of the requests that will follow; a server that wants larger ones is of no use."""
MAX_REPLY = U16.size + MAX_STRING
"""Bytes of an option reply's data: an information is a type and, at its longest, a string."""
MAX_REPLIES = 64
MAX_SIZE = (1 << 63) - 1
DEFAULT_PAYLOAD = 32 << 20
"""Bytes that any server takes in a request, unless it says otherwise."""
SEND_BUFFER = 1 << 20
"""Bytes. A Unix socket's 208 KiB would stop a long write several times."""
KEEPALIVE_SECONDS, KEEPALIVE_INTERVAL, KEEPALIVE_PROBES = 10, 5, 4
USER_TIMEOUT_MS = 30_000
"""A peer that has vanished has to be noticed: the kernel's NBD client itself would wait for ever."""


class ClientError(Exception):
    """A server answers, but not with what was asked for; the text is one line."""


class UnknownExportError(ClientError):
    """The server has no export of that name, or no disk for it."""


class Connection:
    """A connected socket, ready for requests, and what the server says of the export.

    `size` is in bytes, `flags` are the transmission flags, `payload` is the most bytes that a request may carry.
    """

    __slots__ = ("description", "flags", "payload", "size", "sock")

    def __init__(self, sock: socket.socket, size: int, flags: int, description: str, payload: int) -> None:
        self.sock = sock
        self.size = size
        self.flags = flags
        self.description = description
        self.payload = payload


def connect(addresses: list[Address], name: str, seconds: float = HANDSHAKE_SECONDS) -> Connection:
    """Connect to the export of a name at the first address where anybody answers, within so many seconds.

    Raises:
        ClientError: the server breaks the protocol, or does not have what was asked for.
        OSError: nobody answers, or not in time.
    """
    failed: OSError = ConnectionRefusedError("there is no address")
    for address in addresses:
        try:
            sock = _open(address, seconds)
        except OSError as error:
            failed = error
            continue
        try:
            connection = negotiate(sock, name, seconds)
            sock.settimeout(None)
        except BaseException:
            sock.close()
            raise
        return connection
    raise failed


def _open(address: Address, seconds: float) -> socket.socket:
    if isinstance(address, str):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    else:
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(seconds)
        sock.connect(address)
        if isinstance(address, str):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        else:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_SECONDS)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
    except BaseException:
        sock.close()
        raise
    return sock


def negotiate(sock: socket.socket, name: str, seconds: float = HANDSHAKE_SECONDS) -> Connection:
    """Choose the export of a name on a socket that has just been connected.

    Nothing is received beyond the handshake: what follows is the kernel's.

    Raises:
        ClientError, OSError: as `connect`.
    """
    peer = _Peer(sock, seconds)
    magic, version, offered = GREETING.unpack(peer.receive(GREETING.size))
    if magic != NBDMAGIC or version != IHAVEOPT:
        raise ClientError("what answers there is no NBD server, or a very old one")
    if not offered & HandshakeFlag.FIXED_NEWSTYLE:
        raise ClientError("the server does not speak NBD's fixed newstyle")
    encoded = name.encode()
    wanted = (Info.DESCRIPTION, Info.BLOCK_SIZE)
    data = U32.pack(len(encoded)) + encoded + U16.pack(len(wanted)) + b"".join(map(U16.pack, wanted))
    flags = offered & (HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)
    peer.send(CLIENT_FLAGS.pack(flags) + OPTION.pack(IHAVEOPT, Option.GO, len(data)) + data)
    return _read_answer(peer)


class _Peer:
    """A server, and the time that it has left for all it has to say."""

    def __init__(self, sock: socket.socket, seconds: float) -> None:
        self.sock = sock
        self._deadline = time.monotonic() + seconds

    def receive(self, length: int) -> bytes:
        """Receive exactly `length` bytes."""
        data = bytearray(length)
        view = memoryview(data)
        while view:
            self.sock.settimeout(self._time_left())
            count = self.sock.recv_into(view)
            if not count:
                raise ConnectionResetError("the server closed the connection")
            view = view[count:]
        return bytes(data)

    def send(self, data: bytes) -> None:
        self.sock.settimeout(self._time_left())
        self.sock.sendall(data)

    def _time_left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the server does not answer in time")
        return left


def _read_answer(peer: _Peer) -> Connection:
    """Read the replies to GO."""
    size = flags = -1
    description, payload = "", DEFAULT_PAYLOAD
    for _ in range(MAX_REPLIES):
        magic, option, kind, length = OPTION_REPLY.unpack(peer.receive(OPTION_REPLY.size))
        if magic != OPTION_REPLY_MAGIC or option != Option.GO or length > MAX_REPLY:
            raise ClientError("the server breaks the protocol: that is no reply to what it was asked")
        data = peer.receive(length)
        if kind == OptionReply.ACK:
            if size < 0 or data:
                raise ClientError("the server breaks the protocol: it gives an export, but does not describe it")
            return Connection(peer.sock, size, flags, description, payload)
        if kind != OptionReply.INFO:
            raise _refusal(kind, data)
        about = U16.unpack_from(data)[0] if len(data) >= U16.size else -1
        if about == Info.EXPORT:
            size, flags = _export(data)
        elif about == Info.DESCRIPTION:
            description = data[U16.size :].decode(errors="replace")
        elif about == Info.BLOCK_SIZE:
            payload = _payload(data)
    raise ClientError("the server breaks the protocol: it does not stop to describe the export")


def _export(data: bytes) -> tuple[int, int]:
    if len(data) != INFO_EXPORT.size:
        raise ClientError("the server breaks the protocol: an export's size and flags have another length")
    _, size, flags = INFO_EXPORT.unpack(data)
    if not 0 < size <= MAX_SIZE or size % BLOCK_SIZE:
        raise ClientError(f"the export has {size} bytes; what can be attached is a multiple of {BLOCK_SIZE}")
    if not flags & TransmissionFlag.HAS_FLAGS:
        raise ClientError("the server breaks the protocol: the export's flags are not valid")
    return size, flags


def _payload(data: bytes) -> int:
    if len(data) != INFO_BLOCK_SIZE.size:
        raise ClientError("the server breaks the protocol: an export's block sizes have another length")
    _, minimum, _, payload = INFO_BLOCK_SIZE.unpack(data)
    if minimum > BLOCK_SIZE or payload < BLOCK_SIZE:
        raise ClientError(f"the server does not take requests of {BLOCK_SIZE} bytes")
    return int(payload)


def _refusal(kind: int, data: bytes) -> ClientError:
    if kind < 1 << 31:
        return ClientError(f"the server breaks the protocol: GO is not answered by a reply of type {kind}")
    # It is shown on a terminal.
    said = "".join(character if character.isprintable() else "?" for character in data.decode(errors="replace"))
    if kind == OptionReply.ERR_UNKNOWN:
        return UnknownExportError(f"the server does not have it ({said or 'it gives no reason'})")
    if kind == OptionReply.ERR_TLS_REQD:
        return ClientError("the server requires TLS, which the kernel's NBD client cannot do")
    return ClientError(f"the server refuses: {said or f'error {kind - (1 << 31)}'}")
