"""The examples in configs/, served as they are but for names and addresses of the machine, with a client on each."""

import json
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.certificates import make_certificates
from tests.configured import MODULE
from tests.conftest import wait_until_served
from zramd.attach.attachment import AttachError, MissingToolError, NotRootError
from zramd.attach.loop import LoopDevice, NoFreeLoopError, NoFuseError
from zramd.expressions import total_memory
from zramd.memory import round_up_to_page
from zramd.status.client import ask

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def directory() -> Iterator[Path]:
    """Return a runtime directory, in memory so that what is served lies there too."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)
        # A server for swap has its own tmpfs there.
        subprocess.run(["umount", "--lazy", f"{name}/zram0"], stderr=subprocess.DEVNULL)


@contextmanager
def served(directory: Path, name: str, *changes: tuple[str, str]) -> Iterator[Path]:
    """Serve an example, with its sockets in `directory`, and yield its file. Each change has to apply."""
    text = (CONFIGS / name).read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = directory / name
    path.write_text(text)
    process = subprocess.Popen(
        [*MODULE, "serve", "--config", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "RUNTIME_DIRECTORY": str(directory)},
    )
    try:
        wait_until_served(process)
        yield path
    finally:
        process.terminate()
        process.communicate(timeout=30)
    assert process.returncode == 0


def facts(directory: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads(ask(directory / "zram0.status", "json"))
    return found


def size(uri: str) -> int:
    """Return the size of the disk at a URI, as another program sees it."""
    if shutil.which("nbdinfo") is None:
        pytest.skip("nbdinfo is missing: apt install libnbd-bin")
    done = subprocess.run(["nbdinfo", "--size", uri], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_swap_is_as_large_as_the_memory_up_to_4_gib(directory: Path) -> None:
    with served(directory, "swap.toml"):
        assert size(f"nbd+unix:///?socket={directory}/zram0.nbd") == min(total_memory(), 4 << 30)
        assert facts(directory)["measures"]


def test_a_remote_disk_is_for_those_with_a_certificate_that_is_named(directory: Path, tmp_path: Path) -> None:
    certificates = make_certificates(tmp_path / "certificates")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    changes = [
        ("0.0.0.0:10809", f"127.0.0.1:{port}"),
        ("/etc/zramd/tls", str(certificates.server)),
        ("build1.example", "alice.example"),
    ]
    with served(directory, "remote.toml", *changes):
        uri = f"//localhost:{port}/zram0"
        expected = min(total_memory(), 16 << 30)
        assert size(f"nbds:{uri}?tls-certificates={certificates.client('alice')}") == expected
        for refused in (f"nbds:{uri}?tls-certificates={certificates.client('bob')}", f"nbd:{uri}"):
            assert subprocess.run(["nbdinfo", refused], capture_output=True).returncode == 1
        mm_stat = facts(directory)["mm_stat"]
        assert isinstance(mm_stat, dict)
        assert mm_stat["mem_limit"] == round_up_to_page(total_memory() // 2)


def zramd(*arguments: str | Path) -> tuple[int, str]:
    """Run a verb; return its exit status and what it said."""
    done = subprocess.run([*MODULE, *arguments], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_a_scratch_disk_is_made_a_file_system_and_mounted_and_what_is_on_it_stays(
    directory: Path, tmp_path: Path
) -> None:
    where = tmp_path / "srv/build"
    with served(directory, "build.toml", ('"/srv/build"', f'"{where}"')) as config:
        try:
            attached = LoopDevice.attach(directory / "zram0.nbd")
        except (NotRootError, MissingToolError, NoFuseError, NoFreeLoopError) as error:
            pytest.skip(str(error))
        with attached:
            device = attached.path
            assert zramd("mount", device, "--config", config) == (0, f"{where}\n")
            try:
                assert where.stat().st_mode & 0o7777 == 0o1777
                (where / "a").write_text("kept")
                assert "is mounted on" in zramd("mount", device, "--config", config)[1]
                with (where / "a").open():
                    assert zramd("umount", device)[0] == 1
            finally:
                assert zramd("umount", device) == (0, "")
            other = tmp_path / "other.toml"
            other.write_text(config.read_text().replace('fs-type = "ext4"', 'fs-type = "ext2"'))
            status, said = zramd("mount", device, "--config", other)
            assert (status, "there is ext4 on" in said) == (1, True)
            assert "has a mount-point" in zramd("swapon", device, "--config", config)[1]
            assert zramd("mount", device, "--config", config)[0] == 0
            try:
                assert (where / "a").read_text() == "kept"
            finally:
                assert zramd("umount", device) == (0, "")
        with pytest.raises(AttachError):
            _ = attached.path
