"""A server that may be swapped to: it dies and is there again, is upgraded while it serves, and is locked in memory."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import ServerProcess, wait_until_served
from tests.nbd_bytes import READ, REPLY_BYTES, SIMPLE, TRIM, connect, receive, reply
from zramd.attach.attachment import MissingToolError, NotRootError
from zramd.attach.loop import LoopDevice, NoFreeLoopError, NoFuseError
from zramd.layout import PAGE_SIZE
from zramd.status.client import StatusError

SIZE = 256 << 20


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def state() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory) / "state"
        subprocess.run(["umount", "--lazy", str(Path(directory) / "state")], stderr=subprocess.DEVNULL)


class Supervised(ServerProcess):
    """A supervisor and its server."""

    @property
    def server(self) -> int:
        """The pid of the server, 0 while there is none."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for child in map(int, children):
            with suppress(OSError):
                if b"--check" not in Path(f"/proc/{child}/cmdline").read_bytes():
                    return child
        return 0

    def answers(self) -> bool:
        try:
            self.ask("initstate")
        except StatusError:
            return False
        return True

    def wait_for_another(self, server: int) -> None:
        """Wait until another server than that one answers."""
        wait_for(lambda: self.server not in (0, server) and self.answers())

    def write(self, page: int, data: bytes) -> None:
        with connect(self.unix) as sock:
            sock.sendall(SIMPLE.write(1, page * PAGE_SIZE, data))
            assert receive(sock, REPLY_BYTES) == reply(1)

    def read(self, page: int) -> bytes:
        with connect(self.unix) as sock:
            sock.sendall(SIMPLE.request(READ, 1, page * PAGE_SIZE, PAGE_SIZE))
            assert receive(sock, REPLY_BYTES) == reply(1)
            return receive(sock, PAGE_SIZE)


def start(directory: Path, *options: str) -> Supervised:
    unix, status, admin = (directory / f"zram0.{socket}" for socket in ("nbd", "status", "admin"))
    command = [sys.executable, "-m", "zramd", "serve", "--swap", *options]
    if "--config" not in options:
        command += ["--unix", str(unix), "--status", str(status)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until_served(process)
    return Supervised(process, unix, status, admin)


@pytest.fixture
def supervised(tmp_path: Path, state: Path) -> Iterator[Supervised]:
    running = start(tmp_path, "--size", str(SIZE), "--state", str(state))
    yield running
    if running.process.poll() is None:
        status, errors = running.stop()
        assert (status, [line for line in errors.splitlines() if "died" not in line]) == (0, [])


def test_a_server_that_is_killed_is_there_again_with_all_its_pages(supervised: Supervised) -> None:
    for number in range(5):
        data = os.urandom(PAGE_SIZE)
        supervised.write(number, data)
        server = supervised.server
        os.kill(server, signal.SIGKILL)
        supervised.wait_for_another(server)
        assert supervised.read(number) == data
    status, errors = supervised.stop()
    assert status == 0
    assert errors == "zramd: the server died (SIGKILL); it is started again\n" * 5


def test_an_upgrade_replaces_supervisor_and_server_and_keeps_pid_and_pages(supervised: Supervised) -> None:
    data = os.urandom(PAGE_SIZE)
    supervised.write(7, data)
    server = supervised.server
    started = Path(f"/proc/{supervised.process.pid}/environ").read_bytes()
    assert b"ZRAMD_SERVER" not in started
    supervised.process.send_signal(signal.SIGHUP)
    supervised.wait_for_another(server)
    assert f"ZRAMD_SERVER={server}".encode() in Path(f"/proc/{supervised.process.pid}/environ").read_bytes()
    assert supervised.read(7) == data


@pytest.mark.parametrize("delay", [0, 0.1, 0.2, 0.3])
def test_a_server_that_dies_during_an_upgrade_has_a_successor(supervised: Supervised, delay: float) -> None:
    data = os.urandom(PAGE_SIZE)
    supervised.write(7, data)
    server = supervised.server
    supervised.process.send_signal(signal.SIGHUP)
    time.sleep(delay)
    with suppress(ProcessLookupError):
        os.kill(server, signal.SIGKILL)
    supervised.wait_for_another(server)
    assert supervised.read(7) == data


@pytest.mark.parametrize("delay", [0, 0.1, 0.2, 0.3, 0.4])
def test_a_stop_is_not_lost_in_an_upgrade(supervised: Supervised, delay: float) -> None:
    supervised.process.send_signal(signal.SIGHUP)
    time.sleep(delay)
    supervised.process.terminate()
    supervised.process.communicate(timeout=30)
    assert supervised.process.returncode == 0


@pytest.mark.parametrize(
    ("text", "by", "said"),
    [
        ("[zram0]\n", "[zram0]\nsizee = 1\n", "sizee"),
        (f'size = "{SIZE}"', 'size = "1G"', "ask for the same"),
        ("swap = true\n", 'swap = true\nweb = "0.0.0.0:8080"\n', "a loopback address, not 0.0.0.0"),
        ("[zram0]\n", '[zram0]\nwriteback-device = "/nowhere/at/all"\n', "/nowhere/at/all cannot be the backing store"),
        ("[zram0]\n", '[tls]\nmode = "on"\ncertificates = "/nowhere"\n[zram0]\n', "cannot read /nowhere/"),
    ],
)
def test_a_program_that_would_not_serve_is_no_upgrade(
    text: str, by: str, said: str, tmp_path: Path, state: Path
) -> None:
    config = tmp_path / "zramd.toml"
    config.write_text(
        f'[server]\nswap = true\nunix = ["{tmp_path}/zram0.nbd"]\n'
        f'[zram0]\nsize = "{SIZE}"\nstate = "{state}"\nstatus = "{tmp_path}/zram0.status"\n'
    )
    command = [sys.executable, "-m", "zramd", "serve", "--config", str(config)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until_served(process)
    supervised = Supervised(process, *(tmp_path / f"zram0.{socket}" for socket in ("nbd", "status", "admin")))
    server = supervised.server
    config.write_text(config.read_text().replace(text, by))
    process.send_signal(signal.SIGHUP)
    assert process.stderr is not None
    line = process.stderr.readline()
    assert line.startswith("zramd: no upgrade, since what is installed would not serve: Error: ")
    assert said in line
    assert supervised.server == server
    assert supervised.answers()
    assert supervised.stop() == (0, "")


def test_a_server_that_cannot_start_any_more_is_tried_until_it_is_to_stop(supervised: Supervised, state: Path) -> None:
    (state / "page_table").unlink()
    os.kill(supervised.server, signal.SIGKILL)
    assert supervised.process.stderr is not None
    for _ in range(3):
        assert "the server died" in supervised.process.stderr.readline()
        assert supervised.process.stderr.readline().startswith("Error: ")
    supervised.process.terminate()
    supervised.process.communicate(timeout=30)
    assert supervised.process.returncode == 1


def test_what_cannot_start_is_not_tried_again(tmp_path: Path, state: Path) -> None:
    state.mkdir(mode=0o700)
    (state / "page_table").write_bytes(bytes(PAGE_SIZE))
    command = [sys.executable, "-m", "zramd", "serve", "--swap", "--state", str(state)]
    command += ["--unix", str(tmp_path / "nbd"), "--status", str(tmp_path / "status")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert result.returncode == 1
    assert result.stderr.startswith(f"Error: {state}: there is a page table")
    assert result.stderr.count("\n") == 1


def test_regions_that_die_with_the_server_are_not_for_swap(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "zramd", "serve", "--swap", "--volatile"]
    command += ["--unix", str(tmp_path / "nbd"), "--status", str(tmp_path / "status")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert result.returncode == 1
    assert "zram0 cannot be swapped to: its regions must outlive the server" in result.stderr


def test_interrupting_a_terminal_reaches_the_server_once(supervised: Supervised) -> None:
    supervised.process.send_signal(signal.SIGINT)
    _, errors = supervised.process.communicate(timeout=30)
    assert (supervised.process.returncode, errors) == (0, "")


def test_stop_ends_supervisor_and_server(supervised: Supervised) -> None:
    server = supervised.server
    assert supervised.ask("stop 1") == ""
    _, errors = supervised.process.communicate(timeout=30)
    assert (supervised.process.returncode, errors) == (0, "")
    assert not Path(f"/proc/{server}").exists()


def test_what_is_missing_is_said_and_what_is_in_force_is_so(supervised: Supervised) -> None:
    measures = json.loads(supervised.ask("json"))["measures"]
    assert set(measures) == {
        *("OOM score", "IO flusher", "real time", "memory lock", "supervisor", "unswappable regions"),
    }
    assert measures["supervisor"] == ""
    server = Path(f"/proc/{supervised.server}")
    locked = next(int(line.split()[1]) for line in (server / "status").read_text().splitlines() if "VmLck" in line)
    assert (measures["memory lock"] == "") == (locked > 0)
    with connect(supervised.unix):
        threads = [int(task.name) for task in (server / "task").iterdir()]
        policies = {os.sched_getscheduler(thread) for thread in threads}
    assert (measures["real time"] == "") == (policies == {os.SCHED_RR})
    assert (measures["OOM score"] == "") == ((server / "oom_score_adj").read_text() == "-1000\n")
    for name, missing in measures.items():
        assert missing == "" or "needs" in missing, name


def resident(pid: int) -> int:
    """Return resident memory in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_SIZE


def test_locked_memory_follows_what_is_stored(supervised: Supervised) -> None:
    if json.loads(supervised.ask("json"))["measures"]["memory lock"]:
        pytest.skip("memory cannot be locked here: run the tests as root")
    empty = resident(supervised.server)
    assert empty < SIZE // 2
    data = os.urandom(1 << 20)
    for part in range(64):
        supervised.write(part * 256, data)
    full = resident(supervised.server)
    assert full > empty + (64 << 20)
    with connect(supervised.unix) as sock:
        sock.sendall(SIMPLE.request(TRIM, 1, 0, 64 << 20))
        assert receive(sock, REPLY_BYTES) == reply(1)
    assert supervised.mm_stat()[2] == 0
    wait_for(lambda: resident(supervised.server) < empty + (8 << 20))


@pytest.fixture
def swapped(supervised: Supervised) -> Iterator[tuple[Supervised, Path]]:
    """Swap to a server, with hardly any need."""
    try:
        device = LoopDevice.attach(supervised.unix)
    except (NotRootError, MissingToolError, NoFuseError, NoFreeLoopError) as error:
        pytest.skip(str(error))
    with device:
        path = device.path
        command([sys.executable, "-m", "zramd", "swapon", str(path), "--priority", "0"])
        yield supervised, path
        if str(path) in Path("/proc/swaps").read_text():
            command([sys.executable, "-m", "zramd", "swapoff", str(path)])


def command(arguments: list[str]) -> None:
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_server_is_not_stopped_while_the_machine_swaps_to_it(swapped: tuple[Supervised, Path]) -> None:
    supervised, device = swapped
    server = supervised.server
    assert json.loads(supervised.ask("json"))["swaps"] == [str(device)]
    with pytest.raises(StatusError, match=f"EBUSY {device} is swapped to: swapoff first"):
        supervised.ask("stop 1")
    supervised.process.terminate()
    assert supervised.process.stderr is not None
    line = supervised.process.stderr.readline()
    assert line == f"zramd: not stopped, since the machine swaps to {device}: swapoff first (zramd swapoff)\n"
    assert supervised.server == server
    assert supervised.answers()
    command([sys.executable, "-m", "zramd", "swapoff", str(device)])
    # What was refused is done now.
    supervised.process.communicate(timeout=30)
    assert supervised.process.returncode == 0


def faults(pid: int) -> dict[str, int]:
    """Return the page faults of each thread."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return {task.name: int((task / "stat").read_text().rpartition(")")[2].split()[7]) for task in tasks}


def test_the_thread_that_serves_writes_takes_no_page_fault_while_the_pool_grows(supervised: Supervised) -> None:
    if json.loads(supervised.ask("json"))["measures"]["memory lock"]:
        pytest.skip("memory cannot be locked here: run the tests as root")
    idle = set(faults(supervised.server))
    with connect(supervised.unix) as sock:
        before: dict[str, int] = {}
        for page in range(4096):
            sock.sendall(SIMPLE.write(page, page * PAGE_SIZE, os.urandom(2048).ljust(PAGE_SIZE, b"x")))
            assert receive(sock, REPLY_BYTES) == reply(page)
            if page == 16:
                before = faults(supervised.server)
        after = faults(supervised.server)
    (serving,) = set(after) - idle
    assert after[serving] == before[serving]
    assert sum(after.values()) - sum(before.values()) > 2000


def test_a_disk_grows_under_its_clients(supervised: Supervised) -> None:
    data = os.urandom(PAGE_SIZE)
    supervised.write(3, data)
    with connect(supervised.unix) as client:
        assert supervised.ask(f"grow {2 * SIZE}") == ""
        assert client.recv(1) == b""
    last = 2 * SIZE // PAGE_SIZE - 1
    supervised.write(last, data)
    server = supervised.server
    os.kill(server, signal.SIGKILL)
    supervised.wait_for_another(server)
    assert supervised.read(3) == supervised.read(last) == data
    assert supervised.ask("disksize") == f"{2 * SIZE}\n"
    for size, reason in ((SIZE, "it can grow to"), (1 << 60, "it can grow to")):
        with pytest.raises(StatusError, match=f"EINVAL .*{reason}"):
            supervised.ask(f"grow {size}")
    assert supervised.read(3) == data
