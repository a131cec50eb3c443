import logging
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.nbd_bytes import ABORT, ACK, GREETING, client_flags, option, option_reply, receive_rest
from zramd.device.disk import Disk
from zramd.device.opening import OpenDevice
from zramd.listeners import listen_unix
from zramd.nbd.access import Access
from zramd.nbd.export import Export, Exports
from zramd.nbd.server import Server

USER, GROUP, OTHER = 60_001, 60_002, 60_003
PASSED = GREETING + option_reply(ABORT, ACK)

CLIENT = f"""
import os, socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
sock.settimeout(60)
try:
    sock.sendall({client_flags() + option(ABORT)!r})
except BrokenPipeError:
    pass
while True:
    try:
        data = sock.recv(4096)
    except ConnectionResetError:
        break
    if not data:
        break
    os.write(1, data)
"""

PASSING = """
import socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
with socket.socket(fileno=0) as starter:
    socket.send_fds(starter, [b"x"], [sock.fileno()])
    starter.recv(1)
"""

CERTIFICATE: dict[str, Any] = {
    "subject": (
        (("countryName", "DE"),),
        (("organizationName", "makers"), ("commonName", "build1")),
        (("commonName", "two"),),
    ),
    "issuer": ((("commonName", "the authority"),),),
    "subjectAltName": (
        ("DNS", "build1.example"),
        ("DNS", "*.wild.example"),
        ("IP Address", "192.0.2.1"),
        ("email", "ann@example"),
        ("URI", "spiffe://example/ann"),
        ("DirName", ((("commonName", "directory"),),)),
    ),
    "serialNumber": "01",
}


@pytest.mark.parametrize(
    "name",
    ["build1", "two", "build1.example", "*.wild.example", "192.0.2.1", "ann@example", "spiffe://example/ann"],
)
def test_a_certificate_is_admitted_by_any_of_its_names(name: str) -> None:
    assert Access(names=frozenset([name])).admits_certificate(CERTIFICATE)
    assert Access(names=frozenset(["another", name])).admits_certificate(CERTIFICATE)


@pytest.mark.parametrize(
    "name",
    [
        "build",
        "uild1",
        "build11",
        "Build1",
        "build1 ",
        " build1",
        "build1.exampl",
        "build1.example.",
        "build1.example.com",
        "x.build1.example",
        "BUILD1.EXAMPLE",
        "a.wild.example",
        "*.example",
        "*",
        "",
        "192.0.2.10",
        "ann",
        "directory",
        "DE",
        "makers",
        "the authority",
        "01",
        "commonName",
        "DNS",
        "build1\0",
    ],
)
def test_nothing_but_a_whole_name_in_the_same_case_admits_a_certificate(name: str) -> None:
    assert not Access(names=frozenset([name])).admits_certificate(CERTIFICATE)


@pytest.mark.parametrize("certificate", [None, {}, {"subject": (), "subjectAltName": ()}])
def test_without_a_name_nobody_is_admitted_where_names_are_asked_for(certificate: dict[str, Any] | None) -> None:
    assert not Access(names=frozenset(["build1"])).admits_certificate(certificate)
    assert Access().admits_certificate(certificate)


def test_users_and_groups_say_nothing_about_certificates_nor_names_about_users() -> None:
    assert Access(users=frozenset([OTHER]), groups=frozenset([OTHER])).admits_certificate(CERTIFICATE)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert Access(names=frozenset(["another"])).admits_peer(ours)


def test_the_peer_of_a_socket_pair_is_this_user() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert Access().admits_peer(ours)
        assert Access(users=frozenset([os.geteuid()])).admits_peer(ours)
        assert Access(groups=frozenset([os.getegid()])).admits_peer(ours)
        assert not Access(users=frozenset([OTHER])).admits_peer(ours)
        assert not Access(groups=frozenset([OTHER])).admits_peer(ours)
        assert Access(users=frozenset([OTHER]), groups=frozenset([os.getegid()])).admits_peer(ours)
        assert Access(users=frozenset([os.geteuid()]), groups=frozenset([OTHER])).admits_peer(ours)
        for group in os.getgroups():
            assert Access(groups=frozenset([group])).admits_peer(ours)


# Another user, for which the tests must run as root


@pytest.fixture
def directory() -> Iterator[Path]:
    """Return a directory that other users can enter."""
    if os.geteuid() != 0:
        pytest.skip("only root can be another user: run the tests with sudo")
    with tempfile.TemporaryDirectory(prefix="zramd-test-") as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


def as_user(path: Path, uid: int, gid: int, groups: list[int]) -> bytes:
    """Return what somebody else is told on a socket, who gives up the handshake at once."""
    done = subprocess.run(
        ["/usr/bin/env", "python3", "-I", "-S", "-c", CLIENT, str(path)],
        user=uid,
        group=gid,
        extra_groups=groups,
        capture_output=True,
        timeout=60,
        check=False,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class Running:
    """A server with this access on a socket to which everybody can connect."""

    def __init__(self, directory: Path, device: OpenDevice, access: Access) -> None:
        disk = Disk("disk", None)
        disk.opened = device
        self.path = directory / "nbd"
        self.server = Server(Exports([Export("disk", "", disk)]), access=access)
        self.server.accept_on(listen_unix(self.path, 0o666))


@pytest.fixture
def running(directory: Path, opened: OpenDevice, request: pytest.FixtureRequest) -> Iterator[Running]:
    server = Running(directory, opened, request.param)
    yield server
    assert server.server.stop(10)


def access(users: tuple[int, ...] = (), groups: tuple[int, ...] = ()) -> Access:
    return Access(frozenset(users), frozenset(groups))


ADMITTED = [
    pytest.param(access(), USER, GROUP, [], id="nobody is named"),
    pytest.param(access(users=(USER,)), USER, GROUP, [], id="a user"),
    pytest.param(access(users=(OTHER, USER)), USER, GROUP, [], id="one of two users"),
    pytest.param(access(groups=(GROUP,)), USER, GROUP, [], id="a primary group"),
    pytest.param(access(groups=(OTHER,)), USER, GROUP, [1, 2, OTHER, 3], id="a supplementary group"),
    pytest.param(access(groups=(200,)), USER, GROUP, list(range(1, 256)), id="one of 255 groups"),
    pytest.param(access(users=(0,), groups=(OTHER,)), USER, GROUP, [OTHER], id="no user but a group"),
]
REFUSED = [
    pytest.param(access(users=(0,)), USER, GROUP, [], id="another user"),
    pytest.param(access(users=(GROUP,)), USER, GROUP, [], id="the number of a group among the users"),
    pytest.param(access(groups=(USER,)), USER, GROUP, [], id="the number of a user among the groups"),
    pytest.param(access(groups=(0,)), USER, GROUP, [OTHER], id="other groups"),
    pytest.param(access(users=(0,), groups=(0,)), USER, GROUP, list(range(1, 256)), id="none of 255 groups"),
    pytest.param(access(groups=(200,)), USER, GROUP, list(range(1, 1000)), id="too many groups to tell"),
]


@pytest.mark.parametrize(("running", "uid", "gid", "groups"), ADMITTED, indirect=["running"])
def test_who_is_named_is_let_in(running: Running, uid: int, gid: int, groups: list[int]) -> None:
    assert as_user(running.path, uid, gid, groups) == PASSED


@pytest.mark.parametrize(("running", "uid", "gid", "groups"), REFUSED, indirect=["running"])
def test_who_is_not_named_learns_nothing_and_is_logged(
    running: Running, uid: int, gid: int, groups: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert as_user(running.path, uid, gid, groups) == b""
    assert [record.getMessage() for record in caplog.records] == [f"user {uid}, group {gid} is not let in"]


@pytest.mark.parametrize("running", [access(users=(USER,))], indirect=True)
def test_root_is_let_in_only_if_it_is_named(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(60)
        sock.connect(str(running.path))
        assert receive_rest(sock) == b""
    assert "user 0, group 0 is not let in" in caplog.text


@pytest.mark.parametrize("running", [access(users=(USER,))], indirect=True)
def test_what_counts_is_who_connected_not_who_has_the_socket_now(running: Running) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        done = subprocess.Popen(
            ["/usr/bin/env", "python3", "-I", "-S", "-c", PASSING, str(running.path)],
            stdin=theirs.fileno(),
            user=USER,
            group=GROUP,
            extra_groups=[],
            cwd="/",
        )
        theirs.close()
        _, (fd,), _, _ = socket.recv_fds(ours, 1, 1)
        ours.sendall(b"x")
        assert done.wait(60) == 0
    with socket.socket(fileno=fd) as sock:
        sock.settimeout(60)
        sock.sendall(client_flags() + option(ABORT))
        assert receive_rest(sock) == PASSED
