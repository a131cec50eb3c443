"""Listeners and connections: one thread accepts on each listener, one serves each connection."""

import errno
import logging
import os
import socket
import threading
import traceback
from pathlib import Path

from zramd.nbd.export import Exports
from zramd.nbd.handshake import HANDSHAKE_SECONDS, ClientLeftError, Handshake, SessionError
from zramd.nbd.transmission import Transmission

SEND_BUFFER = 4 << 20
"""Bytes that a socket takes before a send blocks; the default of 208 KiB would block a long reply several times."""

MAX_CONNECTIONS = 256
"""At half a megabyte each. One more is closed before it costs a thread."""
MAX_UNIX_PATH = 107
"""Bytes in the path of a Unix socket: sun_path without its NUL."""

log = logging.getLogger(__name__)


class ListenError(Exception):
    """An address cannot be listened on."""


def listen_unix(path: Path) -> socket.socket:
    """Listen on a Unix socket that only its owner may use. The socket of a server that has died is taken over.

    Raises:
        ListenError: the path is taken or cannot be used.
    """
    if len(os.fsencode(path)) > MAX_UNIX_PATH:
        raise ListenError(f"cannot listen on {path}: a socket's path has at most {MAX_UNIX_PATH} bytes")
    # It listens before it has its name: whoever finds the name refusing connections knows that its server is dead.
    unnamed = path.with_name(f".{os.getpid()}")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Before bind: the file then never exists with another mode.
        os.fchmod(sock.fileno(), 0o600)
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        sock.bind(str(unnamed))
        try:
            sock.listen(128)
            if _is_stale(path):
                path.unlink()
            os.link(unnamed, path)
        finally:
            unnamed.unlink()
    except OSError as error:
        sock.close()
        reason = error.strerror or str(error)
        if error.errno == errno.EEXIST:
            reason = "another server listens there" if path.is_socket() else "there is a file that is no socket"
        raise ListenError(f"cannot listen on {path}: {reason}") from error
    return sock


def _is_stale(path: Path) -> bool:
    """Say whether a path is a socket that nobody listens on."""
    if not path.is_socket():
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
    return False


def listen_tcp(host: str, port: int) -> socket.socket:
    """Listen on a TCP address.

    Raises:
        ListenError: the address cannot be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise ListenError(f"cannot listen on {host}:{port}: it is not the address of a host") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(128)
    except OSError as error:
        sock.close()
        raise ListenError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return sock


class Server:
    """Serves exports on any number of listeners until it is stopped."""

    def __init__(self, exports: Exports) -> None:
        self._exports = exports
        self._lock = threading.Lock()
        self._listeners: list[socket.socket] = []
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._stopping = False

    @property
    def connections(self) -> int:
        """Return how many clients are connected."""
        return len(self._connections)

    def serve(self, listener: socket.socket) -> None:
        """Accept connections on a listener, in a thread of its own."""
        self._listeners.append(listener)
        threading.Thread(target=self._accept, args=(listener,), name="nbd-accept", daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError as error:
                if self._stopping:
                    return
                log.warning("cannot accept a connection: %s", error)
                # Out of descriptors or memory: what is connected goes on, and the next try comes a little later.
                threading.Event().wait(0.1)
                continue
            thread = threading.Thread(target=self._serve_connection, args=(sock,), name="nbd", daemon=True)
            # Started under the lock: stop() then finds only threads that it can wait for.
            with self._lock:
                if self._stopping:
                    sock.close()
                    return
                if len(self._connections) >= MAX_CONNECTIONS:
                    log.warning("more than %d connections: one refused", MAX_CONNECTIONS)
                    sock.close()
                    continue
                try:
                    thread.start()
                except RuntimeError as error:
                    log.warning("cannot serve a connection: %s", error)
                    sock.close()
                    continue
                self._connections[sock] = thread

    def _serve_connection(self, sock: socket.socket) -> None:
        try:
            _tune(sock)
            export = Handshake(sock, self._exports, HANDSHAKE_SECONDS).run()
            if export is not None:
                sock.settimeout(None)
                Transmission(sock, export).run()
        except (ClientLeftError, OSError) as error:
            log.info("connection lost: %s", error)
        except SessionError as error:
            log.warning("connection ended: %s", error)
        except Exception as error:
            log.error("connection ended by a defect of the server: %s", describe_defect(error))
        finally:
            self._forget(sock)

    def _forget(self, sock: socket.socket) -> None:
        with self._lock:
            self._connections.pop(sock, None)
        sock.close()

    def stop(self, seconds: float) -> bool:
        """Stop listening, let each connection answer what it has received, and wait up to `seconds` for that.

        Return whether all connections ended in time; those that did not are cut off.
        """
        with self._lock:
            self._stopping = True
            connections = dict(self._connections)
        for listener in self._listeners:
            # shutdown, since closing alone does not wake a thread that waits in accept.
            _shutdown(listener, socket.SHUT_RDWR)
            listener.close()
        for sock in connections:
            _shutdown(sock, socket.SHUT_RD)
        for thread in connections.values():
            thread.join(seconds / max(1, len(connections)))
        late = [sock for sock, thread in connections.items() if thread.is_alive()]
        for sock in late:
            _shutdown(sock, socket.SHUT_RDWR)
            connections[sock].join(seconds / len(late))
        return not late


def describe_defect(error: Exception) -> str:
    """Return one line that says what went wrong, and where in the code."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"


def _shutdown(sock: socket.socket, how: int) -> None:
    try:
        sock.shutdown(how)
    except OSError as error:
        # The client, or the connection's own thread, was faster.
        log.debug("shutdown: %s", error)


def _tune(sock: socket.socket) -> None:
    if sock.family == socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    else:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A peer that has vanished without a word gives its place up in the end.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
