import contextlib
import errno
import json
import shutil
import socket
import ssl
import struct
import subprocess
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.certificates import Certificates, make_certificates, openssl
from tests.configured import MODULE, disk_table, quoted, start_configured, write_config
from tests.conftest import ServerProcess
from tests.interop.test_tools import free_port, run, same
from tests.nbd_bytes import (
    ABORT,
    ACK,
    DISC,
    ERR_INVALID,
    ERR_POLICY,
    ERR_TLS_REQD,
    ERR_UNSUP,
    EXPORT_NAME,
    EXTENDED_HEADERS,
    FLUSH,
    GO,
    GREETING,
    INFO,
    LIST,
    READ,
    REPLY_BYTES,
    SET_META_CONTEXT,
    STARTTLS,
    STRUCTURED_REPLY,
    client_flags,
    info_request,
    option,
    option_reply,
    receive,
    receive_rest,
    reply,
    request,
    write_request,
)
from tests.property.test_device import make_data

MIB = 1 << 20
OPTION_REPLY_BYTES = 20
SEND_DF = 1 << 7
ALLOCATION = struct.pack(">I", 0) + struct.pack(">II", 1, 15) + b"base:allocation"
"""The data of a SET_META_CONTEXT for the default export."""
VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]
REFUSED = ["without", "foreign", "expired", "revoked"]
DATA = b"".join(bytes(make_data(kind, 7, MIB)) for kind in ("random", "half", "text", "pattern", "zero")) + b"ragged"


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@dataclass
class TlsServer:
    """A server on a Unix socket and a TCP port."""

    process: ServerProcess
    port: int
    certificates: Certificates

    @property
    def unix(self) -> Path:
        return self.process.unix

    def uri(self, client: str = "alice", *, unix: bool = False) -> str:
        """Return libnbd's URI for a client with its certificate."""
        place = f"nbds+unix:///?socket={self.unix}&" if unix else f"nbds://localhost:{self.port}/?"
        return f"{place}tls-certificates={self.certificates.client(client)}"

    def connect(self) -> socket.socket:
        """Return a connection with greeting and client flags exchanged."""
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(60)
        sock.connect(str(self.unix))
        assert receive(sock, len(GREETING)) == GREETING
        sock.sendall(client_flags())
        return sock

    def secure(
        self, client: str = "alice", sock: socket.socket | None = None, version: ssl.TLSVersion | None = None
    ) -> ssl.SSLSocket:
        """Return a TLS connection in the middle of the handshake, at whose end a missing close_notify is an error."""
        sock = sock or self.connect()
        try:
            sock.sendall(option(STARTTLS))
            assert receive(sock, OPTION_REPLY_BYTES) == option_reply(STARTTLS, ACK)
            context = client_context(self.certificates.client(client), version)
            return context.wrap_socket(sock, server_hostname="localhost", suppress_ragged_eofs=False)
        except BaseException:
            sock.close()
            raise

    def serves(self, client: str = "alice", version: ssl.TLSVersion | None = None) -> bool:
        """Say whether a client gets an answer to an option over TLS; otherwise TLS must have refused it."""
        try:
            with self.secure(client, version=version) as sock:
                sock.sendall(option(ABORT))
                return receive(sock, OPTION_REPLY_BYTES) == option_reply(ABORT, ACK)
        except (ssl.SSLError, ConnectionResetError, BrokenPipeError):
            return False

    def transmission(self, version: ssl.TLSVersion | None = None) -> ssl.SSLSocket:
        """Return a TLS connection to the default export, ready for requests."""
        sock = self.secure(version=version)
        sock.sendall(option(EXPORT_NAME))
        assert len(receive(sock, 10)) == 10
        return sock

    def wait_for_clients(self, count: int) -> None:
        """Wait until so many are connected to the disk."""
        for _ in range(3000):
            if json.loads(self.process.ask("json"))["connections"] == count:
                return
            time.sleep(0.01)
        pytest.fail(f"there are not {count} clients left")

    def stop(self) -> str:
        """End the server and return its log."""
        status, log = self.process.stop()
        assert status == 0
        assert "defect" not in log
        assert "Traceback" not in log
        return log


def client_context(directory: Path, version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF  # which Python sets
    context.load_verify_locations(directory / "ca-cert.pem")
    if (directory / "client-cert.pem").exists():
        context.load_cert_chain(directory / "client-cert.pem", directory / "client-key.pem")
    if version is not None:
        context.minimum_version = context.maximum_version = version
    return context


def start(directory: Path, certificates: Certificates, *lines: str, tables: str = "") -> TlsServer:
    """Start a server with these lines in its table [tls] beside the directory of certificates."""
    port = free_port(socket.AF_INET, "127.0.0.1")
    tls = (
        lines
        if any(line.startswith("psk") for line in lines)
        else (*lines, f"certificates = {quoted(certificates.strict)}")
    )
    text = "\n".join(
        [
            "[server]",
            f"unix = {quoted(directory / 'zram0.nbd')}",
            f'tcp = "localhost:{port}"',
            "[tls]",
            *tls,
            tables,
            disk_table(directory),
        ]
    )
    return TlsServer(start_configured(directory, text), port, certificates)


@pytest.fixture(scope="module")
def forced(certificates: Certificates, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsServer]:
    """Return a server that requires TLS."""
    server = start(tmp_path_factory.mktemp("forced"), certificates, 'mode = "require"')
    yield server
    server.stop()


@pytest.fixture(scope="module")
def selective(certificates: Certificates, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsServer]:
    """Return a server that clients can use with TLS and without."""
    server = start(tmp_path_factory.mktemp("selective"), certificates, 'mode = "on"')
    yield server
    server.stop()


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Path]:
    """Return a file as long as the disk, with data at its start and end."""
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.write(DATA * 2)
        file.seek(64 * MIB - len(DATA))
        file.write(DATA)
    yield path
    for left in tmp_path.glob("*.img"):
        left.unlink()


def qemu(server: TlsServer, *, unix: bool = False, priority: str = "", client: str = "alice") -> tuple[list[str], str]:
    """Return the options that give qemu-img or qemu-io its certificates, and the name of the disk."""
    credentials = f"tls-creds-x509,id=tls0,endpoint=client,dir={server.certificates.client(client)}"
    if priority:
        credentials += f",priority={priority}"
    place = f"path={server.unix},tls-hostname=localhost" if unix else f"host=localhost,port={server.port}"
    return ["--object", credentials], f"driver=nbd,{place},tls-creds=tls0"


# Clients


@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
def test_nbdinfo_finds_the_export_behind_tls(forced: TlsServer, unix: bool) -> None:
    text = run("nbdinfo", forced.uri(unix=unix))
    assert "protocol: newstyle-fixed with TLS, using structured packets" in text
    assert "export-size: 67108864" in text
    listed = json.loads(run("nbdinfo", "--list", "--json", forced.uri(unix=unix)))
    assert listed["TLS"] is True
    assert [export["export-name"] for export in listed["exports"]] == ["zram0"]


@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
@pytest.mark.parametrize("options", [(), ("--connections=4", "--requests=16", "--flush")], ids=["plain", "connections"])
def test_nbdcopy_in_and_out_is_identical(
    forced: TlsServer, image: Path, tmp_path: Path, unix: bool, options: tuple[str, ...]
) -> None:
    copy = tmp_path / "copy.img"
    run("nbdcopy", *options, image, forced.uri(unix=unix))
    run("nbdcopy", *options, forced.uri(unix=unix), copy)
    assert same(image, copy)


@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
def test_qemu_img_converts_to_and_from_it(forced: TlsServer, image: Path, tmp_path: Path, unix: bool) -> None:
    credentials, disk = qemu(forced, unix=unix)
    copy = tmp_path / "copy.img"
    run("qemu-img", "convert", *credentials, "-n", "-f", "raw", "--target-image-opts", image, disk)
    run("qemu-img", "convert", *credentials, "--image-opts", disk, "-O", "raw", copy)
    assert same(image, copy)


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_qemu_io_reads_the_patterns_it_wrote_with_either_version(forced: TlsServer, version: str) -> None:
    credentials, disk = qemu(forced, priority=f"NORMAL:-VERS-ALL:+VERS-TLS{version}")
    commands = [
        "write -P 0x11 0 2M",
        "write -P 0x22 513 513",
        "write -z 64k 64k",
        "write -f -P 0x33 1M 4k",
        "discard 128k 64k",
        "flush",
        "read -P 0x11 0 513",
        "read -P 0x22 513 513",
        "read -P 0 64k 128k",
        "read -P 0x33 1M 4k",
        "read -P 0x11 1028k 1020k",
    ]
    output = run("qemu-io", *credentials, "--image-opts", *(part for each in commands for part in ("-c", each)), disk)
    assert "failed" not in output
    assert "error" not in output


def test_fio_verifies_what_two_jobs_wrote(certificates: Certificates, tmp_path: Path) -> None:
    # It does not let a URI name files, so it has no certificate, and no authority to trust.
    server = start(tmp_path, certificates, 'mode = "require"', "verify-clients = false")
    jobs = ["--name=low", "--size=8m", "--offset=0", "--name=high", "--size=8m", "--offset=32m"]
    output = run(
        "fio",
        "--ioengine=nbd",
        f"--uri=nbds://localhost:{server.port}/?tls-verify-peer=false",
        "--rw=randwrite",
        "--bsrange=4k-128k",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--iodepth=16",
        "--output-format=json",
        *jobs,
        directory=tmp_path,
    )
    done = json.loads(output[output.index("{") :])["jobs"]
    assert [(job["jobname"], job["error"]) for job in done] == [("low", 0), ("high", 0)]
    assert all(job["write"]["io_bytes"] >= 7 * MIB and job["read"]["io_bytes"] >= 7 * MIB for job in done)
    server.stop()


def libnbd(uri: str) -> Any:
    nbd = pytest.importorskip("nbd", reason="libnbd's Python module is missing: apt install python3-libnbd")
    handle = nbd.NBD()
    handle.add_meta_context("base:allocation")
    handle.set_uri_allow_local_file(True)
    handle.connect_uri(uri)
    return handle


@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
def test_libnbd_writes_and_reads_much_more_at_once_than_the_buffers_hold(forced: TlsServer, unix: bool) -> None:
    disk = libnbd(forced.uri(unix=unix))
    assert disk.get_tls_negotiated()
    assert disk.get_structured_replies_negotiated()
    data = bytes(make_data("half", 3, 31 * MIB)) + bytes(make_data("random", 4, MIB))
    disk.trim(64 * MIB, 0)
    disk.pwrite(data, 4095)
    assert disk.pread(len(data), 4095) == data
    assert disk.pread(len(data), 4096) == data[1:] + bytes(1)
    disk.trim(64 * MIB, 0)
    disk.shutdown()


def test_libnbd_gets_holes_and_block_status_in_structured_replies(forced: TlsServer) -> None:
    disk = libnbd(forced.uri())
    disk.trim(64 * MIB, 0)
    disk.pwrite(DATA[:MIB], MIB)
    extents: list[int] = []
    disk.block_status(4 * MIB, 0, lambda _name, _offset, entries, _error: extents.extend(entries))
    assert extents[:6:2] == [MIB, MIB, extents[4]]
    assert extents[1:6:2] == [3, 0, 3]
    chunks: list[tuple[int, int, int]] = []
    data = disk.pread_structured(3 * MIB, 0, lambda part, offset, kind, _: chunks.append((offset, len(part), kind)))
    assert data == bytes(MIB) + DATA[:MIB] + bytes(MIB)
    hole = 2
    assert sum(length for _, length, kind in chunks if kind == hole) == 2 * MIB
    disk.trim(64 * MIB, 0)
    disk.shutdown()


def test_four_connections_see_each_others_writes(forced: TlsServer) -> None:
    handles = [libnbd(forced.uri(unix=bool(number % 2))) for number in range(4)]
    assert all(handle.can_multi_conn() for handle in handles)
    for number in range(64):
        data = DATA[number * 40_000 : number * 40_000 + 70_000]
        handles[number % 4].pwrite(data, number * 70_001)
        assert handles[(number + 1) % 4].pread(len(data), number * 70_001) == data
    for number in range(64):
        assert handles[number % 4].pread(70_000, number * 70_001) == DATA[number * 40_000 : number * 40_000 + 70_000]
    for handle in handles:
        handle.shutdown()


def test_many_requests_in_one_record_are_answered_in_order(forced: TlsServer) -> None:
    with forced.transmission() as sock:
        parts = [DATA[number * 4096 : number * 4096 + 4096] for number in range(200)]
        sock.sendall(b"".join(write_request(number, number * 4096, part) for number, part in enumerate(parts)))
        sock.sendall(request(FLUSH, 200) + request(READ, 201, 0, 200 * 4096))
        expected = b"".join(map(reply, range(201))) + reply(201, b"".join(parts))
        assert receive(sock, len(expected)) == expected


# Modes


def test_with_tls_off_starttls_is_refused_and_the_handshake_goes_on(server: ServerProcess) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(server.unix))
        sock.sendall(client_flags() + option(STARTTLS) + option(ABORT))
        received = receive_rest(sock)
    assert received.startswith(GREETING + option_reply(STARTTLS, ERR_POLICY)[:16])
    assert received.endswith(option_reply(ABORT, ACK))
    done = subprocess.run(
        ["nbdinfo", f"nbds+unix:///?socket={server.unix}&tls-verify-peer=false"], capture_output=True, check=False
    )
    assert done.returncode != 0


def test_with_tls_on_both_kinds_of_client_see_one_disk(selective: TlsServer) -> None:
    plain = libnbd(f"nbd+unix:///?socket={selective.unix}")
    secure = libnbd(selective.uri())
    assert not plain.get_tls_negotiated()
    assert secure.get_tls_negotiated()
    plain.pwrite(DATA, 0)
    assert secure.pread(len(DATA), 0) == DATA
    secure.pwrite(DATA, 8 * MIB)
    assert plain.pread(len(DATA), 8 * MIB) == DATA
    plain.shutdown()
    secure.shutdown()


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (LIST, b""),
        (INFO, info_request(b"")),
        (GO, info_request(b"")),
        (GO, info_request(b"no such export")),
        (STRUCTURED_REPLY, b""),
        (EXTENDED_HEADERS, b""),
        (SET_META_CONTEXT, ALLOCATION),
        (99, b"data"),
    ],
)
def test_a_server_that_requires_tls_answers_nothing_else_in_plain_text(
    forced: TlsServer, kind: int, data: bytes
) -> None:
    with forced.connect() as sock:
        sock.sendall(option(kind, data) + option(ABORT))
        received = receive_rest(sock)
    header, rest = received[:OPTION_REPLY_BYTES], received[OPTION_REPLY_BYTES:]
    assert header[:16] == option_reply(kind, ERR_TLS_REQD)[:16]
    (length,) = struct.unpack(">I", header[16:])
    assert rest[length:] == option_reply(ABORT, ACK)
    assert b"zram0" not in received


def test_a_server_that_requires_tls_drops_who_names_an_export_without(forced: TlsServer) -> None:
    with forced.connect() as sock:
        sock.sendall(option(EXPORT_NAME))
        assert receive_rest(sock) == b""


def test_nbdinfo_without_tls_is_told_that_it_is_required(forced: TlsServer) -> None:
    done = subprocess.run(
        ["nbdinfo", "--size", f"nbd://localhost:{forced.port}"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode != 0
    assert "requires TLS" in done.stderr


def test_after_starttls_unknown_options_are_answered_and_nothing_says_that_tls_is_required(forced: TlsServer) -> None:
    with forced.secure() as sock:
        sock.sendall(option(99, b"data"))
        assert receive(sock, 16) == option_reply(99, ERR_UNSUP)[:16]


def test_starttls_takes_no_data_and_works_once(forced: TlsServer) -> None:
    with forced.connect() as plain:
        plain.sendall(option(STARTTLS, b"data"))
        header = receive(plain, OPTION_REPLY_BYTES)
        assert header[:16] == option_reply(STARTTLS, ERR_INVALID)[:16]
        receive(plain, int.from_bytes(header[16:]))
        with forced.secure(sock=plain) as sock:
            sock.sendall(option(STARTTLS) + option(ABORT))
            received = receive_rest(sock)
    assert received[:16] == option_reply(STARTTLS, ERR_INVALID)[:16]
    assert received.endswith(option_reply(ABORT, ACK))


def test_starttls_is_not_for_a_client_without_fixed_newstyle(forced: TlsServer) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(forced.unix))
        sock.sendall(client_flags(0) + option(STARTTLS))
        assert receive_rest(sock) == GREETING


# Versions


@pytest.mark.parametrize("version", VERSIONS, ids=["1.2", "1.3"])
def test_tls_from_1_2_on_works(forced: TlsServer, version: ssl.TLSVersion) -> None:
    with forced.transmission(version) as sock:
        assert sock.version() == {VERSIONS[0]: "TLSv1.2", VERSIONS[1]: "TLSv1.3"}[version]
        sock.sendall(write_request(1, 5, DATA) + request(READ, 2, 5, len(DATA)))
        assert receive(sock, 2 * REPLY_BYTES + len(DATA)) == reply(1) + reply(2, DATA)


def test_tls_1_1_is_refused(forced: TlsServer) -> None:
    context = client_context(forced.certificates.client("alice"))
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with forced.connect() as plain:
        plain.sendall(option(STARTTLS))
        receive(plain, OPTION_REPLY_BYTES)
        # The server's alert: had this client no TLS 1.1 itself, the reason would be another.
        with pytest.raises(ssl.SSLError, match="ALERT_PROTOCOL_VERSION"):
            context.wrap_socket(plain, server_hostname="localhost")


# Who is let in


@pytest.mark.parametrize("version", VERSIONS, ids=["1.2", "1.3"])
@pytest.mark.parametrize("client", REFUSED)
def test_who_shows_no_good_certificate_is_refused(forced: TlsServer, client: str, version: ssl.TLSVersion) -> None:
    assert not forced.serves(client, version)
    assert forced.serves("alice", version)


@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
@pytest.mark.parametrize("client", REFUSED)
def test_libnbd_without_a_good_certificate_is_refused(forced: TlsServer, client: str, unix: bool) -> None:
    with pytest.raises(Exception, match="gnutls_record_"):
        libnbd(forced.uri(client, unix=unix))


def test_each_refusal_is_logged_in_one_line(certificates: Certificates, tmp_path: Path) -> None:
    server = start(tmp_path, certificates, 'mode = "require"')
    for client in REFUSED:
        assert not server.serves(client)
    lines = server.stop().splitlines()
    assert len(lines) == len(REFUSED)
    assert all(line.startswith("zramd: connection ended: TLS failed: ") for line in lines)


def test_without_a_list_of_revoked_certificates_only_that_one_is_let_in_too(
    certificates: Certificates, tmp_path: Path
) -> None:
    server = start(
        tmp_path, Certificates(certificates.server, certificates.server, certificates.clients), 'mode = "on"'
    )
    assert [client for client in REFUSED if server.serves(client)] == ["revoked"]
    server.stop()


def test_clients_that_are_not_verified_need_no_certificate(certificates: Certificates, tmp_path: Path) -> None:
    server = start(tmp_path, certificates, 'mode = "require"', "verify-clients = false")
    assert [client for client in ["alice", *REFUSED] if server.serves(client)] == ["alice", *REFUSED]
    disk = libnbd(server.uri("without"))
    disk.pwrite(DATA, 0)
    assert disk.pread(len(DATA), 0) == DATA
    disk.shutdown()
    server.stop()


@pytest.mark.parametrize(
    ("names", "admitted"),
    [
        (["alice"], ["alice"]),
        (["bob.example"], ["bob"]),
        (["bob.other.example"], ["bob"]),
        (["bob", "alice.example"], ["alice", "bob"]),
        (
            [
                "Alice",
                "alic",
                "lice",
                "alice.exampl",
                "alice.example.",
                ".example",
                "*.example",
                "example",
                "ALICE.EXAMPLE",
                "alice.example.com",
                "other.example",
                "CN=alice",
                "DNS:alice.example",
                "zramd tests",
                " alice",
            ],
            [],
        ),
    ],
    ids=["common name", "alternative name", "second alternative name", "either", "no other name"],
)
def test_of_verified_clients_only_those_with_an_allowed_name_are_let_in(
    certificates: Certificates, tmp_path: Path, names: list[str], admitted: list[str]
) -> None:
    access = f"[access]\ncertificate-names = {quoted(names)}\n"
    server = start(tmp_path, certificates, 'mode = "require"', tables=access)
    assert [client for client in ["alice", "bob", *REFUSED] if server.serves(client)] == admitted
    log = server.stop()
    assert log.count("the name in the client's certificate is not let in") == 2 - len(admitted)


# What goes wrong


@pytest.mark.parametrize(
    "injected",
    [
        option(ABORT),
        option(GO, info_request(b"")),
        option(EXPORT_NAME) + write_request(1, 0, b"injected" * 512),
        bytes(1),
        b"GET / HTTP/1.1\r\n\r\n",
    ],
    ids=["ABORT", "GO", "a write", "a byte", "HTTP"],
)
def test_plain_text_behind_starttls_ends_the_session_and_is_not_obeyed(selective: TlsServer, injected: bytes) -> None:
    with selective.transmission() as sock:
        sock.sendall(write_request(1, 0, DATA[:4096]))
        assert receive(sock, REPLY_BYTES) == reply(1)
        with selective.connect() as plain:
            plain.sendall(option(STARTTLS) + injected)
            assert receive(plain, OPTION_REPLY_BYTES) == option_reply(STARTTLS, ACK)
            # A server that had kept what was injected for after TLS would now shake hands.
            with pytest.raises(OSError, match=r"SSL|reset|Broken pipe"):
                client_context(selective.certificates.client("alice")).wrap_socket(plain, server_hostname="localhost")
        sock.sendall(request(READ, 2, 0, 4096))
        assert receive(sock, REPLY_BYTES + 4096) == reply(2, DATA[:4096])


def test_what_was_agreed_on_before_starttls_is_forgotten(selective: TlsServer) -> None:
    with selective.connect() as plain:
        plain.sendall(option(STRUCTURED_REPLY) + option(SET_META_CONTEXT, ALLOCATION) + option(EXTENDED_HEADERS))
        acknowledged = option_reply(STRUCTURED_REPLY, ACK)
        chosen = option_reply(SET_META_CONTEXT, 4, struct.pack(">I", 1) + b"base:allocation")
        received = receive(plain, len(acknowledged) * 3 + len(chosen))
        assert received.startswith(acknowledged)
        assert received.endswith(option_reply(SET_META_CONTEXT, ACK) + option_reply(EXTENDED_HEADERS, ACK))
        with selective.secure(sock=plain) as sock:
            sock.sendall(option(SET_META_CONTEXT, ALLOCATION))
            header = receive(sock, OPTION_REPLY_BYTES)
            assert header[:16] == option_reply(SET_META_CONTEXT, ERR_INVALID)[:16]
            receive(sock, int.from_bytes(header[16:]))
            # With extended headers this option would end the session.
            sock.sendall(option(EXPORT_NAME))
            size, flags = struct.unpack(">QH", receive(sock, 10))
            assert size == 64 * MIB
            assert not flags & SEND_DF
            block_status = 7
            sock.sendall(write_request(1, 0, DATA[:4096]) + request(READ, 2, 0, 4096))
            assert receive(sock, 2 * REPLY_BYTES + 4096) == reply(1) + reply(2, DATA[:4096])
            sock.sendall(request(block_status, 3, 0, 4096))
            assert receive(sock, REPLY_BYTES) == reply(3, error=errno.EINVAL)


def trickle(sock: socket.socket, data: bytes) -> None:
    for byte in data:
        sock.sendall(bytes([byte]))
        time.sleep(0.1)


@pytest.mark.parametrize("pieces", ["nothing", "half", "one byte at a time"])
def test_a_client_that_stalls_in_tls_is_dropped_in_the_end_and_holds_nobody_up(
    certificates: Certificates, tmp_path: Path, pieces: str
) -> None:
    server = start(tmp_path, certificates, 'mode = "require"', tables="[limits]\nhandshake-seconds = 1\n")
    hello = ssl.MemoryBIO()
    client = client_context(certificates.client("alice")).wrap_bio(ssl.MemoryBIO(), hello, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    data = hello.read()
    with server.connect() as plain, contextlib.ExitStack() as others:
        plain.sendall(option(STARTTLS))
        receive(plain, OPTION_REPLY_BYTES)
        if pieces == "half":
            plain.sendall(data[: len(data) // 2])
        for _ in range(3):
            others.enter_context(server.transmission()).sendall(request(READ, 1, 0, 4096))
        if pieces == "one byte at a time":
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                trickle(plain, data)
        assert receive_rest(plain) == b""
    assert server.serves()
    server.stop()


@pytest.mark.parametrize("version", VERSIONS, ids=["1.2", "1.3"])
@pytest.mark.parametrize("unread", [False, True], ids=["all read", "replies unread"])
def test_disc_and_abort_are_followed_by_close_notify(forced: TlsServer, version: ssl.TLSVersion, unread: bool) -> None:
    with forced.transmission(version) as sock:
        sock.sendall(request(READ, 1, 0, 8192) + request(DISC, 2))
        if not unread:
            assert len(receive(sock, REPLY_BYTES + 8192)) == REPLY_BYTES + 8192
        # Without close_notify this raises SSLEOFError.
        assert len(receive_rest(sock)) == (REPLY_BYTES + 8192 if unread else 0)
    with forced.secure(version=version) as sock:
        sock.sendall(option(ABORT))
        assert receive_rest(sock) == option_reply(ABORT, ACK)


def test_a_client_that_vanishes_in_mid_reply_leaves_the_server_well(certificates: Certificates, tmp_path: Path) -> None:
    server = start(tmp_path, certificates, 'mode = "require"')
    with server.transmission() as filling:
        filling.sendall(write_request(1, 0, DATA))
        assert receive(filling, REPLY_BYTES) == reply(1)
        for number in range(6):
            with server.transmission() as sock:
                sock.sendall(request(READ, 1, 0, 32 * MIB) * 4)
                assert len(receive(sock, REPLY_BYTES + number)) == REPLY_BYTES + number
        for number in range(6):
            with server.transmission() as sock:
                sock.sendall(write_request(1, 32 * MIB, DATA)[: 100_000 * number + 50])
        server.wait_for_clients(1)
        filling.sendall(request(READ, 2, 0, len(DATA)))
        assert receive(filling, REPLY_BYTES + len(DATA)) == reply(2, DATA)
    server.stop()


def test_a_cut_without_close_notify_in_the_middle_of_a_record_leaves_the_server_well(
    certificates: Certificates, tmp_path: Path
) -> None:
    server = start(tmp_path, certificates, 'mode = "require"')
    for damage in (b"", b"\x17\x03\x03\x40\x00half a record", b"\x17\x03\x03\x00\x20" + b"\xff" * 32, b"\xff" * 1000):
        with server.transmission() as sock, socket.socket(fileno=sock.detach()) as raw:
            raw.settimeout(60)
            raw.sendall(damage)
            raw.shutdown(socket.SHUT_WR)
            receive_rest(raw)
    server.wait_for_clients(0)
    assert server.serves()
    server.stop()


@pytest.mark.parametrize("unread", [1, 4096, 200_000])
def test_all_that_a_client_wrote_before_disc_is_kept_though_it_takes_no_replies(
    certificates: Certificates, tmp_path: Path, unread: int
) -> None:
    server = start(tmp_path, certificates, 'mode = "require"')
    for turn in range(5):
        parts = [struct.pack(">QQ", turn, number) * 256 for number in range(400)]
        with server.transmission() as sock:
            sock.sendall(request(READ, 1, 0, unread))
            sock.sendall(b"".join(write_request(number, number * 4096, part) for number, part in enumerate(parts)))
            sock.sendall(request(DISC, 1))
        server.wait_for_clients(0)
        with server.transmission() as sock:
            sock.sendall(request(READ, 1, 0, 400 * 4096))
            data = receive(sock, REPLY_BYTES + 400 * 4096)[REPLY_BYTES:]
        assert [number for number, part in enumerate(parts) if data[number * 4096 : number * 4096 + 4096] != part] == []
        server.wait_for_clients(0)
    server.stop()


def test_a_signal_ends_a_server_with_idle_tls_clients(certificates: Certificates, tmp_path: Path) -> None:
    server = start(tmp_path, certificates, 'mode = "require"')
    with server.transmission() as idle, server.secure() as early, server.connect() as stalled:
        stalled.sendall(option(STARTTLS))
        idle.sendall(write_request(1, 0, DATA))
        assert receive(idle, REPLY_BYTES) == reply(1)
        server.stop()
        # With close_notify.
        assert receive_rest(idle) == b""
        # The server may not even have seen the end of this one's TLS handshake.
        with contextlib.suppress(ssl.SSLError):
            assert receive_rest(early) == b""


# Certificates and keys that cannot be used


@pytest.fixture
def broken(certificates: Certificates, tmp_path: Path) -> Path:
    """Return a copy of the server's directory, to be damaged."""
    return Path(shutil.copytree(certificates.strict, tmp_path / "broken"))


def assert_not_started(directory: Path, tls: str, *words: str) -> None:
    """Check that a server ends at its start with one line that has these words."""
    text = (
        f'[server]\nunix = {quoted(directory / "zram0.nbd")}\n[tls]\nmode = "require"\n{tls}\n{disk_table(directory)}'
    )
    config = write_config(directory, text)
    done = subprocess.run(
        [*MODULE, "serve", "--config", config], capture_output=True, text=True, check=False, timeout=30
    )
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ")
    for word in words:
        assert word in line
    assert not list(directory.glob("zram0.*"))


@pytest.mark.parametrize("name", ["ca-cert.pem", "server-cert.pem", "server-key.pem"])
@pytest.mark.parametrize("damage", ["missing", "empty", "text", "unreadable"])
def test_a_file_that_cannot_be_used_is_named_or_its_directory_is(
    broken: Path, tmp_path: Path, name: str, damage: str
) -> None:
    file = broken / name
    file.unlink()
    if damage == "unreadable":
        file.mkdir()
    elif damage != "missing":
        file.write_text("no certificate\n" if damage == "text" else "")
    word = str(file) if damage in ("missing", "unreadable") else str(broken)
    assert_not_started(tmp_path, f"certificates = {quoted(broken)}", word)


def test_a_broken_list_of_revoked_certificates_is_refused(broken: Path, tmp_path: Path) -> None:
    (broken / "ca-crl.pem").write_text("nobody\n")
    assert_not_started(tmp_path, f"certificates = {quoted(broken)}", str(broken))


def test_a_key_of_another_certificate_is_refused(broken: Path, certificates: Certificates, tmp_path: Path) -> None:
    shutil.copy(certificates.client("bob") / "client-key.pem", broken / "server-key.pem")
    assert_not_started(tmp_path, f"certificates = {quoted(broken)}", str(broken))


def test_an_encrypted_key_is_refused_without_a_question(broken: Path, tmp_path: Path) -> None:
    openssl(broken, "pkey", "-in", "server-key.pem", "-aes256", "-passout", "pass:secret", "-out", "encrypted.pem")
    (broken / "encrypted.pem").replace(broken / "server-key.pem")
    assert_not_started(tmp_path, f"certificates = {quoted(broken)}", "server-key.pem is encrypted")


def test_without_verified_clients_no_authority_is_needed(certificates: Certificates, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(certificates.server, tmp_path / "alone"))
    (alone / "ca-cert.pem").unlink()
    made = Certificates(alone, alone, certificates.clients)
    server = start(tmp_path, made, 'mode = "require"', "verify-clients = false")
    assert server.serves("without")
    server.stop()


def test_the_option_tls_requires_tls_with_a_directory(certificates: Certificates, tmp_path: Path) -> None:
    command = [*MODULE, "serve", "--size", "64M", "--volatile", "--tls", str(certificates.strict)]
    sockets = ["--unix", str(tmp_path / "zram0.nbd"), "--status", str(tmp_path / "zram0.status")]
    process = subprocess.Popen([*command, *sockets], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(3)]
    assert f"NBD URI: nbds+unix:///?socket={tmp_path}/zram0.nbd\n" in lines
    running = ServerProcess(process, *(tmp_path / f"zram0.{name}" for name in ("nbd", "status", "admin")))
    server = TlsServer(running, 0, certificates)
    assert server.serves("alice")
    assert not server.serves("without")
    with server.connect() as sock:
        sock.sendall(option(LIST))
        assert receive(sock, 16) == option_reply(LIST, ERR_TLS_REQD)[:16]
    server.stop()


# Pre-shared keys

HAS_PSK = hasattr(ssl.SSLContext, "set_psk_server_callback")
KEYS = {"alice": "00112233445566778899aabbccddeeff", "bob": "ff" * 32}
needs_psk = pytest.mark.skipif(not HAS_PSK, reason="this Python's ssl has no pre-shared keys: run with 3.13 or newer")


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """Return a file of keys, in a directory as QEMU wants it."""
    directory = tmp_path / "keys"
    directory.mkdir()
    path = directory / "keys.psk"
    path.write_text("# of the tests\n\n" + "".join(f"{user}:{key}\n" for user, key in KEYS.items()))
    return path


@pytest.mark.skipif(HAS_PSK, reason="this Python's ssl has pre-shared keys")
def test_a_python_without_pre_shared_keys_says_so_in_one_line(keys: Path, tmp_path: Path) -> None:
    assert_not_started(tmp_path, f"psk-file = {quoted(keys)}", "3.13", "certificates")


@needs_psk
def test_clients_with_pre_shared_keys_read_what_they_wrote(
    certificates: Certificates, keys: Path, image: Path, tmp_path: Path
) -> None:
    server = start(tmp_path, certificates, 'mode = "require"', f"psk-file = {quoted(keys)}")
    copy = tmp_path / "copy.img"
    tcp = f"nbds://bob@localhost:{server.port}/?tls-psk-file={keys}"
    unix = f"nbds+unix://alice@/?socket={server.unix}&tls-psk-file={keys}"
    assert run("nbdinfo", "--size", unix) == f"{64 * MIB}\n"
    run("nbdcopy", image, unix)
    run("nbdcopy", tcp, copy)
    assert same(image, copy)
    for version in ("1.2", "1.3"):
        priority = f"NORMAL:-VERS-ALL:+VERS-TLS{version}:+ECDHE-PSK:+DHE-PSK:+PSK"
        credentials = f"tls-creds-psk,id=tls0,endpoint=client,dir={keys.parent},username=alice,priority={priority}"
        disk = f"driver=nbd,host=localhost,port={server.port},tls-creds=tls0"
        output = run("qemu-io", "--object", credentials, "--image-opts", "-c", "read 0 1M", disk)
        assert "read 1048576/1048576" in output
    server.stop()


@needs_psk
@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_an_unknown_user_a_wrong_key_and_no_key_are_refused(
    certificates: Certificates, keys: Path, tmp_path: Path, version: str
) -> None:
    server = start(tmp_path, certificates, 'mode = "require"', f"psk-file = {quoted(keys)}")
    reasons = []
    for user, key in [("alice", KEYS["alice"]), ("mallory", KEYS["alice"]), ("alice", KEYS["bob"])]:
        context: Any = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.minimum_version = context.maximum_version = VERSIONS[version == "1.3"]
        context.set_ciphers("PSK")
        context.set_psk_client_callback(lambda _, user=user, key=key: (user, bytes.fromhex(key)))
        with server.connect() as plain:
            plain.sendall(option(STARTTLS))
            receive(plain, OPTION_REPLY_BYTES)
            try:
                with context.wrap_socket(plain) as sock:
                    sock.sendall(option(ABORT))
                    assert receive(sock, OPTION_REPLY_BYTES) == option_reply(ABORT, ACK)
                    reasons.append("")
            except ssl.SSLError as error:
                reasons.append(error.reason)
    assert reasons[0] == ""
    assert reasons[1]
    # Nobody learns which users there are.
    assert reasons[1] == reasons[2]
    assert not server.serves("alice")
    server.stop()


@needs_psk
@pytest.mark.parametrize("line", ["alice", "alice:", "alice:xyz", ":00", "alice:0"])
def test_a_line_that_is_no_user_and_key_is_named(keys: Path, tmp_path: Path, line: str) -> None:
    keys.write_text(f"bob:00\n{line}\n")
    assert_not_started(tmp_path, f"psk-file = {quoted(keys)}", f"{keys}:2")
