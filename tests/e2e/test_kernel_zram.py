"""The same bytes written to a kernel zram device and to zramd."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import pytest

from tests.conftest import ServerProcess, start_server
from zramd.device.counters import MmStat

CONTROL = Path("/sys/class/zram-control")
DISKSIZE = 256 << 20
nbd = pytest.importorskip("nbd", reason="needs libnbd's Python binding: apt-get install python3-libnbd, scripts/setup")


@pytest.fixture
def kernel_zram() -> Iterator[Path]:
    """Make a kernel zram device of our own (lz4), and remove it."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to make a kernel zram device")
    if not CONTROL.exists():
        pytest.skip("needs kernel zram: modprobe zram")
    number = (CONTROL / "hot_add").read_text().strip()
    sysfs = Path(f"/sys/block/zram{number}")
    try:
        (sysfs / "comp_algorithm").write_text("lz4")
        (sysfs / "disksize").write_text(str(DISKSIZE))
        yield sysfs
    finally:
        (CONTROL / "hot_remove").write_text(number)


@pytest.mark.usefixtures("kernel_zram")
def test_random_histories_give_the_same_counters_at_every_step() -> None:
    script = Path(__file__).parents[2] / "scripts" / "compare_kernel.py"
    for kind, steps in (("exact", 40_000), ("files", 8_000)):
        done = subprocess.run(
            [sys.executable, script, "--kinds", kind, "--steps", str(steps), "--seeds", "4"],
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def zramd_server(tmp_path: Path) -> Iterator[ServerProcess]:
    server = start_server(tmp_path, "--size", str(DISKSIZE), "--algorithm", "lz4")
    yield server
    assert server.stop() == (0, "")


def collect_files(size: int) -> bytes:
    """Return `size` bytes of what this machine has: programs, libraries, Python, text; and some zero pages."""
    data = bytearray(256 << 10)
    for directory in ("/usr/bin", "/usr/lib", "/usr/share"):
        room = len(data) + size // 3
        for path in sorted(Path(directory).rglob("*")):
            if len(data) >= room:
                break
            with suppress(OSError):
                if path.is_file() and not path.is_symlink():
                    data += path.read_bytes()
    return bytes(data[:size]).ljust(size, b"\0")


def write_kernel(device: Path, data: bytes) -> None:
    subprocess.run(
        ["dd", f"of={device}", "bs=1M", "oflag=direct", "iflag=fullblock", "status=none"], input=data, check=True
    )


def write_nbd(uri: str, data: bytes) -> None:
    client = nbd.NBD()
    client.connect_uri(uri)
    for offset in range(0, len(data), 1 << 20):
        client.pwrite(data[offset : offset + (1 << 20)], offset)
    client.shutdown()


def test_the_same_file_gives_the_same_counters(
    kernel_zram: Path, zramd_server: ServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    data = collect_files(DISKSIZE)
    write_kernel(Path("/dev") / kernel_zram.name, data)
    write_nbd(zramd_server.uri, data)
    kernel = [int(field) for field in (kernel_zram / "mm_stat").read_text().split()]
    ours = zramd_server.mm_stat()
    names = [field.name for field in fields(MmStat)]
    with capsys.disabled():
        print("\n{:20}{:>12}{:>12}{:>9}".format("mm_stat", "kernel", "zramd", "ratio"))
        for name, theirs, mine in zip(names, kernel, ours, strict=True):
            print(f"{name:20}{theirs:12}{mine:12}{mine / theirs if theirs else 1:9.4f}")
    side_by_side = dict(zip(names, zip(kernel, ours, strict=True), strict=True))
    for name, (theirs, mine) in side_by_side.items():
        if name in ("orig_data_size", "same_pages", "mem_limit", "pages_compacted"):
            assert mine == theirs, name
        else:
            assert mine == pytest.approx(theirs, rel=0.02), name
