"""The fixed newstyle handshake, from the greeting to the choice of an export."""

import socket
import time
from collections.abc import Callable

from zramd.device.disk import UninitialisedError
from zramd.device.opening import OpenDevice
from zramd.nbd.export import MAXIMUM_PAYLOAD, MINIMUM_BLOCK, PREFERRED_BLOCK, Export, Exports
from zramd.nbd.protocol import (
    CLIENT_FLAGS,
    EXPORT,
    EXPORT_NAME_PADDING,
    GREETING,
    IHAVEOPT,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    MAX_NAME,
    NBDMAGIC,
    OPTION,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    U16,
    U32,
    HandshakeFlag,
    Info,
    Option,
    OptionReply,
)

HANDSHAKE_SECONDS = 10.0
"""A client that has not chosen an export by then is disconnected."""
MAX_OPTION_LENGTH = 1 << 20
"""Bytes of data in an option. Nothing legal is that long; a longer one ends the session."""
MAX_OPTIONS = 1024
"""Options in one handshake."""


class SessionError(Exception):
    """The client broke the protocol: this session ends, and nothing else does."""


class ClientLeftError(SessionError):
    """The client closed the connection where more was to come."""


class _InvalidError(Exception):
    """An option's data contradict themselves: an error reply, and the handshake goes on."""


Connect = Callable[[Export], OpenDevice]
"""Claims the disk of an export for a client. Raises UninitialisedError."""


class Handshake:
    """One handshake on a connected socket, which must be over within `seconds`."""

    def __init__(
        self, sock: socket.socket, exports: Exports, connect: Connect, seconds: float = HANDSHAKE_SECONDS
    ) -> None:
        self._sock = sock
        self._exports = exports
        self._connect = connect
        self._deadline = time.monotonic() + seconds
        self._no_zeroes = False
        self._fixed = False

    def _receive(self, length: int) -> bytes:
        """Receive exactly `length` bytes."""
        data = bytearray(length)
        view = memoryview(data)
        while view:
            self._limit_time()
            count = self._sock.recv_into(view)
            if not count:
                raise ClientLeftError("the client left during the handshake")
            view = view[count:]
        return bytes(data)

    def _send(self, data: bytes) -> None:
        self._limit_time()
        self._sock.sendall(data)

    def _limit_time(self) -> None:
        """Let the next system call on the socket take no longer than what is left for the handshake."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the handshake took too long")
        self._sock.settimeout(left)

    def run(self) -> OpenDevice | None:
        """Negotiate. Return the device to serve, or None if the client said it is done.

        Raises:
            SessionError: the client broke the protocol or left.
            OSError: the connection failed, or the time is over.
        """
        offered = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
        self._send(GREETING.pack(NBDMAGIC, IHAVEOPT, offered))
        (flags,) = CLIENT_FLAGS.unpack(self._receive(CLIENT_FLAGS.size))
        if flags & ~int(offered):
            raise SessionError(f"the client set unknown flags {flags:#x}")
        self._no_zeroes = bool(flags & HandshakeFlag.NO_ZEROES)
        self._fixed = bool(flags & HandshakeFlag.FIXED_NEWSTYLE)
        for _ in range(MAX_OPTIONS):
            magic, option, length = OPTION.unpack(self._receive(OPTION.size))
            if magic != IHAVEOPT:
                raise SessionError(f"an option starts with {magic:#x}")
            if length > MAX_OPTION_LENGTH:
                raise SessionError(f"an option of {length} bytes is too long")
            data = self._receive(length)
            if option == Option.EXPORT_NAME:
                return self._export_name(data)
            if not self._fixed:
                raise SessionError(f"option {option} from a client that does not speak fixed newstyle")
            if option == Option.ABORT:
                self._reply(option, OptionReply.ACK)
                return None
            opened = self._option(option, data)
            if opened is not None:
                return opened
        raise SessionError(f"more than {MAX_OPTIONS} options")

    def _reply(self, option: int, reply: OptionReply, data: bytes = b"") -> None:
        self._send(OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, reply, len(data)) + data)

    def _option(self, option: int, data: bytes) -> OpenDevice | None:
        """Answer an option. Return a device if transmission follows."""
        answer: dict[int, Callable[[bytes], OpenDevice | None]] = {
            Option.LIST: self._list,
            Option.INFO: self._info,
            Option.GO: self._go,
        }
        try:
            if option not in answer:
                self._reply(option, OptionReply.ERR_UNSUP, b"this server does not know the option")
                return None
            return answer[option](data)
        except _InvalidError as error:
            self._reply(option, OptionReply.ERR_INVALID, str(error).encode())
            return None

    def _export_name(self, data: bytes) -> OpenDevice:
        # The protocol has no error reply to this option.
        try:
            export = self._exports.find(_decode_name(data)) if len(data) <= MAX_NAME else None
        except _InvalidError as error:
            raise SessionError(str(error)) from error
        if export is None:
            raise SessionError("no such export")
        try:
            opened = self._connect(export)
        except UninitialisedError as error:
            raise SessionError(str(error)) from error
        reply = EXPORT.pack(opened.device.disksize, export.flags)
        self._send(reply if self._no_zeroes else reply + EXPORT_NAME_PADDING)
        return opened

    def _list(self, data: bytes) -> None:
        if data:
            raise _InvalidError("LIST takes no data")
        for export in self._exports:
            name, description = export.name.encode(), export.description.encode()
            self._reply(Option.LIST, OptionReply.SERVER, U32.pack(len(name)) + name + description)
        self._reply(Option.LIST, OptionReply.ACK)

    def _info(self, data: bytes) -> None:
        self._describe(Option.INFO, data)

    def _go(self, data: bytes) -> OpenDevice | None:
        return self._describe(Option.GO, data)

    def _describe(self, option: Option, data: bytes) -> OpenDevice | None:
        name, wanted = _parse_info_request(data)
        export = self._exports.find(name)
        if export is None:
            self._reply(option, OptionReply.ERR_UNKNOWN, b"no such export")
            return None
        opened = None
        try:
            if option is Option.GO:
                opened = self._connect(export)
            disksize = opened.device.disksize if opened else export.disk.require_disksize()
        except UninitialisedError as error:
            self._reply(option, OptionReply.ERR_UNKNOWN, str(error).encode())
            return None
        self._reply(option, OptionReply.INFO, INFO_EXPORT.pack(Info.EXPORT, disksize, export.flags))
        if Info.NAME in wanted:
            self._reply(option, OptionReply.INFO, U16.pack(Info.NAME) + export.name.encode())
        if Info.DESCRIPTION in wanted:
            self._reply(option, OptionReply.INFO, U16.pack(Info.DESCRIPTION) + export.description.encode())
        # Always, as nbdkit does: a client that did not ask may still profit from it.
        sizes = INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, MINIMUM_BLOCK, PREFERRED_BLOCK, MAXIMUM_PAYLOAD)
        self._reply(option, OptionReply.INFO, sizes)
        self._reply(option, OptionReply.ACK)
        return opened


def _parse_info_request(data: bytes) -> tuple[str, set[int]]:
    """Split the data of INFO and GO: u32 name length, name, u16 count, count times u16 information type."""
    if len(data) < U32.size + U16.size:
        raise _InvalidError("the option is too short")
    (length,) = U32.unpack_from(data)
    if length > len(data) - U32.size - U16.size or length > MAX_NAME:
        raise _InvalidError("the export name is longer than the option or than 4096 bytes")
    end = U32.size + length
    (count,) = U16.unpack_from(data, end)
    end += U16.size
    if len(data) != end + count * U16.size:
        raise _InvalidError("the option's length is not that of its parts")
    wanted = {U16.unpack_from(data, end + number * U16.size)[0] for number in range(count)}
    return _decode_name(data[U32.size : U32.size + length]), wanted


def _decode_name(data: bytes) -> str:
    try:
        name = data.decode()
    except UnicodeDecodeError as error:
        raise _InvalidError("the export name is not UTF-8") from error
    if "\0" in name:
        raise _InvalidError("the export name has a NUL in it")
    return name
