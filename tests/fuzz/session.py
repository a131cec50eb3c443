"""One session on one thread: a stream of bytes is what the client sends, and all that can be checked is.

The first bytes of an input are no part of the stream, but say how it is played: see `Setup`.
"""

import atexit
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from tests.fuzz.handshakes import Agreed, End, Handshake
from tests.fuzz.stream import Disk as Shadow
from tests.fuzz.stream import Reader, Rules
from tests.fuzz.transmissions import Request, Transmission
from tests.fuzz.wire import Wire
from tests.property.test_device import make_data, read, recount, write
from tests.property.test_pool import check_invariants
from zramd.device.codecs import codec
from zramd.device.disk import Disk
from zramd.device.opening import OpenDevice
from zramd.device.wanted import Wanted
from zramd.device.zram import Device
from zramd.layout import (
    ENTRY_HANDLE_MASK,
    ENTRY_SIZE_MASK,
    ENTRY_SIZE_SHIFT,
    ENTRY_STATE_MASK,
    ENTRY_STATE_SHIFT,
    PAGE_SIZE,
    PageState,
)
from zramd.memory import RegionStore
from zramd.nbd import handshake, transmission
from zramd.nbd.export import Export, Exports
from zramd.nbd.limits import Limits
from zramd.nbd.protocol import ClientLeftError, SessionError
from zramd.nbd.tls import TlsMode

SIZE = 256 << 10
SETUP_BYTES = 4
RECOUNT_EVERY = 50
STEPS = [1 << 30, 1, 7, 28, 33, 100, 4096, 5000]
"""Bytes received at once."""
SMALL_SENDS = [1 << 30, 1000]
LIMITS = [
    Limits(option=64 << 10, options=64, payload=128 << 10, memory=64 << 10, handshake_seconds=3600),
    Limits(option=64 << 10, options=64, payload=1 << 20, memory=256 << 10, handshake_seconds=3600),
]
TLS = [TlsMode.OFF, TlsMode.ON, TlsMode.REQUIRE, TlsMode.OFF]


@dataclass(frozen=True)
class Setup:
    """How a stream is played.

    Attributes:
        step: index of how much is received at once.
        small: whether sends are taken in parts.
        limits: index of the limits.
        tls: index of what there is of TLS.
        answered: options answered until the server stops.
        leave: bytes after which the client leaves without a word.
    """

    step: int = 0
    small: bool = False
    limits: int = 0
    tls: int = 0
    answered: int | None = None
    leave: int | None = None

    def pack(self) -> bytes:
        flags = self.small | self.limits << 1 | self.tls << 2 | (self.answered is not None) << 4
        flags |= (self.leave is not None) << 5
        where = self.leave if self.leave is not None else self.answered or 0
        return bytes([self.step, flags]) + where.to_bytes(2)

    @classmethod
    def unpack(cls, data: bytes) -> "Setup":
        step, flags = data[0] % len(STEPS), data[1]
        where = int.from_bytes(data[2:4])
        leave = where if flags & 32 else None
        answered = where % 8 if flags & 16 and leave is None else None
        return cls(step, bool(flags & 1), flags >> 1 & 1, flags >> 2 & 3, answered, leave)


class World:
    """Three exports: one to write to, one that is read-only, and one without a size."""

    def __init__(self) -> None:
        text, raw = make_data("text", 7, SIZE // 4), make_data("random", 7, SIZE // 4)
        pattern = make_data("pattern", 7, SIZE // 8)
        self._fixed = text + bytes(SIZE // 4) + pattern + bytes(SIZE // 8) + raw
        self._opened = [OpenDevice(RegionStore(None), Wanted(disksize=SIZE, codec=codec("lz4"))) for _ in range(2)]
        self._device, fixed = (opened.device for opened in self._opened)
        write(fixed, 0, self._fixed)
        with fixed:
            fixed.discard(SIZE // 4, SIZE // 8)
        disks = [Disk(name, None) for name in ("disk", "fixed", "none")]
        for disk, opened in zip(disks, self._opened, strict=False):
            disk.opened = opened
        self._exports = Exports(
            [
                Export("disk", "a disk", disks[0]),
                Export("fixed", "", disks[1], read_only=True),
                Export("none", "n", disks[2]),
            ]
        )
        self._is_dirty = False
        self.sessions = 0

    def _shadows(self) -> list[Shadow]:
        empty = range(SIZE // 4 // PAGE_SIZE, (SIZE // 4 + SIZE // 8) // PAGE_SIZE)
        filled = set(range(SIZE // PAGE_SIZE)) - set(empty)
        disk, fixed = (str(opened.device.identity.uuid).encode() for opened in self._opened)
        return [
            Shadow(b"disk", b"a disk, UUID " + disk, bytearray(SIZE)),
            Shadow(b"fixed", b"UUID " + fixed, bytearray(self._fixed), read_only=True, allocated=filled),
            Shadow(b"none", b"n", None),
        ]

    def run(self, data: bytes) -> End:
        """Play a session, check it, and return how it ended. The disk is empty before.

        Raises:
            AssertionError: the server did not do what it had to do; and whatever else it may raise that it must not.
        """
        if self._is_dirty:
            with self._device:
                self._device.discard(0, SIZE)
        data = data.ljust(SETUP_BYTES, b"\0")
        setup, stream = Setup.unpack(data), data[SETUP_BYTES:]
        wire = Wire(stream, STEPS[setup.step], SMALL_SENDS[setup.small], setup.leave)
        with contextlib.closing(wire):
            outcome = self._serve(wire, setup)
        end = self._check(wire, setup, stream, outcome)
        self.sessions += 1
        if self.sessions % RECOUNT_EVERY == 0:
            self.check_devices()
        return end

    def _serve(self, wire: Wire, setup: Setup) -> Exception | None:
        """Serve a client as the server does; return what the server would have logged."""
        limits, mode = LIMITS[setup.limits], TLS[setup.tls]
        secure = (lambda sock, _: sock) if mode is not TlsMode.OFF else None
        try:
            with contextlib.ExitStack() as held:

                def connect(export: Export) -> OpenDevice:
                    return held.enter_context(export.disk.connected(lambda: None))

                session = handshake.Handshake(
                    wire, self._exports, connect, secure, mode, limits, Stopping(setup.answered)
                ).run()
                if session is not None:
                    opened, terms = session.opened, session.terms
                    self._is_dirty = True
                    transmission.Transmission(session.sock, opened.device, opened.flush, terms, limits).run()
        except (SessionError, BrokenPipeError) as error:
            return error
        return None

    def _check(self, wire: Wire, setup: Setup, stream: bytes, outcome: Exception | None) -> End:
        limits = LIMITS[setup.limits]
        rules = Rules(
            limits.option, limits.options, limits.payload, limits.memory // 4, TLS[setup.tls].value, setup.answered
        )
        shadows = self._shadows()
        sent, received = Reader(stream), Reader(bytes(wire.sent))
        end = Handshake(shadows, rules, sent, received).follow()
        if isinstance(end, Agreed):
            agreed = end
            followed = Transmission(agreed, rules, sent, received, wire.taken if wire.gone else None, cut=wire.cut)
            end = followed.follow()
            if followed.exact:
                self._compare(shadows[0], followed.unfinished)
            elif agreed.disk.read_only:
                assert not any(entry for _, entry in self._device.entries())
        else:
            assert not received.left
        if wire.gone:
            return end
        assert isinstance(outcome, {End.WELL: type(None), End.LEFT: ClientLeftError, End.BROKEN: SessionError}[end]), (
            f"ends with {outcome!r} instead of {end}"
        )
        assert end is not End.BROKEN or not isinstance(outcome, ClientLeftError)
        return end

    def _compare(self, shadow: Shadow, unfinished: Request | None) -> None:
        """Check what is on the disk; an unfinished write may have been carried out up to a page's end."""
        assert shadow.contents is not None
        found, wanted = read(self._device, 0, SIZE), shadow.contents
        if unfinished:
            offset, payload = unfinished.offset, unfinished.payload
            until = offset
            while until < offset + len(payload) and found[until] == payload[until - offset]:
                until += 1
            # The old contents may happen to be what would have been written next.
            cuts = [until, *(page for page in range(offset // PAGE_SIZE * PAGE_SIZE, until + 1, PAGE_SIZE))]
            assert any(
                found == wanted[:offset] + payload[: cut - offset] + wanted[cut:] for cut in cuts if cut >= offset
            ), "an unfinished write changed more than its beginning"
            return
        if found != wanted:
            where = next(place for place in range(SIZE) if found[place] != wanted[place])
            raise AssertionError(f"the disk is not what it has to be, from {where} on")
        entries = {page for page, entry in self._device.entries() if entry}
        assert entries == shadow.allocated, f"allocated: {sorted(entries)} instead of {sorted(shadow.allocated)}"

    def check_devices(self) -> None:
        """Check counters against a recount, the pools' invariants, and that the read-only disk is what it was."""
        for opened in self._opened:
            stat = opened.device.mm_stat()
            assert stat == recount(opened.device, stat)
            check_invariants(opened.device.pool, dict(_objects(opened.device)))
        assert read(self._opened[1].device, 0, SIZE) == self._fixed
        assert not any(disk.disk.clients for disk in self._exports)

    def close(self) -> None:
        for opened in self._opened:
            opened.close()


def _objects(device: Device) -> Iterator[tuple[int, bytes]]:
    """Yield handle and payload of all that is in a device's pool."""
    for _, entry in device.entries():
        if entry >> ENTRY_STATE_SHIFT & ENTRY_STATE_MASK in (PageState.COMPRESSED, PageState.HUGE):
            handle = entry & ENTRY_HANDLE_MASK
            yield handle, device.pool.map(handle, entry >> ENTRY_SIZE_SHIFT & ENTRY_SIZE_MASK).tobytes()


class Stopping:
    """Says that the server is not stopping, so many times."""

    def __init__(self, answered: int | None) -> None:
        self._left = answered

    def __call__(self) -> bool:
        if self._left is None:
            return False
        self._left -= 1
        return self._left < 0


@cache
def world() -> World:
    """Return the world that sessions of this process run in."""
    made = World()
    atexit.register(made.close)
    return made


def run(data: bytes) -> None:
    """Play one input; raise if it shows a defect."""
    world().run(data)
