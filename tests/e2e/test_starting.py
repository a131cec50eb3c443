import contextlib
import fcntl
import json
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.certificates import make_certificates
from tests.configured import MODULE, disk_table, quoted, start_configured, write_config
from tests.conftest import ServerProcess, wait_until_served
from tests.e2e.test_cli import assert_refused, kill, write_and_check, zramd
from tests.e2e.test_cli import holds as holds_by_default
from tests.interop.test_tools import free_port
from tests.nbd_bytes import (
    ABORT,
    ACK,
    DISC,
    EPERM,
    EXPORT_NAME,
    GREETING,
    LIST,
    READ,
    REPLY_BYTES,
    SERVER,
    TRIM,
    WRITE_ZEROES,
    client_flags,
    connect,
    option,
    option_reply,
    receive,
    receive_rest,
    reply,
    request,
    write_request,
)
from tests.property.test_device import make_data
from zramd.status.client import ask

MIB = 1 << 20
DATA = bytes(make_data("half", 11, 300_000))
READ_ONLY = 2

ACTIVATOR = """
import os, sys
count = int(sys.argv[1])
for number in range(count):
    os.dup2(int(sys.argv[2 + number]), 3 + number)
os.environ.setdefault("LISTEN_PID", str(os.getpid()))
os.environ.setdefault("LISTEN_FDS", str(count))
os.execv(sys.executable, [sys.executable, "-m", "zramd", *sys.argv[2 + count :]])
"""


def config_of(directory: Path, *disks: str, server: str = "") -> str:
    """Return a configuration with a Unix socket in `directory`."""
    return f"[server]\nunix = {quoted(directory / 'zram0.nbd')}\n{server}\n" + "".join(disks)


def connect_to(path: Path, name: str) -> socket.socket:
    """Return a connection to an export, ready for requests."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(60)
    sock.connect(str(path))
    sock.sendall(client_flags() + option(EXPORT_NAME, name.encode()))
    assert len(receive(sock, len(GREETING) + 10)) == len(GREETING) + 10
    return sock


def write_to(path: Path, name: str, offset: int, data: bytes) -> None:
    with connect_to(path, name) as sock:
        sock.sendall(write_request(1, offset, data) + request(DISC, 2))
        assert receive_rest(sock) == reply(1)


def read_from(path: Path, name: str, offset: int, length: int) -> bytes:
    with connect_to(path, name) as sock:
        sock.sendall(request(READ, 1, offset, length) + request(DISC, 2))
        answer = receive_rest(sock)
    assert answer[:REPLY_BYTES] == reply(1)
    return answer[REPLY_BYTES:]


def listed(sock: socket.socket) -> list[str]:
    """Return the names of the exports that a server tells a new client of."""
    sock.settimeout(60)
    sock.sendall(client_flags() + option(LIST) + option(ABORT))
    answer = receive_rest(sock)
    assert answer.startswith(GREETING)
    answer = answer[len(GREETING) :]
    names = []
    while answer[:16] == option_reply(LIST, SERVER)[:16]:
        length = int.from_bytes(answer[16:20])
        size = int.from_bytes(answer[20:24])
        names.append(answer[24 : 24 + size].decode())
        answer = answer[20 + length :]
    assert answer == option_reply(LIST, ACK) + option_reply(ABORT, ACK)
    return names


def listed_at(address: tuple[str, int] | Path) -> list[str]:
    if isinstance(address, tuple):
        with socket.create_connection(address, 60) as sock:
            return listed(sock)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(address))
        return listed(sock)


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("it did not come to that")


def stopped(server: ServerProcess) -> str:
    """End a server that must end well and return its log, which must have no defect in it."""
    status, log = server.stop()
    assert status == 0, log
    assert "Traceback" not in log
    assert "defect" not in log
    return log


# Several disks


@pytest.fixture
def three(tmp_path: Path) -> str:
    """Return a configuration of three disks with different settings, which keep their contents."""
    return config_of(
        tmp_path,
        disk_table(
            tmp_path, "zram0", f"state = {quoted(tmp_path / 'a')}", 'size = "8M"', 'compression-algorithm = "lz4"'
        ),
        disk_table(
            tmp_path,
            "zram5",
            f"state = {quoted(tmp_path / 'b')}",
            'size = "16M"',
            'compression-algorithm = "zstd(level=7)"',
            "chain-size = 4",
            'resident-limit = "4M"',
            'description = "the fifth"',
        ),
        disk_table(tmp_path, "zram2", 'size = "24M"', 'compression-algorithm = "lz4hc"'),
    )


def test_each_disk_has_its_own_settings_contents_and_statistics(tmp_path: Path, three: str) -> None:
    server = start_configured(tmp_path, three)
    assert listed_at(server.unix) == ["zram0", "zram5", "zram2"]
    status = {name: tmp_path / f"{name}.status" for name in ("zram0", "zram5", "zram2")}
    facts = {name: json.loads(ask(path, "json")) for name, path in status.items()}
    assert [facts[name]["disksize"] for name in status] == [8 * MIB, 16 * MIB, 24 * MIB]
    assert [facts[name]["name"] for name in status] == list(status)
    assert [facts[name]["comp_algorithm"] for name in status] == ["lz4", "zstd", "lz4hc"]
    assert [ask(path, "mem_limit") for path in status.values()] == ["0\n", f"{4 * MIB}\n", "0\n"]
    assert facts["zram5"]["uris"] == [f"nbd+unix:///zram5?socket={server.unix}"]
    assert facts["zram0"]["uris"] == [f"nbd+unix:///?socket={server.unix}"]
    for number, name in enumerate(status):
        write_to(server.unix, name, 4096 * number, DATA[number:] + bytes(number))
    for number, name in enumerate(status):
        assert read_from(server.unix, name, 4096 * number, len(DATA)) == DATA[number:] + bytes(number)
    # The empty name is the first.
    assert read_from(server.unix, "", 0, len(DATA)) == DATA
    write_to(server.unix, "", 4 * MIB, DATA)
    assert read_from(server.unix, "zram0", 4 * MIB, len(DATA)) == DATA
    assert read_from(server.unix, "zram5", 4 * MIB, len(DATA)) == bytes(len(DATA))
    pages = len(DATA) // 4096 + 1
    reads_and_writes = [ask(path, "stat").split()[0:7:4] for path in status.values()]
    assert reads_and_writes == [["3", "2"], ["2", "1"], ["1", "1"]]
    stored = [int(ask(path, "mm_stat").split()[0]) // 4096 for path in status.values()]
    assert stored == [2 * pages, pages, pages]
    stopped(server)


def test_the_command_stat_asks_the_disk_whose_status_socket_it_is_given(tmp_path: Path, three: str) -> None:
    server = start_configured(tmp_path, three)
    for name, size in (("zram0", 8), ("zram5", 16), ("zram2", 24)):
        done = zramd("stat", "disksize", "--status", tmp_path / f"{name}.status")
        assert (done.returncode, done.stdout) == (0, f"{size * MIB}\n")
        assert f"{name} is served at" in zramd("status", "--status", tmp_path / f"{name}.status").stdout
    zramd("set", "mem_limit=1M", "--admin", tmp_path / "zram2.admin")
    assert [ask(tmp_path / f"{name}.status", "mem_limit") for name in ("zram0", "zram5", "zram2")] == [
        "0\n",
        f"{4 * MIB}\n",
        f"{MIB}\n",
    ]
    stopped(server)


def test_the_command_that_stops_a_server_has_its_answer_though_the_server_ends_meanwhile(tmp_path: Path) -> None:
    slow = (
        "import time; from zramd.status.server import AdminServer as A; answer = A._answer;"
        "A._answer = lambda *given: (answer(*given), time.sleep(0.15))[0];"
        "from zramd.cli import main; main()"
    )
    config = write_config(tmp_path, config_of(tmp_path, disk_table(tmp_path)))
    command = [sys.executable, "-c", slow, "serve", "--config", str(config)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    wait_until_served(server)
    done = zramd("stop", "--admin", tmp_path / "zram0.admin")
    assert (done.returncode, done.stderr) == (0, "")
    server.communicate(timeout=30)


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_each_disk_that_keeps_its_contents_has_them_after_a_restart(tmp_path: Path, three: str, end: str) -> None:
    names = ("zram0", "zram5", "zram2")
    server = start_configured(tmp_path, three)
    for number, name in enumerate(names):
        write_to(server.unix, name, 0, DATA[number:])
    if end == "stop":
        stopped(server)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "zramd.toml"]
    else:
        kill(server)
    server = start_configured(tmp_path, three)
    expected = [DATA, DATA[1:], bytes(len(DATA) - 2)]
    assert [read_from(server.unix, name, 0, len(DATA) - number) for number, name in enumerate(names)] == expected
    stopped(server)


def test_disks_in_another_order_are_the_same_disks_with_another_default(tmp_path: Path) -> None:
    disks = [disk_table(tmp_path, name, f"state = {quoted(tmp_path / name)}") for name in ("zram0", "zram1")]
    server = start_configured(tmp_path, config_of(tmp_path, *disks))
    write_to(server.unix, "", 0, DATA)
    stopped(server)
    server = start_configured(tmp_path, config_of(tmp_path, *reversed(disks)))
    assert listed_at(server.unix) == ["zram1", "zram0"]
    assert read_from(server.unix, "", 0, len(DATA)) == bytes(len(DATA))
    assert read_from(server.unix, "zram0", 0, len(DATA)) == DATA
    stopped(server)


@pytest.mark.parametrize("taken", ["state", "status", "admin"])
def test_two_disks_do_not_share_what_belongs_to_one(tmp_path: Path, taken: str) -> None:
    shared = f"{taken} = {quoted(tmp_path / 'shared')}"
    disks = [f'[zram{number}]\nsize = "8M"\n{shared}\n' for number in range(2)]
    if taken != "state":
        disks = [disk + "volatile = true\n" for disk in disks]
    if taken != "status":
        disks = [disk + f"status = {quoted(tmp_path / f'{number}.status')}\n" for number, disk in enumerate(disks)]
    done = zramd("serve", "--config", write_config(tmp_path, config_of(tmp_path, *disks)))
    assert_refused(done, 1, str(tmp_path / "shared"))
    assert not list(tmp_path.glob("*.nbd"))
    assert not list(tmp_path.glob("*.status"))


def test_a_disk_without_a_size_refuses_clients_and_the_others_serve(tmp_path: Path) -> None:
    disks = disk_table(tmp_path, "zram0"), disk_table(tmp_path, "zram1", "size = 0")
    server = start_configured(tmp_path, config_of(tmp_path, *disks))
    write_and_check(server.unix)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(server.unix))
        sock.sendall(client_flags() + option(EXPORT_NAME, b"zram1"))
        assert receive_rest(sock) == GREETING
    ask(tmp_path / "zram1.admin", "disksize 8M")
    write_to(server.unix, "zram1", 0, DATA)
    assert holds_by_default(server.unix)
    assert "no such" not in stopped(server)


def test_a_disk_without_a_size_of_its_own_has_that_of_what_is_kept(tmp_path: Path) -> None:
    config = config_of(tmp_path, disk_table(tmp_path, "zram0", "size = 0", f"state = {quoted(tmp_path / 'kept')}"))
    server = start_configured(tmp_path, config)
    ask(tmp_path / "zram0.admin", "disksize 8M")
    write_to(server.unix, "", 0, DATA)
    stopped(server)
    server = start_configured(tmp_path, config)
    assert read_from(server.unix, "", 0, len(DATA)) == DATA
    ask(tmp_path / "zram0.admin", "reset 1")
    stopped(server)
    server = start_configured(tmp_path, config)
    assert ask(server.status, "disksize") == "0\n"
    stopped(server)


def test_a_read_only_disk_serves_reads_and_refuses_changes(tmp_path: Path) -> None:
    state = f"state = {quoted(tmp_path / 'kept')}"
    server = start_configured(tmp_path, config_of(tmp_path, disk_table(tmp_path, "zram0", state)))
    write_to(server.unix, "", 1000, DATA)
    stopped(server)
    locked = disk_table(tmp_path, "zram0", state, "read-only = true")
    server = start_configured(tmp_path, config_of(tmp_path, locked, disk_table(tmp_path, "zram1")))
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(60)
        sock.connect(str(server.unix))
        sock.sendall(client_flags() + option(EXPORT_NAME))
        assert int.from_bytes(receive(sock, len(GREETING) + 10)[-2:]) & READ_ONLY
        before = ask(server.status, "mm_stat")
        for cookie, message in enumerate(
            [write_request(0, 0, DATA), request(TRIM, 1, 0, MIB), request(WRITE_ZEROES, 2, 0, MIB)]
        ):
            sock.sendall(message)
            assert receive(sock, REPLY_BYTES) == reply(cookie, error=EPERM)
        sock.sendall(request(READ, 3, 1000, len(DATA)))
        assert receive(sock, REPLY_BYTES + len(DATA)) == reply(3, DATA)
    # The other disk is not locked.
    write_to(server.unix, "zram1", 0, DATA)
    assert ask(server.status, "mm_stat") == before
    stopped(server)


@pytest.mark.parametrize(
    "options",
    [
        ["--size", "1G"],
        ["--algorithm", "lz4"],
        ["--unix", "/tmp/a"],  # noqa: S108 (never made)
        ["--tcp", "localhost:1"],
        ["--tls", "/a"],
        ["--read-only"],
        ["--status", "/a"],
        ["--status-group", "0"],
        ["--admin", "/a"],
        ["--state", "/a"],
        ["--volatile"],
        ["--mem-limit", "0"],
        ["--chain-size", "8"],
    ],
    ids=lambda options: options[0],
)
def test_a_configuration_excludes_the_other_options(tmp_path: Path, options: list[str]) -> None:
    config = write_config(tmp_path, config_of(tmp_path, disk_table(tmp_path)))
    assert_refused(zramd("serve", "--config", config, *options), 2, options[0], "--config")
    assert not list(tmp_path.glob("zram0.*"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[zram0]\nsise = 1\n", [":2: [zram0] sise:", "did you mean size?"]),
        ("[zram0\n", ["line 1"]),
        ("", ["there is no disk"]),
    ],
    ids=["a key", "no TOML", "nothing"],
)
def test_a_wrong_configuration_is_refused_in_one_line(tmp_path: Path, text: str, words: list[str]) -> None:
    config = write_config(tmp_path, text)
    assert_refused(zramd("serve", "--config", config), 1, str(config), *words)


# Standard input


def libnbd() -> Any:
    nbd = pytest.importorskip("nbd", reason="libnbd's Python module is missing: apt install python3-libnbd")
    return nbd.NBD()


def test_libnbd_starts_a_server_of_its_own_on_standard_input() -> None:
    disk = libnbd()
    disk.connect_command([*MODULE, "serve", "--stdio", "--size", "64M"])
    assert disk.get_size() == 64 * MIB
    disk.pwrite(DATA, 12345)
    assert disk.pread(len(DATA), 12345) == DATA
    disk.shutdown()


def popen_stdio(sock: socket.socket, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*MODULE, "serve", "--stdio", *options],
        stdin=sock.fileno(),
        stdout=sock.fileno(),
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("leave", ["DISC", "ABORT", "half-close", "close"])
def test_a_server_on_standard_input_ends_well_with_its_client_and_prints_nothing_to_it(leave: str) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            process = popen_stdio(theirs, "--size", "8M")
        ours.settimeout(60)
        if leave == "ABORT":
            ours.sendall(client_flags() + option(ABORT))
            assert receive_rest(ours) == GREETING + option_reply(ABORT, ACK)
        elif leave == "close":
            assert receive(ours, len(GREETING)) == GREETING
        else:
            ours.sendall(client_flags() + option(EXPORT_NAME))
            greeted = receive(ours, len(GREETING) + 10)
            assert greeted[: len(GREETING) + 8] == GREETING + (8 * MIB).to_bytes(8)
            ours.sendall(write_request(1, 77, DATA) + request(READ, 2, 77, len(DATA)))
            assert receive(ours, 2 * REPLY_BYTES + len(DATA)) == reply(1) + reply(2, DATA)
            if leave == "DISC":
                ours.sendall(request(DISC, 3))
            else:
                ours.shutdown(socket.SHUT_WR)
            assert receive_rest(ours) == b""
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "Traceback" not in errors
    assert "zram0: 8M" in errors


def test_a_signal_ends_a_server_on_standard_input() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            process = popen_stdio(theirs, "--size", "8M")
        assert receive(ours, len(GREETING)) == GREETING
        process.terminate()
        _, errors = process.communicate(timeout=30)
        assert receive_rest(ours) == b""
    assert process.returncode == 0
    assert "Traceback" not in errors


def test_a_configuration_may_be_served_on_standard_input(tmp_path: Path) -> None:
    text = "".join(disk_table(tmp_path, name, f"state = {quoted(tmp_path / name)}") for name in ("zram0", "zram1"))
    config = write_config(tmp_path, text)
    for _ in range(2):
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                process = subprocess.Popen(
                    [*MODULE, "serve", "--config", config, "--stdio"],
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    stderr=subprocess.PIPE,
                    text=True,
                )
            assert listed(ours) == ["zram0", "zram1"]
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 0, errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["zram0", "zram1", "zramd.toml"]


@pytest.mark.parametrize("kind", ["null", "file", "pipe", "closed", "datagram", "listening"])
def test_a_standard_input_that_is_no_connected_socket_is_refused(tmp_path: Path, kind: str) -> None:
    command = [*MODULE, "serve", "--stdio", "--size", "8M"]
    with contextlib.ExitStack() as held:
        if kind == "closed":
            command = ["sh", "-c", 'exec "$@" <&-', "sh", *command]
            given: Any = subprocess.DEVNULL
        elif kind == "null":
            given = subprocess.DEVNULL
        elif kind == "pipe":
            given = subprocess.PIPE
        elif kind == "file":
            given = held.enter_context((tmp_path / "file").open("w+b"))
        elif kind == "datagram":
            given, _ = map(held.enter_context, socket.socketpair(type=socket.SOCK_DGRAM))
        else:
            given = held.enter_context(socket.create_server(("127.0.0.1", 0)))
        done = subprocess.run(
            command,
            stdin=given if isinstance(given, int) else given.fileno(),
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    assert_refused(done, 1, "standard input")


# Socket activation


def listen(path: Path, kind: int = socket.SOCK_STREAM) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.bind(str(path))
    if kind == socket.SOCK_STREAM:
        sock.listen()
    return sock


def popen_activated(
    fds: list[int], *arguments: str | Path, environment: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start zramd as systemd does, with these descriptors from 3 on."""
    # Out of the way of the numbers that they are to get.
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 200) for fd in fds]
    try:
        return subprocess.Popen(
            [sys.executable, "-c", ACTIVATOR, str(len(high)), *map(str, high), *map(str, arguments)],
            pass_fds=high,
            env=os.environ | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        for fd in high:
            os.close(fd)


def popen_activated_beside(
    directory: Path, fd: int, environment: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start zramd as systemd does, with a socket and with the option to listen on `own` in the directory too."""
    disk = ("--volatile", "--size", "8M", "--status", directory / "s")
    return popen_activated([fd], "serve", *disk, "--unix", directory / "own", environment=environment)


def test_libnbd_activates_a_server(tmp_path: Path) -> None:
    disk = libnbd()
    status = str(tmp_path / "status")
    disk.connect_systemd_socket_activation([*MODULE, "serve", "--size", "64M", "--volatile", "--status", status])
    disk.pwrite(DATA, 1)
    assert disk.pread(len(DATA), 1) == DATA
    facts = json.loads(ask(Path(status), "json"))
    assert facts["connections"] == 1
    # It listens on nothing else.
    assert [uri.partition("libnbd")[0] for uri in facts["uris"]] == ["nbd+unix:///?socket=/tmp/"]
    disk.shutdown()


def test_all_sockets_of_activation_are_served_and_are_left_where_they_are(tmp_path: Path) -> None:
    paths: list[Path] = [tmp_path / "one", tmp_path / "two"]
    with contextlib.ExitStack() as held:
        socks = [held.enter_context(listen(path)) for path in paths]
        tcp = held.enter_context(socket.create_server(("127.0.0.1", 0)))
        process = popen_activated(
            [sock.fileno() for sock in (*socks, tcp)],
            "serve",
            *("--volatile", "--size", "8M", "--status", tmp_path / "s"),
        )
        lines = wait_until_served(process)
        assert "NBD on 3 sockets of LISTEN_FDS\n" in lines
        for path in paths:
            assert listed_at(path) == ["zram0"]
        assert listed_at(tcp.getsockname()) == ["zram0"]
        write_and_check(paths[0])
        assert holds_by_default(paths[1])
        process.terminate()
        assert process.communicate(timeout=30) == ("", "")
        assert process.returncode == 0
    # Unlike sockets of its own.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_sockets_of_activation_are_served_beside_those_that_are_asked_for(tmp_path: Path) -> None:
    with listen(tmp_path / "given") as given:
        process = popen_activated_beside(tmp_path, given.fileno())
        wait_until_served(process)
        write_and_check(tmp_path / "own")
        assert holds_by_default(tmp_path / "given")
        process.terminate()
        assert process.communicate(timeout=30)[1] == ""


@pytest.mark.parametrize(
    ("disks", "names"),
    [(1, ["status", "nbd", "admin"]), (2, ["zram1.admin", "", "zram0.status", "zram0.admin", "zram1.status"])],
    ids=["one disk", "two disks"],
)
def test_sockets_with_the_names_of_status_and_admin_are_these(tmp_path: Path, disks: int, names: list[str]) -> None:
    directory = tmp_path / "unused"
    directory.mkdir()
    config = write_config(tmp_path, "".join(disk_table(directory, f"zram{number}") for number in range(disks)))
    with contextlib.ExitStack() as held:
        socks = [held.enter_context(listen(tmp_path / f"{name or 'nbd'}.socket")) for name in names]
        process = popen_activated(
            [sock.fileno() for sock in socks],
            *("serve", "--config", config),
            environment={"LISTEN_FDNAMES": ":".join(names)},
        )
        wait_until_served(process)
        assert list(directory.iterdir()) == []
        for number in range(disks):
            prefix = "" if disks == 1 else f"zram{number}."
            status, admin = tmp_path / f"{prefix}status.socket", tmp_path / f"{prefix}admin.socket"
            assert json.loads(ask(status, "json"))["name"] == f"zram{number}"
            assert ask(admin, f"mem_limit {number + 1}M") == ""
            assert ask(status, "mem_limit") == f"{number + 1 << 20}\n"
            done = zramd("set", "mem_limit=0", "--admin", status)
            assert "EACCES" in done.stderr
        assert listed_at(tmp_path / "nbd.socket") == [f"zram{number}" for number in range(disks)]
        process.terminate()
        assert process.communicate(timeout=30)[1] == ""
        assert process.returncode == 0


@pytest.mark.parametrize(
    "environment",
    [
        {"LISTEN_PID": "1"},
        {"LISTEN_PID": ""},
        {"LISTEN_PID": "x"},
        {"LISTEN_FDS": ""},
        {"LISTEN_FDS": "0"},
        {"LISTEN_FDS": "x"},
    ],
    ids=lambda environment: "=".join(*environment.items()),
)
def test_sockets_that_are_for_another_process_are_ignored(tmp_path: Path, environment: dict[str, str]) -> None:
    with listen(tmp_path / "given") as given:
        process = popen_activated_beside(tmp_path, given.fileno(), environment)
        lines = wait_until_served(process)
        assert not any("LISTEN_FDS" in line for line in lines)
        assert listed_at(tmp_path / "own") == ["zram0"]
        # Nobody accepts there: the connection waits without a greeting.
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(tmp_path / "given"))
            process.terminate()
            assert process.communicate(timeout=30)[1] == ""
            sock.setblocking(False)
            with pytest.raises(BlockingIOError):
                sock.recv(1)


@pytest.mark.parametrize("kind", ["file", "pipe", "connected", "datagram", "nothing"])
def test_a_descriptor_of_activation_that_does_not_listen_is_refused(tmp_path: Path, kind: str) -> None:
    with contextlib.ExitStack() as held:
        good = held.enter_context(listen(tmp_path / "good"))
        if kind == "file":
            fds = [held.enter_context((tmp_path / "file").open("w")).fileno()]
        elif kind == "pipe":
            fds = [end.fileno() for end in map(held.enter_context, map(os.fdopen, os.pipe(), "rw"))][:1]
        elif kind == "connected":
            fds = [sock.fileno() for sock in map(held.enter_context, socket.socketpair())][:1]
        elif kind == "datagram":
            fds = [held.enter_context(listen(tmp_path / "dgram", socket.SOCK_DGRAM)).fileno()]
        else:
            fds = []
        options: list[str | Path] = ["--volatile", "--size", "8M", "--status", tmp_path / "s"]
        process = popen_activated([good.fileno(), *fds], "serve", *options, environment={"LISTEN_FDS": "2"})
        output, errors = process.communicate(timeout=30)
    assert_refused(subprocess.CompletedProcess([], process.returncode, output, errors), 1, "descriptor 4 of LISTEN_FDS")
    assert not (tmp_path / "s").exists()


def test_a_socket_of_activation_beyond_loopback_is_refused_too(tmp_path: Path) -> None:
    with socket.create_server(("0.0.0.0", 0)) as public:  # noqa: S104 (that is the point)
        process = popen_activated([public.fileno()], "serve", "--volatile", "--size", "8M", "--status", tmp_path / "s")
        output, errors = process.communicate(timeout=30)
    done = subprocess.CompletedProcess([], process.returncode, output, errors)
    assert_refused(done, 1, "require TLS", "plain-tcp-beyond-loopback = true")


# Where it listens


def test_all_addresses_serve_the_same_disk(tmp_path: Path) -> None:
    ports = free_port(socket.AF_INET, "127.0.0.1"), free_port(socket.AF_INET6, "::1")
    paths = [tmp_path / "zram0.nbd", tmp_path / "deeper" / "other.nbd"]
    text = (
        f"[server]\nunix = {quoted([str(path) for path in paths])}\n"
        f'tcp = ["127.0.0.1:{ports[0]}", "[::1]:{ports[1]}"]\n' + disk_table(tmp_path)
    )
    server = start_configured(tmp_path, text)
    write_and_check(paths[1])
    assert holds_by_default(paths[0])
    addresses: list[tuple[str, int] | Path] = [*paths, ("127.0.0.1", ports[0]), ("::1", ports[1])]
    for address in addresses:
        assert listed_at(address) == ["zram0"]
    assert json.loads(ask(server.status, "json"))["uris"] == [
        *(f"nbd+unix:///?socket={path}" for path in paths),
        f"nbd://127.0.0.1:{ports[0]}",
        f"nbd://[::1]:{ports[1]}",
    ]
    stopped(server)
    assert not any(path.exists() for path in paths)


@pytest.mark.parametrize("mode", ["0600", "0660", "666"])
def test_a_unix_socket_has_the_mode_and_group_of_the_configuration(tmp_path: Path, mode: str) -> None:
    group = 60_002 if os.geteuid() == 0 else os.getegid()
    lines = f'unix-mode = "{mode}"\nunix-group = {group}'
    server = start_configured(tmp_path, config_of(tmp_path, disk_table(tmp_path), server=lines))
    found = server.unix.stat()
    assert (stat.S_IMODE(found.st_mode), found.st_gid, found.st_uid) == (int(mode, 8), group, os.geteuid())
    # The sockets of the disk are the owner's all the same.
    assert [stat.S_IMODE(path.stat().st_mode) for path in (server.status, server.admin)] == [0o600, 0o600]
    stopped(server)


def test_a_unix_socket_has_the_owner_of_the_configuration(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a socket away: run the tests with sudo")
    lines = 'unix-owner = "60001"\nunix-group = "60002"'
    server = start_configured(tmp_path, config_of(tmp_path, disk_table(tmp_path), server=lines))
    assert (server.unix.stat().st_uid, server.unix.stat().st_gid) == (60_001, 60_002)
    stopped(server)


def test_the_group_of_the_status_socket_may_read_and_not_change(tmp_path: Path) -> None:
    group = 60_002 if os.geteuid() == 0 else os.getegid()
    text = config_of(tmp_path, disk_table(tmp_path, "zram0", f"status-group = {group}"))
    server = start_configured(tmp_path, text)
    status, admin = server.status.stat(), server.admin.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_gid) == (0o660, group)
    assert stat.S_IMODE(admin.st_mode) == 0o600
    stopped(server)


def test_the_sockets_of_a_killed_server_are_taken_over_and_those_of_a_living_one_are_not(tmp_path: Path) -> None:
    text = config_of(tmp_path, disk_table(tmp_path), disk_table(tmp_path, "zram1"))
    kill(start_configured(tmp_path, text))
    assert (tmp_path / "zram1.status").is_socket()
    server = start_configured(tmp_path, text)
    write_and_check(server.unix)
    done = zramd("serve", "--config", write_config(tmp_path, text))
    assert_refused(done, 1, str(server.unix), "another server listens there")
    assert holds_by_default(server.unix)
    stopped(server)
    assert [path.name for path in tmp_path.iterdir()] == ["zramd.toml"]


@pytest.mark.parametrize("option", ["--web", "--metrics"])
def test_pages_and_metrics_are_for_loopback_only(tmp_path: Path, option: str) -> None:
    sockets = "--unix", tmp_path / "nbd", "--status", tmp_path / "status"
    refused = zramd("serve", "--size", "8M", "--volatile", *sockets, option, "0.0.0.0:9586")
    assert_refused(refused, 1, option, "a loopback address, not 0.0.0.0")


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", ""])  # noqa: S104 (that is the point)
def test_plain_tcp_that_others_could_reach_is_refused_unless_it_is_allowed(tmp_path: Path, host: str) -> None:
    port = free_port(socket.AF_INET6 if host == "[::]" else socket.AF_INET, host.strip("[]"))
    tcp = f'tcp = "{host}:{port}"\n'
    for tables in ("", 'plain-tcp-beyond-loopback = false\n[tls]\nmode = "off"\n'):
        config = write_config(tmp_path, f"[server]\n{tcp}{tables}{disk_table(tmp_path)}")
        done = zramd("serve", "--config", config)
        assert_refused(done, 1, "require TLS", "plain-tcp-beyond-loopback = true", "[server]")
    assert not list(tmp_path.glob("zram0.*"))
    local = "::1" if host == "[::]" else "127.0.0.1"
    allowed = start_configured(tmp_path, f"[server]\n{tcp}plain-tcp-beyond-loopback = true\n{disk_table(tmp_path)}")
    assert listed_at((local, port)) == ["zram0"]
    stopped(allowed)


def test_the_option_tcp_is_refused_beyond_loopback(tmp_path: Path) -> None:
    port = free_port(socket.AF_INET, "0.0.0.0")  # noqa: S104 (that is the point)
    options: list[str | Path] = ["--volatile", "--size", "8M", "--status", tmp_path / "s", "--unix", tmp_path / "n"]
    assert_refused(zramd("serve", *options, "--tcp", f"0.0.0.0:{port}"), 1, "require TLS")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", ["on", "require"])
def test_tls_opens_tcp_to_others_only_if_it_is_required(tmp_path: Path, mode: str) -> None:
    certificates = make_certificates(tmp_path / "tls").server
    port = free_port(socket.AF_INET, "0.0.0.0")  # noqa: S104 (that is the point)
    text = (
        f'[server]\ntcp = "0.0.0.0:{port}"\n[tls]\nmode = "{mode}"\ncertificates = {quoted(certificates)}\n'
        + disk_table(tmp_path)
    )
    if mode == "on":
        assert_refused(zramd("serve", "--config", write_config(tmp_path, text)), 1, "require TLS")
        return
    server = start_configured(tmp_path, text)
    with socket.create_connection(("127.0.0.1", port), 60) as sock:
        sock.sendall(client_flags() + option(LIST) + option(ABORT))
        answer = receive_rest(sock)
    assert answer.startswith(GREETING)
    assert b"zram0" not in answer
    stopped(server)


# Many clients


@pytest.fixture
def crowd() -> Iterator[Callable[[Path, int], list[socket.socket]]]:
    """Return a function that connects many clients and leaves them waiting."""
    with contextlib.ExitStack() as held:

        def connect_many(path: Path, count: int) -> list[socket.socket]:
            socks = []
            for _ in range(count):
                sock = held.enter_context(socket.socket(socket.AF_UNIX))
                sock.settimeout(60)
                sock.connect(str(path))
                socks.append(sock)
            return socks

        yield connect_many


def fds_and_threads(server: ServerProcess) -> tuple[int, int]:
    process = Path("/proc") / str(server.process.pid)
    return len(list((process / "fd").iterdir())), len(list((process / "task").iterdir()))


def test_a_server_that_runs_out_of_descriptors_goes_on_and_serves_again(
    tmp_path: Path, crowd: Callable[[Path, int], list[socket.socket]]
) -> None:
    limits = "[limits]\nhandshake-seconds = 3600\nhandshakes = 1000\n"
    server = start_configured(tmp_path, config_of(tmp_path, disk_table(tmp_path)) + limits)
    before = fds_and_threads(server)
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (64, 64))
    with connect(server.unix) as early:
        socks = crowd(server.unix, 100)
        # Accepting on the two other sockets has reserved a descriptor each.
        wait_for(lambda: fds_and_threads(server)[0] >= 62)
        # Who is connected is served.
        early.sendall(write_request(1, 0, DATA) + request(READ, 2, 0, len(DATA)))
        assert receive(early, 2 * REPLY_BYTES + len(DATA)) == reply(1) + reply(2, DATA)
        for sock in socks:
            sock.close()
    assert listed_at(server.unix) == ["zram0"]
    with connect(server.unix) as late:
        late.sendall(request(READ, 2, 0, len(DATA)))
        assert receive(late, REPLY_BYTES + len(DATA)) == reply(2, DATA)
    wait_for(lambda: fds_and_threads(server) == before)
    log = stopped(server)
    assert "cannot accept a connection (nbd): [Errno 24] Too many open files" in log


def test_sixty_clients_that_say_nothing_do_not_hold_up_the_end(
    tmp_path: Path, crowd: Callable[[Path, int], list[socket.socket]]
) -> None:
    limits = "[limits]\nhandshake-seconds = 3600\n"
    server = start_configured(tmp_path, config_of(tmp_path, disk_table(tmp_path)) + limits)
    socks = crowd(server.unix, 60)
    assert all(receive(sock, len(GREETING)) == GREETING for sock in socks)
    server.process.send_signal(signal.SIGTERM)
    _, errors = server.process.communicate(timeout=30)
    assert (server.process.returncode, errors) == (0, "")
    assert all(receive_rest(sock) == b"" for sock in socks)


def test_a_thousand_visits_leave_no_thread_and_no_descriptor(tmp_path: Path) -> None:
    port = free_port(socket.AF_INET, "127.0.0.1")
    text = config_of(tmp_path, disk_table(tmp_path), server=f'tcp = "127.0.0.1:{port}"')
    server = start_configured(tmp_path, text)
    before = fds_and_threads(server)
    write_and_check(server.unix)
    for number in range(1000):
        if number % 4 == 0:
            socket.create_connection(("127.0.0.1", port), 60).close()
            continue
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(60)
            # The backlog may be full for a moment.
            sock.connect(str(server.unix))
            if number % 4 == 1:
                receive(sock, len(GREETING))
            elif number % 4 == 2:
                with contextlib.suppress(BrokenPipeError):
                    sock.sendall(client_flags() + option(EXPORT_NAME) + request(READ, 1, 0, 4096))
    wait_for(lambda: fds_and_threads(server) == before)
    assert holds_by_default(server.unix)
    log = stopped(server)
    assert "Errno" not in log
