"""The client of the status socket, and how it finds the server."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

from zramd.paths import STATUS_SUFFIX, server_sockets

SECONDS = 10.0
"""What a server that is well takes to connect to, and to answer all but what takes long."""


class StatusError(Exception):
    """No server answers, or it refused."""


class NoServerError(StatusError):
    """No server runs there."""


def find_disks(suffix: str = STATUS_SUFFIX) -> list[Path]:
    """Return the socket (`.status` or `.admin`) of each disk that is served.

    Raises:
        StatusError: there is none.
    """
    option = f"--{suffix[1:]}"
    try:
        alive = [path for path in server_sockets(suffix) if _answers(path)]
    except OSError as error:
        raise StatusError(f"cannot look for servers: {error}; name one with {option} PATH") from error
    if not alive:
        raise NoServerError(f"no running server found: start one with `zramd serve`, or name it with {option} PATH")
    return alive


def find_disk(suffix: str = STATUS_SUFFIX) -> Path:
    """Return the socket (`.status` or `.admin`) of the one disk that is served.

    Raises:
        StatusError: there is none, or there are several.
    """
    alive = find_disks(suffix)
    if len(alive) > 1:
        option = f"--{suffix[1:]}"
        raise StatusError(f"several disks are served; choose one with {option}: {' '.join(map(str, alive))}")
    return alive[0]


NOBODY_LISTENS = "nobody listens there any more; start one with `zramd serve`"


def _reason(path: Path, error: OSError, seconds: float | None) -> str:
    """Say why a server cannot be asked, and what to do."""
    match error:
        case FileNotFoundError():
            return "there is no such socket"
        case ConnectionRefusedError():
            return NOBODY_LISTENS if path.is_socket() else "it is no socket"
        case PermissionError():
            return "it is for others; run this as root or the server's owner, or serve with --status-group"
        case TimeoutError():
            return f"nothing came within {seconds or SECONDS:.0f} s; it hangs, or is no socket of zramd"
        case ConnectionResetError() | BrokenPipeError():
            return "it hung up; it has ended, or is no status or admin socket"
    return error.strerror or str(error)


def _answers(path: Path) -> bool:
    try:
        _connect(path).close()
    except OSError:
        return False
    return True


def _connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(SECONDS)
    try:
        sock.connect(str(path))
    except OSError:
        sock.close()
        raise
    return sock


def _failure(path: Path, error: OSError, seconds: float | None) -> StatusError:
    kind = NoServerError if isinstance(error, FileNotFoundError | ConnectionRefusedError) else StatusError
    return kind(f"no server answers at {path}: {_reason(path, error, seconds)}")


def stream(path: Path, request: str, seconds: float | None = SECONDS) -> Iterator[bytes]:
    """Send one request and yield the answer as it comes, without the blank line that ends it.

    Raises:
        StatusError: the server cannot be reached, or it refused, or it ended in the middle.
    """
    try:
        with _connect(path) as sock, sock.makefile("rb") as answer:
            sock.settimeout(seconds)
            sock.sendall(os.fsencode(request) + b"\n")
            sock.shutdown(socket.SHUT_WR)
            for line in answer:
                if line.startswith(b"error: "):
                    raise StatusError(line.decode(errors="replace").removeprefix("error: ").rstrip("\n"))
                if line == b"\n":
                    return
                yield line
    except OSError as error:
        raise _failure(path, error, seconds) from error
    raise StatusError(f"the server at {path} ended in the middle of its answer")


def ask(path: Path, request: str, seconds: float | None = SECONDS, descriptor: int | None = None) -> str:
    """Send one request and return the answer, without the blank line that ends it; wait up to `seconds` (or forever).

    `save` and `restore` take a `descriptor` with them.

    Raises:
        StatusError: the server cannot be reached, or it refused.
    """
    try:
        with _connect(path) as sock:
            sock.settimeout(seconds)
            line = os.fsencode(request) + b"\n"
            if descriptor is None:
                sock.sendall(line)
            else:
                socket.send_fds(sock, [line], [descriptor])
            sock.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: sock.recv(65536), b""))
    except OSError as error:
        raise _failure(path, error, seconds) from error
    if not answer.endswith(b"\n"):
        raise StatusError(f"the server at {path} closed the connection without an answer")
    text = answer[:-1].decode(errors="replace")
    if text.startswith("error: "):
        raise StatusError(text.removeprefix("error: ").rstrip("\n"))
    return text
