import errno
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.conftest import ServerProcess
from tests.property.test_device import make_data

nbd = pytest.importorskip("nbd", reason="libnbd's Python module is missing: apt install python3-libnbd")

SIZE = 64 << 20
PAGE = 4096
TEXT = bytes(make_data("text", 1, 64 << 10))


def connect(server: ServerProcess) -> Any:
    handle = nbd.NBD()
    handle.connect_uri(server.uri)
    return handle


@pytest.fixture
def disk(server: ServerProcess) -> Iterator[Any]:
    """Return a connection to an empty disk."""
    handle = connect(server)
    yield handle
    handle.shutdown()


def test_size_block_sizes_and_description_are_advertised(server: ServerProcess) -> None:
    handle = nbd.NBD()
    handle.set_full_info(True)
    handle.connect_uri(server.uri)
    assert handle.get_size() == SIZE
    assert handle.get_block_size(nbd.SIZE_MINIMUM) == 1
    assert handle.get_block_size(nbd.SIZE_PREFERRED) == PAGE
    assert handle.get_block_size(nbd.SIZE_MAXIMUM) == 64 << 20
    assert handle.get_canonical_export_name() == "zram0"
    uuid = json.loads(server.ask("json"))["uuid"]
    assert handle.get_export_description() == f"zramd compressed memory, UUID {uuid}"
    handle.shutdown()


def test_every_command_that_is_served_is_advertised_and_nothing_else(disk: Any) -> None:
    assert disk.can_flush()
    assert disk.can_fua()
    assert disk.can_trim()
    assert disk.can_zero()
    assert disk.can_cache()
    assert disk.can_multi_conn()
    assert not disk.is_read_only()
    assert not disk.is_rotational()
    assert disk.can_df()
    assert disk.can_fast_zero()


@pytest.mark.parametrize("name", ["", "zram0"])
def test_the_export_has_a_name_and_is_the_default(server: ServerProcess, name: str) -> None:
    handle = nbd.NBD()
    handle.set_export_name(name)
    handle.connect_unix(str(server.unix))
    assert handle.get_size() == SIZE
    handle.shutdown()


def test_an_unknown_export_is_refused(server: ServerProcess) -> None:
    handle = nbd.NBD()
    handle.set_export_name("other")
    with pytest.raises(nbd.Error) as caught:
        handle.connect_unix(str(server.unix))
    assert caught.value.errnum == errno.ENOENT


@pytest.mark.parametrize("offset", [0, 1, 4095, SIZE - 65536])
@pytest.mark.parametrize("fua", [False, True])
def test_write_read_zero_and_trim(disk: Any, offset: int, fua: bool) -> None:
    flags = nbd.CMD_FLAG_FUA if fua else 0
    disk.pwrite(TEXT, offset, flags)
    assert disk.pread(len(TEXT), offset) == TEXT
    disk.cache(len(TEXT), offset)
    disk.zero(1000, offset + 100, flags)
    disk.zero(1000, offset + 2000, flags | nbd.CMD_FLAG_NO_HOLE)
    expected = TEXT[:100] + bytes(1000) + TEXT[1100:2000] + bytes(1000) + TEXT[3000:]
    assert disk.pread(len(TEXT), offset) == expected
    disk.trim(len(TEXT), offset, flags)
    disk.flush()
    trimmed = disk.pread(len(TEXT), offset)
    assert trimmed.count(0) > len(TEXT) - 2 * PAGE
    assert trimmed[PAGE : len(TEXT) - PAGE] == bytes(len(TEXT) - 2 * PAGE)


def test_a_flush_with_fua_on_another_connection_is_taken(server: ServerProcess, disk: Any) -> None:
    other = connect(server)
    disk.pwrite(TEXT, 0)
    other.flush()
    assert other.pread(len(TEXT), 0) == TEXT
    other.shutdown()


def test_every_single_byte_can_be_written_and_read(disk: Any) -> None:
    disk.pwrite(TEXT[: 2 * PAGE], 0)
    shadow = bytearray(TEXT[: 2 * PAGE])
    for offset in [*range(20), *range(PAGE - 20, PAGE + 20), *range(2 * PAGE - 20, 2 * PAGE)]:
        shadow[offset] ^= 0xFF
        disk.pwrite(shadow[offset : offset + 1], offset)
        assert disk.pread(1, offset) == shadow[offset : offset + 1]
    assert disk.pread(2 * PAGE, 0) == shadow


def test_two_connections_see_each_others_writes(server: ServerProcess) -> None:
    first, second = connect(server), connect(server)
    for number in range(100):
        writer, reader = (first, second) if number % 2 else (second, first)
        data = TEXT[number * 10 : number * 10 + 5000]
        writer.pwrite(data, number * 1000)
        assert reader.pread(len(data), number * 1000) == data
    first.shutdown()
    second.shutdown()


def test_requests_that_the_client_would_have_refused_are_refused(disk: Any) -> None:
    disk.set_strict_mode(0)
    refused: list[tuple[Callable[[], object], int]] = [
        (lambda: disk.pread(PAGE, SIZE - 1), errno.EINVAL),
        (lambda: disk.pwrite(TEXT, SIZE - 1), errno.ENOSPC),
        (lambda: disk.trim(PAGE, SIZE), errno.EINVAL),
        (lambda: disk.cache(PAGE, SIZE), errno.EINVAL),
        (lambda: disk.zero(PAGE, SIZE - 1), errno.ENOSPC),
        (lambda: disk.zero(PAGE - 1, 0, nbd.CMD_FLAG_FAST_ZERO), errno.ENOTSUP),
        (lambda: disk.trim(PAGE, 0, nbd.CMD_FLAG_DF), errno.EINVAL),
        (lambda: disk.pread(PAGE, 2**63 - PAGE), errno.EINVAL),
    ]
    for call, code in refused:
        with pytest.raises(nbd.Error) as caught:
            call()
        assert caught.value.errnum == code
    assert disk.pread(PAGE, SIZE - PAGE) == bytes(PAGE)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("connections", [1, 4])
def test_random_requests_in_flight_keep_a_shadow_copy_true(server: ServerProcess, seed: int, connections: int) -> None:
    generator = random.Random(seed)
    area = 1 << 20
    shadow = bytearray(area)
    handles = [connect(server) for _ in range(connections)]
    # (handle, cookie, first byte, end, buffer and expected contents of a read)
    flying: list[tuple[Any, int, int, int, Any, bytes]] = []
    started = 0
    while started < 2500 or flying:
        if started < 2500 and len(flying) < 64:
            length = generator.choice([1, 100, 512, PAGE, 3 * PAGE, 5000, 20000])
            offset = generator.randrange(area - length)
            if generator.random() < 0.5 and length % PAGE == 0:
                offset = offset // PAGE * PAGE
            # Neighbours may share a page, but not a byte.
            if all(end <= offset or begin >= offset + length for _, _, begin, end, _, _ in flying):
                flying.append(start(generator, generator.choice(handles), offset, length, shadow))
                started += 1
                continue
        if not flying:
            continue
        handle = flying[0][0]
        handle.poll(-1)
        landed = [flight for flight in flying if flight[0].aio_command_completed(flight[1])]
        for _, _, begin, end, buffer, expected in landed:
            if buffer is not None:
                assert buffer.to_bytearray() == expected, f"bytes {begin} to {end}"
        gone = {id(flight) for flight in landed}
        flying = [flight for flight in flying if id(flight) not in gone]
    for handle in handles:
        assert handle.pread(area, 0) == shadow
        handle.shutdown()


def start(
    generator: random.Random, handle: Any, offset: int, length: int, shadow: bytearray
) -> tuple[Any, int, int, int, Any, bytes]:
    """Start a request and change the shadow copy as it will change the disk."""
    end = offset + length
    flags = generator.choice([0, 0, 0, nbd.CMD_FLAG_FUA])
    kind = generator.random()
    buffer = None
    if kind < 0.4:
        buffer = nbd.Buffer(length)
        cookie = handle.aio_pread(buffer, offset)
    elif kind < 0.8:
        data = make_data(generator.choice(["zero", "pattern", "text", "random"]), generator.randrange(99), length)
        shadow[offset:end] = data
        cookie = handle.aio_pwrite(nbd.Buffer.from_bytearray(data), offset, flags=flags)
    elif kind < 0.9:
        shadow[offset:end] = bytes(length)
        cookie = handle.aio_zero(length, offset, flags=flags | generator.choice([0, nbd.CMD_FLAG_NO_HOLE]))
    elif kind < 0.97:
        first, last = -(-offset // PAGE) * PAGE, end // PAGE * PAGE
        shadow[first:last] = bytes(max(0, last - first))
        cookie = handle.aio_trim(length, offset, flags=flags)
    else:
        cookie = handle.aio_flush()
    return handle, cookie, offset, end, buffer, bytes(shadow[offset:end])
