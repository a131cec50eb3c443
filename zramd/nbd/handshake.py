"""The fixed newstyle handshake, from the greeting to the choice of an export.

Nothing is received beyond the option at hand: what a client sends behind STARTTLS is then taken for TLS, and what it
sends behind GO is left for the transmission.
"""

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from zramd.device.life import UninitialisedError
from zramd.device.opening import OpenDevice
from zramd.nbd.block_status import CONTEXT_NAMES, Context, find_contexts
from zramd.nbd.export import MINIMUM_BLOCK, PREFERRED_BLOCK, Export, Exports, uuid_of
from zramd.nbd.identity import is_uuid
from zramd.nbd.limits import DEFAULT_LIMITS, Limits
from zramd.nbd.options import RefusedError, decode, parse_info, parse_meta_context, require_empty
from zramd.nbd.protocol import (
    CLIENT_FLAGS,
    EXPORT,
    EXPORT_NAME_PADDING,
    GREETING,
    IHAVEOPT,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    NBDMAGIC,
    OPTION,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    U16,
    U32,
    ClientLeftError,
    HandshakeFlag,
    Info,
    Option,
    OptionReply,
    SessionError,
)
from zramd.nbd.terms import Mode, Terms
from zramd.nbd.tls import TlsMode

Connect = Callable[[Export], OpenDevice]
"""Claims the disk of an export for a client. Raises UninitialisedError."""
Secure = Callable[[socket.socket, float], socket.socket]
"""Makes a TLS connection of a plain one, within so many seconds. Raises OSError, SessionError."""


@dataclass(frozen=True, slots=True)
class Session:
    """What a handshake leads to: the device of an export to serve on a socket, on the terms agreed on."""

    sock: socket.socket
    export: Export
    opened: OpenDevice
    terms: Terms


class Handshake:
    """One handshake on a connected socket.

    `connect` is called once, for the export that the client chooses; `secure` at most once, if it asks for TLS.
    While `is_stopping` returns true, every option but ABORT is refused.
    """

    def __init__(
        self,
        sock: socket.socket,
        exports: Exports,
        connect: Connect,
        secure: Secure | None = None,
        tls: TlsMode = TlsMode.OFF,
        limits: Limits = DEFAULT_LIMITS,
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._sock = sock
        self._exports = exports
        self._connect = connect
        self._secure = secure
        self._tls = tls
        self._limits = limits
        self._is_stopping = is_stopping
        self._deadline = time.monotonic() + limits.handshake_seconds
        self._no_zeroes = False
        self._is_secure = False
        self._mode = Mode.SIMPLE
        self._contexts: tuple[Context, ...] = ()
        self._contexts_of: Export | None = None

    def _receive(self, length: int) -> bytes:
        """Receive exactly `length` bytes."""
        data = bytearray(length)
        view = memoryview(data)
        while view:
            self._sock.settimeout(self._time_left())
            count = self._sock.recv_into(view)
            if not count:
                raise ClientLeftError("the client left during the handshake")
            view = view[count:]
        return bytes(data)

    def _send(self, data: bytes) -> None:
        self._sock.settimeout(self._time_left())
        self._sock.sendall(data)

    def _time_left(self) -> float:
        """Return the seconds that the next system call on the socket may take."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the handshake took too long")
        return left

    def run(self) -> Session | None:
        """Negotiate. Return None if the client said it is done.

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
        for _ in range(self._limits.options):
            magic, option, length = OPTION.unpack(self._receive(OPTION.size))
            if magic != IHAVEOPT:
                raise SessionError(f"an option starts with {magic:#x}")
            if length > self._limits.option:
                raise SessionError(f"an option of {length} bytes is too long")
            data = self._receive(length)
            if option == Option.EXPORT_NAME:
                return self._export_name(data)
            if not flags & HandshakeFlag.FIXED_NEWSTYLE:
                raise SessionError(f"option {option} from a client that does not speak fixed newstyle")
            if option == Option.ABORT:
                self._reply(option, OptionReply.ACK)
                return None
            try:
                session = self._answer(option, data)
            except RefusedError as error:
                self._reply(option, error.reply, str(error).encode())
            except UninitialisedError as error:
                self._reply(option, OptionReply.ERR_UNKNOWN, str(error).encode())
            else:
                if session is not None:
                    return session
        raise SessionError(f"more than {self._limits.options} options")

    def _reply(self, option: int, reply: OptionReply, data: bytes = b"") -> None:
        self._send(OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, reply, len(data)) + data)

    def _needs_tls(self) -> bool:
        return self._tls is TlsMode.REQUIRE and not self._is_secure

    def _answer(self, option: int, data: bytes) -> Session | None:
        """Answer an option. Return a session if transmission follows."""
        if self._is_stopping():
            raise RefusedError(OptionReply.ERR_SHUTDOWN, "the server is shutting down")
        if self._needs_tls() and option != Option.STARTTLS:
            raise RefusedError(OptionReply.ERR_TLS_REQD, "this server requires TLS")
        match option:
            case Option.GO:
                return self._describe(Option.GO, data)
            case Option.INFO:
                self._describe(Option.INFO, data)
            case Option.LIST:
                self._list(data)
            case Option.STARTTLS:
                self._start_tls(data)
            case Option.STRUCTURED_REPLY | Option.EXTENDED_HEADERS:
                self._set_mode(Option(option), data)
            case Option.LIST_META_CONTEXT | Option.SET_META_CONTEXT:
                self._meta_context(Option(option), data)
            case _:
                raise RefusedError(OptionReply.ERR_UNSUP, "this server does not know the option")
        return None

    def _export_name(self, data: bytes) -> Session:
        # The protocol has no error reply to this option.
        if self._is_stopping():
            raise SessionError("EXPORT_NAME while the server is shutting down")
        if self._needs_tls():
            raise SessionError("EXPORT_NAME without TLS, which this server requires")
        if self._mode is Mode.EXTENDED:
            raise SessionError("EXPORT_NAME after EXTENDED_HEADERS")
        try:
            name = decode(data, self._limits.name)
            export = self._find(name)
            opened = self._claim(export, name)
        except (RefusedError, UninitialisedError) as error:
            raise SessionError(str(error)) from error
        terms = self._terms(export)
        reply = EXPORT.pack(opened.device.disksize, export.flags(terms))
        self._send(reply if self._no_zeroes else reply + EXPORT_NAME_PADDING)
        return Session(self._sock, export, opened, terms)

    def _find(self, name: str) -> Export:
        export = self._exports.find(name)
        if export is None:
            raise RefusedError(OptionReply.ERR_UNKNOWN, "no such export")
        return export

    def _claim(self, export: Export, name: str) -> OpenDevice:
        """Connect to the export that was found under a name."""
        opened = self._connect(export)
        # Until it is claimed, the disk may be reset and made anew.
        if is_uuid(name) and name != uuid_of(opened):
            raise SessionError("the export got another device while it was asked for")
        return opened

    def _terms(self, export: Export) -> Terms:
        """Return the terms for an export: contexts count only for the one that they were chosen for."""
        contexts = self._contexts if self._contexts_of is export else ()
        return Terms(self._mode, contexts, export.read_only)

    def _list(self, data: bytes) -> None:
        require_empty(data)
        for export in self._exports:
            name, description = export.name.encode(), export.describe(export.disk.opened).encode()
            self._reply(Option.LIST, OptionReply.SERVER, U32.pack(len(name)) + name + description)
        self._reply(Option.LIST, OptionReply.ACK)

    def _start_tls(self, data: bytes) -> None:
        require_empty(data)
        if self._is_secure:
            raise RefusedError(OptionReply.ERR_INVALID, "this is TLS already")
        if self._secure is None:
            raise RefusedError(OptionReply.ERR_POLICY, "this server has no TLS")
        self._reply(Option.STARTTLS, OptionReply.ACK)
        self._sock = self._secure(self._sock, self._time_left())
        # Whoever sits between client and server may have said what came before.
        self._is_secure = True
        self._mode = Mode.SIMPLE
        self._contexts, self._contexts_of = (), None

    def _set_mode(self, option: Option, data: bytes) -> None:
        require_empty(data)
        if option is Option.EXTENDED_HEADERS:
            self._mode = Mode.EXTENDED
        elif self._mode is Mode.EXTENDED:
            raise RefusedError(OptionReply.ERR_EXT_HEADER_REQD, "extended headers were chosen already")
        else:
            self._mode = Mode.STRUCTURED
        self._reply(option, OptionReply.ACK)

    def _meta_context(self, option: Option, data: bytes) -> None:
        choosing = option is Option.SET_META_CONTEXT
        if choosing:
            self._contexts, self._contexts_of = (), None
        if self._mode is Mode.SIMPLE:
            raise RefusedError(OptionReply.ERR_INVALID, "contexts need structured replies or extended headers")
        name, queries = parse_meta_context(data, self._limits.name)
        export = self._find(name)
        if choosing:
            found = [context for context, name in CONTEXT_NAMES.items() if name in queries]
            self._contexts, self._contexts_of = tuple(found), export
        elif queries:
            found = sorted({context for query in queries for context in find_contexts(query)})
        else:
            found = list(Context)
        for context in found:
            number = context if choosing else 0
            self._reply(option, OptionReply.META_CONTEXT, U32.pack(number) + CONTEXT_NAMES[context].encode())
        self._reply(option, OptionReply.ACK)

    def _describe(self, option: Option, data: bytes) -> Session | None:
        """Answer INFO or GO."""
        name, wanted = parse_info(data, self._limits.name)
        export = self._find(name)
        terms = self._terms(export)
        opened = self._claim(export, name) if option is Option.GO else export.disk.require_opened()
        disksize = opened.device.disksize
        self._reply(option, OptionReply.INFO, INFO_EXPORT.pack(Info.EXPORT, disksize, export.flags(terms)))
        if Info.NAME in wanted:
            self._reply(option, OptionReply.INFO, U16.pack(Info.NAME) + export.name.encode())
        if Info.DESCRIPTION in wanted:
            self._reply(option, OptionReply.INFO, U16.pack(Info.DESCRIPTION) + export.describe(opened).encode())
        # Always, as nbdkit does: a client that did not ask may still profit from it.
        sizes = INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, MINIMUM_BLOCK, PREFERRED_BLOCK, self._limits.payload)
        self._reply(option, OptionReply.INFO, sizes)
        self._reply(option, OptionReply.ACK)
        return Session(self._sock, export, opened, terms) if option is Option.GO else None
