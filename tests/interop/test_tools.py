import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import ServerProcess, start_server
from tests.property.test_device import make_data

MIB = 1 << 20
PACKAGES = {
    "nbdinfo": "libnbd-bin",
    "nbdcopy": "libnbd-bin",
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
    "fio": "fio",
    "nbdkit": "nbdkit",
    "nbdsh": "python3-libnbd",
}


def run(
    program: str, *arguments: str | Path, directory: Path | None = None, environment: dict[str, str] | None = None
) -> str:
    """Run a program that must succeed and return what it printed."""
    if shutil.which(program) is None:
        pytest.skip(f"{program} is missing: apt install {PACKAGES[program]}")
    done = subprocess.run(
        [program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=directory,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a file of 48 MiB with data of every kind, and holes."""
    path = tmp_path_factory.mktemp("image") / "disk.img"
    with path.open("wb") as file:
        file.truncate(48 * MIB)
        for number, kind in enumerate(["random", "half", "text", "pattern", "short pattern", "zero"]):
            file.seek((number * 7 + 1) * MIB)
            file.write(bytes(make_data(kind, number, MIB)) * 3 + b"a ragged end")
        file.seek(48 * MIB - 5)
        file.write(b"thelast"[:5])
    yield path
    path.unlink()


@pytest.fixture
def server48(tmp_path: Path) -> Iterator[ServerProcess]:
    """Return a server of the image's size."""
    server = start_server(tmp_path, "--size", "48M")
    yield server
    assert server.stop() == (0, "")


def same(first: Path, second: Path) -> bool:
    with first.open("rb") as left, second.open("rb") as right:
        while part := left.read(MIB):
            if part != right.read(MIB):
                return False
        return not right.read(1)


def test_nbdinfo_shows_the_export(server: ServerProcess) -> None:
    text = run("nbdinfo", server.uri)
    for line in (
        "protocol: newstyle-fixed without TLS",
        "export-size: 67108864",
        "can_multi_conn: true",
        "can_trim: true",
        "can_zero: true",
        "block_size_preferred: 4096",
    ):
        assert line in text
    assert run("nbdinfo", "--size", server.uri) == "67108864\n"


def test_nbdinfo_json_has_every_field_right(server: ServerProcess) -> None:
    (export,) = json.loads(run("nbdinfo", "--json", server.uri))["exports"]
    expected = {
        "export-size": 64 * MIB,
        "is_rotational": False,
        "is_read_only": False,
        "can_cache": True,
        "can_df": True,
        "can_fast_zero": True,
        "can_flush": True,
        "can_fua": True,
        "can_multi_conn": True,
        "can_trim": True,
        "can_zero": True,
        "block_size_minimum": 1,
        "block_size_preferred": 4096,
        "block_size_maximum": 64 * MIB,
    }
    assert {name: export.get(name) for name in expected} == expected


def test_nbdinfo_lists_the_export_by_name(server: ServerProcess) -> None:
    exports = json.loads(run("nbdinfo", "--list", "--json", server.uri))["exports"]
    assert [(export["export-name"], export["export-size"]) for export in exports] == [("zram0", 64 * MIB)]
    assert exports[0]["description"]


@pytest.mark.parametrize("options", [(), ("--connections=4", "--requests=64", "--flush"), ("--request-size=4096",)])
def test_nbdcopy_in_and_out_is_identical(
    server48: ServerProcess, image: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    copy = tmp_path / "copy.img"
    run("nbdcopy", *options, image, server48.uri)
    run("nbdcopy", *options, server48.uri, copy)
    assert same(image, copy)
    copy.unlink()


def test_nbdcopy_over_old_data_leaves_nothing_of_them(server48: ServerProcess, image: Path, tmp_path: Path) -> None:
    run("qemu-io", "-f", "raw", "-c", "write -P 0xa5 0 48M", server48.uri)
    run("nbdcopy", image, server48.uri)
    copy = tmp_path / "copy.img"
    run("nbdcopy", server48.uri, copy)
    assert same(image, copy)
    copy.unlink()


def test_qemu_img_converts_to_and_from_it(server48: ServerProcess, image: Path, tmp_path: Path) -> None:
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", image, server48.uri)
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", image, server48.uri)
    packed, copy = tmp_path / "copy.qcow2", tmp_path / "copy.img"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", server48.uri, packed)
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", packed, copy)
    assert same(image, copy)
    copy.unlink()
    packed.unlink()


def test_a_qcow2_image_lives_on_it(server48: ServerProcess, image: Path) -> None:
    target = f"json:{{'driver':'qcow2','file':{{'driver':'nbd','server':{{'type':'unix','path':'{server48.unix}'}}}}}}"
    run("qemu-img", "create", "-f", "qcow2", server48.uri, "48M")
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "qcow2", "--target-is-zero", image, server48.uri)
    assert "identical" in run("qemu-img", "compare", "-f", "raw", image, target)


def test_qemu_io_reads_the_patterns_it_wrote(server: ServerProcess) -> None:
    commands = [
        "write -P 0x11 0 64k",
        "write -P 0x22 64k 1M",
        "write -P 0x33 513 513",
        "write -P 0x44 4095 4099",
        "write -f -P 0x55 2M 4k",
        "write -z 65k 10k",
        "write -z -u 200k 100k",
        "discard 512k 64k",
        "flush",
        "read -P 0x11 0 513",
        "read -P 0x33 513 513",
        "read -P 0x11 1026 3069",
        "read -P 0x44 4095 4099",
        "read -P 0x11 8194 57342",
        "read -P 0x22 64k 1k",
        "read -P 0 65k 10k",
        "read -P 0x22 75k 125k",
        "read -P 0 200k 100k",
        "read -P 0 512k 64k",
        "read -P 0x22 576k 512k",
        "read -P 0x55 2M 4k",
        "read -P 0 10M 33M",
    ]
    output = run("qemu-io", "-f", "raw", *(part for command in commands for part in ("-c", command)), server.uri)
    assert "failed" not in output
    assert "error" not in output


def test_qemu_io_gets_an_error_and_goes_on_when_the_memory_limit_is_reached(tmp_path: Path) -> None:
    server = start_server(tmp_path, "--size", "64M", "--mem-limit", "64K")
    noise = tmp_path / "noise"
    noise.write_bytes(bytes(make_data("random", 1, MIB)))
    if shutil.which("qemu-io") is None:
        pytest.skip(f"qemu-io is missing: apt install {PACKAGES['qemu-io']}")
    try:
        commands = [f"write -s {noise} 0 1M", "write -z 0 1M", "write -P 0 2M 1M", "read -P 0 0 3M"]
        done = subprocess.run(
            ["qemu-io", "-f", "raw", *(part for command in commands for part in ("-c", command)), server.uri],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert "write failed: No space left on device" in done.stdout + done.stderr
        assert "wrote 1048576/1048576 bytes at offset 2097152" in done.stdout
        assert "read 3145728/3145728 bytes at offset 0" in done.stdout
        assert "Pattern verification failed" not in done.stdout
    finally:
        assert server.stop() == (0, "")


@pytest.mark.parametrize("pattern", ["write", "randwrite"])
def test_fio_verifies_what_two_jobs_wrote_on_two_connections(
    server: ServerProcess, tmp_path: Path, pattern: str
) -> None:
    job = ["--size=32m", f"--rw={pattern}"]
    output = run(
        "fio",
        "--ioengine=nbd",
        f"--uri={server.uri}",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--do_verify=1",
        "--bsrange=4k-128k",
        "--bs_unaligned=0",
        "--iodepth=32",
        "--buffer_compress_percentage=50",
        "--refill_buffers",
        "--output-format=json",
        "--name=low",
        *job,
        "--offset=0",
        "--name=high",
        *job,
        "--offset=32m",
        directory=tmp_path,
    )
    jobs = json.loads(output[output.index("{") :])["jobs"]
    assert [(done["jobname"], done["error"]) for done in jobs] == [("low", 0), ("high", 0)]
    for done in jobs:
        assert done["write"]["io_bytes"] == 32 * MIB
        assert done["read"]["io_bytes"] >= 31 * MIB


def free_port(family: socket.AddressFamily, host: str) -> int:
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        try:
            sock.bind((host, 0))
        except OSError as error:
            pytest.skip(f"{host} cannot be used: {error}; enable it with sysctl net.ipv6.conf.lo.disable_ipv6=0")
        port: int = sock.getsockname()[1]
        return port


@pytest.mark.parametrize(
    ("family", "host", "written"),
    [(socket.AF_INET, "127.0.0.1", "127.0.0.1"), (socket.AF_INET6, "::1", "[::1]")],
    ids=["IPv4", "IPv6"],
)
def test_tcp_serves_as_the_unix_socket_does(
    tmp_path: Path, image: Path, family: socket.AddressFamily, host: str, written: str
) -> None:
    address = f"{written}:{free_port(family, host)}"
    server = start_server(tmp_path, "--size", "48M", "--tcp", address)
    copy = tmp_path / "copy.img"
    try:
        assert json.loads(server.ask("json"))["uris"] == [server.uri, f"nbd://{address}"]
        assert run("nbdinfo", "--size", f"nbd://{address}") == f"{48 * MIB}\n"
        run("nbdcopy", "--connections=2", image, f"nbd://{address}")
        run("nbdcopy", f"nbd://{address}", copy)
        assert same(image, copy)
        copy.unlink()
        run("nbdcopy", server.uri, copy)
        assert same(image, copy)
        copy.unlink()
    finally:
        assert server.stop() == (0, "")


@pytest.mark.parametrize("name", ["a b.nbd", "50%41.nbd", "a&b=c.nbd", "q?#.nbd", "größe.nbd"])
def test_the_uri_that_the_server_tells_reaches_it_whatever_its_path(
    tmp_path: Path, name: str, start_at: Callable[[Path], str]
) -> None:
    assert run("nbdinfo", "--size", start_at(tmp_path / name)) == f"{64 * MIB}\n"


@pytest.fixture
def start_at(tmp_path: Path) -> Iterator[Callable[[Path], str]]:
    """Return a function that starts a server on an NBD socket and returns the URI that the server tells."""
    servers = []

    def start(path: Path) -> str:
        # A Unix socket given twice: the later one holds.
        servers.append(start_server(tmp_path, "--size", "64M", "--unix", os.fspath(path)))
        uri: str = json.loads(servers[-1].ask("json"))["uris"][0]
        return uri

    yield start
    for server in servers:
        assert server.stop() == (0, "")


@pytest.fixture
def mixed(server: ServerProcess) -> ServerProcess:
    """Return a server whose disk has pages in every state: huge, compressed, same-filled, kept zeros, and empty."""
    nbd = pytest.importorskip("nbd", reason="needs libnbd's Python binding: apt-get install python3-libnbd")
    disk = nbd.NBD()
    disk.connect_uri(server.uri)
    disk.pwrite(bytes(make_data("random", 1, 8192)), 0)
    disk.pwrite(bytes(make_data("text", 1, 12288)), MIB)
    disk.pwrite(b"\1" * 8192, 2 * MIB)
    disk.zero(4096, 3 * MIB, nbd.CMD_FLAG_NO_HOLE)
    disk.shutdown()
    return server


MAP = [
    # first byte, bytes, base:allocation, zramd:state
    (0, 8192, 0, 3),
    (8192, MIB - 8192, 3, 0),
    (MIB, 12288, 0, 2),
    (MIB + 12288, MIB - 12288, 3, 0),
    (2 * MIB, 8192, 0, 1),
    (2 * MIB + 8192, MIB - 8192, 3, 0),
    (3 * MIB, 4096, 2, 1),
    (3 * MIB + 4096, 61 * MIB - 4096, 3, 0),
]


@pytest.mark.parametrize(("context", "column"), [("base:allocation", 2), ("zramd:state", 3)])
def test_nbdinfo_maps_the_make_up_of_the_disk(mixed: ServerProcess, context: str, column: int) -> None:
    found = json.loads(run("nbdinfo", "--json", f"--map={context}", mixed.uri))
    assert [(extent["offset"], extent["length"], extent["type"]) for extent in found] == [
        (row[0], row[1], row[column]) for row in MAP
    ]


def test_qemu_img_maps_holes_and_zeros(mixed: ServerProcess) -> None:
    found = json.loads(run("qemu-img", "map", "--output=json", mixed.uri))
    assert [(extent["start"], extent["length"], extent["zero"], extent["data"]) for extent in found] == [
        (offset, length, bool(status & 2), not status & 1) for offset, length, status, _ in MAP
    ]


def test_nbdsh_runs_a_session_of_its_own_server(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "zramd", "serve", "--stdio", "--size", "1M"]
    script = f"h.connect_command({command!r}); h.pwrite(b'nbdsh', 3); print(h.pread(9, 0), h.get_size())"
    path = f"/usr/bin:{os.environ['PATH']}"  # its Python must be Debian's
    printed = run("nbdsh", "-c", script, directory=tmp_path, environment={**os.environ, "PATH": path})
    assert printed == "bytearray(b'\\x00\\x00\\x00nbdsh\\x00') 1048576\n"


def test_nbdkit_compares_the_disk_with_what_was_copied_to_it(server48: ServerProcess, image: Path) -> None:
    run("nbdcopy", image, server48.uri)
    checking = (
        "--filter=checkwrite",
        "nbd",
        f"socket={server48.unix}",
        "--run",
        f"nbdcopy {shlex.quote(str(image))} $uri",
    )
    run("nbdkit", "-U", "-", *checking)
