"""Servers that are to be killed, and what starts them."""

import json
import os
import select
import signal
import subprocess
import sys
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.crash.steps import Step
from zramd import native
from zramd.native import Engine

ROOT = Path(__file__).resolve().parents[2]
GENERATED = ROOT / "build" / "native"
SECONDS = 30
"""For what takes a moment."""


def build_engine(directory: Path) -> Path:
    """Compile the engine with the named steps in it, from the C that the build of zramd has left. Return its file."""
    source = GENERATED / "zramd" / "native" / "engine.c"
    newest = max(path.stat().st_mtime for path in (ROOT / "zramd" / "native").glob("*.p[xy]*"))
    if not source.exists() or source.stat().st_mtime < newest:
        pytest.skip("the C of the compiled engine is missing or old: run scripts/setup")
    target = directory / "engine.so"
    includes = [f"-I{GENERATED}", f"-I{sysconfig.get_path('include')}"]
    options = ["-shared", "-fPIC", "-O1", "-w", "-DZRAMD_STEPS", *includes, "-o", str(target)]
    subprocess.run(["gcc", *options, str(source), "-llz4", "-lzstd"], check=True)
    return target


@dataclass
class Server:
    """A server that was started; its sockets come into being while it starts."""

    starter: "Starter"
    directory: Path
    pid: int = 0
    pidfd: int = field(default=-1, repr=False)

    @property
    def unix(self) -> Path:
        return self.directory / "nbd"

    @property
    def status(self) -> Path:
        return self.directory / "status"

    @property
    def admin(self) -> Path:
        return self.directory / "admin"

    @property
    def errors(self) -> Path:
        """The file with what the server wrote to standard error."""
        return self.directory / "errors"

    def has_died(self, seconds: float = 0) -> bool:
        """Wait for the end, and say whether it has come."""
        return bool(select.select([self.pidfd], [], [], seconds)[0])

    def kill(self) -> None:
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def end(self) -> int:
        """Return the exit status of a server that has ended; if a signal did it, that one's negative number."""
        os.close(self.pidfd)
        return self.starter.wait(self.pid)


class Starter(ABC):
    """What starts servers, and waits for them."""

    def start(self, directory: Path, *options: str, step: Step | None = None, passing: int = 0) -> Server:
        """Start a server with its sockets in `directory`; it dies when it passes a step for the n-th time."""
        server = Server(self, directory)
        server.errors.write_bytes(b"")  # here, since the server may not come to it
        sockets = ["--unix", str(server.unix), "--status", str(server.status), "--admin", str(server.admin)]
        server.pid = self._start(["serve", *sockets, *options], server.errors, step, passing)
        server.pidfd = os.pidfd_open(server.pid)
        return server

    @abstractmethod
    def _start(self, arguments: Sequence[str], errors: Path, step: Step | None, passing: int) -> int:
        """Start a server, and return its process id."""

    @abstractmethod
    def wait(self, pid: int) -> int:
        """Return the exit status of a server that has ended; if a signal did it, that one's negative number."""

    @abstractmethod
    def close(self) -> None:
        """Go away. All servers have ended."""


class ExecutedServers(Starter):
    """Servers as a user starts them."""

    def __init__(self) -> None:
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def _start(self, arguments: Sequence[str], errors: Path, step: Step | None, passing: int) -> int:
        assert step is None
        with errors.open("ab") as file:
            command = [sys.executable, "-m", "zramd", *arguments]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file)
        self._processes[process.pid] = process
        return process.pid

    def wait(self, pid: int) -> int:
        return self._processes.pop(pid).wait()

    def close(self) -> None:
        assert not self._processes


class ForkedServers(Starter):
    """Servers of one engine that start in milliseconds; arguments are those of tests/crash/launcher.py."""

    def __init__(self, engine: Engine, *arguments: str) -> None:
        self._launcher = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.launcher", *arguments],
            cwd=ROOT,
            env={**os.environ, native.VARIABLE: engine.value},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _start(self, arguments: Sequence[str], errors: Path, step: Step | None, passing: int) -> int:
        name = step.name if step else None
        return self._ask(arguments=arguments, errors=str(errors), step=name, passing=passing)

    def wait(self, pid: int) -> int:
        return self._ask(wait=pid)

    def _ask(self, **request: object) -> int:
        assert self._launcher.stdin is not None
        assert self._launcher.stdout is not None
        self._launcher.stdin.write(json.dumps(request) + "\n")
        self._launcher.stdin.flush()
        answer = self._launcher.stdout.readline()
        assert answer, "there is no launcher any more: it has said why"
        return int(answer)

    def close(self) -> None:
        self._launcher.communicate(timeout=SECONDS)
