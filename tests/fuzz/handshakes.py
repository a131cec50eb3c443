"""What a handshake must have looked like, read off what was sent and received. Nothing of the server's is used."""

import struct
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum, auto

from tests.fuzz.stream import PAGE, Disk, EndError, Reader, Rules
from tests.nbd_bytes import (
    ABORT,
    ACK,
    ERR_EXT_HEADER_REQD,
    ERR_INVALID,
    ERR_POLICY,
    ERR_SHUTDOWN,
    ERR_TLS_REQD,
    ERR_UNKNOWN,
    ERR_UNSUP,
    EXPORT_NAME,
    EXTENDED_HEADERS,
    FIXED_NEWSTYLE,
    GO,
    GREETING,
    INFO,
    INFO_REPLY,
    LIST,
    LIST_META_CONTEXT,
    META_CONTEXT,
    NO_ZEROES,
    SERVER,
    SET_META_CONTEXT,
    STARTTLS,
    STRUCTURED_REPLY,
)

FIRST_ERROR = 1 << 31
CONTEXTS = {b"base:allocation": 1, b"zramd:state": 2}
NAME, DESCRIPTION, BLOCK_SIZE = 1, 2, 3

Replies = list[tuple[int, bytes]]
"""(type, data) of replies to an option, before the ACK."""


class End(Enum):
    """How a session ends."""

    WELL = auto()
    LEFT = auto()
    """The client left where more should have come."""
    BROKEN = auto()
    """The client broke the protocol."""


@dataclass
class Agreed:
    """What a transmission starts with."""

    disk: Disk
    structured: bool
    extended: bool
    contexts: frozenset[int]


class RefusedError(Exception):
    """An option has to be refused."""

    def __init__(self, reply: int) -> None:
        super().__init__(reply)
        self.reply = reply


@dataclass
class Handshake:
    """A handshake as its client sees it."""

    disks: list[Disk]
    rules: Rules
    sent: Reader
    received: Reader
    structured: bool = False
    extended: bool = False
    secure: bool = False
    answered: int = 0
    contexts: frozenset[int] = frozenset()
    contexts_of: Disk | None = field(default=None)

    def follow(self) -> End | Agreed:
        """Check all that was received; return how it ended, or what was agreed on."""
        assert self.received.take(len(GREETING)) == GREETING
        try:
            return self._follow()
        except EndError:
            # The server has to have sent whole replies, so it is the client's stream that ended.
            assert not self.received.left
            return End.LEFT

    def _follow(self) -> End | Agreed:
        (flags,) = self.sent.unpack(">I")
        if flags & ~(FIXED_NEWSTYLE | NO_ZEROES):
            return End.BROKEN
        for _ in range(self.rules.options):
            magic, kind, length = struct.unpack(">8sII", self.sent.take(16))
            if magic != b"IHAVEOPT" or length > self.rules.option:
                return End.BROKEN
            data = self.sent.take(length)
            if kind == EXPORT_NAME:
                return self._export_name(data, padded=not flags & NO_ZEROES)
            if not flags & FIXED_NEWSTYLE:
                return End.BROKEN
            if kind == ABORT:
                self._expect(kind, [])
                return End.WELL
            try:
                replies, agreed = self._answer(kind, data)
            except RefusedError as refusal:
                self._expect_error(kind, refusal.reply)
            else:
                self._expect(kind, replies)
                if agreed:
                    return agreed
        return End.BROKEN

    def _reply(self, kind: int) -> tuple[int, bytes]:
        try:
            magic, echoed, reply, length = self.received.unpack(">QIII")
            data = self.received.take(length)
        except EndError as error:
            raise AssertionError(f"option {kind}: no whole reply") from error
        assert (magic, echoed) == (0x3E889045565A9, kind)
        return reply, data

    def _expect(self, kind: int, replies: Replies) -> None:
        """Check that these replies come, in any order, and then an ACK."""
        found = []
        while (reply := self._reply(kind))[0] != ACK:
            assert reply[0] < FIRST_ERROR, f"option {kind} is refused: {reply[1]!r}"
            found.append(reply)
        assert not reply[1]
        assert Counter(found) == Counter(replies), f"option {kind}: {found} instead of {replies}"

    def _expect_error(self, kind: int, wanted: int) -> None:
        reply, text = self._reply(kind)
        assert reply == wanted, f"option {kind}: {reply:#x} instead of {wanted:#x}"
        assert len(text.decode()) <= PAGE

    def _find(self, name: bytes) -> Disk:
        if len(name) > PAGE or not _is_text(name):
            raise RefusedError(ERR_INVALID)
        for disk in self.disks:
            if name == disk.name or not name:
                return disk
        raise RefusedError(ERR_UNKNOWN)

    def _export_name(self, name: bytes, *, padded: bool) -> End | Agreed:
        if self._is_stopped() or self._needs_tls() or self.extended:
            return End.BROKEN
        try:
            disk = self._find(name)
        except RefusedError:
            return End.BROKEN
        if disk.contents is None:
            return End.BROKEN
        agreed = self._agree(disk)
        assert self.received.take(10) == self._describe(agreed)
        assert not padded or self.received.take(124) == bytes(124)
        return agreed

    def _agree(self, disk: Disk) -> Agreed:
        contexts = self.contexts if disk is self.contexts_of else frozenset()
        return Agreed(disk, self.structured, self.extended, contexts)

    def _describe(self, agreed: Agreed) -> bytes:
        """Return size and flags of an export."""
        flags = 1 | 4 | 8 | 256 | 1024
        flags |= 2 if agreed.disk.read_only else 32 | 64 | 2048
        if agreed.structured:
            flags |= 128
        if agreed.extended and agreed.contexts:
            flags |= 4096
        return struct.pack(">QH", agreed.disk.size, flags)

    def _is_stopped(self) -> bool:
        self.answered += 1
        return self.rules.answered is not None and self.answered > self.rules.answered

    def _needs_tls(self) -> bool:
        return self.rules.tls == "require" and not self.secure

    def _answer(self, kind: int, data: bytes) -> tuple[Replies, Agreed | None]:
        """Return what an option has to be answered with, and what is agreed on if it ends the handshake."""
        if self._is_stopped():
            raise RefusedError(ERR_SHUTDOWN)
        if self._needs_tls() and kind != STARTTLS:
            raise RefusedError(ERR_TLS_REQD)
        if kind in (LIST, STARTTLS, STRUCTURED_REPLY, EXTENDED_HEADERS) and data:
            raise RefusedError(ERR_INVALID)
        replies: Replies = []
        if kind == LIST:
            replies = [(SERVER, struct.pack(">I", len(d.name)) + d.name + d.description) for d in self.disks]
        elif kind == STARTTLS:
            self._start_tls()
        elif kind == STRUCTURED_REPLY:
            if self.extended:
                raise RefusedError(ERR_EXT_HEADER_REQD)
            self.structured = True
        elif kind == EXTENDED_HEADERS:
            self.structured = self.extended = True
        elif kind in (INFO, GO):
            return self._info(kind, Reader(data))
        elif kind in (LIST_META_CONTEXT, SET_META_CONTEXT):
            replies = self._meta_context(kind, Reader(data))
        else:
            raise RefusedError(ERR_UNSUP)
        return replies, None

    def _start_tls(self) -> None:
        if self.secure:
            raise RefusedError(ERR_INVALID)
        if self.rules.tls == "off":
            raise RefusedError(ERR_POLICY)
        self.secure = True
        self.structured = self.extended = False
        self.contexts, self.contexts_of = frozenset(), None

    def _info(self, kind: int, data: Reader) -> tuple[Replies, Agreed | None]:
        try:
            name = data.string()
            (count,) = data.unpack(">H")
            wanted = set(data.unpack(f">{count}H"))
        except EndError:
            raise RefusedError(ERR_INVALID) from None
        if data.left:
            raise RefusedError(ERR_INVALID)
        disk = self._find(name)
        if disk.contents is None:
            raise RefusedError(ERR_UNKNOWN)
        agreed = self._agree(disk)
        infos = [b"\0\0" + self._describe(agreed), struct.pack(">HIII", BLOCK_SIZE, 1, PAGE, self.rules.payload)]
        if NAME in wanted:
            infos.append(struct.pack(">H", NAME) + disk.name)
        if DESCRIPTION in wanted:
            infos.append(struct.pack(">H", DESCRIPTION) + disk.description)
        return [(INFO_REPLY, info) for info in infos], agreed if kind == GO else None

    def _meta_context(self, kind: int, data: Reader) -> Replies:
        setting = kind == SET_META_CONTEXT
        if setting:
            self.contexts, self.contexts_of = frozenset(), None
        if not self.structured:
            raise RefusedError(ERR_INVALID)
        try:
            name = data.string()
            (count,) = data.unpack(">I")
            queries = [data.string() for _ in range(count)]
        except EndError:
            raise RefusedError(ERR_INVALID) from None
        if data.left or not all(len(query) <= PAGE and _is_text(query) for query in queries):
            raise RefusedError(ERR_INVALID)
        disk = self._find(name)
        if setting:
            found = {context for context in CONTEXTS if context in queries}
            self.contexts, self.contexts_of = frozenset(CONTEXTS[context] for context in found), disk
        else:
            namespaces = {context: context[: context.index(b":") + 1] for context in CONTEXTS}
            found = {c for c in CONTEXTS if not queries or c in queries or namespaces[c] in queries}
        return [(META_CONTEXT, struct.pack(">I", CONTEXTS[c] if setting else 0) + c) for c in found]


def _is_text(name: bytes) -> bool:
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in name
