"""The scenarios: what each machine is like, what happens in it, and what is expected of it."""

import contextlib
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from harness import StepError, end_group
from measuring import SHARED_MEMORY
from vm_image import GUEST, KERNELS, ROOT
from vm_machine import Guest

READY_SECONDS = 20.0
DISK = 512
"""MiB, of every disk."""
DOWN_SECONDS = 3.0
"""How long a killed server on the host stays away."""


class Expected(Enum):
    """What a scenario is to show."""

    NOTHING_LOST = "nothing is lost"
    DANGER = "something is lost, or the machine freezes"
    EITHER = "for comparison"


@dataclass(frozen=True, slots=True)
class Scenario:
    """A run in a guest; `settings` are those of its script."""

    name: str
    about: str
    script: str
    settings: dict[str, str]
    kernels: tuple[str, ...] = ("6.1",)
    memory: int = 512
    expected: Expected = Expected.NOTHING_LOST
    limit: float = 480
    silence: float = 60
    systemd: bool = False
    files: tuple[Path, ...] = ()

    def guest(self, version: str, settings_file: Path, **port: str) -> Guest:
        """Return the machine that runs it; its settings go into that file."""
        settings = self.settings | port
        settings_file.write_text("".join(f"{name}={shlex.quote(value)}\n" for name, value in settings.items()))
        return Guest(
            f"{self.name}-{version}",
            version,
            self.memory,
            GUEST / self.script,
            systemd=self.systemd,
            files={"settings": settings_file, **{path.name: path for path in self.files}},
            append=RUN_SCRIPT if self.systemd else "",
            limit=self.limit,
            silence=self.silence,
        )


def _swapping(server: str, hog: str, limit: str = "", kills: int = 0, protected: bool = True) -> dict[str, str]:
    return {
        "SERVER": server,
        "PROTECTED": "yes" if protected else "no",
        "DISK": str(DISK),
        "HOG": hog,
        "LIMIT": limit,
        "KILLS": str(kills),
        "EVERY": "50",
    }


RUN_SCRIPT = "systemd.run=/guest/script systemd.run_success_action=none systemd.run_failure_action=none"
"""On the kernel's command line: systemd, once it is up, starts the script."""

BOTH = tuple(KERNELS)
SMALL, LARGE = "96 2 1", "330 2 1"
"""Hogs: for a cgroup of 48 MiB, and for the 420 MiB of a whole machine."""
_SWAPPING = (
    Scenario(
        "a",
        "server on the host, killed 3 times, hog in a cgroup",
        "swapping",
        _swapping("host", SMALL, "48M", 3),
        limit=300,
    ),
    Scenario("b", "server in the guest, hog in a cgroup", "swapping", _swapping("guest", SMALL, "48M")),
    Scenario(
        "c",
        "server in the guest, memory of the whole machine exhausted",
        "swapping",
        _swapping("guest", LARGE),
        BOTH,
        420,
    ),
    Scenario(
        "c-kill",
        "as c, the server killed in the middle",
        "swapping",
        _swapping("guest", LARGE, kills=1),
        BOTH,
        420,
    ),
    Scenario("d", "as b, the server killed 3 times", "swapping", _swapping("guest", SMALL, "48M", 3), BOTH),
)


def _plain(scenario: Scenario) -> Scenario:
    """Return the same without protection."""
    return replace(
        scenario,
        name=f"{scenario.name}-plain",
        about=f"{scenario.about}; without protection",
        settings=scenario.settings | {"PROTECTED": "no"},
        expected=Expected.EITHER if scenario.name == "b" else Expected.DANGER,
    )


def _kernel_zram(scenario: Scenario) -> Scenario:
    """Return the same with kernel zram, which nobody can kill."""
    return replace(
        scenario,
        name=f"{scenario.name}-zram",
        about=f"kernel zram beside {scenario.name}",
        settings=scenario.settings | {"SERVER": "kernel", "PROTECTED": "no", "KILLS": "0"},
        expected=Expected.EITHER,
    )


_FILES = Scenario(
    "e",
    "ext4, the server killed 3 times while files are written and synced",
    "files",
    {"KILLS": "3", "FILES": "24"},
    BOTH,
)
_UNITS = Scenario(
    "f",
    "systemd's units: killed, upgraded by reload, and stopped while the machine swaps",
    "units",
    {},
    BOTH,
    limit=900,
    silence=120,
    systemd=True,
    files=(
        *sorted((ROOT / "systemd").glob("*.service")),
        *sorted((ROOT / "systemd").glob("*.socket")),
        ROOT / "systemd" / "zramd.sysusers.conf",
        ROOT / "configs" / "swap.toml",
    ),
)

SCENARIOS = (
    *_SWAPPING,
    _FILES,
    _UNITS,
    *(_plain(scenario) for scenario in _SWAPPING),
    *(_kernel_zram(scenario) for scenario in _SWAPPING if scenario.name in {"b", "c"}),
)


class HostServer:
    """zramd on the host, for a guest that comes through its gateway; it keeps its contents when it is killed.

    The directory has to lie in memory.
    """

    def __init__(self, directory: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self._log = directory / "zramd.log"
        # Nothing on the host waits for it, so it needs no protection there.
        self._command = [sys.executable, "-m", "zramd", "serve", "--size", f"{DISK}M"]
        self._command += ["--state", str(directory / "state"), "--status", str(directory / "zramd.status")]
        self._command += ["--tcp", f"127.0.0.1:{self.port}"]
        self._start()

    def _start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + READY_SECONDS
        while True:
            with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            if self._process.poll() is not None or time.monotonic() > deadline:
                said = self._log.read_text().strip().splitlines() or ["it said nothing"]
                raise StepError(f"zramd did not serve on the host: {said[-1]}")
            time.sleep(0.1)

    def kill(self) -> None:
        """Kill it with -9, and start it again after a while."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        time.sleep(DOWN_SECONDS)
        self._start()

    def hear(self, line: str) -> None:
        """Do what a line of the guest's console asks for."""
        if line == "HOST kill":
            self.kill()

    def end(self) -> None:
        """End it."""
        end_group(self._process)


@contextlib.contextmanager
def server_for(scenario: Scenario) -> Iterator[HostServer | None]:
    """Run zramd on the host while the scenario needs it."""
    if scenario.settings.get("SERVER") != "host":
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="zramd-vm-", dir=SHARED_MEMORY) as directory:
        server = HostServer(Path(directory))
        try:
            yield server
        finally:
            server.end()
