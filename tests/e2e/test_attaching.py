"""The commands that attach and swap, by nbdfuse and a loop device: what there is on a machine without nbd."""

import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.configured import MODULE
from tests.conftest import ServerProcess, start_server
from tests.e2e.test_attach import in_use
from zramd.attach.attachment import AttachError
from zramd.attach.loop import _require_machine
from zramd.attach.module import has_nbd
from zramd.attach.swaps import read_swaps
from zramd.paths import make_runtime_directory

MIB = 1 << 20
HOGS = 8
"""Processes: swapoff looks only between two of them whether it is to stop."""
HOG = """
import random, sys
data = random.Random(1)
pages = [bytearray(data.randbytes(2048) + bytes(2048)) for _ in range({count})]
for _ in sys.stdin:
    data.seed(1)
    print(all(page == data.randbytes(2048) + bytes(2048) for page in pages), flush=True)
"""


def zramd(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*MODULE, *arguments], capture_output=True, text=True, timeout=120)


def done(*arguments: str | Path) -> str:
    """Run a command that must succeed without a word on standard error; return what it printed."""
    result = zramd(*arguments)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def refused(*arguments: str | Path) -> str:
    """Run a command that must fail with one line; return that."""
    result = zramd(*arguments)
    assert (result.returncode, result.stdout) == (1, "")
    assert re.fullmatch(r"Error: [^\n]+\n", result.stderr)
    return result.stderr


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    running = start_server(tmp_path, "--size", "512M")
    yield running
    assert running.stop() == (0, "")


@pytest.fixture
def device(server: ServerProcess) -> Iterator[str]:
    """Return a loop device that `zramd attach` has made, and check at the end that nothing is left of it."""
    try:
        _require_machine()
    except AttachError as error:
        pytest.skip(str(error))
    before = in_use(make_runtime_directory())
    path = done("attach", "--fuse", "--status", server.status).strip()
    assert Path(path).is_block_device()
    yield path
    if str(Path("/sys/block", Path(path).name, "loop")) in in_use(make_runtime_directory()):
        done("detach", path)
    assert in_use(make_runtime_directory()) <= before
    assert not list(Path("/run/zramd").glob("zramd-loop-*/nbdfuse.pid"))


@pytest.fixture
def swap(device: str) -> Iterator[str]:
    """Return a device that may be swapped to."""
    result = zramd("swapon", device)
    if "Operation not permitted" in result.stderr:
        pytest.skip("swapon is not permitted here: run the tests in a virtual machine")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    yield device
    if device in [each.path for each in read_swaps()]:
        done("swapoff", device)


def used(device: str) -> int:
    return sum(each.used for each in read_swaps() if each.path == device)


class Hogs:
    """Processes whose memory, of so many bytes together, does not fit into what they may have."""

    def __init__(self, size: int, limit: int) -> None:
        self._limit, self._directory = _memory_cgroup()
        self._limit.write_text(str(limit))
        command = [sys.executable, "-c", HOG.format(count=size // HOGS // 4096)]
        join = self._directory / "cgroup.procs"
        self._processes = [
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                preexec_fn=lambda: join.write_text("0"),
            )
            for _ in range(HOGS)
        ]

    def are_whole(self) -> bool:
        """Have them look whether all their memory is as it was."""
        return all(_is_whole(process) for process in self._processes)

    def allow_all(self) -> None:
        self._limit.write_text("-1" if self._limit.name == "memory.limit_in_bytes" else "max")

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()
        self._directory.rmdir()


def _is_whole(hog: subprocess.Popen[str]) -> bool:
    assert hog.stdin is not None
    assert hog.stdout is not None
    hog.stdin.write("\n")
    hog.stdin.flush()
    return hog.stdout.readline() == "True\n"


def _memory_cgroup() -> tuple[Path, Path]:
    """Make a cgroup. Return the file that limits its memory, and its directory."""
    for parent, name in (("memory", "memory.limit_in_bytes"), ("", "memory.max")):
        directory = Path("/sys/fs/cgroup", parent, f"zramd-test-{os.getpid()}")
        try:
            directory.mkdir()
        except OSError:
            continue
        if (directory / name).exists():
            return directory / name, directory
        directory.rmdir()
    pytest.skip("no memory cgroup can be made: run the tests where /sys/fs/cgroup can be written to")


@pytest.fixture
def hogs(swap: str) -> Iterator[Hogs]:
    hogs = Hogs(256 * MIB, 128 * MIB)
    try:
        assert hogs.are_whole()
        assert used(swap) > 128 * MIB
        yield hogs
    finally:
        hogs.end()


def test_an_attached_device_stays_and_can_be_used_until_it_is_detached(device: str, tmp_path: Path) -> None:
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    subprocess.run(["mkfs.ext4", "-q", device], check=True)
    subprocess.run(["mount", device, mountpoint], check=True)
    try:
        assert f"{device} is mounted on {mountpoint}" in refused("detach", device)
        assert "is mounted on" in refused("swapon", device, "--force")
        (mountpoint / "file").write_text("still there")
    finally:
        subprocess.run(["umount", mountpoint], check=True)
    assert "ext4" in refused("swapon", device)
    assert done("detach", device) == ""
    assert "zramd attach has made" in refused("detach", device)


def test_the_default_is_the_device_that_is_attached_and_the_one_that_is_swapped_to(swap: str) -> None:
    assert (used(swap), [each.priority for each in read_swaps() if each.path == swap]) == (0, [100])
    assert "is swapped to" in refused("detach", swap)
    assert "is swapped to" in refused("swapon")
    assert done("swapoff") == ""
    assert done("swapon", "--priority", "7", "--no-discard") == ""
    assert [each.priority for each in read_swaps() if each.path == swap] == [7]
    assert done("swapoff") == ""
    assert "which device?" in refused("swapoff")


def test_a_file_system_is_not_swapped_over_unless_that_is_wanted(device: str) -> None:
    subprocess.run(["mkfs.ext4", "-q", device], check=True)
    assert f"there is something on {device} (ext4)" in refused("swapon", device)
    result = zramd("swapon", device, "--force")
    if "Operation not permitted" in result.stderr:
        pytest.skip("swapon is not permitted here: run the tests in a virtual machine")
    assert (result.returncode, result.stderr) == (0, "")
    assert done("swapoff", device) == ""


def test_what_was_swapped_out_comes_back_as_it_was(swap: str, hogs: Hogs, server: ServerProcess) -> None:
    assert server.mm_stat()[0] > 128 * MIB
    assert hogs.are_whole()
    hogs.allow_all()
    assert done("swapoff", swap) == ""
    assert hogs.are_whole()


def test_swapoff_shows_what_is_left_and_stops_when_interrupted(swap: str, hogs: Hogs) -> None:
    hogs.allow_all()
    before = used(swap)
    terminal, end = pty.openpty()
    process = subprocess.Popen([*MODULE, "swapoff", swap], stdout=subprocess.DEVNULL, stderr=end)
    os.close(end)
    said = b""
    while b"left" not in said:
        part = _read(terminal)
        assert part
        said += part
    process.send_signal(signal.SIGINT)
    while part := _read(terminal):
        said += part
    os.close(terminal)
    assert process.wait(60) == 1
    assert re.search(rf"Error: swapoff was stopped; [\d.]+M are left on {swap}".encode(), said)
    assert 0 < used(swap) < before
    assert hogs.are_whole()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # nobody has the other end any more
        return b""


def test_without_nbd_the_way_out_is_named(server: ServerProcess) -> None:
    if has_nbd():
        pytest.skip("this kernel has nbd: what is tested here is what happens without")
    if os.geteuid() != 0:
        pytest.skip("needs root: run the tests with sudo")
    assert "--fuse" in refused("attach", "--status", server.status)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("attach", "/dev/sda"), "/dev/sda"),
        (("attach", "nbd0"), "/dev/nbd0"),
        (("attach", "/dev/nbd"), "/dev/nbd0"),
        (("attach", "--uri", "nbd://x", "--status", "/s"), "exclude"),
        (("attach", "--connections", "17"), "17"),
        (("attach", "--dead-timeout", "0"), "0"),
        (("detach",), "DEVICE"),
        (("detach", "/dev/sda"), "/dev/sda"),
        (("swapon", "--priority", "32768"), "32768"),
        (("swapoff", "/swapfile"), "/swapfile"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(arguments: tuple[str, ...], says: str) -> None:
    result = zramd(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert says in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments", [("/dev/nbd0",), ("--connections", "2"), ("--dead-timeout", "5"), ("--foreground",), ("--no-swap",)]
)
def test_nbdfuse_takes_no_options_of_nbd(arguments: tuple[str, ...]) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: run the tests with sudo")
    result = zramd("attach", "--fuse", *arguments)
    assert result.returncode == 2
    assert "exclude each other" in result.stderr.splitlines()[-1]


def test_an_attach_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    try:
        _require_machine()
    except AttachError as error:
        pytest.skip(str(error))
    before = in_use(make_runtime_directory())
    assert "absent.nbd" in refused("attach", "--fuse", "--uri", f"nbd+unix:///?socket={tmp_path}/absent.nbd")
    assert "/etc/pki/libnbd" in refused("attach", "--fuse", "--uri", "nbds://localhost/?tls-certificates=/absent")
    assert in_use(make_runtime_directory()) <= before
