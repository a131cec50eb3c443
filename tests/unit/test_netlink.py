"""Messages as bytes, on a little-endian machine; nothing of the client's own constants is used but names in errors."""

import errno
import os
import random
import socket
import struct
from collections.abc import Callable, Iterator

import pytest

from zramd.attach import netlink
from zramd.attach.netlink import LostEventsError, NbdFamily, NetlinkError, attributes, messages

FAMILY = 0x1D
UUID = "0f3c9a52-6d1b-4f0e-9c55-3a1f6f2f7a10"
CONNECT, DISCONNECT, RECONFIGURE, LINK_DEAD, STATUS = 1, 2, 3, 4, 5


def message(kind: int, payload: bytes, sequence: int = 1, flags: int = 0) -> bytes:
    return struct.pack("<IHHII", 16 + len(payload), kind, flags, sequence, 0) + payload


def attribute(kind: int, payload: bytes) -> bytes:
    return struct.pack("<HH", 4 + len(payload), kind) + payload + bytes(-len(payload) % 4)


def answer(command: int, *parts: bytes, kind: int = FAMILY, sequence: int = 1) -> bytes:
    return message(kind, bytes([command, 1, 0, 0]) + b"".join(parts), sequence)


def acknowledgement(number: int = 0, sequence: int = 1, rest: bytes = b"", flags: int = 0x100) -> bytes:
    return message(
        2, struct.pack("<i", -number) + struct.pack("<IHHII", 20, FAMILY, 5, sequence, 0) + rest, sequence, flags
    )


class Kernel:
    """The other end of both sockets: what is written to it before is what a request is answered with."""

    def __init__(self) -> None:
        requests, self.requests = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        events, self.events = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.requests.settimeout(10)
        self.family = NbdFamily(requests, events, FAMILY)

    def answers(self, *received: bytes) -> None:
        for data in received:
            self.requests.send(data)

    def asked(self) -> bytes:
        return self.requests.recv(1 << 16)

    def close(self) -> None:
        self.family.close()
        self.requests.close()
        self.events.close()


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    kernel = Kernel()
    yield kernel
    kernel.close()


def test_connect_is_sent_with_every_attribute_and_its_padding(kernel: Kernel) -> None:
    kernel.answers(answer(CONNECT, attribute(1, struct.pack("<I", 7))), acknowledgement())
    index = kernel.family.connect(
        7, [3, 0x1234], size=1 << 32, block_size=4096, flags=0x16D, dead_seconds=86400, backend=UUID
    )
    assert index == 7
    sent = kernel.asked()
    assert sent == message(
        FAMILY,
        bytes([CONNECT, 1, 0, 0])
        + bytes.fromhex("0800 0100 07000000")
        + bytes.fromhex("0c00 0200 0000000001000000")
        + bytes.fromhex("0c00 0300 0010000000000000")
        + bytes.fromhex("0c00 0400 0000000000000000")
        + bytes.fromhex("0c00 0800 8051010000000000")
        + bytes.fromhex("0c00 0500 6d01000000000000")
        + bytes.fromhex("2900 0a00")
        + UUID.encode()
        + bytes(4)
        + bytes.fromhex("1c00 0780 0c00 0180 0800 0100 03000000 0c00 0180 0800 0100 34120000"),
        flags=5,
    )
    assert len(sent) % 4 == 0


def test_without_an_index_the_kernel_chooses(kernel: Kernel) -> None:
    kernel.answers(answer(CONNECT, attribute(1, struct.pack("<I", 16))), acknowledgement())
    assert kernel.family.connect(None, [3], size=4096, block_size=4096, flags=1, dead_seconds=1, backend=UUID) == 16
    assert kernel.asked()[20:].startswith(bytes.fromhex("0c00 0200"))


def test_reconfigure_sends_only_what_changes(kernel: Kernel) -> None:
    start = bytes([RECONFIGURE, 1, 0, 0]) + attribute(1, bytes([2, 0, 0, 0])) + attribute(10, UUID.encode() + b"\0")
    kernel.answers(acknowledgement(), acknowledgement(sequence=2))
    kernel.family.reconfigure(2, UUID, [5])
    sockets = bytes.fromhex("1000 0780 0c00 0180 0800 0100 05000000")
    assert kernel.asked() == message(FAMILY, start + sockets, 1, 5)
    kernel.family.reconfigure(2, UUID, size=8192)
    assert kernel.asked() == message(FAMILY, start + attribute(2, struct.pack("<Q", 8192)), 2, 5)


def test_disconnect_names_the_device(kernel: Kernel) -> None:
    kernel.answers(acknowledgement())
    kernel.family.disconnect(3)
    assert kernel.asked() == message(FAMILY, bytes([DISCONNECT, 1, 0, 0]) + bytes.fromhex("0800 0100 03000000"), 1, 5)


def device(index: int, connected: int) -> bytes:
    return attribute(1, attribute(1, struct.pack("<I", index)) + attribute(2, bytes([connected])))


@pytest.mark.parametrize(
    ("devices", "connected"),
    [
        ((), False),
        ((device(3, 0),), False),
        ((device(3, 1),), True),
        ((device(2, 1), device(3, 0)), False),
        ((device(2, 0), device(3, 1)), True),
    ],
)
def test_status_is_that_of_the_device_asked_for(kernel: Kernel, devices: tuple[bytes, ...], connected: bool) -> None:
    kernel.answers(answer(STATUS, attribute(0x8009, b"".join(devices))), acknowledgement())
    assert kernel.family.is_connected(3) is connected
    assert kernel.asked()[16:] == bytes([STATUS, 1, 0, 0]) + bytes.fromhex("0800 0100 03000000")


def test_a_reply_and_its_acknowledgement_may_come_in_one_piece(kernel: Kernel) -> None:
    kernel.answers(answer(STATUS, attribute(9, device(1, 1))) + acknowledgement())
    assert kernel.family.is_connected(1)


def test_the_late_reply_to_another_request_is_passed_over(kernel: Kernel) -> None:
    late = answer(STATUS, attribute(9, device(1, 1)), sequence=77)
    kernel.answers(late, answer(STATUS, attribute(9, device(1, 0))), acknowledgement())
    assert not kernel.family.is_connected(1)


TEXT = attribute(1, b"no way\0")
REQUEST_BODY = bytes(12)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (acknowledgement(errno.EBUSY), os.strerror(errno.EBUSY)),
        (acknowledgement(errno.EBUSY, flags=0), os.strerror(errno.EBUSY)),
        (acknowledgement(errno.EBUSY, rest=TEXT, flags=0x300), "no way"),
        (acknowledgement(errno.EBUSY, rest=attribute(3, bytes(8)) + TEXT, flags=0x300), "no way"),
        (acknowledgement(errno.EBUSY, rest=attribute(3, bytes(8)), flags=0x300), os.strerror(errno.EBUSY)),
        # The kernel's text after the whole request, whose header says that it has 20 bytes.
        (acknowledgement(errno.EBUSY, rest=bytes(4) + TEXT, flags=0x200), "no way"),
        # A text that is not there after all, and one that is no text.
        (acknowledgement(errno.EBUSY, flags=0x300), os.strerror(errno.EBUSY)),
        (acknowledgement(errno.EBUSY, rest=attribute(1, b"\xff"), flags=0x300), "\ufffd"),
    ],
)
def test_an_error_has_its_number_and_the_text_if_there_is_one(kernel: Kernel, data: bytes, text: str) -> None:
    kernel.answers(data)
    with pytest.raises(NetlinkError) as caught:
        kernel.family.disconnect(1)
    assert (caught.value.errno, caught.value.strerror) == (errno.EBUSY, text)


@pytest.mark.parametrize(
    "data",
    [
        b"\0",
        message(FAMILY, b"")[:15],
        message(FAMILY, b"")[:4].replace(b"\x10", b"\x0f") + message(FAMILY, b"")[4:],
        struct.pack("<IHHII", 0xFFFFFFFF, FAMILY, 0, 1, 0),
        struct.pack("<IHHII", 21, FAMILY, 0, 1, 0) + bytes(4),
        message(FAMILY, b"") + b"\0\0",
        message(FAMILY, b"\1\1\0"),
        message(2, bytes(3)),
        message(2, bytes(4)),
        message(2, struct.pack("<i", -1) + bytes(15)),
        acknowledgement(1, rest=b"\0\0\0", flags=0x300),
        acknowledgement(1, rest=b"\xff\xff\1\0", flags=0x300),
    ],
    ids=range(12),
)
def test_what_is_cut_short_or_odd_is_an_error_and_no_answer(kernel: Kernel, data: bytes) -> None:
    kernel.answers(data)
    with pytest.raises(NetlinkError, match="cut short"):
        kernel.family.disconnect(1)


@pytest.mark.parametrize(
    "parts",
    [
        (attribute(9, device(1, 1)[:-1]),),
        (attribute(9, attribute(1, attribute(1, b"\1\0\0\0"))),),
        (attribute(9, attribute(1, b"\1")),),
        (b"\3\0\1\0",),
        (attribute(9, attribute(1, attribute(1, b"\1\0\0") + attribute(2, b"\1"))),),
        (attribute(9, attribute(1, attribute(1, b"\1\0\0\0") + attribute(2, b"\1\0\0\0"))),),
    ],
    ids=range(6),
)
def test_a_status_that_makes_no_sense_is_an_error(kernel: Kernel, parts: tuple[bytes, ...]) -> None:
    kernel.answers(answer(STATUS, *parts), acknowledgement())
    with pytest.raises(NetlinkError):
        kernel.family.is_connected(1)


def test_a_connect_that_does_not_tell_the_device_is_an_error(kernel: Kernel) -> None:
    kernel.answers(answer(CONNECT), acknowledgement())
    with pytest.raises(NetlinkError, match="which device"):
        kernel.family.connect(None, [1], size=4096, block_size=4096, flags=1, dead_seconds=1, backend=UUID)


def test_a_message_longer_than_the_buffer_is_an_error(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel.family, "_buffer", bytearray(64))
    kernel.answers(message(FAMILY, bytes(64)))
    with pytest.raises(NetlinkError, match="too long"):
        kernel.family.disconnect(1)


def test_a_kernel_that_does_not_answer_is_given_up(kernel: Kernel) -> None:
    kernel.family._requests.settimeout(0.01)
    with pytest.raises(TimeoutError):
        kernel.family.disconnect(1)


def dead(index: int) -> bytes:
    return answer(LINK_DEAD, attribute(1, struct.pack("<I", index)), sequence=0)


def test_dead_connections_of_the_device_are_counted_once(kernel: Kernel) -> None:
    assert kernel.family.dead_connections(1) == 0
    for data in (dead(1), dead(0), dead(1) + dead(1), dead(257), answer(CONNECT, attribute(1, b"\1\0\0\0"))):
        kernel.events.send(data)
    assert kernel.family.dead_connections(1) == 3
    assert kernel.family.dead_connections(1) == 0


def test_events_of_other_families_do_not_count(kernel: Kernel) -> None:
    kernel.events.send(answer(LINK_DEAD, attribute(1, b"\1\0\0\0"), kind=FAMILY + 1))
    assert kernel.family.dead_connections(1) == 0


def test_an_event_that_is_cut_short_is_an_error(kernel: Kernel) -> None:
    kernel.events.send(dead(1)[:-1])
    with pytest.raises(NetlinkError, match="cut short"):
        kernel.family.dead_connections(1)


class Overrun(socket.socket):
    """A socket for which the kernel had more than it could keep."""

    def recvmsg_into(self, *_: object) -> tuple[int, list[tuple[int, int, bytes]], int, object]:
        raise OSError(errno.ENOBUFS, "No buffer space available")


def test_events_that_were_lost_are_told() -> None:
    requests, events = socket.socketpair()
    with requests, Overrun(fileno=events.detach()) as overrun:
        family = NbdFamily(requests, overrun, FAMILY)
        with pytest.raises(LostEventsError):
            family.dead_connections(1)


def controller(family: bytes, groups: bytes) -> tuple[bytes, bytes]:
    return answer(1, attribute(2, b"nbd\0"), family, groups, kind=16), acknowledgement()


GROUPS = attribute(
    7,
    attribute(1, attribute(1, b"other\0") + attribute(2, struct.pack("<I", 4)))
    + attribute(2, attribute(2, struct.pack("<I", 5)) + attribute(1, b"nbd_mc_group\0")),
)


def found(kernel: Kernel, replies: tuple[bytes, ...]) -> tuple[int, int]:
    kernel.family._family = 16
    kernel.answers(*replies)
    return kernel.family._find()


def test_the_family_and_its_group_are_found_by_name(kernel: Kernel) -> None:
    assert found(kernel, controller(attribute(1, b"\x1d\0"), GROUPS)) == (0x1D, 5)
    assert kernel.asked() == message(16, bytes([3, 1, 0, 0]) + bytes.fromhex("0800 0200") + b"nbd\0", 1, 5)


@pytest.mark.parametrize(
    "replies",
    [
        controller(b"", GROUPS),
        controller(attribute(1, b"\x1d\0"), b""),
        controller(
            attribute(1, b"\x1d\0"), attribute(7, attribute(1, attribute(1, b"other\0") + attribute(2, bytes(4))))
        ),
        (acknowledgement(errno.ENOENT),),
    ],
    ids=range(4),
)
def test_a_kernel_without_the_family_or_its_group_is_told(kernel: Kernel, replies: tuple[bytes, ...]) -> None:
    with pytest.raises(NetlinkError) as caught:
        found(kernel, replies)
    assert caught.value.errno == errno.ENOENT


def test_this_kernel_answers_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The controller is a family itself, and has a multicast group, on every Linux."""
    monkeypatch.setattr(netlink, "NBD_FAMILY", b"nlctrl")
    monkeypatch.setattr(netlink, "NBD_GROUP", b"notify")
    family = NbdFamily.open()
    try:
        assert family._family == 16
        assert family.dead_connections(0) == 0
        assert family.events.getsockname()[0] != 0  # the kernel sends events to no other sockets
    finally:
        family.close()


def test_this_kernel_gives_its_text_with_an_error() -> None:
    requests, events = (socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 16) for _ in range(2))
    requests.setsockopt(270, 11, 1)
    family = NbdFamily(requests, events, 16)
    try:
        with pytest.raises(NetlinkError) as caught:
            family._ask(3, [attribute(2, b"x" * 100 + b"\0")], 1)
    finally:
        family.close()
    assert caught.value.strerror not in ("", os.strerror(caught.value.errno or 0))


@pytest.mark.parametrize("parse", [messages, attributes])
def test_nothing_has_no_parts(parse: Callable[[memoryview], Iterator[object]]) -> None:
    assert list(parse(memoryview(b""))) == []


def test_any_bytes_are_parsed_to_an_end_or_an_error() -> None:
    data = random.Random(1).randbytes(1 << 12)
    for start in range(0, len(data), 7):
        for parse in (messages, attributes):
            try:
                parts: list[object] = list(parse(memoryview(data)[start : start + 64]))
            except NetlinkError:
                continue
            assert len(parts) <= 16
