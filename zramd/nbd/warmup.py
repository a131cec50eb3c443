"""One pass of each request that a kernel sends, through all of the real path, on a small device of its own.

Done before memory is locked: what has run once is loaded. It is a self-test of the path too.
"""

import os
import socket
import threading

from zramd.device.codecs import Codec
from zramd.device.opening import OpenDevice
from zramd.device.wanted import Wanted
from zramd.layout import PAGE_SIZE
from zramd.memory import RegionStore
from zramd.nbd.protocol import REQUEST, REQUEST_MAGIC, SIMPLE_REPLY, SIMPLE_REPLY_MAGIC, Command, CommandFlag
from zramd.nbd.transmission import Transmission

PAGES = 512
SECONDS = 10.0
"""For the whole pass; it takes a few milliseconds."""


class WarmUpError(Exception):
    """A request was not answered as it must be: this zramd must not serve."""


def warm_up(codec: Codec) -> None:
    """Write, read, trim, zero and flush.

    Raises:
        WarmUpError: an answer was wrong.
    """
    opened = OpenDevice(RegionStore(None), Wanted(PAGES * PAGE_SIZE, codec))
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=Transmission(theirs, opened.device, None).run)
    with ours, theirs:
        ours.settimeout(SECONDS)
        thread.start()
        try:
            _converse(ours)
        except OSError as error:
            raise WarmUpError(f"the path of a request does not work: {error}") from error
        finally:
            ours.shutdown(socket.SHUT_RDWR)
            thread.join(SECONDS)
    opened.close()


def _converse(sock: socket.socket) -> None:
    text = b"A page of text compresses well. " * (PAGE_SIZE // 32)
    noise = os.urandom(PAGE_SIZE)
    pages = text + noise + b"zramd678" * (PAGE_SIZE // 8) + bytes(PAGE_SIZE)
    _request(sock, Command.WRITE, 0, len(pages), payload=pages)
    _request(sock, Command.WRITE, 4 * PAGE_SIZE + 512, 1024, CommandFlag.FUA, payload=noise[:1024])
    _request(sock, Command.FLUSH, 0, 0)
    for offset, length, wanted in (
        (0, len(pages), pages),
        (4 * PAGE_SIZE, PAGE_SIZE, bytes(512) + noise[:1024] + bytes(PAGE_SIZE - 1536)),
    ):
        if _request(sock, Command.READ, offset, length) != wanted:
            raise WarmUpError("what was written does not read back: the codec or the pool is broken")
    _request(sock, Command.WRITE_ZEROES, PAGE_SIZE, PAGE_SIZE)
    _request(sock, Command.TRIM, 0, PAGE_SIZE)
    if any(_request(sock, Command.READ, 0, 2 * PAGE_SIZE)):
        raise WarmUpError("what was discarded does not read as zeros: the pool is broken")
    sock.sendall(REQUEST.pack(REQUEST_MAGIC, 0, Command.DISC, 0, 0, 0))


def _request(
    sock: socket.socket, command: Command, offset: int, length: int, flags: int = 0, payload: bytes = b""
) -> bytes:
    """Make a request; return what a read found."""
    sock.sendall(REQUEST.pack(REQUEST_MAGIC, flags, command, offset, offset, length) + payload)
    magic, error, cookie = SIMPLE_REPLY.unpack(_receive(sock, SIMPLE_REPLY.size))
    if (magic, error, cookie) != (SIMPLE_REPLY_MAGIC, 0, offset):
        raise WarmUpError(f"{command.name} was answered with error {error}: the server is broken")
    return _receive(sock, length) if command is Command.READ else b""


def _receive(sock: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        part = sock.recv(length - len(data))
        if not part:
            raise WarmUpError("the path of a request ended too early: the server is broken")
        data += part
    return data
