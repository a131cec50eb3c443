"""block_state: the kernel's format to the character, streamed, and for the owner only."""

import socket
import threading
from pathlib import Path

import pytest

from tests.property.test_device import make_data, write
from zramd.device.block_state import block_state
from zramd.device.codecs import codec
from zramd.device.disk import Disk
from zramd.device.opening import OpenDevice
from zramd.device.recompression import Recompression
from zramd.device.wanted import Wanted
from zramd.layout import PAGE_SIZE
from zramd.memory import RegionStore
from zramd.status import attributes
from zramd.status.attributes import AttributeRefusedError, Served
from zramd.status.server import AdminServer


def set_time(opened: OpenDevice, page: int, second: int) -> None:
    with opened.device:
        opened.device._times[page] = second


def test_a_line_is_as_the_kernel_prints_it() -> None:
    disk = Disk("zram0", None)
    opened = disk.open(Wanted(64 << 20, codec("lz4"), secondary={1: codec("zstd", 19)}))
    kinds = {0: "zero", 1: "text", 2: "random", 600: "pattern", 16383: "text"}
    for page, kind in kinds.items():
        write(opened.device, page * PAGE_SIZE, make_data(kind, page, PAGE_SIZE))
        set_time(opened, page, page + 7)
    disk.recompress(Recompression(max_pages=2))  # the noise, which gets no smaller, and the last page
    disk.mark_idle(None)
    set_time(opened, 16383, (1 << 32) - 1)
    assert "".join(block_state(opened.device)) == (
        "           0            7.000000 s.....\n"
        "           1            8.000000 ...i..\n"
        "           2            9.000000 ..hi.n\n"
        "         600          607.000000 s.....\n"
        "       16383   4294967295.000000 ...ir.\n"
    )
    opened.close()


def test_a_part_of_it_is_at_most_a_chunk_of_the_page_table() -> None:
    opened = OpenDevice(RegionStore(None), Wanted(1 << 30, codec("lz4")))
    pages = 4096
    write(opened.device, 0, make_data("pattern", 1, pages * PAGE_SIZE))
    parts = list(block_state(opened.device))
    assert sum(part.count("\n") for part in parts) == pages
    assert max(map(len, parts)) <= 20 << 10
    opened.close()


def test_nobody_holds_the_lock_while_a_part_is_read_and_a_device_that_goes_away_ends_it() -> None:
    opened = OpenDevice(RegionStore(None), Wanted(1 << 30, codec("lz4")))
    write(opened.device, 0, make_data("pattern", 1, 2048 * PAGE_SIZE))
    parts = block_state(opened.device)
    next(parts)
    write(opened.device, 0, make_data("text", 1, PAGE_SIZE))
    opened.destroy()
    assert list(parts) == []


@pytest.fixture
def served() -> Served:
    return Served(Disk("zram0", None), (), Path("/admin"))


def converse(served: Served, request: bytes) -> bytes:
    """Ask the admin socket, as root or its owner."""
    client, end = socket.socketpair()
    server = AdminServer(served)
    thread = threading.Thread(target=server._answer_lines, args=(end,))
    thread.start()
    with client, end:
        client.sendall(request)
        client.shutdown(socket.SHUT_WR)
        thread.join()
        end.close()
        return b"".join(iter(lambda: client.recv(1 << 16), b""))


def test_the_admin_socket_streams_it_and_ends_it_with_a_blank_line(served: Served) -> None:
    assert converse(served, b"block_state\ninitstate\n").startswith(b"error: EINVAL zram0 is not initialised")
    opened = served.disk.open(Wanted(1 << 20, codec("lz4")))
    assert converse(served, b"block_state\ninitstate\n") == b"\n1\n\n"
    write(opened.device, 0, make_data("text", 1, PAGE_SIZE))
    set_time(opened, 0, 5)
    assert converse(served, b"block_state\ninitstate\n") == b"           0            5.000000 ......\n\n1\n\n"
    opened.close()


def test_who_may_only_read_attributes_is_not_told_what_pages_are(served: Served) -> None:
    with pytest.raises(AttributeRefusedError, match=r"^EACCES .*/admin"):
        attributes.read(served, "block_state")
