"""`zramd save` and `zramd restore` with real servers: pipes, full disks, kills, Ctrl-C, and clients that go on."""

import itertools
import os
import random
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ServerProcess, start_server, wait_until_served
from tests.nbd_bytes import READ, REPLY_BYTES, connect, receive, reply, request, write_request
from tests.property.test_device import make_data, read
from zramd.device.disk import Disk
from zramd.layout import PAGE_SIZE
from zramd.status.client import StatusError

MODULE = [sys.executable, "-m", "zramd"]
DATA = bytes(make_data("half", 1, 2 << 20)) + bytes(make_data("text", 2, 1 << 20))
NOBODY = 65534


@pytest.fixture
def filled(server: ServerProcess) -> ServerProcess:
    """Return a server with 6 MiB of data, 2 MiB of which cannot be compressed."""
    write(server, 0, DATA)
    write(server, 8 << 20, random.Random(1).randbytes(3 << 20))
    return server


def write(server: ServerProcess, offset: int, data: bytes) -> None:
    with connect(server.unix) as sock:
        for start in range(0, len(data), 1 << 20):
            sock.sendall(write_request(1, offset + start, data[start : start + (1 << 20)]))
            assert receive(sock, REPLY_BYTES) == reply(1)


def contents(server: ServerProcess, length: int) -> bytes:
    with connect(server.unix) as sock:
        parts = []
        for start in range(0, length, 1 << 20):
            sock.sendall(request(READ, 1, start, 1 << 20))
            parts.append(receive(sock, REPLY_BYTES + (1 << 20))[REPLY_BYTES:])
        return b"".join(parts)


def command(server: ServerProcess, *arguments: str | Path) -> list[str]:
    return [*MODULE, *map(str, arguments), "--admin", str(server.admin)]


def run(server: ServerProcess, *arguments: str | Path, data: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command(server, *arguments), input=data, capture_output=True, timeout=60, check=False)


def refused(done: subprocess.CompletedProcess[bytes], *words: str) -> None:
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("Error: ")
    for word in words:
        assert word in line


def wait_for_work(server: ServerProcess, kind: str) -> None:
    while kind not in server.ask("work"):
        pass


def wait_for_no_work(server: ServerProcess) -> None:
    while server.ask("work").strip():
        pass


def test_what_was_saved_is_restored(filled: ServerProcess, tmp_path: Path) -> None:
    directory = tmp_path / "images"
    directory.mkdir()
    image = directory / "a.img"
    before, data = filled.mm_stat(), contents(filled, 16 << 20)
    done = run(filled, "save", image)
    assert (done.returncode, done.stdout) == (0, b"")
    assert done.stderr.startswith(b"6M of data saved, ")
    assert stat.S_IMODE(image.stat().st_mode) == 0o600
    assert list(directory.iterdir()) == [image]
    refused(run(filled, "restore", image), "EBUSY", "holds data")
    assert b"nothing is restored" in run(filled, "restore", "--if-empty", image).stderr
    filled.ask("reset 1")
    assert run(filled, "restore", "--size", "128M", image).returncode == 0
    assert filled.ask("disksize") == f"{128 << 20}\n"
    assert filled.mm_stat()[:2] == before[:2]
    assert contents(filled, 16 << 20) == data


def test_from_one_server_to_another_through_a_pipe(filled: ServerProcess, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    server = start_server(other, "--size", "64M", "--algorithm", "zstd")
    with subprocess.Popen(command(filled, "save", "-"), stdout=subprocess.PIPE) as saving:
        done = subprocess.run(command(server, "restore", "-"), stdin=saving.stdout, capture_output=True, check=False)
        assert (done.returncode, saving.wait(timeout=60)) == (0, 0)
    assert done.stderr.startswith(b"6M of data restored, saved on ")
    assert contents(server, 16 << 20) == contents(filled, 16 << 20)
    assert server.ask("comp_algorithm") == "[lz4] lz4hc zstd \n"
    assert server.stop() == (0, "")


def test_a_named_pipe_is_written_to(filled: ServerProcess, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(command(filled, "save", pipe), stderr=subprocess.PIPE) as saving:
        image = pipe.read_bytes()
        assert saving.wait(timeout=60) == 0
    filled.ask("reset 1")
    assert run(filled, "restore", "-", data=image).returncode == 0


def test_errors_are_one_line_and_leave_the_disk_without_a_size(filled: ServerProcess, tmp_path: Path) -> None:
    image = run(filled, "save", "-").stdout
    link = tmp_path / "link"
    link.symlink_to("file")
    refused(run(filled, "save", link), f"{link} is not saved", "symbolic link")
    refused(run(filled, "save", tmp_path / "none" / "file"), "not saved", "No such file")
    refused(run(filled, "restore", tmp_path / "none"), "not restored", "No such file")
    filled.ask("reset 1")
    refused(run(filled, "restore", "-", data=image[:-1]), "not restored", "EINVAL", "cut short")
    refused(run(filled, "restore", "-", data=b"no image" * 100), "not restored", "EINVAL", "not a disk saved by zramd")
    assert filled.ask("initstate") == "0\n"
    assert run(filled, "restore", "-", data=image).returncode == 0


def test_without_a_descriptor_save_and_restore_are_refused(filled: ServerProcess) -> None:
    for line in ("save fd", "save /etc/passwd", "restore fd", "restore /etc/passwd", "restore fd size=1"):
        with pytest.raises(StatusError, match="EINVAL"):
            filled.ask(line)


def test_a_full_disk_leaves_the_old_file_and_no_other(small_tmpfs: Path, filled: ServerProcess) -> None:
    directory = Path(tempfile.mkdtemp(dir=small_tmpfs))
    image = directory / "a.img"
    image.write_bytes(b"old")
    refused(run(filled, "save", image), "not saved", "ENOSPC")
    assert image.read_bytes() == b"old"
    assert list(directory.iterdir()) == [image]


def test_a_server_needs_no_way_to_the_file(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can let another user serve: run the tests with sudo")
    with tempfile.TemporaryDirectory(prefix="zramd-test-", dir="/dev/shm") as name:
        home = Path(name)
        os.chown(home, NOBODY, NOBODY)
        unix, status = home / "a.nbd", home / "a.status"
        process = subprocess.Popen(
            [*MODULE, "serve", "--size", "16M", "--volatile", "--unix", str(unix), "--status", str(status)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
        )
        wait_until_served(process)
        server = ServerProcess(process, unix, status, home / "a.admin")
        write(server, 0, DATA)
        private = tmp_path / "private"
        private.mkdir(mode=0o700)
        assert run(server, "save", private / "a.img").returncode == 0
        server.ask("reset 1")
        assert run(server, "restore", private / "a.img").returncode == 0
        assert contents(server, len(DATA)) == DATA
        assert server.stop() == (0, "")


# Cut short


def test_ctrl_c_ends_a_save_that_nobody_reads(filled: ServerProcess) -> None:
    with subprocess.Popen(command(filled, "save", "-"), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as saving:
        wait_for_work(filled, "save")
        saving.send_signal(signal.SIGINT)
        assert saving.wait(timeout=60) in (1, 130)
        assert saving.stderr is not None
        assert b"ECANCELED" in saving.stderr.read()
        wait_for_no_work(filled)
    assert run(filled, "save", "-").stdout


@pytest.mark.parametrize("verb", ["save", "restore"])
def test_the_server_stops_when_its_client_is_killed(filled: ServerProcess, verb: str) -> None:
    if verb == "restore":
        filled.ask("reset 1")
    # The other end of the pipe stays open: nothing else tells the server.
    out, into = os.pipe()
    stream = {"stdout": into} if verb == "save" else {"stdin": out}
    with subprocess.Popen(command(filled, verb, "-"), stderr=subprocess.PIPE, **stream) as client:  # type: ignore[call-overload]
        wait_for_work(filled, verb)
        client.kill()
    wait_for_no_work(filled)
    if verb == "restore":
        assert filled.ask("initstate") == "0\n"
    os.close(out)
    os.close(into)


def test_a_client_that_is_killed_leaves_the_old_file(filled: ServerProcess, tmp_path: Path) -> None:
    directory = tmp_path / "images"
    directory.mkdir()
    image = directory / "a.img"
    image.write_bytes(b"old")
    filled.process.send_signal(signal.SIGSTOP)
    with subprocess.Popen(command(filled, "save", image)) as client:
        while not any("deleted" in os.readlink(f) for f in descriptors(client.pid)):
            assert client.poll() is None
        client.kill()
    filled.process.send_signal(signal.SIGCONT)
    assert image.read_bytes() == b"old"
    assert list(directory.iterdir()) == [image]


def descriptors(pid: int) -> Iterator[str]:
    for name in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{name}"
        if os.path.islink(path):
            yield path


def test_a_server_that_is_killed_leaves_the_old_file(tmp_path: Path) -> None:
    server = start_server(tmp_path, "--size", "64M")
    write(server, 0, DATA)
    directory = tmp_path / "images"
    directory.mkdir()
    image = directory / "a.img"
    image.write_bytes(b"old")
    server.process.send_signal(signal.SIGSTOP)
    with subprocess.Popen(command(server, "save", image), stderr=subprocess.PIPE, text=True) as client:
        while not any("deleted" in os.readlink(f) for f in descriptors(client.pid)):
            assert client.poll() is None
        server.process.kill()
        assert client.wait(timeout=60) == 1
        assert client.stderr is not None
        (line,) = client.stderr.read().splitlines()
    assert line.startswith(f"Error: {image} is not saved: ")
    server.process.communicate(timeout=30)
    assert image.read_bytes() == b"old"
    assert list(directory.iterdir()) == [image]


def test_nothing_is_left_of_a_restore_when_the_server_is_killed(tmp_path: Path) -> None:
    state = ["--size", "64M", "--state", str(tmp_path / "state")]
    server = start_server(tmp_path, *state, volatile=False)
    write(server, 0, DATA)
    image = run(server, "save", "-").stdout
    server.ask("reset 1")
    with subprocess.Popen(command(server, "restore", "-"), stdin=subprocess.PIPE, stderr=subprocess.PIPE) as client:
        assert client.stdin is not None
        client.stdin.write(image[: len(image) // 2])
        client.stdin.flush()
        while not (tmp_path / "state" / "page_table").exists():
            assert client.poll() is None
        server.process.kill()
        client.stdin.close()
        assert client.wait(timeout=60) == 1
    server.process.communicate(timeout=30)
    server = start_server(tmp_path, *state, volatile=False)
    assert server.mm_stat() == [0] * 9
    assert server.ask("initstate") == "1\n"
    assert run(server, "restore", "-", data=image).returncode == 0
    assert contents(server, len(DATA)) == DATA
    assert server.stop()[0] == 0


# Beside I/O


def numbered(number: int, noise: bytes) -> bytes:
    return (number.to_bytes(8, "little") + noise[: number % 3000]).ljust(PAGE_SIZE, b"z")


def test_each_save_is_of_one_moment_while_a_client_writes(server: ServerProcess) -> None:
    """A client writes growing numbers to the pages in turn: at each moment they are so many in a row."""
    pages, noise = 4096, random.Random(1).randbytes(3000)
    write(server, 0, b"".join(numbered(number, noise) for number in range(pages)))
    ended = threading.Event()

    def write_on() -> None:
        with connect(server.unix) as sock:
            for number in itertools.count(pages, 8):
                for following in range(number, number + 8):
                    sock.sendall(write_request(following, following % pages * PAGE_SIZE, numbered(following, noise)))
                for following in range(number, number + 8):
                    assert receive(sock, REPLY_BYTES) == reply(following)
                if ended.is_set():
                    return

    writer = threading.Thread(target=write_on)
    writer.start()
    try:
        saved = [run(server, "save", "-") for _ in range(3)]
    finally:
        ended.set()
        writer.join()
    firsts = []
    for done in saved:
        assert done.returncode == 0, done.stderr
        data = contents_of(done.stdout, pages * PAGE_SIZE)
        numbers = sorted(int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), PAGE_SIZE))
        assert numbers == list(range(numbers[0], numbers[0] + pages))
        for number in numbers[::50]:
            start = number % pages * PAGE_SIZE
            assert data[start : start + PAGE_SIZE] == numbered(number, noise)
        firsts.append(numbers[0])
    assert firsts == sorted(set(firsts))


def contents_of(image: bytes, length: int) -> bytes:
    disk = Disk("zram1", None)
    fd = os.memfd_create("image")
    os.write(fd, image)
    os.lseek(fd, 0, os.SEEK_SET)
    disk.restore(fd)
    os.close(fd)
    return read(disk.require_opened().device, 0, length)
