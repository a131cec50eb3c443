"""What is counted of requests, with either engine."""

import bisect
import importlib
import time

import pytest

from tests.nbd_bytes import (
    BLOCK_STATUS,
    CACHE,
    FLUSH,
    READ,
    SIMPLE,
    STRUCTURED,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    Peer,
    exchange,
    receive,
)
from tests.property.test_device import make_data
from zramd.device.opening import OpenDevice
from zramd.device.requests import LATENCY_BOUNDS, OPERATIONS, OperationStat, Requests
from zramd.layout import LATENCY_BUCKETS
from zramd.native import Engine, choose
from zramd.nbd.block_status import Context
from zramd.nbd.limits import Limits
from zramd.nbd.protocol import Command
from zramd.nbd.terms import Mode, Terms
from zramd.nbd.transmission import Transmission

PAGE = 4096
MIB = 1 << 20
SIZE = 64 * MIB
RAW = bytes(make_data("random", 2, PAGE))
TERMS = Terms(Mode.STRUCTURED, (Context.ALLOCATION,))


def summary(stat: dict[str, OperationStat]) -> dict[str, tuple[int, int, int]]:
    """Return (count, errors, bytes) of each operation that has any."""
    assert all(one.count == sum(one.buckets) and (one.count > 0) == (one.nanoseconds > 0) for one in stat.values())
    return {name: (one.count, one.errors, one.bytes) for name, one in stat.items() if one.count}


def test_bounds_are_quarter_octaves_and_the_compiled_engine_has_the_same() -> None:
    assert LATENCY_BOUNDS[:6] == (1024, 1280, 1536, 1792, 2048, 2560)
    assert LATENCY_BOUNDS[-1] == 1 << 34
    assert len(LATENCY_BOUNDS) == LATENCY_BUCKETS - 1
    if choose() is Engine.PYTHON:
        return
    bucket = importlib.import_module("zramd.native.engine").latency_bucket
    for latency in (0, 1, (1 << 63) - 1, *(bound + step for bound in LATENCY_BOUNDS for step in (-1, 0, 1))):
        assert bucket(latency) == bisect.bisect_left(LATENCY_BOUNDS, latency), latency


def test_operations_are_what_the_protocol_calls_them() -> None:
    assert {name.upper(): number for name, number in OPERATIONS.items()} == {
        command.name: command.value for command in Command if command is not Command.DISC
    }


def test_all_requests_are_counted_with_their_bytes_and_errors_and_stay_so_when_the_connection_ends(
    opened: OpenDevice,
) -> None:
    requests = Requests()
    long = Limits().buffer + PAGE
    opened.device.set_mem_limit(PAGE)
    stream = [
        STRUCTURED.write(1, 0, RAW),
        STRUCTURED.write(2, PAGE, RAW),  # no space
        STRUCTURED.request(READ, 3, 0, PAGE),
        STRUCTURED.request(READ, 4, 10, 100),
        STRUCTURED.request(READ, 5, SIZE, PAGE),  # refused
        STRUCTURED.request(READ, 6, 0, long),
        STRUCTURED.write(7, 0, bytes(long)),
        STRUCTURED.request(TRIM, 8, 0, PAGE),
        STRUCTURED.request(WRITE_ZEROES, 9, 0, 8 * MIB),
        STRUCTURED.request(CACHE, 10, 0, PAGE),
        STRUCTURED.request(BLOCK_STATUS, 11, 0, SIZE),
        STRUCTURED.request(FLUSH, 12),
        STRUCTURED.request(99, 13, 0, PAGE),  # no command
        STRUCTURED.request(2, 14),
    ]
    with (
        requests.counting() as counters,
        Peer(lambda sock: Transmission(sock, opened.device, None, TERMS, counters=counters).run()) as peer,
    ):
        exchange(peer.client, *stream)
        assert peer.join() is None
        connected = summary(requests.stat())
    assert connected == {
        "read": (4, 1, PAGE + 100 + long),
        "write": (3, 1, PAGE + long),
        "trim": (1, 0, PAGE),
        "write_zeroes": (1, 0, 8 * MIB),
        "cache": (1, 0, PAGE),
        "block_status": (1, 0, SIZE),
        "flush": (1, 0, 0),
    }
    assert summary(requests.stat()) == connected
    assert requests.in_flight == 0


def test_a_page_that_is_damaged_and_a_flush_that_fails_are_errors(opened: OpenDevice) -> None:
    def flush() -> None:
        raise OSError(5, "Input/output error")

    requests = Requests()
    device = opened.device
    with (
        requests.counting() as counters,
        Peer(lambda sock: Transmission(sock, device, flush, counters=counters).run()) as peer,
    ):
        peer.client.sendall(SIMPLE.write(1, 0, bytes(make_data("text", 1, PAGE))))
        receive(peer.client, 16)
        with device:
            device.replace_entry(0, device.entry(0) ^ 1 << 40)  # another size
        exchange(peer.client, SIMPLE.request(READ, 2, 0, PAGE), SIMPLE.request(FLUSH, 3))
        assert peer.join() is None
    assert summary(requests.stat()) == {"read": (1, 1, 0), "write": (1, 0, PAGE), "flush": (1, 1, 0)}


@pytest.mark.parametrize("command", [READ, WRITE])
def test_what_waits_is_in_flight_and_the_wait_is_in_its_latency(opened: OpenDevice, command: int) -> None:
    requests = Requests()
    with (
        requests.counting() as counters,
        Peer(lambda sock: Transmission(sock, opened.device, None, counters=counters).run()) as peer,
    ):
        with opened.device:
            frame = SIMPLE.write(1, 0, RAW) if command == WRITE else SIMPLE.request(READ, 1, 0, PAGE)
            peer.client.sendall(frame)
            while not requests.in_flight:
                time.sleep(0.001)
            assert summary(requests.stat()) == {}
        exchange(peer.client)
        assert peer.join() is None
    (stat,) = (stat for stat in requests.stat().values() if stat.count)
    bucket = stat.buckets.index(1)
    assert LATENCY_BOUNDS[bucket - 1] < stat.nanoseconds <= LATENCY_BOUNDS[bucket]
    assert requests.in_flight == 0
