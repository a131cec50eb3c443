"""`zramd top` on a terminal of 80x24 and off it, on a server under load."""

import fcntl
import json
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ServerProcess, start_server
from tests.nbd_bytes import READ, REPLY_BYTES, connect, receive, request, write_request
from tests.property.test_device import make_data
from zramd.cli.status import NOT_RUNNING

pyte = pytest.importorskip("pyte", reason="pyte is not installed: pip install -e '.[dev]'")
pytest.importorskip("rich", reason="rich is not installed: pip install -e '.[top]'")

TOP = [sys.executable, "-m", "zramd", "top"]
BLOCK = bytes(make_data("half", 1, 1 << 16))
WRITES = 40
ALTERNATE, MAIN = b"\x1b[?1049h", b"\x1b[?1049l"
SHOW_CURSOR = b"\x1b[?25h"
PATIENCE = 20.0
"""Seconds until what should be on the screen is given up."""


class Terminal:
    """A terminal with `zramd top` in it."""

    def __init__(self, *arguments: str) -> None:
        self.screen = pyte.Screen(80, 24)
        self._stream = pyte.ByteStream(self.screen)
        self.received = b""
        self._ours, self._its = os.openpty()
        self.resize(80, 24)
        self.attributes = termios.tcgetattr(self._its)
        self.process = subprocess.Popen(
            [*TOP, *arguments],
            stdin=self._its,
            stdout=self._its,
            stderr=self._its,
            env=os.environ | {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8", "COLUMNS": "", "LINES": ""},
            start_new_session=True,
        )

    def resize(self, width: int, height: int) -> None:
        fcntl.ioctl(self._its, termios.TIOCSWINSZ, struct.pack("4H", height, width, 0, 0))
        self.screen.resize(height, width)

    def press(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def wait(self, pattern: str) -> re.Match[str]:
        """Return where a pattern is found on the screen, once it is there."""
        deadline = time.monotonic() + PATIENCE
        while (found := re.search(pattern, "\n".join(self.screen.display))) is None:
            assert time.monotonic() < deadline, "\n".join([pattern, *self.screen.display])
            self._receive(0.1)
        return found

    def _receive(self, seconds: float) -> bool:
        if not select.select([self._ours], [], [], seconds)[0]:
            return False
        received = os.read(self._ours, 1 << 16)
        self.received += received
        self._stream.feed(received)
        return True

    def end(self) -> int:
        """Wait until it ends, and check that the terminal is as it was. Return the exit status."""
        status = self.process.wait(PATIENCE)
        while self._receive(0):
            pass
        assert self.received.count(ALTERNATE) == self.received.count(MAIN) == 1
        assert self.received.rindex(SHOW_CURSOR) > self.received.index(ALTERNATE)
        assert termios.tcgetattr(self._its) == self.attributes
        return status

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(PATIENCE)
        os.close(self._ours)
        os.close(self._its)


class Load(threading.Thread):
    """A client that writes and reads, for as long as its server lives."""

    def __init__(self, server: ServerProcess) -> None:
        super().__init__(daemon=True)
        self._path = server.unix
        self.start()

    def run(self) -> None:
        try:
            with connect(self._path) as sock:
                for number in range(1 << 30):
                    offset = number % 512 << 16
                    sock.sendall(write_request(1, offset, BLOCK) + request(READ, 2, offset, 4096))
                    receive(sock, 2 * REPLY_BYTES + 4096)
                    time.sleep(0.002)
        except (OSError, AssertionError):
            pass  # the server has ended


def serve(directory: Path) -> ServerProcess:
    return start_server(directory, "--size", "64M", "--mem-limit", "32M")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    running = serve(tmp_path_factory.mktemp("top"))
    yield running
    assert running.stop() == (0, "")


@pytest.fixture
def terminal(server: ServerProcess) -> Iterator[Terminal]:
    made = Terminal("-d", "0.2", "--status", str(server.status))
    yield made
    made.close()


def test_it_shows_the_load_answers_keys_and_leaves_the_terminal_as_it_was(
    server: ServerProcess, terminal: Terminal
) -> None:
    Load(server)
    rates = terminal.wait(r"\nwrite +([0-9,]+) +([0-9.]+) +[0-9.]+us +[0-9.]+[um]s")
    assert int(rates[1].replace(",", "")) > 0
    assert float(rates[2]) > 0
    terminal.wait(r"memory .*of 32M, the limit")
    terminal.wait(r"\n +pool .*[0-9]+%")
    terminal.wait(r"\npolicy  off +\nwork    none +\npressure on memory")
    terminal.press("s")
    terminal.wait("by size")
    terminal.press("p-")
    terminal.wait(r"PAUSED +every 0.5 s")
    terminal.press("h")
    terminal.wait("more often, less often")
    terminal.press("hp")
    terminal.resize(50, 8)
    terminal.process.send_signal(signal.SIGWINCH)
    terminal.wait(r"^zramd top  zram0 .*h help *\nmemory .*\n.*\n.*…")
    terminal.press("q")
    assert terminal.end() == 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_and_leaves_the_terminal_as_it_was(
    terminal: Terminal, number: signal.Signals, status: int
) -> None:
    terminal.wait("occupancy")
    terminal.process.send_signal(number)
    assert terminal.end() == status


def test_it_outlives_the_server_and_goes_on_with_the_next(tmp_path: Path) -> None:
    server = serve(tmp_path)
    terminal = Terminal("-d", "0.2", "--status", str(server.status))
    try:
        Load(server)
        terminal.wait(r"\nwrite +[1-9]")
        server.process.kill()
        server.process.communicate()
        terminal.wait(r"not running for [0-9]+ s: no server answers at")
        server = serve(tmp_path)
        terminal.wait(r"\nwrite +0 ")
        terminal.press("q")
        assert terminal.end() == 0
    finally:
        terminal.close()
        assert server.stop() == (0, "")


def test_json_is_an_object_a_line_with_the_rates_of_each_interval(tmp_path: Path) -> None:
    server = serve(tmp_path)
    command = [*TOP, "--json", "-d", "0.2", "--status", str(server.status)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    done, lines = 0.0, [json.loads(process.stdout.readline())]
    with connect(server.unix) as sock:
        for number in range(WRITES):
            sock.sendall(write_request(1, number << 16, BLOCK))
            receive(sock, REPLY_BYTES)
    while round(done) < WRITES:
        lines.append(json.loads(process.stdout.readline()))
        done += lines[-1]["operations"]["write"]["requests_per_second"] * lines[-1]["seconds"]
    assert round(done) == WRITES
    assert (
        sum(round(line["operations"]["write"]["bytes_per_second"] * line["seconds"]) for line in lines) == WRITES << 16
    )
    assert lines[-1]["mm_stat"]["orig_data_size"] == WRITES << 16
    assert sum(use["memory"] for use in lines[-1]["classes"]) == lines[-1]["pool"]["memory"]
    assert server.stop() == (0, "")
    while lines[-1]["running"]:
        lines.append(json.loads(process.stdout.readline()))
    server = serve(tmp_path)
    while not lines[-1]["running"]:
        lines.append(json.loads(process.stdout.readline()))
    # Its counters are behind those of the server before it, and the difference is no rate.
    assert lines[-1]["operations"] == {}
    process.terminate()
    process.wait(PATIENCE)
    process.stdout.close()
    assert server.stop() == (0, "")


def run(*arguments: str, code: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"{code}\nfrom zramd.cli import main; main(prog_name='zramd')", "top", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=os.environ | environment, check=False
    )


def test_without_a_terminal_it_prints_once_or_draws_a_picture(server: ServerProcess, tmp_path: Path) -> None:
    place = ["--status", str(server.status), "-d", "0.1"]
    once = run("--once", *place, LC_ALL="C", PYTHONUTF8="0", COLUMNS="80", LINES="24")
    assert (once.returncode, once.stderr) == (0, "")
    assert "\x1b" not in once.stdout
    assert once.stdout.isascii()
    assert max(map(len, once.stdout.splitlines())) <= 80
    picture = tmp_path / "top.svg"
    assert run("--svg", str(picture), *place).returncode == 0
    assert re.search(r"@font-face|@import|url\([^#]|href", picture.read_text()) is None


def test_what_it_cannot_do_is_one_line(server: ServerProcess, tmp_path: Path) -> None:
    place = ["--status", str(server.status)]
    missing = run("--once", *place, code="import sys; sys.modules['rich'] = None")
    refusals = [
        (run(*place), 1, "this is no terminal: use zramd top --once, or --json"),
        (missing, 1, f"rich, which is not installed: {sys.executable} -m pip install rich"),
        (run("--json", "--status", str(tmp_path / "none")), NOT_RUNNING, "no server answers"),
    ]
    for done, status, words in refusals:
        assert (done.returncode, done.stdout) == (status, "")
        assert len(done.stderr.splitlines()) == 1
        assert words in done.stderr
    with_no_screen = subprocess.run(
        ["script", "-qec", f"TERM=dumb {sys.executable} -m zramd top --status {server.status}", "/dev/null"],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert "Error: a terminal of kind dumb cannot be drawn on: use zramd top --once" in with_no_screen.stdout
