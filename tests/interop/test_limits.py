"""Limits and the order of allocation and free, as measured on a kernel zram device (Linux 6.18, chain size 8, lz4)."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ServerProcess, start_server
from zramd.device.codecs import codec
from zramd.layout import PAGE_SIZE

nbd = pytest.importorskip("nbd", reason="needs libnbd's Python binding: apt-get install python3-libnbd, scripts/setup")

RAW = [random.Random(seed).randbytes(PAGE_SIZE) for seed in range(12)]


class Rig:
    """A server of 256 KiB, lz4, and a client."""

    def __init__(self, server: ServerProcess) -> None:
        self.server = server
        self.client = nbd.NBD()
        self.client.connect_uri(server.uri)

    def write(self, page: int, data: bytes) -> None:
        self.client.pwrite(data, page * PAGE_SIZE)

    def read(self, page: int) -> bytes:
        return bytes(self.client.pread(PAGE_SIZE, page * PAGE_SIZE))

    def refuses(self, page: int, data: bytes) -> None:
        with pytest.raises(nbd.Error) as refused:
            self.write(page, data)
        assert refused.value.errno == "ENOSPC"

    def check(self, mm_stat: str, failed_writes: int = 0) -> None:
        """Compare with a row of mm_stat, in which `-` stands for a column that was not looked at."""
        columns = self.server.ask("mm_stat").split()
        wanted = mm_stat.split()
        assert [column if want != "-" else "-" for column, want in zip(columns, wanted, strict=True)] == wanted
        assert int(self.server.ask("io_stat").split()[1]) == failed_writes

    def notify_free(self) -> int:
        return int(self.server.ask("io_stat").split()[3])


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    server = start_server(tmp_path, "--size", "256K", "--algorithm", "lz4")
    rig = Rig(server)
    yield rig
    rig.client.shutdown()
    assert server.stop() == (0, "")


def compressed_to(length: int) -> bytes:
    """Return a page that lz4 makes `length` bytes of: a random prefix and zeros."""
    page = bytearray(PAGE_SIZE)
    compress = codec("lz4").compressor(page)
    for prefix in range(length):
        page[prefix] = RAW[2][prefix]
        if len(compress(0)) == length:
            return bytes(page)
    raise AssertionError(f"no page of {length} bytes")


def test_an_overwrite_shows_both_copies_in_mem_used_max(rig: Rig) -> None:
    rig.write(0, RAW[0])
    rig.server.ask("mem_used_max 0")
    rig.check("4096 4096 4096 0 4096 0 0 1 1")
    rig.write(0, RAW[1])
    rig.check("4096 4096 4096 0 8192 0 0 1 2")
    rig.server.ask("mem_used_max 0")
    rig.write(0, compressed_to(1032))
    # The class of 1,032 bytes has zspages of 8 pages.
    rig.check("4096 1032 32768 0 36864 0 0 0 2")


def test_at_the_limit_a_write_fails_the_old_page_stays_and_a_zero_page_is_taken(rig: Rig) -> None:
    rig.server.ask("mem_limit 5000")
    rig.write(0, RAW[0])
    rig.write(1, RAW[1])
    rig.check("8192 8192 8192 8192 8192 0 0 2 2")
    rig.refuses(2, RAW[2])
    rig.check("8192 8192 8192 8192 12288 0 0 2 -", failed_writes=1)
    rig.refuses(0, RAW[3])
    rig.check("8192 8192 8192 8192 12288 0 0 2 -", failed_writes=2)
    assert rig.read(0) == RAW[0]
    rig.write(0, bytes(PAGE_SIZE))
    rig.check("8192 4096 4096 8192 12288 1 0 1 -", failed_writes=2)
    assert rig.read(0) == bytes(PAGE_SIZE)
    assert rig.read(1) == RAW[1]


def test_a_write_of_eight_pages_stops_at_the_limit_and_counts_once(rig: Rig) -> None:
    rig.server.ask("mem_limit 16K")
    rig.refuses(0, b"".join(RAW[:8]))
    rig.check("16384 16384 16384 16384 20480 0 0 4 -", failed_writes=1)
    assert [rig.read(page) for page in range(8)] == [*RAW[:4], *[bytes(PAGE_SIZE)] * 4]


def test_discard_and_write_zeroes_count_every_page_and_free(rig: Rig) -> None:
    rig.client.trim(10 * PAGE_SIZE, 0)
    assert rig.notify_free() == 10
    rig.write(0, RAW[0] + RAW[1])
    rig.client.zero(2 * PAGE_SIZE, 0)
    assert rig.notify_free() == 12
    # Unallocated, not same-filled.
    rig.check("0 0 0 0 8192 0 0 0 2")
    rig.client.zero(PAGE_SIZE, 5 * PAGE_SIZE, nbd.CMD_FLAG_NO_HOLE)
    # A hole is what this client did not want.
    assert rig.notify_free() == 12
    rig.check("4096 0 0 0 8192 1 0 0 2")


def test_a_pattern_of_eight_bytes_is_same_filled_one_of_sixteen_is_not(rig: Rig) -> None:
    for page, period in enumerate([4, 8, 16]):
        rig.write(page, RAW[0][:period] * (PAGE_SIZE // period))
    assert rig.server.mm_stat()[5] == 2
    assert rig.server.mm_stat()[0] == 3 * PAGE_SIZE


def test_a_full_limit_is_allowed_and_whole_zspages_count(rig: Rig) -> None:
    page = RAW[0][:1100].ljust(PAGE_SIZE, b"\0")
    rig.write(0, page)
    used = rig.server.mm_stat()[2]
    assert used > PAGE_SIZE
    rig.client.trim(PAGE_SIZE, 0)
    rig.server.ask(f"mem_limit {used - PAGE_SIZE}")
    rig.refuses(0, page)
    rig.server.ask(f"mem_limit {used}")
    rig.write(0, page)
    assert rig.read(0) == page
