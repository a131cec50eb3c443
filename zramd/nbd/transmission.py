"""The transmission phase: requests in batches.

One receive brings in whatever the client has sent, all complete requests in it are parsed and their pages compressed,
the device is locked once for all of them, and one gathered send answers them. At a queue depth of 32 that is two
system calls and one lock for 32 requests.

Memory is bounded by the receive buffer and by MAX_REPLY, and the time under the lock by the latter: a request longer
than the buffer is applied in pieces.

The fence: a client that has lost its connection sends what was not answered again, on another, and may then overwrite
it there. So nothing is applied for a client that is gone; whether it is gone is looked at under the device's lock, and
whatever it does elsewhere comes after that. Only one that took its leave (DISC) is owed all that it had asked for.
"""

import select
import socket
from collections.abc import Callable

from zramd.device.stream import Prepared
from zramd.device.zram import Device, NoSpaceError, PageError
from zramd.layout import PAGE_SIZE
from zramd.nbd.export import MAXIMUM_PAYLOAD
from zramd.nbd.handshake import ClientLeftError, SessionError
from zramd.nbd.protocol import (
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    Command,
    CommandFlag,
    Error,
)

BUFFER_SIZE = 512 << 10
"""Bytes received at once at most; also what a connection costs in memory."""
MAX_REPLY = 1 << 20
"""Bytes of replies gathered before they are sent; also of work done under one hold of the lock, a page being added for
each request: at 4 KiB each that is 128 requests and about a millisecond."""
LONG = BUFFER_SIZE - REQUEST.size
"""A request of more bytes than this is long. A write that is not fits the buffer."""
WRITE_SLICE = BUFFER_SIZE // 2
"""Bytes of a long write that are applied at once."""
DISCARD_SLICE = 4 << 20
"""Bytes discarded under one hold of the lock: 1024 pages, about a millisecond."""
MAX_SWALLOW = 2 * MAXIMUM_PAYLOAD
"""A refused write with up to this much payload leaves the session in step; a longer one ends it."""
IOV_MAX = 1024
"""Buffers that the kernel takes in one gathered send."""

# Plain integers: an enum member costs more than the comparison it is used in.
_HEADER = REQUEST.size
_READ, _WRITE, _DISC, _FLUSH, _TRIM, _CACHE, _WRITE_ZEROES = map(int, Command)
_FUA, _NO_HOLE = map(int, CommandFlag)
_EINVAL, _ENOSPC, _EIO = int(Error.EINVAL), int(Error.ENOSPC), int(Error.EIO)
_COMMANDS = frozenset(map(int, Command))
_NOTHING: list[Prepared] = []

Header = tuple[int, int, int, int, int, int]
"""(magic, flags, command, cookie, offset, length), as REQUEST unpacks it."""
Request = tuple[int, int, int, int, int, int, list[Prepared]]
"""(command, flags, cookie, offset, length, where the payload starts in the buffer, prepared pages); not refused."""


class Transmission:
    """The transmission phase of one connection.

    `flush` writes to the medium what was written to the device; it may raise OSError.
    """

    def __init__(self, sock: socket.socket, device: Device, flush: Callable[[], None]) -> None:
        self._sock = sock
        self._device = device
        self._disksize = device.disksize
        self._flush = flush
        self._stream = device.stream(bytearray(BUFFER_SIZE))
        self._buffer = self._stream.view
        self._start = 0  # what is received and not yet consumed lies from here
        self._end = 0  # to here
        self._replies: list[bytes | memoryview] = []
        self._reply_bytes = 0
        self._durable: list[int] = []  # cookies of requests to be answered after a flush
        self._payload_left = 0  # of a long write: the next request starts this far behind `_start`
        self._leaving = False  # the client has said DISC
        self._drained = False  # all that a client that is gone had sent is in the buffer
        self._poll = select.poll()
        # With no events asked for, a full close (HUP) or an error of a Unix peer; TCP needs to be asked for its FIN.
        self._poll.register(sock, 0 if sock.family == socket.AF_UNIX else select.POLLRDHUP)

    def run(self) -> None:
        """Serve requests until the client disconnects.

        Raises:
            SessionError: the client broke the protocol.
            OSError: the connection failed.
        """
        while self._receive():
            while True:
                batch, stop = self._parse()
                if stop is not None:
                    self._leaving = stop[2] == _DISC and stop[0] == REQUEST_MAGIC
                    self._payload_left = stop[5] if stop[2] == _WRITE else 0
                self._apply(batch)
                if stop is None:
                    if batch and self._drained:
                        continue
                    break
                if stop[0] != REQUEST_MAGIC:
                    raise SessionError(f"a request starts with {stop[0]:#x}")
                if stop[2] == _DISC:
                    return
                self._apply_long(stop)

    def _receive(self) -> bool:
        """Receive more; say whether there was any. The unconsumed part moves to the front when room gets short."""
        if self._start == self._end:
            self._start = self._end = 0
        elif BUFFER_SIZE - self._end < BUFFER_SIZE // 4:
            rest = self._end - self._start
            self._buffer[:rest] = self._buffer[self._start : self._end]
            self._start, self._end = 0, rest
        return self._receive_behind(0)

    def _receive_behind(self, flags: int) -> bool:
        """Receive into the free end of the buffer; say whether there was anything."""
        try:
            count = self._sock.recv_into(self._buffer[self._end :], 0, flags)
        except ConnectionResetError:
            # A Unix peer that left replies unread: what it had sent can still be received.
            count = self._sock.recv_into(self._buffer[self._end :], 0, flags)
        self._end += count
        return count > 0

    def _require_client(self) -> None:
        """Check that the client is still there, or has said DISC. The caller holds the device's lock.

        Raises:
            ClientLeftError: it is gone.
        """
        if self._poll.poll(0) and not self._said_disconnect():
            raise ClientLeftError("the client left; what it had asked for and not seen answered is dropped")

    def _said_disconnect(self) -> bool:
        """Say whether a client that is gone had said DISC, as far as the buffer can hold what it sent."""
        if self._leaving:
            return True
        self._drained = True
        try:
            while self._receive_behind(socket.MSG_DONTWAIT):
                pass
        except OSError:
            return False
        position = self._start + self._payload_left
        while self._end - position >= _HEADER:
            magic, _, command, _, _, length = REQUEST.unpack_from(self._buffer, position)
            if magic != REQUEST_MAGIC:
                return False
            if command == _DISC:
                return True
            position += _HEADER + (length if command == _WRITE else 0)
        return False

    def _parse(self) -> tuple[list[Request], Header | None]:
        """Consume the complete requests in the buffer, answer those that are refused, compress what others write.

        Return the others, and the header that this stopped at, if it is that of a long request, of a disconnect, or
        no request's at all.
        """
        batch: list[Request] = []
        buffer, start, end = self._buffer, self._start, self._end
        unpack, prepare, disksize = REQUEST.unpack_from, self._stream.prepare, self._disksize
        stop: Header | None = None
        while end - start >= _HEADER:
            header: Header = unpack(buffer, start)
            magic, flags, command, cookie, offset, length = header
            after = start + _HEADER
            if magic != REQUEST_MAGIC or length > LONG or command == _DISC:
                stop, start = header, after
                break
            begin = after
            if command == _WRITE:
                after += length
                if after > end:
                    break
            # What is plain and in bounds needs no closer look.
            if flags or offset + length > disksize or command > _TRIM:
                error = self._refusal(command, flags, offset, length)
                if error:
                    self._reply(error, cookie)
                    start = after
                    continue
            prepared = prepare(begin, length, offset) if command == _WRITE else _NOTHING
            batch.append((command, flags, cookie, offset, length, begin, prepared))
            start = after
        self._start = start
        return batch, stop

    def _refusal(self, command: int, flags: int, offset: int, length: int) -> int:
        """Return the error number for a request that is not to be carried out, 0 for one that is.

        FUA is accepted on every command, as the protocol asks.
        """
        if flags & ~_FUA and (command != _WRITE_ZEROES or flags & ~(_FUA | _NO_HOLE)):
            return _EINVAL
        if command not in _COMMANDS:
            return _EINVAL
        if offset + length > self._disksize and command != _FLUSH:
            return _ENOSPC if command in (_WRITE, _WRITE_ZEROES) else _EINVAL
        if length > MAXIMUM_PAYLOAD and command in (_READ, _WRITE):
            return _EINVAL
        return 0

    def _apply(self, batch: list[Request]) -> None:
        """Apply requests in order and send all replies, under as few holds of the lock as MAX_REPLY allows."""
        device, stream, replies, pack = self._device, self._stream, self._replies, SIMPLE_REPLY.pack
        position, count = 0, len(batch)
        while position < count:
            with device:
                self._require_client()
                work = 0
                while position < count and work < MAX_REPLY:
                    command, flags, cookie, offset, length, begin, prepared = batch[position]
                    position += 1
                    work += length + PAGE_SIZE
                    error = 0
                    try:
                        if command == _WRITE:
                            device.write(stream, begin, length, offset, prepared)
                        elif command == _READ:
                            self._read(cookie, offset, length)
                            continue
                        elif command == _TRIM:
                            device.discard(offset, length)
                        elif command == _WRITE_ZEROES:
                            device.write_zeroes(offset, length)
                    except (NoSpaceError, PageError) as failure:
                        error = _error_number(failure)
                    if command == _WRITE and not flags:
                        replies.append(pack(SIMPLE_REPLY_MAGIC, error, cookie))
                        self._reply_bytes += SIMPLE_REPLY.size
                    else:
                        self._finish(command, flags, cookie, error)
            self._send()
        self._send()

    def _read(self, cookie: int, offset: int, length: int) -> None:
        """Gather the reply to a read. The caller holds the device's lock."""
        replies = self._replies
        position = len(replies)
        replies.append(SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie))
        try:
            self._device.read(offset, length, replies)
        except PageError:
            del replies[position:]
            raise
        self._reply_bytes += SIMPLE_REPLY.size + length

    def _apply_long(self, header: Header) -> None:
        """Apply a request that is too long for the buffer or the lock, in pieces."""
        _, flags, command, cookie, offset, length = header
        error = self._refusal(command, flags, offset, length)
        if command == _WRITE:
            if length > MAX_SWALLOW:
                raise SessionError(f"a write of {length} bytes is too long")
            error = self._write_pieces(offset, length, error)
        elif not error and command == _READ:
            self._read_pieces(cookie, offset, length)
            return
        elif not error and command in (_TRIM, _WRITE_ZEROES):
            error = self._discard_pieces(command, offset, length)
        self._payload_left = 0
        self._finish(command, flags, cookie, error)
        self._send()

    def _write_pieces(self, offset: int, length: int, error: int) -> int:
        """Receive a long write and apply it, or swallow it once there is an error. Return the error number."""
        device = self._device
        while length:
            # Each piece but the last ends with a page.
            piece = min(length, WRITE_SLICE - offset % PAGE_SIZE)
            while self._end - self._start < piece:
                if not self._receive():
                    raise ClientLeftError("the client left in the middle of a write")
            if not error:
                prepared = self._stream.prepare(self._start, piece, offset)
                self._payload_left = length
                try:
                    with device:
                        self._require_client()
                        device.write(self._stream, self._start, piece, offset, prepared)
                except (NoSpaceError, PageError) as failure:
                    error = _error_number(failure)
            self._start += piece
            offset += piece
            length -= piece
        return error

    def _read_pieces(self, cookie: int, offset: int, length: int) -> None:
        """Send the reply to a long read piece by piece.

        The header goes out before the last page is read: the protocol leaves only a disconnect for an error then.
        """
        self._replies.append(SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie))
        self._reply_bytes += SIMPLE_REPLY.size
        while length:
            piece = min(length, MAX_REPLY - offset % PAGE_SIZE)
            try:
                with self._device:
                    self._device.read(offset, piece, self._replies)
            except PageError as failure:
                raise SessionError(f"a read failed after its reply had begun: {failure}") from failure
            self._reply_bytes += piece
            self._send()
            offset += piece
            length -= piece

    def _discard_pieces(self, command: int, offset: int, length: int) -> int:
        """Carry out a long trim or write-zeroes. Return the error number."""
        device = self._device
        while length:
            piece = min(length, DISCARD_SLICE - offset % PAGE_SIZE)
            try:
                with device:
                    self._require_client()
                    if command == _TRIM:
                        device.discard(offset, piece)
                    else:
                        device.write_zeroes(offset, piece)
            except (NoSpaceError, PageError) as failure:
                return _error_number(failure)
            offset += piece
            length -= piece
        return 0

    def _finish(self, command: int, flags: int, cookie: int, error: int) -> None:
        """Answer a request that has no data to return, at once or, if it asks for durability, after a flush."""
        if not error and (command == _FLUSH or flags & _FUA):
            self._durable.append(cookie)
        else:
            self._reply(error, cookie)

    def _reply(self, error: int, cookie: int) -> None:
        self._replies.append(SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie))
        self._reply_bytes += SIMPLE_REPLY.size

    def _send(self) -> None:
        """Send all replies gathered so far. The lock is not held: a slow client holds up nobody else."""
        if self._durable:
            error = 0
            try:
                self._flush()
            except OSError:
                error = _EIO
            for cookie in self._durable:
                self._reply(error, cookie)
            self._durable.clear()
        replies = self._replies
        while replies:
            try:
                sent = self._sock.sendmsg(replies[:IOV_MAX])
            except (BrokenPipeError, ConnectionResetError):
                if not self._said_disconnect():
                    raise
                sent = self._reply_bytes
            if sent == self._reply_bytes:
                replies.clear()
                self._reply_bytes = 0
                return
            self._reply_bytes -= sent
            whole = 0
            while whole < len(replies) and sent >= len(replies[whole]):
                sent -= len(replies[whole])
                whole += 1
            del replies[:whole]
            if sent:
                replies[0] = memoryview(replies[0])[sent:]


def _error_number(failure: NoSpaceError | PageError) -> int:
    return _ENOSPC if isinstance(failure, NoSpaceError) else _EIO
