"""What many tests start from: a device in this process, and a server in another."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

from zramd.device.codecs import codec
from zramd.device.opening import OpenDevice
from zramd.device.wanted import Wanted
from zramd.memory import RegionStore
from zramd.status.client import ask

# Time per example says nothing on a machine that does other things too.
settings.register_profile("zramd", deadline=None)
settings.load_profile("zramd")


NO_ENGINE = {
    "test_access",
    "test_activation",
    "test_ahead",
    "test_attach",
    "test_attaching",
    "test_bench",
    "test_classes",
    "test_cli",
    "test_client",
    "test_codecs",
    "test_compaction",
    "test_collecting",
    "test_config",
    "test_config_files",
    "test_docs",
    "test_doctor",
    "test_engines",
    "test_errors",
    "test_example_config",
    "test_examples",
    "test_expressions",
    "test_handshake",
    "test_http",
    "test_identity",
    "test_keeper",
    "test_kernel_zram",
    "test_log",
    "test_manual",
    "test_memory",
    "test_metrics",
    "test_native",
    "test_netlink",
    "test_noswap",
    "test_notify",
    "test_options",
    "test_page_map",
    "test_percentile",
    "test_policy",
    "test_policy_loop",
    "test_pool",
    "test_reclaim",
    "test_sizes",
    "test_starting",
    "test_status_table",
    "test_swaps",
    "test_top",
    "test_two_servers",
    "test_units",
    "test_web",
}
"""Modules for which it is all the same which engine runs the hot path, or which run both."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let scripts/test run with the second engine what the engine matters to."""
    parser.addoption("--hot-path", action="store_true", help="only the tests for which the engine matters")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests that --hot-path leaves out."""
    if config.getoption("--hot-path"):
        left_out = [item for item in items if item.path.stem in NO_ENGINE]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item.path.stem not in NO_ENGINE]


@dataclass
class ServerProcess:
    """A `zramd serve` of a test's own."""

    process: subprocess.Popen[str]
    unix: Path
    status: Path
    admin: Path

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.unix}"

    def ask(self, request: str) -> str:
        """Ask the admin socket, which reads and changes."""
        return ask(self.admin, request)

    def mm_stat(self) -> list[int]:
        return [int(field) for field in self.ask("mm_stat").split()]

    def stop(self) -> tuple[int, str]:
        """End the server as a user would. Return its exit status and what it wrote to standard error."""
        self.process.terminate()
        _, errors = self.process.communicate(timeout=30)
        return self.process.returncode, errors


def wait_until_served(process: subprocess.Popen[str]) -> list[str]:
    """Return what a server says until it serves."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("status: "):
            return lines
    pytest.fail(f"the server did not start: {process.communicate(timeout=30)[1]}")


def start_server(directory: Path, *options: str, volatile: bool = True) -> ServerProcess:
    """Start a server with its sockets in `directory`, and wait until it serves."""
    unix, status, admin = (directory / f"zram0.{socket}" for socket in ("nbd", "status", "admin"))
    command = [sys.executable, "-m", "zramd", "serve", "--unix", str(unix), "--status", str(status), *options]
    if volatile:
        command.append("--volatile")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until_served(process)
    return ServerProcess(process, unix, status, admin)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    """Return a volatile server of 64 MiB, and check at the end that it was still well."""
    running = start_server(tmp_path, "--size", "64M")
    yield running
    assert running.stop() == (0, "")


@pytest.fixture
def opened() -> Iterator[OpenDevice]:
    """Return a volatile lz4 device of 64 MiB in this process."""
    device = OpenDevice(RegionStore(None), Wanted(disksize=64 << 20, codec=codec("lz4")))
    yield device
    device.close()


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """Mount a tmpfs of 2 MiB."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small tmpfs")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2M,mode=0700", "tmpfs", str(tmp_path)], check=True)
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)
