"""Clients that connect and stall, each at its stage, and connect again when they are dropped.

They live in a process of their own with one thread, so that what they cost is not paid by whoever measures. Run as a
program: the arguments as JSON, and a socket as standard input, on which a line is answered with what is connected.
"""

import contextlib
import fcntl
import json
import os
import select
import socket
import subprocess
import sys
import termios
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from frames import DEFAULT_EXPORT, FLAGS, GO, option, request

from zramd.nbd.protocol import IHAVEOPT, OPTION, Command, Option

SCAN = 0.02
"""Seconds between two looks at whose turn it is, and until a full backlog is tried again."""
TICK = 1.0
"""Seconds between two bytes of those that trickle."""
AREA = 128 << 20
"""Where on the disk they write."""
LONG = 64 << 20


class HelperError(Exception):
    """A process that helps to measure has ended by itself; the text is one line."""


@dataclass(frozen=True, slots=True)
class Stage:
    """How far a client goes: it sends `opening`; then a byte of `trickle` a second, in turn, or all `flood` it can."""

    name: str
    opening: bytes = b""
    trickle: bytes = b""
    flood: bytes = b""


_SOME = bytes(64 << 10)
HANDSHAKE = [
    Stage("before the client flags"),
    Stage("after the client flags", FLAGS),
    Stage("in an option's header", FLAGS + option(Option.LIST)[:7]),
    Stage("in an option's data (1 MiB)", FLAGS + OPTION.pack(IHAVEOPT, Option.INFO, 1 << 20) + _SOME),
    Stage("after STRUCTURED_REPLY", FLAGS + option(Option.STRUCTURED_REPLY)),
    Stage("after INFO", FLAGS + option(Option.INFO, DEFAULT_EXPORT)),
    Stage("after LIST", FLAGS + option(Option.LIST)),
    Stage("LIST, a byte a second", FLAGS, trickle=option(Option.LIST)),
]
TLS_HANDSHAKE = [
    # The header of a record of 512 bytes, and of the ClientHello in it.
    Stage("in a TLS handshake", FLAGS + option(Option.STARTTLS) + b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
]
NEVER_READING = Stage("64 MiB reads, never read", GO, flood=request(Command.READ, 1, 0, LONG))
SLOW_WRITING = Stage(
    "64 MiB write, a byte a second", GO + request(Command.WRITE, 1, AREA, LONG) + b"\x55", trickle=b"\x55"
)
TRANSMISSION = [
    Stage("after GO", GO),
    Stage("in a request's header", GO + request(Command.WRITE, 1, AREA, 4096)[:9]),
    Stage("in a write's payload (1 MiB)", GO + request(Command.WRITE, 1, AREA, 1 << 20) + _SOME),
    NEVER_READING,
]
STAGES = {stage.name: stage for stage in (*HANDSHAKE, *TLS_HANDSHAKE, *TRANSMISSION, SLOW_WRITING)}


@dataclass(frozen=True, slots=True)
class Pressure:
    """What the clients of each stage are up to; but for `connected`, since the start.

    Attributes:
        connected: now, and greeted by the server.
        dropped: how often the server ended a connection that it had greeted.
        refused: how often one that it had not; or the backlog was full.
        unread: bytes of replies that lie in the kernel for them, now.
    """

    connected: dict[str, int]
    dropped: dict[str, int]
    refused: dict[str, int]
    unread: int


class Client:
    """One that stalls."""

    def __init__(self, path: str, stage: Stage, pause: float) -> None:
        self.stage = stage
        self.connected = False
        self.due = 0.0
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._path = path
        self._pause = pause
        self._sent = 0

    def fileno(self) -> int:
        """Return the descriptor of the socket."""
        return self._sock.fileno()

    def connect(self) -> bool:
        """Connect, and send the opening; say whether that could be."""
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.setblocking(False)
        try:
            self._sock.connect(self._path)
        except OSError:
            self._sock.close()
            self.due = time.monotonic() + max(SCAN, self._pause)
            return False
        self.connected, self._sent = True, 0
        self.due = time.monotonic() + TICK if self.stage.trickle else float("inf")
        self._send(self.stage.opening)
        if self.stage.flood:
            self._flood()
        return True

    def tick(self) -> None:
        """Send what is due."""
        if self.stage.trickle:
            position = self._sent % len(self.stage.trickle)
            self._send(self.stage.trickle[position : position + 1])
            self._sent += 1
            self.due = time.monotonic() + TICK
        else:
            self._flood()

    def _flood(self) -> None:
        # More than the buffers of the socket take; what the server takes of it later is asked for a tick later.
        while self._send(self.stage.flood * 64):
            pass
        self.due = time.monotonic() + TICK

    def _send(self, data: bytes) -> bool:
        """Send; say whether all of it went. That the server has hung up is for poll to say."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            return self._sock.send(data) == len(data) if data else True
        return False

    def unread(self) -> int:
        """Return the bytes that the server has sent: nothing is ever read, so there are some once it has greeted."""
        count = bytearray(4)
        fcntl.ioctl(self._sock, termios.FIONREAD, count)
        return int.from_bytes(count, sys.byteorder)

    def drop(self) -> None:
        """Note that the server has hung up."""
        self._sock.close()
        self.connected = False
        self.due = time.monotonic() + self._pause


class Crowd:
    """All of them, on one poll."""

    def __init__(self, path: str, stages: list[str], count: int, pause: float) -> None:
        self._clients = [Client(path, STAGES[stages[number % len(stages)]], pause) for number in range(count)]
        self._by_descriptor: dict[int, Client] = {}
        self._dropped: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._poll = select.poll()

    def run(self, control: int) -> None:
        """Stall, and answer what comes in on the descriptor `control`, to its end."""
        self._poll.register(control, select.POLLIN)
        scan = 0.0
        while True:
            for descriptor, _ in self._poll.poll(SCAN * 1000):
                if descriptor == control:
                    if not os.read(control, 4096):
                        return
                    os.write(control, json.dumps(asdict(self._pressure())).encode() + b"\n")
                else:
                    self._hung_up(descriptor)
            now = time.monotonic()
            if now < scan:
                continue
            scan = now + SCAN
            for client in self._clients:
                if client.due <= now:
                    self._act(client)

    def _act(self, client: Client) -> None:
        if client.connected:
            client.tick()
        elif not client.connect():
            self._refused[client.stage.name] += 1
        else:
            self._by_descriptor[client.fileno()] = client
            # With no events asked for: that the peer has closed is always told.
            self._poll.register(client, 0)

    def _hung_up(self, descriptor: int) -> None:
        self._poll.unregister(descriptor)
        client = self._by_descriptor.pop(descriptor)
        (self._dropped if client.unread() else self._refused)[client.stage.name] += 1
        client.drop()
        if client.due <= time.monotonic():
            self._act(client)

    def _pressure(self) -> Pressure:
        unread = [(client.stage.name, client.unread()) for client in self._by_descriptor.values()]
        connected = Counter(name for name, count in unread if count)
        total = sum(count for _, count in unread)
        return Pressure(dict(connected), dict(self._dropped), dict(self._refused), total)


class Helper:
    """A program of ours in a process of its own while the context lasts, which answers lines on its standard input."""

    def __init__(self, program: str, *arguments: object) -> None:
        self._program = Path(program).name
        self._control, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, program, json.dumps(arguments)]
            # A session of its own: Ctrl-C is for who started it.
            self._process = subprocess.Popen(command, stdin=theirs.fileno(), start_new_session=True)
        self._answers = self._control.makefile()

    def ask(self) -> dict[str, Any]:
        """Return what it has to say now.

        Raises:
            HelperError: it is gone.
        """
        try:
            self._control.sendall(b"\n")
            line = self._answers.readline()
        except OSError:
            line = ""
        if not line:
            raise HelperError(f"{self._program} ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> "Helper":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._answers.close()
        self._control.close()
        self._process.wait()


def stalling(path: Path, stages: list[Stage], count: int, pause: float) -> Helper:
    """Return a crowd, which answers with a Pressure; the stages have equal shares, and who is dropped pauses."""
    return Helper(__file__, str(path), [stage.name for stage in stages], count, pause)


if __name__ == "__main__":
    Crowd(*json.loads(sys.argv[1])).run(sys.stdin.fileno())
