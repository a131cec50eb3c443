"""Listening sockets, and the connections that come in on them: a thread accepts on each, one serves each connection."""

import errno
import ipaddress
import logging
import os
import socket
import struct
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

MAX_UNIX_PATH = 107
"""Bytes in the path of a Unix socket: sun_path without its NUL."""
BACKLOG = 4096
"""Clients that wait to be accepted; one more is refused. The kernel has a limit of its own, net.core.somaxconn."""
PLAIN_TCP = (
    "an address that is not loopback would show the memory of this machine's processes to the network: "
    "require TLS, or set plain-tcp-beyond-loopback = true in [server]"
)
"""Why an address is refused where there is no TLS."""

_PEER = struct.Struct("3i")
"""Linux's struct ucred: pid, uid, gid."""

log = logging.getLogger(__name__)


class ListenError(Exception):
    """An address cannot be listened on."""


def listen_unix(path: Path, mode: int = 0o600, owner: int = -1, group: int = -1) -> socket.socket:
    """Listen on a Unix socket of this mode, owner (uid) and group (gid); -1 is this process's own.

    Who can write to it can connect. The socket of a server that has died is taken over.

    Raises:
        ListenError: the path is taken or cannot be used.
    """
    if len(os.fsencode(path)) > MAX_UNIX_PATH:
        raise ListenError(f"cannot listen on {path}: a socket's path has at most {MAX_UNIX_PATH} bytes")
    if not path.name:
        raise ListenError(f"cannot listen on {path}: it is a directory")
    # It listens before it has its name: whoever finds the name refusing connections knows that its server is dead.
    unnamed = path.with_name(f".{os.getpid()}")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Before bind: the file then never exists with another mode.
        os.fchmod(sock.fileno(), 0o600)
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        sock.bind(str(unnamed))
        try:
            os.chown(unnamed, owner, group)
            os.chmod(unnamed, mode)
            sock.listen(BACKLOG)
            if _is_stale(path):
                path.unlink()
            os.link(unnamed, path)
        finally:
            unnamed.unlink()
    except OSError as error:
        sock.close()
        reason = error.strerror or str(error)
        if error.errno == errno.EEXIST:
            reason = "there is a file that is no socket"
            if path.is_socket():
                reason = "another server listens there: stop it, or name another path"
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


def listen_tcp(host: str, port: int) -> list[socket.socket]:
    """Listen on all TCP addresses of a host, IPv4 and IPv6; without a host, on all of this machine.

    Raises:
        ListenError: an address cannot be used.
    """
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ListenError(f"cannot listen on {host}:{port}: it is not the address of a host") from error
    socks: list[socket.socket] = []
    reason = "it has no address"
    for family, kind, protocol, _, address in found:
        try:
            sock = socket.socket(family, kind, protocol)
        except OSError as error:
            # A machine without IPv6 may still have names with IPv6 addresses.
            reason = str(error.strerror)
            continue
        socks.append(sock)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(address)
            sock.listen(BACKLOG)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL and len(found) > 1:
                socks.pop().close()
                reason = str(error.strerror)
                continue
            for sock in socks:
                sock.close()
            raise ListenError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    if not socks:
        raise ListenError(f"cannot listen on {host}:{port}: {reason}")
    return socks


def peer_ids(sock: socket.socket) -> tuple[int, int]:
    """Return the uid and gid with which the peer of a Unix socket connected."""
    _, uid, gid = _peer(sock)
    return uid, gid


def _peer(sock: socket.socket) -> tuple[int, int, int]:
    pid, uid, gid = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return pid, uid, gid


def is_public(sock: socket.socket) -> bool:
    """Say whether a socket has an address that other machines may reach."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    return is_public_address(sock.getsockname()[0])


def is_public_address(text: str) -> bool:
    """Say whether an address is one that other machines may reach; "" is all of them, and a name is not looked up."""
    try:
        address = ipaddress.ip_address(text or "::")
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    return not address.is_loopback


class Connections:
    """Serves whoever connects to any of several listeners with `serve`, in a thread for each, `most` at a time.

    `kind` names them in the log and the threads. `serve` handles the errors that it expects; the socket is closed for
    it.
    """

    def __init__(self, kind: str, most: int, serve: Callable[[socket.socket], None]) -> None:
        self._kind = kind
        self._most = most
        self._serve = serve
        self._lock = threading.Lock()
        self._listeners: list[socket.socket] = []
        self._threads: dict[socket.socket, threading.Thread] = {}
        self._stopping = False
        self._refused = False

    def __len__(self) -> int:
        """Return how many are connected."""
        return len(self._threads)

    def peer_pids(self) -> set[int]:
        """Return the processes that connected by Unix socket, which may have given their socket to the kernel since."""
        with self._lock:
            return {_peer(sock)[0] for sock in self._threads if sock.family == socket.AF_UNIX}

    def accept_on(self, listener: socket.socket, pause: float = 0) -> None:
        """Accept connections on a listener from now on, at most one every `pause` seconds."""
        self._listeners.append(listener)
        thread = threading.Thread(target=self._accept, args=(listener, pause), name=f"{self._kind}-accept", daemon=True)
        thread.start()

    def _accept(self, listener: socket.socket, pause: float) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError as error:
                if self._stopping:
                    return
                log.warning("cannot accept a connection (%s): %s", self._kind, error)
                # Out of descriptors or memory: what is connected goes on, and the next try comes a little later.
                time.sleep(0.1)
                continue
            self.adopt(sock)
            if pause:
                time.sleep(pause)

    def adopt(self, sock: socket.socket, at_end: Callable[[], None] = lambda: None) -> None:
        """Serve a connected socket in a thread of its own, which calls `at_end` last. If that cannot be, close it."""
        thread = threading.Thread(target=self._run, args=(sock, at_end), name=self._kind, daemon=True)
        with self._lock:
            started = self._start(sock, thread)
        if not started:
            sock.close()
            at_end()

    def _start(self, sock: socket.socket, thread: threading.Thread) -> bool:
        """Start a connection's thread, if there may be one more. The caller holds the lock.

        stop() then finds only threads that it can wait for.
        """
        if self._stopping:
            return False
        if len(self._threads) >= self._most:
            # Once: who may connect must not be able to fill the log.
            if not self._refused:
                log.warning("more than %d connections (%s): the rest are refused", self._most, self._kind)
            self._refused = True
            return False
        try:
            thread.start()
        except RuntimeError as error:
            log.warning("cannot serve a connection (%s): %s", self._kind, error)
            return False
        self._threads[sock] = thread
        return True

    def is_stopping(self) -> bool:
        """Say whether stop() has been called."""
        return self._stopping

    def _run(self, sock: socket.socket, at_end: Callable[[], None]) -> None:
        try:
            self._serve(sock)
        except OSError as error:
            log.info("connection lost (%s): %s", self._kind, error)
        except Exception as error:
            log.error("connection ended by a defect of the server (%s): %s", self._kind, describe_defect(error))
        finally:
            with self._lock:
                self._threads.pop(sock, None)
            sock.close()
            at_end()

    def stop(self, seconds: float) -> bool:
        """Stop listening, let each connection answer what it has received, and wait up to `seconds` for that.

        Return whether all connections ended in time; those that did not are cut off.
        """
        with self._lock:
            self._stopping = True
            threads = dict(self._threads)
        for listener in self._listeners:
            # shutdown, since closing alone does not wake a thread that waits in accept.
            shut_down(listener, socket.SHUT_RDWR)
            listener.close()
        for sock in threads:
            shut_down(sock, socket.SHUT_RD)
        for thread in threads.values():
            thread.join(seconds / max(1, len(threads)))
        late = [sock for sock, thread in threads.items() if thread.is_alive()]
        for sock in late:
            shut_down(sock, socket.SHUT_RDWR)
            threads[sock].join(seconds / len(late))
        return not late


def describe_defect(error: Exception) -> str:
    """Return one line that says what went wrong, and where in the code."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"


def shut_down(sock: socket.socket, how: int) -> None:
    """Shut a socket down that its peer, or the thread that serves it, may have closed already."""
    try:
        sock.shutdown(how)
    except OSError as error:
        log.debug("shutdown: %s", error)
