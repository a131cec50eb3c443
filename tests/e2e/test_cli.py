import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from tests.conftest import ServerProcess, start_server, wait_until_served
from tests.nbd_bytes import (
    FLUSH,
    READ,
    REPLY_BYTES,
    TRIM,
    connect,
    receive,
    receive_rest,
    reply,
    request,
    write_request,
)
from tests.property.test_device import make_data
from zramd import __version__
from zramd.cli import main
from zramd.cli.status import NOT_RUNNING
from zramd.native import choose

MODULE = [sys.executable, "-m", "zramd"]
SCRIPT = [str(Path(sys.executable).with_name("zramd"))]
VERBS = main.list_commands(click.Context(main))
DATA = bytes(make_data("half", 1, 1 << 20)) + bytes(make_data("pattern", 2, 1 << 16))
NOBODY = 65534


def zramd(
    *arguments: str | Path, program: list[str] = MODULE, engine: str | None = None
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ({"ZRAMD_ENGINE": engine} if engine else {})
    return subprocess.run(
        [*program, *map(str, arguments)], capture_output=True, text=True, timeout=30, check=False, env=environment
    )


def assert_refused(done: subprocess.CompletedProcess[str], status: int, *words: str) -> None:
    """Check that a command failed, with one line that says why and no traceback."""
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    *usage, line = done.stderr.splitlines()
    assert line.startswith("Error: ")
    assert "Traceback" not in done.stderr
    assert usage == [] if status == 1 else all("Error" not in text for text in usage)
    for word in words:
        assert word in line


def sockets_in(directory: Path) -> list[str]:
    return ["--unix", str(directory / "b.nbd"), "--status", str(directory / "b.status")]


def write_and_check(path: Path, offset: int = 12345) -> None:
    with connect(path) as sock:
        sock.sendall(write_request(1, offset, DATA))
        assert receive(sock, REPLY_BYTES) == reply(1)


def holds(path: Path, offset: int = 12345) -> bool:
    with connect(path) as sock:
        sock.sendall(request(READ, 1, offset, len(DATA)))
        return receive(sock, REPLY_BYTES + len(DATA)) == reply(1, DATA)


def kill(server: ServerProcess) -> None:
    server.process.kill()
    server.process.communicate(timeout=30)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@dataclass
class User:
    """Somebody without privileges, with directories of their own; this user, if the tests do not run as root."""

    uid: int
    home: Path
    environment: dict[str, str]
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def popen(self, *arguments: str) -> subprocess.Popen[str]:
        identity = {"user": self.uid, "group": self.uid, "extra_groups": []} if os.geteuid() == 0 else {}
        process: subprocess.Popen[str] = subprocess.Popen(
            [*MODULE, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment,
            cwd="/",
            **identity,  # type: ignore[call-overload]
        )
        self.processes.append(process)
        return process

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        process = self.popen(*arguments)
        output, errors = process.communicate(timeout=30)
        return subprocess.CompletedProcess(arguments, process.returncode, output, errors)

    def serve(self, *arguments: str) -> tuple[subprocess.Popen[str], list[str]]:
        """Start a server and return what it says when it serves."""
        process = self.popen("serve", *arguments)
        return process, wait_until_served(process)


def make_user(uid: int, home: Path) -> User:
    if os.geteuid() == 0:
        os.chown(home, uid, uid)
        checkout = Path(__file__).parents[2]
        closed = [path for path in (checkout, *checkout.parents) if not path.stat().st_mode & stat.S_IXOTH]
        if closed:
            pytest.skip(f"other users cannot run what lies under {closed[-1]}: chmod o+x it, or move the checkout")
    return User(uid, home, {"PATH": os.environ["PATH"], "HOME": str(home)})


def end(user: User) -> None:
    for process in user.processes:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=30)


@pytest.fixture
def user() -> Iterator[User]:
    """Return a user with a runtime directory in memory."""
    with tempfile.TemporaryDirectory(prefix="zramd-test-", dir="/dev/shm") as name:
        user = make_user(NOBODY if os.geteuid() == 0 else os.geteuid(), Path(name))
        user.environment["XDG_RUNTIME_DIR"] = name
        yield user
        end(user)


@pytest.fixture
def stranger() -> Iterator[User]:
    """Return a user without a runtime directory, whom nobody else on this machine is."""
    if os.geteuid() != 0:
        pytest.skip("only root can be another user: run the tests with sudo")
    uid = 1_000_000_000 + os.getpid()
    with tempfile.TemporaryDirectory(prefix="zramd-test-") as name:
        user = make_user(uid, Path(name))
        yield user
        end(user)
    shutil.rmtree(f"/dev/shm/zramd-{uid}", ignore_errors=True)  # noqa: S108 (of this uid)


# Start and end


@pytest.mark.parametrize("program", [MODULE, SCRIPT], ids=["python -m zramd", "zramd"])
def test_serve_tells_where_the_disk_is_and_how_to_attach_it(tmp_path: Path, program: list[str]) -> None:
    if not Path(program[0]).exists():
        pytest.skip("the zramd command is not installed: pip install -e .")
    unix, status = tmp_path / "disk.nbd", tmp_path / "disk.status"
    process = subprocess.Popen(
        [*program, "serve", "--size", "8M", "--volatile", "--unix", unix, "--status", status],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    lines: list[str] = []
    while not lines or not lines[-1].startswith("status: "):
        lines.append(process.stdout.readline())
        assert lines[-1], "the server ended"
    process.terminate()
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 0
    assert lines[0] == "zram0: 8M, lz4 level 1, chain size 8, regions in a memfd (volatile)\n"
    assert f"NBD URI: nbd+unix:///?socket={unix}\n" in lines
    (attach,) = [line for line in lines if line.startswith("attach:")]
    assert attach.startswith("attach:  zramd attach ")
    assert attach.endswith(f" --uri 'nbd+unix:///?socket={unix}'\n")
    assert lines[-1] == f"status:  zramd status --status {status}\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_while_clients_are_connected(tmp_path: Path, number: signal.Signals) -> None:
    server = start_server(tmp_path, "--size", "8M")
    with connect(server.unix) as sock, socket.socket(socket.AF_UNIX) as idle, socket.socket(socket.AF_UNIX) as status:
        idle.connect(str(server.unix))
        status.connect(str(server.status))
        sock.sendall(write_request(1, 0, DATA) + request(FLUSH, 2))
        assert receive(sock, 2 * REPLY_BYTES) == reply(1) + reply(2)
        server.process.send_signal(number)
        _, errors = server.process.communicate(timeout=60)
        assert (server.process.returncode, errors) == (0, "")
        assert receive_rest(sock) == b""
    assert list(tmp_path.iterdir()) == []


def test_a_hangup_ends_no_server(tmp_path: Path) -> None:
    command = [*MODULE, "serve", "--size", "8M", "--volatile", *sockets_in(tmp_path)]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, **pipes)  # type: ignore[call-overload]
    wait_until_served(process)
    process.send_signal(signal.SIGHUP)
    assert zramd("stat", "disksize", "--status", tmp_path / "b.status").stdout == f"{8 << 20}\n"
    process.terminate()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "restart the server, which keeps what it serves" in errors


def test_requests_received_before_the_signal_are_answered(tmp_path: Path) -> None:
    server = start_server(tmp_path, "--size", "8M")
    with connect(server.unix) as sock:
        sock.sendall(b"".join(write_request(cookie, cookie << 16, DATA[: 1 << 16]) for cookie in range(100)))
        server.process.terminate()
        assert receive_rest(sock) == b"".join(reply(cookie) for cookie in range(100))
    _, errors = server.process.communicate(timeout=60)
    assert (server.process.returncode, errors) == (0, "")


def test_a_client_that_takes_no_replies_does_not_hold_up_the_end(tmp_path: Path) -> None:
    server = start_server(tmp_path, "--size", "64M")
    with connect(server.unix) as sock:
        sock.sendall(request(READ, 1, 0, 64 << 20) * 10)
        receive(sock, REPLY_BYTES)
        server.process.terminate()
        _, errors = server.process.communicate(timeout=60)
    assert server.process.returncode == 0
    assert len(errors.splitlines()) <= 1
    assert "Traceback" not in errors


def test_sockets_are_only_for_their_owner(server: ServerProcess) -> None:
    assert mode(server.unix) == 0o600
    assert mode(server.status) == 0o600


def test_a_socket_in_a_directory_that_is_not_there_yet_is_made(tmp_path: Path) -> None:
    directory = tmp_path / "run" / "zramd"
    server = start_server(directory, "--size", "8M")
    assert server.ask("disksize") == f"{8 << 20}\n"
    assert server.stop() == (0, "")


# Kept contents


def test_a_restart_finds_the_contents(tmp_path: Path) -> None:
    state = tmp_path / "state"
    server = start_server(tmp_path, "--size", "16M", "--algorithm", "zstd", "--state", str(state), volatile=False)
    write_and_check(server.unix)
    before, identity = server.mm_stat(), json.loads(server.ask("json"))["uuid"]
    assert server.stop() == (0, "")
    assert mode(state) == 0o700
    assert {mode(region) for region in state.iterdir()} == {0o600}
    # Without the size and the algorithm: the device is as it was made.
    server = start_server(tmp_path, "--state", str(state), volatile=False)
    assert server.mm_stat()[:3] == before[:3]
    assert json.loads(server.ask("json"))["uuid"] == identity
    assert server.ask("comp_algorithm") == "lz4 lz4hc [zstd] \n"
    assert server.ask("disksize") == f"{16 << 20}\n"
    assert holds(server.unix)
    assert server.stop() == (0, "")


def test_a_restart_keeps_the_memory_limit_unless_told_otherwise(tmp_path: Path) -> None:
    options = ["--state", str(tmp_path / "state")]
    for given, kept in [(["--mem-limit", "4M"], 4 << 20), ([], 4 << 20), (["--mem-limit", "0"], 0), ([], 0)]:
        server = start_server(tmp_path, *options, *given, volatile=False)
        assert server.ask("mem_limit") == f"{kept}\n"
        assert server.stop() == (0, "")


def test_after_kill_9_every_acknowledged_write_is_there_and_the_sockets_are_taken_over(tmp_path: Path) -> None:
    options = ["--size", "64M", "--state", str(tmp_path / "state")]
    server = start_server(tmp_path, *options, volatile=False)
    acknowledged = 0
    with connect(server.unix) as sock:
        for cookie in range(500):
            sock.sendall(write_request(cookie, cookie << 16, (cookie + 1).to_bytes(2, "big") + DATA[: (1 << 16) - 2]))
            if cookie >= 100:
                assert receive(sock, REPLY_BYTES) == reply(acknowledged)
                acknowledged += 1
        kill(server)
        acknowledged += len(receive_rest(sock)) // REPLY_BYTES
    assert acknowledged >= 400
    assert server.unix.is_socket()
    assert server.status.is_socket()
    server = start_server(tmp_path, *options, volatile=False)
    with connect(server.unix) as sock:
        for cookie in range(acknowledged):
            sock.sendall(request(READ, cookie, cookie << 16, 1 << 16))
            expected = (cookie + 1).to_bytes(2, "big") + DATA[: (1 << 16) - 2]
            assert receive(sock, REPLY_BYTES + (1 << 16)) == reply(cookie, expected)
    assert server.stop() == (0, "")


def test_stale_sockets_are_taken_over(tmp_path: Path) -> None:
    kill(start_server(tmp_path, "--size", "8M"))
    server = start_server(tmp_path, "--size", "8M")
    assert not holds(server.unix)
    assert server.stop() == (0, "")
    assert list(tmp_path.iterdir()) == []


def test_a_volatile_server_keeps_nothing(tmp_path: Path) -> None:
    server = start_server(tmp_path, "--size", "16M")
    write_and_check(server.unix)
    assert server.stop() == (0, "")
    server = start_server(tmp_path, "--size", "16M")
    assert not holds(server.unix)
    assert server.stop() == (0, "")


def test_a_second_server_on_the_same_state_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    state = tmp_path / "state"
    server = start_server(tmp_path, "--size", "16M", "--state", str(state), volatile=False)
    write_and_check(server.unix)
    assert_refused(zramd("serve", "--state", state, *sockets_in(tmp_path)), 1, str(state))
    assert holds(server.unix)
    assert server.stop() == (0, "")


@pytest.mark.parametrize("taken", ["unix", "status"])
def test_a_socket_of_a_living_server_is_not_taken_over(tmp_path: Path, server: ServerProcess, taken: str) -> None:
    path = getattr(server, taken)
    done = zramd("serve", "--size", "8M", "--volatile", *sockets_in(tmp_path), f"--{taken}", path)
    assert_refused(done, 1, str(path), "another server")
    assert server.ask("disksize") == f"{64 << 20}\n"
    assert not holds(server.unix)
    assert not (tmp_path / "b.nbd").exists()


@pytest.mark.parametrize("option", ["--unix", "--status"])
def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path, option: str) -> None:
    precious = tmp_path / "precious"
    precious.write_text("data")
    # The later one of two paths holds.
    done = zramd("serve", "--size", "8M", "--volatile", *sockets_in(tmp_path), option, precious)
    assert_refused(done, 1, str(precious))
    assert precious.read_text() == "data"


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--size", "32M"], str(16 << 20)),
        (["--chain-size", "4"], "chain size 8"),
    ],
)
def test_kept_contents_are_not_served_as_something_else(tmp_path: Path, options: list[str], word: str) -> None:
    state = tmp_path / "state"
    server = start_server(tmp_path, "--size", "16M", "--algorithm", "zstd", "--state", str(state), volatile=False)
    write_and_check(server.unix)
    assert server.stop() == (0, "")
    paths = sockets_in(tmp_path)
    assert_refused(zramd("serve", "--state", state, *paths, *options), 1, str(state), word)
    server = start_server(tmp_path, "--size", "16M", "--state", str(state), volatile=False)
    assert holds(server.unix)
    assert server.stop() == (0, "")


def test_kept_contents_keep_their_algorithm_when_another_is_asked_for(tmp_path: Path) -> None:
    state = tmp_path / "state"
    server = start_server(tmp_path, "--size", "16M", "--algorithm", "zstd", "--state", str(state), volatile=False)
    write_and_check(server.unix)
    assert server.stop() == (0, "")
    server = start_server(tmp_path, "--algorithm", "lz4hc(level=4)", "--state", str(state), volatile=False)
    assert holds(server.unix)
    assert "[lz4hc]" in server.ask("comp_algorithm")
    assert server.stop() == (0, "")


def test_damaged_state_is_refused_with_a_way_out(tmp_path: Path) -> None:
    state = tmp_path / "state"
    server = start_server(tmp_path, "--size", "16M", "--state", str(state), volatile=False)
    write_and_check(server.unix)
    assert server.stop() == (0, "")
    for name, damage in [("superblock", b"\xff" * 8), ("page_table", None), ("handles", b"")]:
        kept = (state / name).read_bytes()
        if damage is None:
            (state / name).unlink()
        elif damage:
            (state / name).write_bytes(damage + kept[len(damage) :])
        else:
            os.truncate(state / name, 4096)
        paths = sockets_in(tmp_path)
        assert_refused(zramd("serve", "--state", state, *paths), 1, str(state))
        (state / name).write_bytes(kept)
        (state / name).chmod(0o600)


@pytest.mark.parametrize("kind", ["open to others", "a file", "a link"])
def test_a_state_directory_that_is_not_private_is_refused(tmp_path: Path, kind: str) -> None:
    state = tmp_path / "state"
    if kind == "open to others":
        state.mkdir(mode=0o755)
    elif kind == "a file":
        state.write_text("data")
    else:
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        state.symlink_to(tmp_path / "elsewhere")
    paths = sockets_in(tmp_path)
    assert_refused(zramd("serve", "--size", "8M", "--state", state, *paths), 1, str(state))


# Options

BAD_OPTIONS = [
    (["serve", "--size", "-1"], 2),
    (["serve", "--size", "many"], 2),
    (["serve", "--size", "1X"], 2),
    (["serve", "--size", ""], 2),
    (["serve", "--size", "0.00001K"], 2),
    (["serve", "--size", "9" * 400 + ".5"], 2),
    (["serve", "--size", "9" * 5000], 2),
    (["serve", "--size", "100000E"], 2),
    (["serve", "--size", "9T"], 1),
    (["serve", "--algorithm", "gzip"], 2),
    (["serve", "--algorithm", "zstd(level=99)"], 2),
    (["serve", "--algorithm", "zstd(level=-999999999999)"], 2),
    (["serve", "--algorithm", "lz4hc(level=0)"], 2),
    (["serve", "--algorithm", "zstd(level=3"], 2),
    (["serve", "--algorithm", ""], 2),
    (["serve", "--chain-size", "0"], 2),
    (["serve", "--chain-size", "17"], 2),
    (["serve", "--chain-size", "four"], 2),
    (["serve", "--mem-limit", "some"], 2),
    (["serve", "--mem-limit", "-1"], 2),
    (["serve", "--tcp", "localhost"], 2),
    (["serve", "--tcp", "localhost:"], 2),
    (["serve", "--tcp", "localhost:0"], 2),
    (["serve", "--tcp", "localhost:65536"], 2),
    (["serve", "--tcp", "localhost:http"], 2),
    (["serve", "--state", "/nowhere", "--volatile"], 2),
    (["serve", "extra"], 2),
    (["serve", "--no-such-option"], 2),
    (["no-such-verb"], 2),
    (["stat"], 2),
    (["stat", "mm_stat", "io_stat"], 2),
    (["set"], 2),
    (["set", "mem_limit"], 2),
    (["set", "mem_limit="], 2),
    (["set", "=5"], 2),
    (["status", "--raw", "--json"], 2),
    (["top", "extra"], 2),
]


@pytest.mark.parametrize(("arguments", "status"), BAD_OPTIONS, ids=lambda value: str(value)[:60])
def test_bad_options_are_refused_with_one_line_that_says_why(tmp_path: Path, arguments: list[str], status: int) -> None:
    if arguments[0] == "serve" and "--state" not in arguments:
        arguments = [*arguments, "--volatile", *sockets_in(tmp_path)]
    assert_refused(zramd(*arguments), status)


@pytest.mark.parametrize(
    "options",
    [
        ["--tcp", "no-such-host.invalid:10809"],
        ["--tcp", "..:10809"],
        ["--tcp", "192.0.2.1:10809"],
        ["--unix", "/proc/nowhere/a.nbd"],
        ["--unix", "/" + "x" * 200],
        ["--status", "/proc/nowhere/a.status"],
        ["--mem-limit", "9" * 30],
        ["--mem-limit", "100000E"],
    ],
    ids=lambda options: " ".join(options)[:50],
)
def test_what_cannot_be_had_is_refused_with_one_line_that_says_why(tmp_path: Path, options: list[str]) -> None:
    sockets = sockets_in(tmp_path)
    done = zramd("serve", "--size", "8M", "--volatile", *sockets, *options)
    assert_refused(done, done.returncode or 1)
    assert list(tmp_path.iterdir()) == []


def test_a_busy_tcp_port_is_refused(tmp_path: Path) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        address = f"127.0.0.1:{busy.getsockname()[1]}"
        done = zramd("serve", "--size", "8M", "--volatile", "--status", tmp_path / "a.status", "--tcp", address)
    assert_refused(done, 1, address, "in use")


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example(verb: str) -> None:
    for flag in ("--help", "-h"):
        done = CliRunner().invoke(main, [verb, flag], prog_name="zramd")
        assert (done.exit_code, done.stderr) == (0, "")
        assert done.stdout.startswith("Usage: ")
        assert "Example" in done.stdout
        assert f"zramd {verb}" in done.stdout.partition("Example")[2]


def test_help_names_every_verb() -> None:
    done = zramd("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for verb in VERBS:
        assert f"\n  {verb} " in done.stdout


def test_the_engine_is_told_and_can_be_chosen() -> None:
    assert f"\nengine  {choose().value}" in zramd("version", "-v").stdout
    assert "\nengine  python, since ZRAMD_ENGINE says so\n" in zramd("version", "-v", engine="python").stdout
    for verb in (["version", "-v"], ["serve", "--volatile"]):
        refused = zramd(*verb, engine="fast")
        assert_refused(refused, 1, "ZRAMD_ENGINE=fast is not an engine: choose python or native")


def test_the_version_is_told() -> None:
    assert zramd("version").stdout == f"zramd {__version__}\n"
    assert zramd("--version").stdout == f"zramd {__version__}\n"
    assert zramd("--version", "-v").stdout == zramd("version", "-v").stdout


# The client verbs


def test_stat_prints_the_text_of_the_server_to_the_byte(server: ServerProcess) -> None:
    write_and_check(server.unix)
    for name in ("mm_stat", "io_stat", "stat", "disksize", "comp_algorithm", "mem_limit", "mem_used_max", "initstate"):
        done = zramd("stat", name, "--status", server.status)
        assert (done.returncode, done.stdout, done.stderr) == (0, server.ask(name), "")
    assert json.loads(zramd("stat", "json", "--status", server.status).stdout)["disksize"] == 64 << 20


def test_stat_of_an_unknown_name_tells_the_names(server: ServerProcess) -> None:
    assert_refused(zramd("stat", "nothing", "--status", server.status), 1, "nothing", "mm_stat", "json")


@pytest.mark.parametrize("name", ["mem_limit 1M", "mm_stat\nmem_limit 1M"])
def test_stat_changes_nothing(server: ServerProcess, name: str) -> None:
    done = zramd("stat", name, "--status", server.status)
    assert server.ask("mem_limit") == "0\n"
    assert done.returncode != 0


def test_set_changes_what_it_is_told_to(server: ServerProcess) -> None:
    write_and_check(server.unix)
    with connect(server.unix) as sock:
        sock.sendall(request(TRIM, 1, 0, 64 << 20))
        assert receive(sock, REPLY_BYTES) == reply(1)
    assert server.ask("mem_used_max") != "0\n"
    done = zramd("set", "mem_limit=1M", "mem_used_max=0", "--admin", server.admin)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert server.ask("mem_limit") == f"{1 << 20}\n"
    assert server.ask("mem_used_max") == "0\n"


@pytest.mark.parametrize("assignment", ["mem_limit=some", "mem_used_max=1", "initstate=1", "nothing=1", "json=1"])
def test_set_refuses_with_one_line(server: ServerProcess, assignment: str) -> None:
    name = assignment.partition("=")[0]
    assert_refused(zramd("set", assignment, "--admin", server.admin), 1, name if name != "mem_limit" else "some")


def test_status_shows_a_row_and_where_the_disk_is_served(server: ServerProcess) -> None:
    write_and_check(server.unix, 0)
    zramd("set", "mem_limit=512M", "--admin", server.admin)
    with connect(server.unix):
        shown, more = (
            zramd("status", *options, "--status", server.status) for options in ([], ["-o", "+MEM-LIMIT,P99,CLIENTS"])
        )
    assert (shown.returncode, shown.stderr) == (0, "")
    names, values, where = shown.stdout.splitlines()
    assert names.split() == ["NAME", "ALGORITHM", "DISKSIZE", "DATA", "COMPR", "TOTAL", "STREAMS", "MOUNTPOINT"]
    assert values.split()[:4] == ["zram0", "lz4", "64M", "1.1M"]
    assert where == f"zram0 is served at {server.uri}"
    assert more.stdout.splitlines()[0].split() == [*names.split(), "MEM-LIMIT", "P99", "CLIENTS"]
    assert more.stdout.splitlines()[1].split()[-3::2] == ["512M", "1"]


def test_status_names_a_disk_and_what_it_does_not_know(server: ServerProcess) -> None:
    done = zramd("list", "zram0", "--json", "--status", server.status)
    assert json.loads(done.stdout)["zramdevices"][0]["disksize"] == 64 << 20
    refused = zramd("status", "-n", "--raw", "zram1", "--status", server.status)
    assert_refused(refused, 1, "no disk 'zram1' is served; there are: zram0")
    assert_refused(zramd("status", "-o", "SIZE", "--status", server.status), 2, "SIZE", "DISKSIZE")


@pytest.mark.parametrize("arguments", [["status"], ["stat", "mm_stat"], ["set", "mem_limit=0"]])
def test_without_a_server_at_the_socket_a_verb_says_so(tmp_path: Path, arguments: list[str]) -> None:
    option = "--admin" if arguments[0] == "set" else "--status"
    status = NOT_RUNNING if arguments == ["status"] else 1
    assert_refused(zramd(*arguments, option, tmp_path / "nobody"), status, str(tmp_path / "nobody"))


# Users without privileges


def test_without_options_a_user_gets_1_gib_in_their_runtime_directory(user: User) -> None:
    process, lines = user.serve()
    runtime = user.home / "zramd"
    unix, status, state = runtime / "zram0.nbd", runtime / "zram0.status", runtime / "zram0"
    assert lines[0] == f"zram0: 1G, lz4 level 1, chain size 8, regions in {state}\n"
    assert (mode(unix), mode(status), mode(state)) == (0o600, 0o600, 0o700)
    assert {mode(region) for region in state.iterdir()} == {0o600}
    write_and_check(unix)
    assert user.run("stat", "disksize").stdout == f"{1 << 30}\n"
    assert user.run("status").stdout.splitlines()[2] == f"zram0 is served at nbd+unix:///?socket={unix}"
    assert user.run("set", "mem_limit=64M").returncode == 0
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    process, lines = user.serve()
    assert lines[1].startswith("recovered: ")
    assert user.run("stat", "mem_limit").stdout == f"{64 << 20}\n"
    assert holds(unix)
    process.terminate()
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")
    assert str(state) in output
    assert sorted(path.name for path in runtime.iterdir()) == ["zram0"]


@pytest.mark.parametrize("arguments", [["status"], ["stat", "mm_stat"], ["set", "mem_limit=0"]])
def test_without_any_server_a_verb_says_how_to_start_one(user: User, arguments: list[str]) -> None:
    assert_refused(user.run(*arguments), NOT_RUNNING if arguments == ["status"] else 1, "zramd serve")


def test_a_dead_servers_socket_is_no_server(user: User) -> None:
    process, _ = user.serve("--size", "8M")
    process.kill()
    process.wait(30)
    assert_refused(user.run("status"), NOT_RUNNING, "no running server")


def test_status_shows_all_disks_and_of_several_one_must_be_chosen_for_the_rest(user: User) -> None:
    other = user.home / "zramd" / "other.status"
    user.serve("--size", "8M")
    user.serve("--size", "16M", "--volatile", "--unix", str(user.home / "other.nbd"), "--status", str(other))
    assert_refused(user.run("stat", "mm_stat"), 1, str(other), str(other.with_name("zram0.status")))
    assert sorted(line.split()[2] for line in user.run("status").stdout.splitlines()[1:3]) == ["16M", "8M"]
    assert user.run("stat", "disksize", "--status", str(other)).stdout == f"{16 << 20}\n"


def test_without_a_runtime_directory_everything_is_private_in_shared_memory(stranger: User) -> None:
    process, lines = stranger.serve("--size", "16M")
    directory = Path(f"/dev/shm/zramd-{stranger.uid}")  # noqa: S108
    assert lines[0].endswith(f"regions in {directory}/zram0\n")
    assert (mode(directory), mode(directory / "zram0")) == (0o700, 0o700)
    write_and_check(directory / "zram0.nbd")
    assert stranger.run("stat", "disksize").stdout == f"{16 << 20}\n"
    process.terminate()
    process.wait(30)
    stranger.serve("--size", "16M")
    assert holds(directory / "zram0.nbd")


def test_a_runtime_directory_on_disk_holds_the_sockets_and_shared_memory_the_contents(stranger: User) -> None:
    stranger.environment["XDG_RUNTIME_DIR"] = str(stranger.home)
    if os.stat(stranger.home).st_dev == os.stat("/dev/shm").st_dev:  # noqa: S108
        pytest.skip("temporary files are in memory here: set TMPDIR to a directory on a disk")
    _, lines = stranger.serve("--size", "16M")
    assert f"NBD URI: nbd+unix:///?socket={stranger.home}/zramd/zram0.nbd\n" in lines
    assert lines[0].endswith(f"regions in /dev/shm/zramd-{stranger.uid}/zram0\n")


def test_a_volatile_server_does_not_stand_in_the_way_of_the_next_one(stranger: User) -> None:
    process, _ = stranger.serve("--size", "16M", "--volatile")
    assert mode(Path(f"/dev/shm/zramd-{stranger.uid}")) == 0o700  # noqa: S108
    process.terminate()
    process.wait(30)
    stranger.serve("--size", "16M")


@pytest.mark.parametrize("options", [[], ["--volatile"]], ids=["kept", "volatile"])
def test_a_directory_that_somebody_else_made_in_shared_memory_is_not_used(stranger: User, options: list[str]) -> None:
    directory = Path(f"/dev/shm/zramd-{stranger.uid}")  # noqa: S108
    directory.mkdir()
    directory.chmod(0o777)
    assert_refused(stranger.run("serve", "--size", "16M", *options), 1, str(directory))
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize("arguments", [["serve", "--size", "16M", "--status", "/proc/nowhere/status"], ["status"]])
def test_a_runtime_directory_that_cannot_be_looked_at_is_no_traceback(stranger: User, arguments: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        stranger.environment["XDG_RUNTIME_DIR"] = f"{name}/user"
        assert_refused(stranger.run(*arguments), 1)
