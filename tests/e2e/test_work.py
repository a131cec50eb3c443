"""Verbs for long work on a real server: what they say, how they show progress, and that Ctrl-C ends the work there."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.configured import disk_table, quoted, start_configured
from tests.conftest import ServerProcess, start_server
from tests.nbd_bytes import REPLY_BYTES, connect, receive, reply, write_request
from tests.property.test_device import make_data
from zramd.layout import PAGE_SIZE

MODULE = [sys.executable, "-m", "zramd"]
PAGES = 2048


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    """Return a server with 8 MiB of text in it and two algorithms to recompress with, the first of which is slow."""
    running = start_server(tmp_path, "--size", "64M", "--algorithm", "lz4 zstd(level=22) zstd(level=1)")
    with connect(running.unix) as sock:
        for page in range(0, PAGES, 256):
            sock.sendall(write_request(1, page * PAGE_SIZE, bytes(make_data("text", page, 256 * PAGE_SIZE))))
            assert receive(sock, REPLY_BYTES) == reply(1)
    yield running
    assert running.stop() == (0, "")


def run(server: ServerProcess, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*MODULE, *arguments, "--admin", str(server.admin)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


class Terminal:
    """A command with a terminal as its standard error."""

    def __init__(self, server: ServerProcess, *arguments: str) -> None:
        self._master, slave = pty.openpty()
        command = [*MODULE, *arguments, "--admin", str(server.admin)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=slave, text=True)
        os.close(slave)
        self.shown = ""

    def wait_for(self, pattern: str) -> None:
        while not re.search(pattern, self.shown):
            self.shown += os.read(self._master, 4096).decode()

    def end(self) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=60)
        os.close(self._master)
        return self.process.returncode, output


def test_pages_are_idle_and_then_recompressed(server: ServerProcess) -> None:
    assert run(server, "idle").stdout == f"{PAGES} pages are idle\n"
    assert run(server, "idle", "1h").stdout == "0 pages are idle\n"
    assert run(server, "idle", "all").stdout == f"{PAGES} pages are idle\n"
    before = server.mm_stat()
    done = run(server, "recompress", "--type", "idle", "--priority", "2", "--max-pages", "100")
    assert (done.returncode, done.stderr) == (0, "")
    match = re.fullmatch(r"100 of 100 pages recompressed, (\d+) bytes saved\n", done.stdout)
    assert match
    assert before[1] - server.mm_stat()[1] == int(match[1])
    done = run(server, "recompress", "--algorithm", "zstd", "--threshold", "4K")
    assert (done.returncode, done.stdout) == (1, "")
    assert "threshold" in done.stderr


def test_ctrl_c_ends_the_work_in_the_server_and_says_what_was_done(server: ServerProcess) -> None:
    terminal = Terminal(server, "recompress", "--priority", "1")
    terminal.wait_for(r"recompress: [1-9]\d* of 2048 \(\d+%\), [\d,]+/s, [\d.]+[BKM] saved")
    assert "recompress: " in server.ask("work")
    terminal.process.send_signal(signal.SIGINT)
    status, output = terminal.end()
    assert status == 130
    match = re.fullmatch(r"cancelled: (\d+) of (\d+) pages recompressed, \d+ bytes saved\n", output)
    assert match
    assert 0 < int(match[1]) <= int(match[2]) < PAGES
    assert server.ask("work") == ""


def test_another_may_cancel_it(server: ServerProcess) -> None:
    terminal = Terminal(server, "recompress", "--priority", "1")
    terminal.wait_for("recompress: [1-9]")
    refused = run(server, "recompress", "--priority", "2")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "EAGAIN zram0: recompress is under way" in refused.stderr
    assert run(server, "set", "cancel=recompress").returncode == 0
    status, output = terminal.end()
    assert status == 0
    assert output.startswith("cancelled: ")


def test_block_state_has_a_line_for_each_page(server: ServerProcess) -> None:
    done = run(server, "block-state")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == PAGES
    assert all(re.fullmatch(r" {8,11}\d+ +\d+\.000000 \.\.\.\.\.\.", line) for line in lines)


def test_who_takes_only_the_first_lines_of_block_state_sees_no_error(server: ServerProcess) -> None:
    command = f"{sys.executable} -m zramd block-state --admin {server.admin} | head -n 2"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, check=False)  # noqa: S602
    assert (done.stdout.count("\n"), done.stderr) == (2, "")


def test_an_estimate_is_a_table_or_json(server: ServerProcess) -> None:
    done = run(server, "estimate", "--samples", "20")
    assert (done.returncode, done.stderr) == (0, "")
    heading, *rows, last = done.stdout.splitlines()
    assert heading.split() == [
        "ALGORITHM",
        "LEVEL",
        "RATIO",
        "COMPRESS",
        "DECOMPRESS",
        "MEMORY/4",
        "MEMORY/8",
        "MEMORY/16",
    ]
    assert rows[0].split()[:2] == ["lz4", "1"]
    assert all(len(row.split()) == 8 for row in rows)
    assert last.startswith(f"By 20 of {PAGES} pages that have an object in memory. Now they take ")
    facts = json.loads(run(server, "estimate", "--samples", "20", "--json").stdout)
    assert len(facts["rows"]) == len(rows)


def test_a_dictionary_is_trained_written_and_installed(server: ServerProcess, tmp_path: Path) -> None:
    path = tmp_path / "dictionary"
    path.touch(mode=0o644)
    command = ["train", "--size", "8K", "--level", "3", "--priority", "3", "--output", str(path)]
    done = run(server, *command, "--install")
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["LEVEL", "RATIO", "MEMORY", "COMPRESS", "DECOMPRESS"]
    assert sum("trained " in line for line in lines[1:]) == 4
    assert 0 < path.stat().st_size <= 8 << 10
    assert path.stat().st_mode & 0o777 == 0o600
    if any(line.startswith("At level 3 the disk takes ") for line in lines):
        assert (done.returncode, done.stderr) == (0, "")
        assert "#3: lz4 lz4hc [zstd]" in server.ask("recomp_algorithm")
    else:
        assert done.returncode == 1
        assert "No gain: at level 3" in done.stdout
        assert "#3" not in server.ask("recomp_algorithm")


@pytest.mark.parametrize("verb", ["train", "estimate"])
def test_ctrl_c_ends_a_trial_in_the_server(server: ServerProcess, verb: str) -> None:
    terminal = Terminal(server, verb, *(["--samples", "8192"] if verb == "estimate" else []))
    terminal.wait_for(rf"{verb}: [1-9]\d* of \d+")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == (130, "cancelled: nothing has changed\n")
    assert server.ask("work") == ""


def test_the_policy_explains_itself_and_is_switched(server: ServerProcess) -> None:
    assert run(server, "policy").stdout == "off\n"
    assert server.ask("policy") == "off\n"
    lines = run(server, "policy", "--explain").stdout.splitlines()
    assert lines[0] == "off: nothing."
    assert lines[1] == f"None of {PAGES} pages that were not touched for 600 s is left to recompress."
    done = run(server, "policy", "--dry-run")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert run(server, "policy").stdout.startswith("dry-run\n")
    assert run(server, "policy", "--off").returncode == 0
    assert run(server, "policy").stdout == "off\n"


def test_the_policy_of_the_configuration_is_on_from_the_start(tmp_path: Path) -> None:
    table = disk_table(tmp_path, "zram0", 'compression-algorithm = "lz4 zstd(level=9) (type=idle)"')
    text = f"[server]\nunix = {quoted(tmp_path / 'zram0.nbd')}\n{table}[zram0.policy]\nenabled = true\nidle-after = 5\n"
    server = start_configured(tmp_path, text)
    assert run(server, "policy").stdout == "on\n"
    assert run(server, "policy", "--explain").stdout.startswith("on: nothing.\n")
    assert server.stop()[0] == 0


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["idle", "soon"], "not an age"),
        (["recompress", "--type", "cold"], "cold"),
        (["recompress", "--algorithm", "zstd", "--priority", "1"], "exclude"),
        (["recompress", "--priority", "0"], "0"),
        (["writeback"], "--type or --pages"),
        (["writeback", "--pages", "1-"], "not a page"),
    ],
)
def test_what_cannot_be_asked_for_is_a_usage_error(arguments: list[str], word: str, tmp_path: Path) -> None:
    command = [*MODULE, *arguments, "--admin", str(tmp_path / "nobody")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert word in done.stderr
