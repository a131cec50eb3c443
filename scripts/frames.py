"""What a client sends, as bytes, and how it reads an exact number of them."""

import socket

from zramd.nbd.protocol import (
    CLIENT_FLAGS,
    GREETING,
    IHAVEOPT,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    OPTION,
    OPTION_REPLY,
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    U16,
    U32,
    Command,
    HandshakeFlag,
    Option,
)

FLAGS = CLIENT_FLAGS.pack(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)
DEFAULT_EXPORT = U32.pack(0) + U16.pack(0)
"""Data of INFO and GO."""


class LeftError(Exception):
    """The server closed the connection where more was to come."""


def option(kind: Option, data: bytes = b"") -> bytes:
    """Return an option."""
    return OPTION.pack(IHAVEOPT, kind, len(data)) + data


def request(command: Command, cookie: int, offset: int = 0, length: int = 0) -> bytes:
    """Return the header of a request."""
    return REQUEST.pack(REQUEST_MAGIC, 0, command, cookie, offset, length)


def done(cookie: int) -> bytes:
    """Return the reply to a request that is not a read and went well."""
    return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie)


GO = FLAGS + option(Option.GO, DEFAULT_EXPORT)
"""All of a client's handshake."""
AFTER_GO = GREETING.size + 3 * OPTION_REPLY.size + INFO_EXPORT.size + INFO_BLOCK_SIZE.size
"""Bytes that the server has sent after that: the greeting, two replies of information, and the last one."""


def receive(sock: socket.socket, length: int) -> bytes:
    """Receive exactly `length` bytes.

    Raises:
        LeftError: the server has closed the connection.
    """
    parts, missing = [], length
    while missing:
        part = sock.recv(min(missing, 1 << 20))
        if not part:
            raise LeftError(f"the server closed the connection, {missing} of {length} bytes short")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def enter(sock: socket.socket) -> None:
    """Go through the handshake to the default export, with simple replies.

    Raises:
        LeftError: the server has closed the connection.
    """
    sock.sendall(GO)
    receive(sock, AFTER_GO)
