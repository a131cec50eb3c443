"""What a transmission must have looked like, read off what was sent and received. Nothing of the server's is used.

Requests have to be as if carried out one after the other; they may be answered in any order.
"""

import struct
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import chain, combinations

from tests.fuzz.handshakes import Agreed, End
from tests.fuzz.stream import PAGE, EndError, Reader, Rules
from tests.nbd_bytes import (
    BLOCK_STATUS,
    DATA_CHUNK,
    DF,
    DISC,
    EINVAL,
    ENOSPC,
    ENOTSUP,
    EOVERFLOW,
    EPERM,
    ERROR_CHUNK,
    ERROR_OFFSET_CHUNK,
    FAST_ZERO,
    FLAGS,
    FLUSH,
    HOLE_CHUNK,
    LONG_STATUS_CHUNK,
    NO_CHUNK,
    NO_HOLE,
    PAYLOAD_LEN,
    READ,
    REQ_ONE,
    STATUS_CHUNK,
    TRIM,
    WRITE,
    WRITE_ZEROES,
)

HOLE, ZERO = 1, 2
ALLOCATION = 1
CHANGING = (WRITE, TRIM, WRITE_ZEROES)


@dataclass(frozen=True)
class Request:
    """A request that the client sent, up to `end` in its stream; the payload may be cut short by the stream's end."""

    command: int
    flags: int
    cookie: int
    offset: int
    length: int
    payload: bytes
    end: int


@dataclass
class Expected:
    """What a request has to be answered with: one of some errors; or data, or the states of pages, or nothing."""

    request: Request
    errors: set[int] = field(default_factory=set)
    data: bytes = b""
    contexts: list[int] = field(default_factory=list)
    statuses: dict[int, list[int]] = field(default_factory=dict)
    length: int = 0
    """Of the range that a BLOCK_STATUS asks about."""


@dataclass
class Answer:
    """The chunks received for a cookie until the last of them."""

    error: int = 0
    start: int = 0
    contents: list[tuple[int, bytes]] = field(default_factory=list)
    extents: dict[int, list[tuple[int, int]]] = field(default_factory=dict)


class Transmission:
    """A transmission as its client sees it.

    `taken` is where in the client's stream the server stood when the client left (None: it did not), `cut` says that it
    left because it was sent too much: what it was sent may then end anywhere.
    """

    def __init__(
        self, agreed: Agreed, rules: Rules, sent: Reader, received: Reader, taken: int | None, *, cut: bool
    ) -> None:
        self._agreed = agreed
        self._disk = agreed.disk
        self._rules = rules
        self._sent = sent
        self._received = received
        self._taken = taken
        self._cut = cut
        self._waiting: defaultdict[int, list[Expected]] = defaultdict(list)
        self._open: dict[int, Answer] = {}
        self._failures: defaultdict[tuple[int, int], Counter[int]] = defaultdict(Counter)  # (cookie, start): errors
        self._layout = ">IHHQQQ" if agreed.extended else ">IHHQQI"
        self._header = struct.calcsize(self._layout)
        self._long = rules.buffer - self._header  # a longer request is taken in pieces
        self._most_kept = received.left + (1 << 20)
        self._kept: dict[bytes, bytes] = {}
        self.exact = not cut
        """Whether the disk must be as it is here now, but for what is in `unfinished`."""
        self.unfinished: Request | None = None
        """A write that the client did not send whole, which may have been carried out from its start on."""

    def follow(self) -> End:
        """Check what was received, and bring the disk to what it has to be. Return how the session ends."""
        begin = self._sent.position
        requests, end = self._requests()
        taken = self._taken
        seen = len(requests) if taken is None else sum(request.end <= taken for request in requests)
        for request in requests[:seen]:
            self._waiting[request.cookie].append(self._carry_out(request))
        if taken is not None:
            self._leave(requests[seen:], self._sent.position - begin, said_disconnect=end is None)
        self._answers()
        for (cookie, start), errors in self._failures.items():
            self._match(cookie, start, errors)
        if not self._cut:
            late = [expected.request for waiting in self._waiting.values() for expected in waiting]
            assert len(late) == sum(map(Counter.total, self._failures.values())), f"not answered, among others: {late}"
        return end or End.WELL

    def _requests(self) -> tuple[list[Request], End | None]:
        """Return what was asked, and how that ended; None is with DISC."""
        sent = self._sent
        found: list[Request] = []
        while sent.left >= self._header:
            magic, flags, command, cookie, offset, length = sent.unpack(self._layout)
            if magic != (0x21E41C71 if self._agreed.extended else 0x25609513):
                return found, End.BROKEN
            if command == DISC:
                return found, None
            payload = b""
            if flags & PAYLOAD_LEN if self._agreed.extended else command == WRITE:
                whole = length <= sent.left
                if length > self._long:
                    if length > 2 * self._rules.payload:
                        return found, End.BROKEN
                    if not whole:
                        rest = sent.take(sent.left)
                        self.unfinished = Request(command, flags, cookie, offset, length, rest, sent.position)
                        if command != WRITE or self._errors(self.unfinished):
                            self.unfinished = None
                        return found, End.LEFT
                if not whole:
                    return found, End.WELL
                payload = sent.take(length)
            found.append(Request(command, flags, cookie, offset, length, payload, sent.position))
        return found, End.WELL

    def _leave(self, rest: list[Request], sent: int, *, said_disconnect: bool) -> None:
        """Carry out what a client that left had asked for and not seen answered, if it is owed that, or else none."""
        if said_disconnect:
            # How much of what had not been received yet is looked at depends on the room in the buffer.
            self.exact = self.exact and sent <= self._rules.buffer
            for request in rest:
                self._carry_out(request)
        elif rest:
            first, self.unfinished = rest[0], None
            if first.command == WRITE and first.length > self._long and not self._errors(first):
                self.unfinished = first

    def _errors(self, request: Request) -> set[int]:
        """Return the errors of which a request has to get one; none if it has to succeed."""
        agreed, command, flags = self._agreed, request.command, request.flags
        if command not in FLAGS:
            return {EINVAL}
        allowed = FLAGS[command]
        if command == READ and agreed.structured:
            allowed |= DF
        if command in (WRITE, BLOCK_STATUS) and agreed.extended:
            allowed |= PAYLOAD_LEN
        errors = set()
        if flags & ~allowed:
            errors.add(EINVAL)
        if command in CHANGING and self._disk.read_only:
            errors.add(EPERM)
        if command == WRITE and agreed.extended and not flags & PAYLOAD_LEN:
            errors.add(EINVAL)
        if command == FLUSH:
            return errors
        length = request.length
        if command == BLOCK_STATUS:
            ids = self._selected(request)
            if ids is None or not ids or not set(ids) <= agreed.contexts or len(set(ids)) < len(ids):
                return {EINVAL}
            length = self._range(request)
            if not length:
                errors.add(EINVAL)
        if request.offset + length > self._disk.size:
            errors.add(ENOSPC if command in (WRITE, WRITE_ZEROES) else EINVAL)
        if command in (READ, WRITE) and length > self._rules.payload:
            errors.add(EINVAL)
        if command == READ and flags & DF and length > self._long:
            errors.add(EOVERFLOW)
        whole = -(-request.offset // PAGE) < (request.offset + length) // PAGE
        if command == WRITE_ZEROES and flags & FAST_ZERO and length and not whole:
            errors.add(ENOTSUP)
        return errors

    def _range(self, request: Request) -> int:
        """Return the length of the range that a BLOCK_STATUS asks about."""
        has_payload = self._agreed.extended and request.flags & PAYLOAD_LEN
        return int.from_bytes(request.payload[:8]) if has_payload else request.length

    def _selected(self, request: Request) -> list[int] | None:
        """Return the contexts that a BLOCK_STATUS asks for; None if its payload is none."""
        if not (self._agreed.extended and request.flags & PAYLOAD_LEN):
            return sorted(self._agreed.contexts)
        if len(request.payload) < 8 or len(request.payload) % 4:
            return None
        return [number for (number,) in struct.iter_unpack(">I", request.payload[8:])]

    def _carry_out(self, request: Request) -> Expected:
        """Do to the disk what a request has to do; return how it has to be answered."""
        expected = Expected(request, self._errors(request))
        disk, offset, length = self._disk, request.offset, request.length
        assert disk.contents is not None
        if not expected.errors:
            if request.command == READ:
                # Where the server sent less than this it is not looked at.
                if self._most_kept >= 0:
                    data = bytes(disk.contents[offset : offset + length])
                    # Reads of the same share a copy: zeros cost nothing to send, as often as they are read.
                    expected.data = self._kept.setdefault(data, data)
                    self._most_kept -= self._cost(offset, length)
            elif request.command == WRITE:
                disk.write(offset, request.payload)
            elif request.command == TRIM:
                disk.trim(offset, length)
            elif request.command == WRITE_ZEROES:
                disk.zero(offset, length, keep=bool(request.flags & NO_HOLE))
            elif request.command == BLOCK_STATUS:
                expected.length = self._range(request)
                expected.contexts = self._selected(request) or []
                expected.statuses = {context: self._statuses(expected, context) for context in expected.contexts}
        return expected

    def _cost(self, offset: int, length: int) -> int:
        """Return how many bytes of a read have to be sent."""
        if not self._agreed.structured:
            return length
        end = offset + length
        pages = range(offset // PAGE, -(-end // PAGE))
        filled = (page * PAGE for page in pages if not self._disk.is_zero(page))
        return sum(min(start + PAGE, end) - max(start, offset) for start in filled)

    def _statuses(self, expected: Expected, context: int) -> list[int]:
        """Return the status of each page that a range touches; in zramd:state, 2 may also be 3."""
        disk, offset = self._disk, expected.request.offset
        pages = range(offset // PAGE, -(-(offset + expected.length) // PAGE))
        if context != ALLOCATION:
            return [disk.state(page) for page in pages]
        return [ZERO * disk.is_zero(page) | HOLE * (page not in disk.allocated) for page in pages]

    def _answers(self) -> None:
        """Take apart what was received, and find for each answer the request."""
        try:
            while self._received.left:
                self._reply()
        except EndError:
            # What the client got before it had enough may end anywhere.
            if not self._cut:
                raise
        assert self._cut or not self._open

    def _reply(self) -> None:
        received = self._received
        (magic,) = received.unpack(">I")
        if magic == 0x67446698:
            assert not self._agreed.extended
            error, cookie = received.unpack(">IQ")
            assert cookie not in self._open
            self._simple(cookie, error)
            return
        assert self._agreed.structured
        flags, kind, cookie = received.unpack(">HHQ")
        start = 0
        if self._agreed.extended:
            assert magic == 0x6E8A278C
            start, length = received.unpack(">QQ")
        else:
            assert magic == 0x668E33EF, f"a reply starts with {magic:#x}"
            (length,) = received.unpack(">I")
        assert flags in (0, 1)
        assert self._waiting[cookie], f"the reply to {cookie:#x}, which was not asked"
        answer = self._open.setdefault(cookie, Answer(start=start))
        assert answer.start == start
        self._chunk(kind, Reader(received.take(length)), answer, last=bool(flags))
        if flags:
            del self._open[cookie]
            if answer.error:
                assert not answer.contents
                assert not answer.extents
                self._failures[cookie, answer.start][answer.error] += 1
                return
            fits = [expected for expected in self._waiting[cookie] if self._fits(expected, answer)]
            assert fits, f"{answer} is no answer to any of {self._waiting[cookie]}"
            # Of several with this cookie, one that a simple reply could not answer.
            self._waiting[cookie].remove(min(fits, key=lambda one: one.request.command not in (READ, BLOCK_STATUS)))

    def _match(self, cookie: int, start: int, errors: Counter[int]) -> None:
        """Check that each error can be the answer to a request of its own: by Hall's theorem, if any choice can."""
        waiting = [one for one in self._waiting[cookie] if not self._agreed.extended or one.request.offset == start]
        for choice in chain.from_iterable(combinations(errors, count) for count in range(1, len(errors) + 1)):
            possible = sum(not one.errors.isdisjoint(choice) for one in waiting)
            assert sum(errors[error] for error in choice) <= possible, f"{errors} are no answers to {waiting}"

    def _simple(self, cookie: int, error: int) -> None:
        """Find the request that a simple reply answers. Of several, the one that returns the most."""
        waiting, received = self._waiting[cookie], self._received
        # With structured replies, errors and contents come in chunks.
        assert not self._agreed.structured or error == 0
        assert waiting, f"the reply to {cookie:#x}, which was not asked"
        if error:
            self._failures[cookie, 0][error] += 1
            return
        for expected in sorted(waiting, key=lambda expected: -len(expected.data)):
            if expected.errors or (self._agreed.structured and expected.request.command in (READ, BLOCK_STATUS)):
                continue
            ahead = received.data[received.position : received.position + len(expected.data)]
            if ahead == expected.data or self._is_cut(expected, ahead):
                received.position += len(ahead)
                waiting.remove(expected)
                return
        raise AssertionError(f"{cookie:#x} was answered without error, at {received.position}, to {waiting}")

    def _is_cut(self, expected: Expected, ahead: bytes) -> bool:
        """Say whether data end where the client had enough."""
        return self._cut and len(ahead) == self._received.left and expected.data.startswith(ahead)

    def _chunk(self, kind: int, payload: Reader, answer: Answer, *, last: bool) -> None:
        assert not answer.error
        if kind == NO_CHUNK:
            assert last
        elif kind == DATA_CHUNK:
            (offset,) = payload.unpack(">Q")
            assert payload.left
            answer.contents.append((offset, payload.take(payload.left)))
        elif kind == HOLE_CHUNK:
            offset, length = payload.unpack(">QI")
            assert 0 < length <= self._disk.size
            answer.contents.append((offset, bytes(length)))
        elif kind == (LONG_STATUS_CHUNK if self._agreed.extended else STATUS_CHUNK):
            (context,) = payload.unpack(">I")
            assert context not in answer.extents
            layout, count = ">II", payload.left // 8
            if self._agreed.extended:
                (count,) = payload.unpack(">I")
                layout = ">QQ"
            extents = [payload.unpack(layout) for _ in range(count)]
            answer.extents[context] = [(length, status) for length, status in extents]
        else:
            assert last
            assert kind in (ERROR_CHUNK, ERROR_OFFSET_CHUNK), f"a chunk of type {kind:#x}"
            answer.error, length = payload.unpack(">IH")
            assert answer.error
            assert 0 < len(payload.take(length).decode()) <= PAGE
            if kind == ERROR_OFFSET_CHUNK:
                payload.unpack(">Q")
        assert not payload.left

    def _fits(self, expected: Expected, answer: Answer) -> bool:
        """Say whether these chunks, none of them an error, are what a request has to be answered with."""
        request = expected.request
        if self._agreed.extended and answer.start != request.offset:
            return False
        if expected.errors or sorted(answer.extents) != sorted(expected.contexts):
            return False
        if request.flags & DF and len(answer.contents) > 1:
            return False
        position = request.offset
        data = b""
        for offset, part in sorted(answer.contents):
            if offset != position:
                return False
            position += len(part)
            data += part
        return data == expected.data and all(
            self._fits_range(expected, context, extents) for context, extents in answer.extents.items()
        )

    def _fits_range(self, expected: Expected, context: int, extents: list[tuple[int, int]]) -> bool:
        """Say whether extents tell the status of the pages in a range, and none is like the one before."""
        position, end = expected.request.offset, expected.request.offset + expected.length
        first = position // PAGE
        before = None
        for length, status in extents:
            pages = range(position // PAGE, -(-(position + length) // PAGE))
            if not 0 < length <= end - position or status == before:
                return False
            for page in pages:
                wanted = expected.statuses[context][page - first]
                if status != wanted and not (context != ALLOCATION and (wanted, status) == (2, 3)):
                    return False
            position += length
            before = status
        if expected.request.flags & REQ_ONE:
            return len(extents) == 1
        return position == end
