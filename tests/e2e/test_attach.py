import hashlib
import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import ServerProcess, start_server
from zramd.attach.attachment import AttachError, InUseError, MissingToolError, NotRootError
from zramd.attach.loop import LoopDevice, NoFreeLoopError, NoFuseError

MIB = 1 << 20


def run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stderr}"


def attached(export: Path | str) -> LoopDevice:
    try:
        return LoopDevice.attach(export)
    except (NotRootError, MissingToolError, NoFuseError, NoFreeLoopError) as error:
        pytest.skip(str(error))


def write_files(directory: Path) -> dict[str, str]:
    """Fill `directory` with 48 MiB in 240 files, half of it compressible; return their checksums."""
    source = random.Random(1)
    sums = {}
    for number in range(240):
        size = source.randrange(400_000)
        data = source.randbytes(size // 2) + b"all work and no play " * (size // 42)
        (directory / f"{number:03}").write_bytes(data)
        sums[f"{number:03}"] = hashlib.sha256(data).hexdigest()
    return sums


def checksums(directory: Path) -> dict[str, str]:
    files = (path for path in directory.iterdir() if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def in_use(parent: Path) -> set[str]:
    """Name each loop device, mount and nbdfuse that `zramd attach --fuse` has made with its directory in `parent`.

    What lies elsewhere is none of this: the tests with the other engine run at the same time.
    """
    made = f"{parent}/zramd-loop-"
    files = [*Path("/sys/block").glob("loop*/loop/backing_file"), *Path("/proc").glob("[0-9]*/cmdline")]
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    return {str(path.parent) for path in files if made in _text(path)} | {line for line in mounts if made in line}


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # ended since it was listed
        return ""


@pytest.fixture
def big_server(tmp_path: Path) -> Iterator[ServerProcess]:
    running = start_server(tmp_path, "--size", "512M", "--algorithm", "lz4")
    yield running
    assert running.stop() == (0, "")


@pytest.fixture
def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], bool]]:
    """Say whether all that was attached since the start of the test is gone; check it at the end."""
    directories = tmp_path / "directories"
    directories.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directories))

    def gone() -> bool:
        return not in_use(directories) and not list(directories.iterdir())

    yield gone
    assert gone()


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("discard", ["discard", "nodiscard"])
def test_ext4_files_survive_a_remount_and_their_memory_comes_back(
    big_server: ServerProcess, tmp_path: Path, discard: str
) -> None:
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    with attached(big_server.unix) as device:
        run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", device.path)
        run("mount", "-o", discard, device.path, mountpoint)
        try:
            run("sync", "-f", mountpoint)
            orig_empty, _, used_empty, *_ = big_server.mm_stat()
            sums = write_files(mountpoint)
            run("umount", mountpoint)
            run("e2fsck", "-f", "-n", device.path)
            orig_full, compressed_full, used_full, *_ = big_server.mm_stat()
            run("mount", "-o", discard, device.path, mountpoint)
            assert checksums(mountpoint) == sums
            for name in sums:
                (mountpoint / name).unlink()
            run("sync", "-f", mountpoint)
            # Linux discards in the background, once the journal says what is free.
            deadline = time.monotonic() + (30 if discard == "discard" else 0)
            while True:
                orig_deleted, *_ = big_server.mm_stat()
                if orig_deleted < orig_empty + 2 * MIB or time.monotonic() > deadline:
                    break
                time.sleep(0.05)
            run("fstrim", mountpoint)
            orig_trimmed, _, used_trimmed, *_ = big_server.mm_stat()
        finally:
            if mountpoint.is_mount():
                run("umount", mountpoint)
    assert orig_full - orig_empty > 40 * MIB
    assert compressed_full < orig_full
    assert used_full - used_empty > 20 * MIB
    # Deleting gives memory back only where the file system discards as it goes; the trim always does.
    assert (orig_deleted < orig_empty + 2 * MIB) == (discard == "discard")
    assert orig_trimmed < orig_empty + 2 * MIB
    assert used_trimmed < used_empty + 2 * MIB


def test_detaching_twice_is_as_good_as_once(server: ServerProcess, nothing_left: Callable[[], bool]) -> None:
    device = attached(server.uri)
    assert device.path.is_block_device()
    assert not nothing_left()
    device.detach()
    assert nothing_left()
    device.detach()
    with pytest.raises(AttachError, match="detached"):
        _ = device.path


@pytest.mark.usefixtures("nothing_left")
def test_what_is_mounted_is_not_detached(server: ServerProcess, tmp_path: Path) -> None:
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    with attached(server.unix) as device:
        run("mkfs.ext4", "-q", device.path)
        run("mount", device.path, mountpoint)
        try:
            with pytest.raises(InUseError, match="unmount it"):
                device.detach()
            (mountpoint / "file").write_text("still there")
        finally:
            run("umount", mountpoint)


@pytest.mark.usefixtures("nothing_left")
def test_a_device_whose_server_died_can_be_detached(tmp_path: Path) -> None:
    server = start_server(tmp_path, "--size", "64M")
    try:
        device = attached(server.unix)
    finally:
        server.process.kill()
        server.process.communicate()
    device.detach()


@pytest.mark.usefixtures("nothing_left")
def test_a_device_whose_nbdfuse_died_can_be_detached(server: ServerProcess) -> None:
    device = attached(server.unix)
    subprocess.run(["kill", "-KILL", (device.directory / "nbdfuse.pid").read_text().strip()], check=True)
    device.detach()


@pytest.mark.usefixtures("nothing_left")
def test_without_a_server_the_error_names_the_socket(tmp_path: Path) -> None:
    with pytest.raises(AttachError, match=r"absent\.nbd"):
        attached(tmp_path / "absent.nbd")
