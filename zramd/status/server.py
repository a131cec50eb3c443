"""The two sockets of a disk: one to read its attributes, for a group, and one to change them too, for the owner.

    mm_stat              the text of the attribute, exactly as sysfs would print it, and a blank line
    mem_limit 512M       changes it; the answer is only the blank line
    recompress type=idle long work; the answer is a line on what was done, and the blank line
    help                 all names that can be read, and those that can be changed with VALUE behind
    GET /metrics HTTP/1.1  metrics by HTTP, which ends the connection: see zramd/status/http.py
    anything refused     error: ERRNO what was wrong

A connection may ask any number of times. `save` and `restore` work on a file, or a pipe, that the client has open: its
descriptor comes with their line (SCM_RIGHTS), so that the server needs no way to it.
"""

import logging
import os
import re
import socket
import threading
import time
from collections.abc import Iterable

from zramd.listeners import Connections, peer_ids
from zramd.status.attributes import NAMES, STREAMED, AttributeRefusedError, Served, read, stream
from zramd.status.caller import Caller
from zramd.status.control import WORDS, write
from zramd.status.http import answer_request
from zramd.status.scraping import metrics_paths

MAX_LINE = 4096
"""Bytes in a request."""
MAX_CLIENTS = 32
"""Of each socket, so that those who read never take the place of the one who wants to change something."""
IDLE_SECONDS = 60.0
"""A client that asks nothing for so long is disconnected: the place may be needed."""
SEND_SECONDS = 5.0
"""A client that does not take its answer by then is disconnected."""
READ_PAUSE = 0.001
"""Readers take turns, an answer or a connection in this many seconds: what they ask for costs I/O time."""

HELP = "help"
_HTTP = re.compile(rb"[A-Z]+ .* HTTP/[0-9.]+\r?")
"""How a request of HTTP begins."""

log = logging.getLogger(__name__)


def _lines(names: Iterable[str]) -> str:
    return "".join(f"{name}\n" for name in names)


class StatusServer(Connections):
    """Answers for one disk those who may only read."""

    def __init__(self, served: Served, kind: str = "status") -> None:
        super().__init__(kind, MAX_CLIENTS, self._answer_lines)
        self._served = served
        self._paths = metrics_paths([served])
        self._turn = threading.Lock()

    def _answer_lines(self, sock: socket.socket) -> None:
        with Caller(sock) as caller:
            self._answer_caller(sock, caller)

    def _answer_caller(self, sock: socket.socket, caller: Caller) -> None:
        pending = b""
        while True:
            sock.settimeout(IDLE_SECONDS)
            received = caller.receive(MAX_LINE)
            pending += received
            *lines, pending = pending.split(b"\n")
            if not received and pending:
                lines.append(pending)
            sock.settimeout(SEND_SECONDS)
            for number, line in enumerate(lines):
                if len(line) > MAX_LINE:
                    pending = line
                    break
                if _HTTP.fullmatch(line):
                    answer_request(sock, self._paths, b"\n".join([*lines[number:], pending]))
                    return
                if line.strip():
                    self._reply(sock, line, caller)
            if len(pending) > MAX_LINE:
                sock.sendall(f"error: E2BIG a request has at most {MAX_LINE} bytes\n\n".encode())
                return
            if not received:
                return

    def _reply(self, sock: socket.socket, line: bytes, caller: Caller) -> None:
        sock.sendall(self._answer(line, caller).encode() + b"\n")

    def _answer(self, line: bytes, caller: Caller) -> str:
        name, _, value = line.decode(errors="replace").lstrip().partition(" ")
        try:
            return self._carry_out(name.rstrip(), value, caller)
        except AttributeRefusedError as error:
            return f"error: {error}\n"

    def _carry_out(self, name: str, value: str, caller: Caller) -> str:
        if value.strip():
            raise AttributeRefusedError(f"EACCES this socket is for reading; changes go to {self._served.admin}")
        with self._turn:
            time.sleep(READ_PAUSE)
            return _lines(NAMES) if name == HELP else read(self._served, name)


class AdminServer(StatusServer):
    """Answers the owner of the server, and root, who may change the disk."""

    def __init__(self, served: Served) -> None:
        super().__init__(served, "admin")

    def _answer_lines(self, sock: socket.socket) -> None:
        uid, _ = peer_ids(sock)
        if uid not in (0, os.geteuid()):
            log.warning("user %d may not change the disk", uid)
            sock.settimeout(SEND_SECONDS)
            # To close with a request unread would reset the connection, and the answer with it.
            sock.recv(MAX_LINE)
            sock.sendall(f"error: EACCES only the owner of the server, user {os.geteuid()}, may\n\n".encode())
            return
        super()._answer_lines(sock)

    def _carry_out(self, name: str, value: str, caller: Caller) -> str:
        if name == HELP:
            return _lines((*NAMES, *STREAMED, *(f"{word} VALUE" for word in WORDS)))
        if not value:
            return read(self._served, name)
        return write(self._served, name, value, caller)

    def _reply(self, sock: socket.socket, line: bytes, caller: Caller) -> None:
        name = line.decode(errors="replace").strip()
        if name not in STREAMED:
            super()._reply(sock, line, caller)
            return
        # Who looks at a page of it in a pager takes no more for a while.
        sock.settimeout(IDLE_SECONDS)
        try:
            for part in stream(self._served, name):
                sock.sendall(part.encode())
            sock.sendall(b"\n")
        except AttributeRefusedError as error:
            sock.sendall(f"error: {error}\n\n".encode())
        sock.settimeout(SEND_SECONDS)
