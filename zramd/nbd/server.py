"""The NBD server: from a connected socket through handshake and transmission."""

import logging
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial

from zramd.device.opening import OpenDevice
from zramd.listeners import Connections, peer_ids, shut_down
from zramd.nbd.access import DEFAULT_ACCESS, Access
from zramd.nbd.export import Export, Exports
from zramd.nbd.handshake import Handshake
from zramd.nbd.limits import DEFAULT_LIMITS, Limits
from zramd.nbd.protocol import ClientLeftError, SessionError
from zramd.nbd.tls import TlsMode, start_tls
from zramd.nbd.transmission import Transmission

log = logging.getLogger(__name__)


class Server(Connections):
    """Serves exports on any number of listeners until it is stopped. Without a TLS context there is no TLS.

    Each connection's thread first calls `enter_thread`.
    """

    def __init__(
        self,
        exports: Exports,
        limits: Limits = DEFAULT_LIMITS,
        access: Access = DEFAULT_ACCESS,
        tls: TlsMode = TlsMode.OFF,
        context: ssl.SSLContext | None = None,
        enter_thread: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__("nbd", limits.connections, self._converse)
        self._exports = exports
        self._limits = limits
        self._access = access
        self._tls = tls
        self._context = context
        self._enter_thread = enter_thread
        self._handshakes: dict[socket.socket, None] = {}  # the oldest first

    def _converse(self, sock: socket.socket) -> None:
        if sock.family == socket.AF_UNIX and not self._access.admits_peer(sock):
            log.warning("user %d, group %d is not let in", *peer_ids(sock))
            return
        self._enter_thread()
        _tune(sock, self._limits)
        context = self._context
        try:
            with ExitStack() as held:
                with self._shaking_hands(sock):
                    session = Handshake(
                        sock,
                        self._exports,
                        partial(self._connect, held, sock),
                        partial(self._secure, held, context) if context else None,
                        self._tls,
                        self._limits,
                        self.is_stopping,
                    ).run()
                if session is not None:
                    session.sock.settimeout(None)
                    opened = session.opened
                    counters = held.enter_context(session.export.disk.requests.counting())
                    Transmission(session.sock, opened.device, opened.flush, session.terms, self._limits, counters).run()
        except ClientLeftError as error:
            log.info("connection lost: %s", error)
        except SessionError as error:
            log.warning("connection ended: %s", error)

    def _connect(self, held: ExitStack, sock: socket.socket, export: Export) -> OpenDevice:
        opened = held.enter_context(export.disk.connected(partial(shut_down, sock, socket.SHUT_RDWR)))
        # Now, and not once it is answered: who has read the answer must not be taken for the oldest handshake.
        with self._lock:
            self._handshakes.pop(sock, None)
        return opened

    def _secure(self, held: ExitStack, context: ssl.SSLContext, plain: socket.socket, seconds: float) -> socket.socket:
        return held.enter_context(closing(start_tls(plain, context, self._access, seconds)))

    @contextmanager
    def _shaking_hands(self, sock: socket.socket) -> Iterator[None]:
        """Count a handshake while it lasts; where it is one too many, end the oldest."""
        with self._lock:
            if len(self._handshakes) >= self._limits.handshakes:
                oldest = next(iter(self._handshakes))
                del self._handshakes[oldest]
                shut_down(oldest, socket.SHUT_RDWR)
            self._handshakes[sock] = None
        try:
            yield
        finally:
            with self._lock:
                self._handshakes.pop(sock, None)


def _tune(sock: socket.socket, limits: Limits) -> None:
    if sock.family == socket.AF_UNIX:
        # The default of 208 KiB would block a long reply several times.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, limits.reply)
    else:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A peer that has vanished without a word gives its place up in the end.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
