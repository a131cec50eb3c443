import json
import os
import re
import socket
import stat
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nbd_bytes import receive_rest
from tests.property.test_device import make_data, write
from zramd.device.disk import Disk
from zramd.device.opening import OpenDevice
from zramd.layout import PAGE_SIZE
from zramd.listeners import listen_unix
from zramd.status.attributes import NAMES, STREAMED, Served
from zramd.status.classes import parse_classes
from zramd.status.client import StatusError, ask
from zramd.status.control import WORDS
from zramd.status.server import MAX_LINE, AdminServer, StatusServer

SIZE = 64 << 20


@pytest.fixture
def path(tmp_path: Path, opened: OpenDevice) -> Iterator[Path]:
    """Return the admin socket of a device, beside which lies its status socket."""
    disk = Disk("zram7", None)
    disk.opened = opened
    path = tmp_path / "admin"
    served = Served(disk, ("nbd+unix:///?socket=/a", "nbd://localhost:1"), path)
    status, admin = StatusServer(served), AdminServer(served)
    status.accept_on(listen_unix(tmp_path / "status"))
    admin.accept_on(listen_unix(path))
    yield path
    assert status.stop(10)
    assert admin.stop(10)


def connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(60)
    sock.connect(str(path))
    return sock


def converse(path: Path, sent: bytes) -> str:
    """Send bytes, half-close, and return all that comes back."""
    with connect(path) as sock:
        sock.sendall(sent)
        sock.shutdown(socket.SHUT_WR)
        return receive_rest(sock).decode()


def fields(text: str) -> list[int]:
    return [int(field) for field in text.split()]


def fill(opened: OpenDevice) -> None:
    """Write two text pages, one raw page and three same-filled ones, and discard one of those."""
    write(opened.device, 0, make_data("text", 1, 2 * PAGE_SIZE))
    write(opened.device, 5 * PAGE_SIZE, make_data("random", 2, PAGE_SIZE))
    write(opened.device, 8 * PAGE_SIZE, bytearray(3 * PAGE_SIZE))
    with opened.device.lock:
        opened.device.discard(10 * PAGE_SIZE, PAGE_SIZE)


# The texts


def test_help_names_what_can_be_read_and_behind_the_admin_socket_what_can_be_changed(path: Path) -> None:
    assert ask(path.with_name("status"), "help").splitlines() == list(NAMES)
    assert ask(path, "help").splitlines() == [*NAMES, *STREAMED, *(f"{word} VALUE" for word in WORDS)]


def test_an_empty_device_has_these_texts(path: Path) -> None:
    zeros = " ".join(["       0"] * 9)
    assert ask(path, "mm_stat") == zeros + "\n"
    assert ask(path, "io_stat") == "       0        0 0        0\n"
    assert ask(path, "stat") == " ".join(["       0"] * 17) + "\n"
    assert ask(path, "disksize") == "67108864\n"
    assert ask(path, "comp_algorithm") == "[lz4] lz4hc zstd \n"
    assert ask(path, "mem_limit") == "0\n"
    assert ask(path, "mem_used_max") == "0\n"
    assert ask(path, "initstate") == "1\n"


def test_mm_stat_has_the_kernels_nine_columns(path: Path, opened: OpenDevice) -> None:
    fill(opened)
    opened.device.set_mem_limit(100 * PAGE_SIZE)
    text = ask(path, "mm_stat")
    columns = fields(text)
    assert columns[0] == 5 * PAGE_SIZE
    assert PAGE_SIZE < columns[1] < 3 * PAGE_SIZE
    assert columns[2] >= columns[1]
    assert columns[2] % PAGE_SIZE == 0
    assert columns[3:] == [100 * PAGE_SIZE, columns[2], 2, 0, 1, 1]
    assert text == "".join(f"{column:>8} " for column in columns)[:-1] + "\n"


def test_io_stat_has_the_kernels_four_columns(path: Path, opened: OpenDevice) -> None:
    fill(opened)
    assert ask(path, "io_stat") == "       0        0 0        1\n"


def test_stat_has_17_columns_with_requests_and_sectors(path: Path, opened: OpenDevice) -> None:
    fill(opened)
    out: list[bytes | memoryview] = []
    with opened.device.lock:
        opened.device.read(0, 3 * PAGE_SIZE, out)
    columns = [1, 0, 24, 0, 3, 0, 48, *[0] * 10]
    assert ask(path, "stat") == " ".join(f"{column:>8}" for column in columns) + "\n"


def test_columns_grow_rather_than_run_together(path: Path, opened: OpenDevice) -> None:
    opened.device.set_mem_limit(1 << 50)
    assert ask(path, "mm_stat").split()[3] == str(1 << 50)


def test_json_is_one_line_with_everything(path: Path, opened: OpenDevice) -> None:
    fill(opened)
    text = ask(path, "json")
    assert text.count("\n") == 1
    assert text.endswith("\n")
    facts = json.loads(text)
    assert facts["name"] == "zram7"
    assert facts["uris"] == ["nbd+unix:///?socket=/a", "nbd://localhost:1"]
    assert facts["connections"] == 0
    assert (facts["disksize"], facts["comp_algorithm"], facts["level"]) == (SIZE, "lz4", 1)
    assert uuid.UUID(facts["uuid"]) == opened.device.identity.uuid
    assert list(facts["mm_stat"].values()) == fields(ask(path, "mm_stat"))
    assert [*fields(ask(path, "io_stat")), 0] == list(facts["io_stat"].values())
    assert facts["io_stat"]["failed_backing_reads"] == 0
    assert facts["stat"] == {"reads": 0, "read_sectors": 0, "writes": 3, "write_sectors": 48}
    assert list(facts["requests"]) == ["read", "write", "flush", "trim", "write_zeroes", "cache", "block_status"]
    assert list(facts["requests"]["read"]) == ["count", "errors", "bytes", "nanoseconds", "buckets"]
    assert len(facts["requests"]["read"]["buckets"]) == len(facts["latency_bounds"]) + 1
    assert facts["inflight"] == 0


# The conversation


@pytest.mark.parametrize("name", NAMES)
def test_each_answer_is_followed_by_a_blank_line(path: Path, name: str) -> None:
    answer = converse(path, f"{name}\n".encode())
    assert answer == "\n" or answer.endswith("\n\n")
    assert answer.count("\n") == {"classes": 123, "codecs": 4, "debug_stat": 3, "recomp_algorithm": 1, "work": 1}.get(
        name, 2
    )


def test_a_connection_may_ask_many_times(path: Path) -> None:
    with connect(path) as sock, sock.makefile("r") as lines:
        for _ in range(50):
            for name in ("disksize", "initstate"):
                sock.sendall(f"{name}\n".encode())
                assert lines.readline() == {"disksize": "67108864\n", "initstate": "1\n"}[name]
                assert lines.readline() == "\n"


def test_requests_sent_at_once_are_answered_in_order(path: Path) -> None:
    assert converse(path, b"disksize\ninitstate\n" * 1000) == "67108864\n\n1\n\n" * 1000


def test_a_request_may_come_in_pieces(path: Path) -> None:
    with connect(path) as sock, sock.makefile("r") as lines:
        for byte in b"disksize\nini":
            sock.sendall(bytes([byte]))
        assert (lines.readline(), lines.readline()) == ("67108864\n", "\n")
        sock.sendall(b"tstate\n")
        assert (lines.readline(), lines.readline()) == ("1\n", "\n")


@pytest.mark.parametrize("request_line", [b"disksize", b"disksize\r\n", b"  disksize \n", b"\n\ndisksize\n\n"])
def test_a_request_may_be_written_by_hand(path: Path, request_line: bytes) -> None:
    assert converse(path, request_line) == "67108864\n\n"


@pytest.mark.parametrize("name", [b"nothing", b"MM_STAT", b"mm_stat\t0", b"..", b"\xff\xfe", b"\0"])
def test_an_unknown_name_is_answered_with_the_names_there_are_and_the_connection_stays(path: Path, name: bytes) -> None:
    error, blank, *rest = converse(path, name + b"\ndisksize\n").split("\n")
    assert error.startswith("error: EINVAL ")
    assert all(known in error.split() for known in NAMES)
    assert blank == ""
    assert rest == ["67108864", "", ""]


def test_an_overlong_line_ends_the_connection_with_an_error(path: Path) -> None:
    with connect(path) as sock:
        sock.sendall(b"x" * (MAX_LINE + 1))
        error = receive_rest(sock).decode()
    assert error.startswith("error: E2BIG ")
    assert error.endswith("\n\n")
    assert error.count("\n") == 2
    assert ask(path, "initstate") == "1\n"


def test_a_client_that_leaves_without_its_answer_hurts_nobody(path: Path) -> None:
    for _ in range(20):  # fewer than there may be connections
        with connect(path) as sock:
            sock.sendall(b"json\n" * 20)
    assert ask(path, "initstate") == "1\n"


def test_idle_clients_keep_nobody_waiting_and_too_many_are_turned_away(path: Path) -> None:
    idle = [connect(path) for _ in range(31)]
    try:
        assert ask(path, "initstate") == "1\n"
        idle += [connect(path) for _ in range(20)]
        assert receive_rest(idle[-1]) == b""
    finally:
        for sock in idle:
            sock.close()


def test_many_clients_at_once_get_their_own_answers(path: Path) -> None:
    wrong: list[str] = []

    def client(name: str, answer: str) -> None:
        wrong.extend(given for given in (ask(path, name) for _ in range(30)) if given != answer)

    expected = [("disksize", "67108864\n"), ("initstate", "1\n"), ("comp_algorithm", "[lz4] lz4hc zstd \n")]
    threads = [threading.Thread(target=client, args=pair) for pair in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# Writes


@pytest.mark.parametrize(
    ("value", "limit"),
    [
        ("64K", 65536),
        ("0x1000", 4096),
        ("010", 4096),
        ("1", 4096),
        ("4097", 8192),
        ("1m", 1 << 20),
        ("2G of memory", 2 << 30),
        ("0", 0),
        ("0x", 0),
    ],
)
def test_mem_limit_takes_a_size_as_the_kernel_reads_it(path: Path, opened: OpenDevice, value: str, limit: int) -> None:
    opened.device.set_mem_limit(PAGE_SIZE * 17)
    assert converse(path, f"mem_limit {value}\n".encode()) == "\n"
    assert ask(path, "mem_limit") == f"{limit}\n"
    assert fields(ask(path, "mm_stat"))[3] == limit


@pytest.mark.parametrize(
    "value", ["none", "-1", "K", "99999999999999999999999999", "0xffffffffffffffffffffffffffff", "9999999E"]
)
def test_mem_limit_refuses_what_is_no_size_and_stays(path: Path, opened: OpenDevice, value: str) -> None:
    opened.device.set_mem_limit(PAGE_SIZE * 17)
    answer = converse(path, f"mem_limit {value}\n".encode())
    assert answer.startswith("error: EINVAL ")
    assert fields(ask(path, "mm_stat"))[3] == PAGE_SIZE * 17


def test_mem_used_max_is_reset_to_the_current_use(path: Path, opened: OpenDevice) -> None:
    fill(opened)
    with opened.device.lock:
        opened.device.discard(0, SIZE)
    assert fields(ask(path, "mem_used_max")) > [0]
    assert converse(path, b"mem_used_max 0\n") == "\n"
    assert ask(path, "mem_used_max") == "0\n"


@pytest.mark.parametrize("value", ["1", "-0", "none", "0K"])
def test_mem_used_max_takes_only_0(path: Path, opened: OpenDevice, value: str) -> None:
    fill(opened)
    before = ask(path, "mem_used_max")
    assert converse(path, f"mem_used_max {value}\n".encode()).startswith("error: EINVAL ")
    assert ask(path, "mem_used_max") == before


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WORDS])
def test_what_cannot_be_written_is_refused_and_the_connection_stays(path: Path, name: str) -> None:
    error, blank, *rest = converse(path, f"{name} 1\ninitstate\n".encode()).split("\n")
    assert error.startswith("error: EACCES ")
    assert name in error
    assert [blank, *rest] == ["", "1", "", ""]


@pytest.mark.parametrize("word", WORDS)
def test_the_status_socket_changes_nothing(path: Path, word: str) -> None:
    before = ask(path, "json")
    answer = converse(path.with_name("status"), f"{word} 1\ninitstate\n".encode())
    assert answer == f"error: EACCES this socket is for reading; changes go to {path}\n\n1\n\n"
    assert ask(path, "json") == before


@pytest.mark.parametrize("line", ["save  ", "restore  ", "restore fd size=1", "restore fd"])
def test_save_and_restore_say_what_they_take(path: Path, line: str) -> None:
    answer = converse(path, f"{line}\n".encode())
    assert re.match("error: EINVAL (save|restore) takes `fd`|error: EINVAL a descriptor has to come", answer)


def test_idle_readers_do_not_keep_the_owner_from_a_change(path: Path) -> None:
    idle = [connect(path.with_name("status")) for _ in range(40)]
    try:
        assert ask(path, "mem_limit 1M") == ""
    finally:
        for sock in idle:
            sock.close()


def test_only_the_owner_and_root_may_change_whatever_the_mode_of_the_socket(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    path.chmod(0o666)
    for directory in path.parents:
        if directory.stat().st_uid == 0 and not directory.stat().st_mode & 1:
            directory.chmod(0o711)
    script = (
        "import os, socket, sys; os.setgid(65534); os.setuid(65534); s = socket.socket(socket.AF_UNIX); "
        "s.connect(sys.argv[1]); s.sendall(b'mem_limit 1M\\n'); print(s.makefile().read(), end='')"
    )
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True)
    assert done.stdout == "error: EACCES only the owner of the server, user 0, may\n\n", done.stderr
    assert ask(path, "mem_limit") == "0\n"


def test_a_status_socket_may_be_for_a_group(tmp_path: Path) -> None:
    path = tmp_path / "for-a-group"
    listen_unix(path, 0o660, group=os.getegid()).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    assert path.stat().st_gid == os.getegid()


# The client


def test_the_client_raises_what_the_server_refused(path: Path) -> None:
    with pytest.raises(StatusError, match=r"^EINVAL no attribute 'nothing'"):
        ask(path, "nothing")


def test_the_client_says_where_nobody_answers(tmp_path: Path) -> None:
    with pytest.raises(StatusError, match=f"no server answers at {tmp_path}/nobody"):
        ask(tmp_path / "nobody", "mm_stat")


def test_the_client_returns_nothing_for_a_write(path: Path) -> None:
    assert ask(path, "mem_limit 1M") == ""


def test_the_pool_is_as_full_as_its_room_in_bytes_not_by_counting_objects() -> None:
    groups = " 0" * 11
    text = f"class size\n 1 64{groups} 64 0 1 1 1\n 254 4096{groups} 15 15 15 1 0\n\n Total{groups} 79 15 16 1\n"
    classes, total = parse_classes(text)
    assert [use.occupancy for use in classes] == [0, 1]
    assert (total.used, total.allocated, total.occupancy) == (15, 79, 15 / 16)
