"""The transmission phase: requests in batches.

One receive brings in whatever the client has sent, all complete requests in it are parsed and their pages compressed,
the device is locked once for all of them, and one gathered send answers them. At a queue depth of 32 that is two
system calls and one lock for 32 requests.

Memory is bounded by the limits, and so is the time under the lock: a request longer than the buffer is applied in
pieces.
"""

import socket
from collections.abc import Callable, Iterator

from zramd.device.fetching import Fetched, NotInMemoryError, PageError
from zramd.device.native import NativeDevice
from zramd.device.pages import NoSpaceError
from zramd.device.requests import RequestCounters
from zramd.device.stream import Prepared, whole_pages
from zramd.device.zram import Device
from zramd.layout import PAGE_SHIFT, PAGE_SIZE, REQUESTS_IN_FLIGHT
from zramd.nbd.block_status import Context, extents
from zramd.nbd.inbox import Header, Inbox
from zramd.nbd.limits import DEFAULT_LIMITS, Limits
from zramd.nbd.protocol import U32, U64, ClientLeftError, Command, CommandFlag, Error, SessionError
from zramd.nbd.replies import ExtendedReplies, Failure, SimpleReplies, StructuredReplies
from zramd.nbd.terms import DEFAULT_TERMS, Mode, Terms

DISCARD_SLICE = 4 << 20
"""Bytes discarded under one hold of the lock: 1024 pages, about a millisecond."""
SWALLOW = 2
"""A refused write with up to this many times the largest payload leaves the session in step; a longer one ends it."""
IOV_MAX = 1024
"""Buffers that the kernel takes in one gathered send."""

# Plain integers: an enum member costs more than the comparison it is used in.
_READ, _WRITE, _DISC, _FLUSH, _TRIM, _CACHE, _WRITE_ZEROES, _BLOCK_STATUS = map(int, Command)
_FUA, _NO_HOLE, _DF, _REQ_ONE, _FAST_ZERO, _PAYLOAD_LEN = map(int, CommandFlag)
_NOTHING: list[Prepared] = []

Request = tuple[int, int, int, int, int, int, list[Prepared]]
"""(command, flags, cookie, offset, length, where the payload starts in the buffer, prepared pages); not refused."""

_REPLIES = {Mode.SIMPLE: SimpleReplies, Mode.STRUCTURED: StructuredReplies, Mode.EXTENDED: ExtendedReplies}


class Transmission:
    """The transmission phase of one connection.

    `flush` writes to the medium what was written to the device, if that is anything but memory; it may raise OSError.
    `counters` count what is answered.
    """

    def __init__(
        self,
        sock: socket.socket,
        device: Device,
        flush: Callable[[], None] | None,
        terms: Terms = DEFAULT_TERMS,
        limits: Limits = DEFAULT_LIMITS,
        counters: RequestCounters | None = None,
    ) -> None:
        self._sock = sock
        self._device = device
        self._disksize = device.disksize
        self._flush = flush
        self._contexts = terms.contexts
        self._limits = limits
        self._max_reply = limits.reply
        self._stream = device.stream(bytearray(limits.buffer))
        self._inbox = Inbox(sock, self._stream.view, extended=terms.mode is Mode.EXTENDED)
        # A request of more bytes does not fit the buffer, or is refused.
        self._long = min(limits.buffer - self._inbox.header.size, limits.payload)
        self._replies = _REPLIES[terms.mode]()
        self._counters = counters or RequestCounters()
        # Pages of the backing store that the next request needs.
        self._fetched: dict[int, Fetched] = {}
        # (command, cookie, offset, length) of requests to be answered after a flush.
        self._durable: list[tuple[int, int, int, int]] = []
        self._forbidden = (_WRITE, _TRIM, _WRITE_ZEROES) if terms.read_only else ()
        # Up to this command, what has no flags and is in bounds is right.
        self._plain = _READ if terms.read_only or terms.mode is Mode.EXTENDED else _TRIM
        self._flags = _allowed_flags(terms)
        self._receive = self._inbox.receive
        if isinstance(device, NativeDevice):
            self._receive = device.engine.Loop(
                self._stream,
                sock,
                self._inbox,
                self._counters.words,
                direct=type(sock) is socket.socket and sock.gettimeout() is None,
                disksize=device.disksize,
                structured=terms.mode is not Mode.SIMPLE,
                read_only=terms.read_only,
                flushing=flush is not None,
                reply_bytes=limits.reply,
                payload=limits.payload,
            ).receive

    def run(self) -> None:
        """Serve requests until the client disconnects.

        Raises:
            SessionError: the client broke the protocol.
            OSError: the connection failed.
        """
        inbox = self._inbox
        while self._receive():
            while True:
                end = inbox.end
                batch, stop = self._parse()
                if stop is not None:
                    magic, flags, command, _, _, length = stop
                    is_request = magic == inbox.magic
                    inbox.leaving = is_request and command == _DISC
                    inbox.payload_left = length if is_request and inbox.has_payload(flags, command) else 0
                self._apply(batch)
                if stop is None:
                    if inbox.end == end:
                        break
                    # The client is gone, and what it had sent came in while it was looked for.
                    continue
                if magic != inbox.magic:
                    raise SessionError(f"a request starts with {magic:#x}")
                if command == _DISC:
                    return
                self._apply_long(stop)

    def _parse(self) -> tuple[list[Request], Header | None]:
        """Consume the complete requests in the buffer, answer those that are refused, compress what others write.

        Return the others, and the header that this stopped at, if it is that of a long request, of a disconnect, or
        no request's at all.
        """
        inbox = self._inbox
        batch: list[Request] = []
        buffer, start, end = inbox.buffer, inbox.start, inbox.end
        unpack, size, wanted, extended = inbox.header.unpack_from, inbox.header.size, inbox.magic, inbox.extended
        prepare, disksize, plain, long = self._stream.prepare, self._disksize, self._plain, self._long
        stop: Header | None = None
        while end - start >= size:
            header: Header = unpack(buffer, start)
            magic, flags, command, cookie, offset, length = header
            after = start + size
            if magic != wanted or length > long or command == _DISC:
                stop = header
                if magic == wanted:
                    start = after
                break
            begin = after
            if flags & _PAYLOAD_LEN if extended else command == _WRITE:
                after += length
                if after > end:
                    break
            # What is plain and in bounds needs no closer look.
            if flags or offset + length > disksize or command > plain:
                failure = self._refusal(command, flags, offset, length)
                if failure:
                    self._counters.add(command, length)
                    self._counters.fail(command, length)
                    self._replies.fail(cookie, offset, failure)
                    start = after
                    continue
            prepared = prepare(begin, length, offset) if command == _WRITE else _NOTHING
            batch.append((command, flags, cookie, offset, length, begin, prepared))
            start = after
        inbox.start = start
        return batch, stop

    def _refusal(self, command: int, flags: int, offset: int, length: int) -> Failure | None:
        """Return why a request is not to be carried out, or None."""
        allowed = self._flags.get(command)
        if allowed is None:
            return Failure(Error.EINVAL, f"unknown command {command}")
        if flags & ~allowed:
            return Failure(Error.EINVAL, f"flags {flags & ~allowed:#x} are not for this command")
        if command in self._forbidden:
            return Failure(Error.EPERM, "the export is read-only")
        if command == _FLUSH:
            return None
        if command == _BLOCK_STATUS:
            if not self._contexts:
                return Failure(Error.EINVAL, "no metadata context was chosen")
            if flags & _PAYLOAD_LEN:
                return None
        if command == _WRITE and self._inbox.extended and not flags & _PAYLOAD_LEN:
            return Failure(Error.EINVAL, "a write needs PAYLOAD_LEN")
        if offset + length > self._disksize:
            number = Error.ENOSPC if command in (_WRITE, _WRITE_ZEROES) else Error.EINVAL
            return Failure(number, f"beyond the end of the export, which has {self._disksize} bytes")
        if command == _BLOCK_STATUS and not length:
            return Failure(Error.EINVAL, "a range of no bytes has no status")
        if command in (_READ, _WRITE) and length > self._limits.payload:
            return Failure(Error.EINVAL, f"more than {self._limits.payload} bytes at once")
        if flags & _DF and length > self._long:
            return Failure(Error.EOVERFLOW, f"more than {self._long} bytes unfragmented")
        if flags & _FAST_ZERO and length:
            head, whole_end = whole_pages(offset, length)
            if head == whole_end:
                return Failure(Error.ENOTSUP, "less than a page is zeroed no faster than it is written")
        return None

    def _apply(self, batch: list[Request]) -> None:
        """Apply requests in order and send all replies, under as few holds of the lock as the limits allow."""
        device, stream, replies, most = self._device, self._stream, self._replies, self._max_reply
        done, read = replies.done, replies.read
        counters, counts, sizes = self._counters, self._counters.counts, self._counters.sizes
        position, count = 0, len(batch)
        while position < count:
            missing: list[int] = []
            counters.words[REQUESTS_IN_FLIGHT] = count - position
            with device:
                self._inbox.require_client()
                if stream.generation != device.generation:
                    batch[position:] = self._prepare_anew(batch[position:])
                work = 0
                while position < count and work < most:
                    command, flags, cookie, offset, length, begin, prepared = batch[position]
                    position += 1
                    work += length + PAGE_SIZE
                    counts[command] += 1
                    sizes[command] += length
                    try:
                        if command == _WRITE:
                            device.write(stream, begin, length, offset, prepared, self._fetched)
                        elif command == _READ:
                            read(device, cookie, offset, length, offset, length, self._fetched, bool(flags & _DF))
                            continue
                        elif command == _TRIM:
                            device.discard(offset, length)
                        elif command == _WRITE_ZEROES:
                            device.write_zeroes(offset, length, keep=bool(flags & _NO_HOLE), fetched=self._fetched)
                        elif command == _BLOCK_STATUS:
                            self._block_status(cookie, flags, offset, length, begin)
                            work = most
                            continue
                    except (NoSpaceError, PageError) as error:
                        counters.fail(command, length)
                        replies.fail(cookie, offset, _failure(error))
                        continue
                    except NotInMemoryError as error:
                        counts[command] -= 1
                        sizes[command] -= length
                        position -= 1
                        missing = error.pages
                        break
                    if self._flush and (flags & _FUA or command == _FLUSH):
                        self._durable.append((command, cookie, offset, length))
                    else:
                        done(cookie, offset)
            self._send()
            self._fetch(missing)
        self._send()

    def _prepare_anew(self, batch: list[Request]) -> Iterator[Request]:
        """Compress once more what is to be written, with the codec that the device has now. The caller holds the lock.

        All of it: what is prepared does not tell with which codec that was, only the stream does.
        """
        stream, device = self._stream, self._device
        stream.choose(device.identity.algorithms, device.generation)
        for command, flags, cookie, offset, length, begin, prepared in batch:
            anew = stream.prepare(begin, length, offset) if command == _WRITE else prepared
            yield command, flags, cookie, offset, length, begin, anew

    def _fetch(self, missing: list[int]) -> None:
        """Read what the next request needs from the backing store, or forget what the last one needed."""
        if missing:
            self._fetched.update(self._device.fetch(missing))
        elif self._fetched:
            self._fetched = {}

    def _block_status(self, cookie: int, flags: int, offset: int, length: int, begin: int) -> None:
        """Answer a BLOCK_STATUS; its payload, if it has one, starts at `begin`. The caller holds the device's lock."""
        contexts = self._contexts
        if flags & _PAYLOAD_LEN:
            payload = self._inbox.buffer[begin : begin + length]
            failure, length, contexts = self._parse_selection(payload, offset)
            if failure:
                self._counters.fail(_BLOCK_STATUS, len(payload))
                self._replies.fail(cookie, offset, failure)
                return
        one = bool(flags & _REQ_ONE)
        runs = self._device.states(offset >> PAGE_SHIFT, -(-(offset + length) // PAGE_SIZE))
        found = [(context, extents(runs, context, offset, length, one=one)) for context in contexts]
        self._replies.status(cookie, offset, found)

    def _parse_selection(self, payload: memoryview, offset: int) -> tuple[Failure | None, int, tuple[Context, ...]]:
        """Return, from the payload of a BLOCK_STATUS, what is wrong with it, the range's length, and the contexts."""
        if len(payload) <= U64.size or len(payload) % U32.size:
            return Failure(Error.EINVAL, "the payload is no length and context ids"), 0, ()
        (length,) = U64.unpack_from(payload)
        ids = [number for (number,) in U32.iter_unpack(payload[U64.size :])]
        contexts = tuple(context for context in self._contexts if context in ids)
        if len(contexts) != len(ids):
            return Failure(Error.EINVAL, "a context is unknown or given twice"), 0, ()
        return self._refusal(_BLOCK_STATUS, 0, offset, length), length, contexts

    def _apply_long(self, header: Header) -> None:
        """Apply a request that is too long for the buffer or the lock, in pieces."""
        _, flags, command, cookie, offset, length = header
        received_at = self._inbox.received_at
        self._counters.words[REQUESTS_IN_FLIGHT] = 1
        failure = self._refusal(command, flags, offset, length)
        if self._inbox.payload_left:
            if length > SWALLOW * self._limits.payload:
                raise SessionError(f"a request with {length} bytes of payload is too long")
            if command != _WRITE and not failure:
                failure = Failure(Error.EINVAL, "the payload is too long")
            failure = self._write_pieces(offset, length, failure)
            self._inbox.payload_left = 0
        elif not failure:
            if command == _READ:
                self._read_pieces(cookie, offset, length)
                self._counters.add(command, length)
                self._counters.note_answers(received_at)
                return
            if command == _BLOCK_STATUS:
                with self._device:
                    self._block_status(cookie, flags, offset, length, 0)
                self._counters.add(command, length)
                self._send()
                return
            if command in (_TRIM, _WRITE_ZEROES):
                failure = self._discard_pieces(command, flags, offset, length)
        self._counters.add(command, length)
        if failure:
            self._counters.fail(command, length)
            self._replies.fail(cookie, offset, failure)
        elif self._flush and (flags & _FUA or command == _FLUSH):
            self._durable.append((command, cookie, offset, length))
        else:
            self._replies.done(cookie, offset)
        # More may have been received since its header.
        self._inbox.received_at = received_at
        self._send()

    def _write_pieces(self, offset: int, length: int, failure: Failure | None) -> Failure | None:
        """Receive a long payload and write it, or swallow it once something has failed. Return what has."""
        device, inbox = self._device, self._inbox
        while length:
            # Each piece but the last ends with a page.
            piece = min(length, self._limits.buffer // 2 - offset % PAGE_SIZE)
            while inbox.end - inbox.start < piece:
                if not inbox.receive():
                    raise ClientLeftError("the client left in the middle of a write")
            if not failure:
                prepared = self._stream.prepare(inbox.start, piece, offset)
                inbox.payload_left = length
                try:
                    with device:
                        inbox.require_client()
                        device.write(self._stream, inbox.start, piece, offset, prepared, self._fetched)
                except (NoSpaceError, PageError) as error:
                    failure = _failure(error)
                except NotInMemoryError as error:
                    self._fetch(error.pages)
                    continue
            self._fetch([])
            inbox.start += piece
            offset += piece
            length -= piece
        return failure

    def _read_pieces(self, cookie: int, start: int, length: int) -> None:
        """Send the reply to a long read piece by piece."""
        offset, end = start, start + length
        while offset < end:
            piece = min(end - offset, self._max_reply - offset % PAGE_SIZE)
            try:
                with self._device:
                    self._replies.read(self._device, cookie, start, length, offset, piece, self._fetched)
            except PageError as error:
                if offset > start and not self._replies.fails_late:
                    raise SessionError(f"a read failed after its reply had begun: {error}") from error
                self._counters.fail(_READ, length)
                self._replies.fail(cookie, start, _failure(error), offset)
                end = offset
            except NotInMemoryError as error:
                self._fetch(error.pages)
                continue
            self._fetch([])
            self._send()
            offset += piece

    def _discard_pieces(self, command: int, flags: int, offset: int, length: int) -> Failure | None:
        """Carry out a long trim or write-zeroes. Return what failed."""
        device = self._device
        while length:
            piece = min(length, DISCARD_SLICE - offset % PAGE_SIZE)
            try:
                with device:
                    self._inbox.require_client()
                    if command == _TRIM:
                        device.discard(offset, piece)
                    else:
                        device.write_zeroes(offset, piece, keep=bool(flags & _NO_HOLE), fetched=self._fetched)
            except (NoSpaceError, PageError) as error:
                return _failure(error)
            except NotInMemoryError as error:
                self._fetch(error.pages)
                continue
            self._fetch([])
            offset += piece
            length -= piece
        return None

    def _send(self) -> None:
        """Send all replies gathered so far, and count them. The lock is not held: a slow client holds up no other."""
        if self._flush and self._durable:
            self._answer_durable(self._flush)
        parts, size = self._replies.parts, self._replies.size
        if not parts:
            return
        while parts:
            try:
                sent = self._sock.sendmsg(parts[:IOV_MAX])
            except (BrokenPipeError, ConnectionResetError):
                if not self._inbox.said_disconnect():
                    raise
                sent = size
            if sent == size:
                parts.clear()
                break
            size -= sent
            whole = 0
            while whole < len(parts) and sent >= len(parts[whole]):
                sent -= len(parts[whole])
                whole += 1
            del parts[:whole]
            if sent:
                parts[0] = memoryview(parts[0])[sent:]
        self._replies.size = 0
        self._counters.note_answers(self._inbox.received_at)

    def _answer_durable(self, flush: Callable[[], None]) -> None:
        try:
            flush()
        except OSError as error:
            failure = Failure(Error.EIO, f"the medium failed: {error.strerror}")
            for command, cookie, offset, length in self._durable:
                self._counters.fail(command, length)
                self._replies.fail(cookie, offset, failure)
        else:
            for _, cookie, offset, _ in self._durable:
                self._replies.done(cookie, offset)
        self._durable.clear()


def _allowed_flags(terms: Terms) -> dict[int, int]:
    """Return the flags that each command may have. FUA is accepted on every one, as the protocol asks."""
    flags = dict.fromkeys(map(int, Command), _FUA)
    flags[_WRITE_ZEROES] |= _NO_HOLE | _FAST_ZERO
    flags[_BLOCK_STATUS] |= _REQ_ONE
    if terms.mode is not Mode.SIMPLE:
        flags[_READ] |= _DF
    if terms.mode is Mode.EXTENDED:
        flags[_WRITE] |= _PAYLOAD_LEN
        flags[_BLOCK_STATUS] |= _PAYLOAD_LEN
    return flags


def _failure(error: NoSpaceError | PageError) -> Failure:
    return Failure(Error.ENOSPC if isinstance(error, NoSpaceError) else Error.EIO, str(error))
