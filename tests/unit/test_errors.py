"""Whatever is wrong, a user reads one line that says what it was, and gets a status that is not 0."""

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.property.test_device import make_data, write
from zramd.cli import main
from zramd.cli.stat import request
from zramd.cli.status import NOT_RUNNING
from zramd.device.codecs import codec
from zramd.device.disk import Disk
from zramd.device.opening import OpenDevice
from zramd.device.wanted import Wanted
from zramd.layout import PAGE_SIZE
from zramd.listeners import listen_unix
from zramd.memory import RegionStore
from zramd.status import client
from zramd.status.attributes import Served
from zramd.status.server import AdminServer, StatusServer

PROGRAM = [sys.executable, "-m", "zramd"]
NOT_UTF8 = os.fsdecode(b"\xff\xfe")
READING = (["status"], ["stat", "mm_stat"])
CHANGING = (
    *(["set", "mem_limit=1M"], ["compact"], ["idle"], ["recompress"], ["writeback", "--type", "idle"], ["policy"]),
    *(["estimate"], ["train"], ["block-state"], ["grow", "1G"], ["save", "x"], ["restore", "/dev/null"], ["reset"]),
    ["stop"],
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a directory with the sockets `status` and `admin` of a disk that holds a page, and one of something else.

    What listens at `silent` takes connections and says nothing.
    """
    directory = tmp_path_factory.mktemp("served")
    disk = Disk("zram0", None)
    disk.opened = OpenDevice(RegionStore(None), Wanted(disksize=1 << 20, codec=codec("lz4")))
    write(disk.opened.device, 0, make_data("text", 1, PAGE_SIZE))
    told = Served(disk, ("nbd+unix:///?socket=/a",), directory / "admin")
    servers = [StatusServer(told), AdminServer(told)]
    for server, name in zip(servers, ("status", "admin"), strict=True):
        server.accept_on(listen_unix(directory / name))
    with socket.socket(socket.AF_UNIX) as silent, socket.socket(socket.AF_UNIX) as rude:
        silent.bind(str(directory / "silent"))
        silent.listen()
        rude.bind(str(directory / "rude"))
        rude.listen()
        threading.Thread(target=_hang_up, args=(rude,), daemon=True).start()
        stale = socket.socket(socket.AF_UNIX)
        stale.bind(str(directory / "stale"))
        stale.close()
        yield directory
    for server in servers:
        assert server.stop(10)
    disk.opened.close()


def _hang_up(listener: socket.socket) -> None:
    while True:
        try:
            listener.accept()[0].close()
        except OSError:
            return


def run(*arguments: str | Path) -> tuple[int, str]:
    """Return the status of a command that fails, and its one line."""
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert isinstance(result.exception, SystemExit), result.exception
    *usage, line = result.stderr.splitlines()
    assert line.startswith("Error: ")
    assert usage[0].startswith("Usage: ") if result.exit_code == 2 else not usage
    return result.exit_code, line


@pytest.mark.parametrize("verb", [*READING, *CHANGING], ids=lambda verb: verb[0])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing", "there is no such socket"),
        ("stale", "nobody listens there any more"),
        ("rude", ("it hung up", "without an answer", "ended in the middle")),
        (".", "it is no socket"),
        ("x" * 200, "path too long"),
        (NOT_UTF8, "there is no such socket"),
    ],
    ids=["missing", "stale", "rude", "directory", "long", "not UTF-8"],
)
def test_a_verb_names_the_socket_where_no_server_answers_and_says_why(
    verb: list[str], name: str, said: str | tuple[str, ...], served: Path
) -> None:
    option = "--status" if verb in READING else "--admin"
    status, line = run(*verb, option, served / name)
    assert status in ((1, NOT_RUNNING) if verb == ["status"] else (1,))
    assert str(served / "") in line
    assert any(text in line for text in ((said,) if isinstance(said, str) else said))


def test_a_server_that_hangs_is_not_waited_for(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request, "__defaults__", (0.05,))
    status, line = run("stat", "mm_stat", "--status", served / "silent")
    assert (status, "it hangs, or is no socket of zramd" in line) == (1, True)


def test_a_socket_of_somebody_else_is_said_to_be_that(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(client, "_connect", refuse)  # root may connect to any
    status, line = run("stat", "mm_stat", "--status", served / "status")
    assert (status, "run this as root or the server's owner" in line) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["stat", ""], 2, "not the name of an attribute"),
        (["stat", NOT_UTF8], 1, "EINVAL no attribute"),
        (["stat", "nothing"], 1, "there are: mm_stat"),
        (["set", "mem_limit"], 2, "is not NAME=VALUE"),
        (["set", "mem_limit=x"], 1, "does not start with a number"),
        (["set", "comp_algorithm=lzo"], 1, "choose one of lz4"),
        (["set", "disksize=1G"], 1, "EBUSY zram0 is initialised: reset it first"),
        (["set", "reset=0"], 1, "EINVAL reset takes"),
        (["set", "backing_dev=/proc/nowhere"], 1, "/proc/nowhere: No such file"),
        (["grow", "x"], 2, "is not a size"),
        (["grow", "2M"], 1, "a volatile disk cannot grow"),
        (["idle", "yesterday"], 2, "is not an age"),
        (["recompress", "--type", "cold"], 2, "'cold' is not one of"),
        (["recompress"], 1, "set recomp_algorithm"),
        (["writeback"], 2, "say which pages"),
        (["writeback", "--pages", "x"], 2, "is not a page"),
        (["writeback", "--pages", "1"], 1, "set backing_dev first"),
        (["train"], 1, "training takes 100"),
        (["save", "/"], 1, "it is no file"),
        (["save", "/proc/nowhere/x"], 1, "/proc/nowhere/x is not saved: No such file"),
        (["save", "/dev/full"], 1, "it is no file, which is not replaced"),
        (["restore", "/dev/zero"], 1, "holds data: reset it first"),
        (["restore", "/proc/nowhere"], 1, "/proc/nowhere is not restored: No such file"),
        (["restore", "/"], 1, "/ is not restored: Is a directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_a_server_or_a_file_refuses_is_told(arguments: list[str], status: int, said: str, served: Path) -> None:
    option, name = ("--status", "status") if arguments[0] == "stat" else ("--admin", "admin")
    found, line = run(*arguments, option, served / name)
    assert (found, said in line) == (status, True), line


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["attach", "/dev/sda"], 2, "is not the name of a device such as /dev/nbd0"),
        (["attach", "--uri", "foo"], 1, "is no NBD URI"),
        (["attach", "--fuse", "--connections", "2"], 2, "--connections and --fuse exclude each other"),
        (["detach", "/dev/nbd999999"], 1, "there is no /dev/nbd999999"),
        (["swapon", "/dev/nbd999999"], 1, "cannot open /dev/nbd999999: No such file"),
        (["swapoff", "/dev/nbd999999"], 1, "/dev/nbd999999 is not swapped to"),
        (["completion", "tcsh"], 2, "'tcsh' is not one of"),
        (["-v", "status"], 2, "-v goes with --version"),
        ([NOT_UTF8], 2, "No such command"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_with_a_command_is_told(arguments: list[str], status: int, said: str) -> None:
    if os.geteuid() != 0 and arguments[0] in ("attach", "detach", "swapon", "swapoff") and status == 1:
        said = "run this again with sudo"
    found, line = run(*arguments)
    assert (found, said in line) == (status, True), line


@pytest.mark.parametrize(
    ("redirected", "status", "said"),
    [
        (">/dev/full", 1, "Error: standard output: No space left on device\n"),
        (">&-", 1, "Error: standard output: Bad file descriptor\n"),
        ("| exec true", 0, ""),
    ],
)
@pytest.mark.parametrize(
    "verb", ["stat json --status {}/status", "block-state --admin {}/admin", "config show {}/disk.toml", "--help"]
)
def test_output_that_nobody_takes_is_an_error_of_one_line(
    verb: str, redirected: str, status: int, said: str, served: Path
) -> None:
    (served / "disk.toml").write_text("[zram0]\n")
    script = f"exec 3>&1; {sys.executable} -m zramd {verb.format(served)} {redirected}"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (status, said)


def test_without_home_path_or_locale_a_command_runs(served: Path) -> None:
    done = subprocess.run(
        [*PROGRAM, "stat", "disksize", "--status", served / "status"], capture_output=True, text=True, env={}
    )
    assert (done.stdout, done.stderr) == ("1048576\n", "")


@pytest.mark.parametrize(("verb", "standard"), [("save", ">&-"), ("restore", "<&-")])
def test_an_image_is_not_taken_from_or_given_to_what_is_closed(verb: str, standard: str, served: Path) -> None:
    script = f"{sys.executable} -m zramd {verb} - --admin {served}/admin {standard}"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: - is not {verb}d: E")
    assert len(done.stderr.splitlines()) == 1


def test_a_disk_without_a_size_is_not_attached_and_the_command_that_gives_it_one_is_named(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can attach: run the tests with sudo")
    server = StatusServer(Served(Disk("zram0", None), ("nbd+unix:///?socket=/a",), tmp_path / "admin"))
    server.accept_on(listen_unix(tmp_path / "status"))
    status, line = run("attach", "--status", tmp_path / "status")
    assert server.stop(10)
    assert (status, f"zramd set --admin {tmp_path}/admin disksize=SIZE" in line) == (1, True), line


def test_ctrl_c_ends_a_command_that_waits_without_a_traceback(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(client, "_connect", interrupt)
    result = CliRunner().invoke(main, ["stat", "mm_stat", "--status", str(served / "status")])
    assert (result.exit_code, result.output) == (130, "\n")


def test_ctrl_c_ends_a_command_that_is_still_being_imported_without_a_traceback() -> None:
    script = (
        "import runpy, signal, sys\n"
        "class Interrupt:\n"
        "    def find_spec(name, *_):\n"
        "        name == 'click' and signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "runpy.run_module('zramd', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")
