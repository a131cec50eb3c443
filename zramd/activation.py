"""Sockets that this process was started with: systemd's socket activation, and standard input.

sd_listen_fds(3): LISTEN_PID is the process that they are for, LISTEN_FDS how many there are, from descriptor 3 on, and
LISTEN_FDNAMES their names, with colons between them.
"""

import os
import socket

from zramd.listeners import ListenError

FIRST_FD = 3


def activated() -> list[tuple[str, socket.socket]]:
    """Return (name, listening socket) of each socket that this process was activated with. Works once.

    Raises:
        ListenError: one of them is not a listening stream socket.
    """
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    fds = range(FIRST_FD, FIRST_FD + int(count))
    names += [""] * (len(fds) - len(names))
    return [(name, _adopt(fd, listening=True)) for fd, name in zip(fds, names, strict=False)]


def standard_input() -> socket.socket:
    """Return the connected socket that is standard input; standard input and output are then no longer there.

    Raises:
        ListenError: it is something else.
    """
    try:
        fd = os.dup(0)
    except OSError as error:
        raise ListenError(f"standard input is no socket ({error.strerror})") from error
    nothing = os.open(os.devnull, os.O_RDWR)
    try:
        sock = _adopt(fd, listening=False)
        # What is printed by mistake must not get among the replies.
        os.dup2(nothing, 0)
        os.dup2(nothing, 1)
    finally:
        os.close(nothing)
    return sock


def _adopt(fd: int, *, listening: bool) -> socket.socket:
    try:
        sock = socket.socket(fileno=fd)
        is_stream = sock.type == socket.SOCK_STREAM
        listens = bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError as error:
        raise ListenError(f"{_where(fd, listening)} is no socket ({error.strerror})") from error
    if not is_stream or listens != listening:
        wanted = "listening" if listening else "connected"
        raise ListenError(f"{_where(fd, listening)} is not a {wanted} stream socket")
    os.set_inheritable(fd, False)
    return sock


def _where(fd: int, listening: bool) -> str:
    return f"descriptor {fd} of LISTEN_FDS" if listening else "standard input"
