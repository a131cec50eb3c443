"""The NBD server: from a connected socket through handshake and transmission."""

import logging
import socket
from contextlib import ExitStack
from functools import partial

from zramd.device.opening import OpenDevice
from zramd.listeners import Connections, shut_down
from zramd.nbd.export import Export, Exports
from zramd.nbd.handshake import HANDSHAKE_SECONDS, ClientLeftError, Handshake, SessionError
from zramd.nbd.transmission import Transmission

SEND_BUFFER = 4 << 20
"""Bytes that a socket takes before a send blocks; the default of 208 KiB would block a long reply several times."""
MAX_CONNECTIONS = 256
"""At half a megabyte each. One more is closed before it costs a thread."""

log = logging.getLogger(__name__)


class Server(Connections):
    """Serves exports on any number of listeners until it is stopped."""

    def __init__(self, exports: Exports) -> None:
        super().__init__("nbd", MAX_CONNECTIONS, self._converse)
        self._exports = exports

    def _converse(self, sock: socket.socket) -> None:
        _tune(sock)
        try:
            with ExitStack() as held:

                def connect(export: Export) -> OpenDevice:
                    return held.enter_context(export.disk.connected(partial(shut_down, sock, socket.SHUT_RDWR)))

                opened = Handshake(sock, self._exports, connect, HANDSHAKE_SECONDS).run()
                if opened is not None:
                    sock.settimeout(None)
                    Transmission(sock, opened.device, opened.flush).run()
        except ClientLeftError as error:
            log.info("connection lost: %s", error)
        except SessionError as error:
            log.warning("connection ended: %s", error)


def _tune(sock: socket.socket) -> None:
    if sock.family == socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    else:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A peer that has vanished without a word gives its place up in the end.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
