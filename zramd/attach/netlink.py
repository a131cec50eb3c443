"""The kernel's NBD client, as it is driven over generic netlink: the family "nbd", of Linux's nbd-netlink.h.

All integers are the machine's own; a message and an attribute are padded to 4 bytes, and their lengths count headers
but no padding.

    message           u32 length, u16 type, u16 flags, u32 sequence number, u32 port, payload
      of a family     type = the family's number; payload: u8 command, u8 version, u16 0, attributes
      NLMSG_ERROR     i32 -errno (0: done), header of the request [, the rest of it] [, attributes if NLM_F_ACK_TLVS]
    attribute         u16 length, u16 type, payload; that of a nested one is attributes

What is asked for, and answered:

    CTRL_CMD_GETFAMILY   FAMILY_NAME              -> FAMILY_ID u16, MCAST_GROUPS {n {GRP_NAME, GRP_ID u32}}
    NBD_CMD_CONNECT      INDEX, SIZE, SOCKETS ..  -> INDEX u32
    NBD_CMD_RECONFIGURE  INDEX, what changes      -> (done)
    NBD_CMD_DISCONNECT   INDEX                    -> (done)
    NBD_CMD_STATUS       INDEX                    -> DEVICE_LIST {DEVICE_ITEM {INDEX u32, CONNECTED u8}}
    NBD_CMD_LINK_DEAD    INDEX u32, to the multicast group: a connection of the device has died

    SOCKETS {SOCK_ITEM {SOCK_FD u32}, SOCK_ITEM ..}

The nbd family tells its reasons to the kernel's log only: an error is an errno, with a text where netlink has one.
"""

import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator

MESSAGE = struct.Struct("=IHHII")
FAMILY_HEADER = struct.Struct("=BBH")
ATTRIBUTE = struct.Struct("=HH")
ERRNO = struct.Struct("=i")
U8 = struct.Struct("=B")
U16 = struct.Struct("=H")
U32 = struct.Struct("=I")
U64 = struct.Struct("=Q")

SOL_NETLINK = 270
NETLINK_ADD_MEMBERSHIP = 1
NETLINK_EXT_ACK = 11

NLMSG_ERROR = 2
NLM_F_REQUEST = 1
NLM_F_ACK = 4
NLM_F_CAPPED = 0x100
NLM_F_ACK_TLVS = 0x200
NLMSGERR_ATTR_MSG = 1
NLA_F_NESTED = 0x8000
NLA_TYPE_MASK = 0x3FFF

NETLINK_GENERIC = 16
GENL_ID_CTRL = 0x10
CTRL_VERSION = 1
CTRL_CMD_GETFAMILY = 3
CTRL_ATTR_FAMILY_ID = 1
CTRL_ATTR_FAMILY_NAME = 2
CTRL_ATTR_MCAST_GROUPS = 7
CTRL_ATTR_MCAST_GRP_NAME = 1
CTRL_ATTR_MCAST_GRP_ID = 2

NBD_FAMILY = b"nbd"
NBD_GROUP = b"nbd_mc_group"
NBD_VERSION = 1
NBD_CMD_CONNECT = 1
NBD_CMD_DISCONNECT = 2
NBD_CMD_RECONFIGURE = 3
NBD_CMD_LINK_DEAD = 4
NBD_CMD_STATUS = 5
NBD_ATTR_INDEX = 1
NBD_ATTR_SIZE_BYTES = 2
NBD_ATTR_BLOCK_SIZE_BYTES = 3
NBD_ATTR_TIMEOUT = 4
NBD_ATTR_SERVER_FLAGS = 5
NBD_ATTR_SOCKETS = 7
NBD_ATTR_DEAD_CONN_TIMEOUT = 8
NBD_ATTR_DEVICE_LIST = 9
NBD_ATTR_BACKEND_IDENTIFIER = 10
NBD_SOCK_ITEM = 1
NBD_SOCK_FD = 1
NBD_DEVICE_ITEM = 1
NBD_DEVICE_INDEX = 1
NBD_DEVICE_CONNECTED = 2

BUFFER_BYTES = 16 << 10
"""More than the kernel ever puts into one message to us: a page, or what was asked for and the error that it got."""
REPLY_SECONDS = 10.0
"""The kernel carries a request out before `send` returns; its reply only has to be fetched."""


class NetlinkError(OSError):
    """The kernel refused a request, or said something that is no message."""


class LostEventsError(Exception):
    """The kernel had more events than it could keep for us: anything may have happened."""


class NbdFamily:
    """The family's number, and two sockets: one for requests, one that gets its events.

    Made by `open`; the arguments are for tests. `events` becomes readable when there is one.
    """

    def __init__(self, requests: socket.socket, events: socket.socket, family: int) -> None:
        self.events = events
        self._requests = requests
        self._family = family
        self._sequence = 0
        self._buffer = bytearray(BUFFER_BYTES)
        requests.settimeout(REPLY_SECONDS)
        events.setblocking(False)

    @classmethod
    def open(cls) -> "NbdFamily":
        """Find the family and join its multicast group.

        Raises:
            NetlinkError: ENOENT if the kernel has no NBD client, or it is not loaded.
            OSError: there are no netlink sockets.
        """
        requests, events = (socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_GENERIC) for _ in range(2))
        try:
            requests.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
            # Without a port of its own, a socket gets no events.
            events.bind((0, 0))
            opened = cls(requests, events, GENL_ID_CTRL)
            opened._family, group = opened._find()
            events.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
        except OSError:
            requests.close()
            events.close()
            raise
        return opened

    def close(self) -> None:
        """Close both sockets."""
        self._requests.close()
        self.events.close()

    def connect(
        self,
        index: int | None,
        fds: Iterable[int],
        *,
        size: int,
        block_size: int,
        flags: int,
        dead_seconds: int,
        backend: str,
    ) -> int:
        """Make a device of connected sockets, and return its index. The kernel keeps the sockets, we may close ours.

        Without an index, the kernel takes a free device or makes one. A request never times out (NBD_ATTR_TIMEOUT 0)
        as long as it has one connection; when there is none left, requests wait for `dead_seconds` for a new one.
        `size` and `block_size` are in bytes, `flags` are the transmission flags; `backend` is the name that the device
        is to be known by, and without which it cannot be reconfigured.

        Raises:
            NetlinkError: EBUSY if the device is taken, EINVAL if it may not have several connections.
        """
        wanted = [
            *([attribute(NBD_ATTR_INDEX, U32.pack(index))] if index is not None else []),
            attribute(NBD_ATTR_SIZE_BYTES, U64.pack(size)),
            attribute(NBD_ATTR_BLOCK_SIZE_BYTES, U64.pack(block_size)),
            attribute(NBD_ATTR_TIMEOUT, U64.pack(0)),
            attribute(NBD_ATTR_DEAD_CONN_TIMEOUT, U64.pack(dead_seconds)),
            attribute(NBD_ATTR_SERVER_FLAGS, U64.pack(flags)),
            attribute(NBD_ATTR_BACKEND_IDENTIFIER, backend.encode() + b"\0"),
            _sockets(fds),
        ]
        for answer in self._ask(NBD_CMD_CONNECT, wanted):
            for kind, payload in attributes(answer):
                if kind == NBD_ATTR_INDEX:
                    return unpack(U32, payload)
        raise NetlinkError(errno.EBADMSG, "the kernel did not say which device it has connected")

    def reconfigure(self, index: int, backend: str, fds: Iterable[int] = (), *, size: int | None = None) -> None:
        """Give a device sockets in place of dead connections, or another size in bytes.

        The kernel drops sockets for which there is no dead connection, without a word.

        Raises:
            NetlinkError: EINVAL if the device is not connected, or to another backend.
        """
        wanted = [
            attribute(NBD_ATTR_INDEX, U32.pack(index)),
            attribute(NBD_ATTR_BACKEND_IDENTIFIER, backend.encode() + b"\0"),
        ]
        sockets = _sockets(fds)
        if len(sockets) > ATTRIBUTE.size:
            wanted.append(sockets)
        if size is not None:
            wanted.append(attribute(NBD_ATTR_SIZE_BYTES, U64.pack(size)))
        self._ask(NBD_CMD_RECONFIGURE, wanted)

    def disconnect(self, index: int) -> None:
        """Disconnect a device; what is in flight and what is asked for later fails. It need not be connected.

        Raises:
            NetlinkError: EINVAL if there is no such device.
        """
        self._ask(NBD_CMD_DISCONNECT, [attribute(NBD_ATTR_INDEX, U32.pack(index))])

    def is_connected(self, index: int) -> bool:
        """Say whether a device has been connected and not disconnected since, be its connections dead or not.

        Raises:
            NetlinkError: the kernel does not say.
        """
        for answer in self._ask(NBD_CMD_STATUS, [attribute(NBD_ATTR_INDEX, U32.pack(index))]):
            for kind, devices in attributes(answer):
                if kind == NBD_ATTR_DEVICE_LIST:
                    return any(_is_connected(device, index) for _, device in attributes(devices))
        return False

    def dead_connections(self, index: int) -> int:
        """Return how many connections of a device died since this was last asked.

        Raises:
            LostEventsError: nobody knows.
            OSError: the socket failed.
        """
        dead = 0
        while True:
            try:
                received = self._receive(self.events)
            except BlockingIOError:
                return dead
            except OSError as error:
                if error.errno == errno.ENOBUFS:
                    raise LostEventsError from error
                raise
            for kind, _, _, payload in messages(received):
                if kind == self._family and _command(payload) == NBD_CMD_LINK_DEAD:
                    found = attributes(payload[FAMILY_HEADER.size :])
                    dead += any(kind == NBD_ATTR_INDEX and unpack(U32, value) == index for kind, value in found)

    def _find(self) -> tuple[int, int]:
        """Ask the controller for the family's number and that of its multicast group."""
        family = group = 0
        name = attribute(CTRL_ATTR_FAMILY_NAME, NBD_FAMILY + b"\0")
        for answer in self._ask(CTRL_CMD_GETFAMILY, [name], CTRL_VERSION):
            for kind, payload in attributes(answer):
                if kind == CTRL_ATTR_FAMILY_ID:
                    family = unpack(U16, payload)
                elif kind == CTRL_ATTR_MCAST_GROUPS:
                    group = _find_group(payload) or group
        if not family or not group:
            raise NetlinkError(errno.ENOENT, "the kernel's nbd family is incomplete: it needs Linux 5.14")
        return family, group

    def _ask(self, command: int, wanted: list[bytes], version: int = NBD_VERSION) -> list[bytes]:
        """Send a request and return the attributes of each reply.

        Raises:
            NetlinkError: the kernel refused it.
            TimeoutError, OSError: the socket failed.
        """
        self._sequence += 1
        payload = FAMILY_HEADER.pack(command, version, 0) + b"".join(wanted)
        self._requests.send(message(self._family, NLM_F_REQUEST | NLM_F_ACK, self._sequence, payload))
        answers: list[bytes] = []
        while True:
            for kind, flags, sequence, reply in messages(self._receive(self._requests)):
                if sequence != self._sequence:
                    continue  # the late reply to a request that was given up
                if kind == NLMSG_ERROR:
                    _raise_error(flags, reply)
                    return answers
                if kind == self._family:
                    _command(reply)
                    answers.append(bytes(reply[FAMILY_HEADER.size :]))

    def _receive(self, sock: socket.socket) -> memoryview:
        length, _, flags, _ = sock.recvmsg_into([self._buffer])
        if flags & socket.MSG_TRUNC or not length:
            raise NetlinkError(errno.EBADMSG, "a netlink message is too long")
        return memoryview(self._buffer)[:length]


def message(kind: int, flags: int, sequence: int, payload: bytes) -> bytes:
    """Return a message to the kernel."""
    return MESSAGE.pack(MESSAGE.size + len(payload), kind, flags, sequence, 0) + payload


def messages(data: memoryview) -> Iterator[tuple[int, int, int, memoryview]]:
    """Yield (type, flags, sequence number, payload) of each message in what was received at once.

    Raises:
        NetlinkError: one is cut short.
    """
    while data:
        if len(data) < MESSAGE.size:
            raise _cut_short("message")
        length, kind, flags, sequence, _ = MESSAGE.unpack_from(data)
        if not MESSAGE.size <= length <= len(data):
            raise _cut_short("message")
        yield kind, flags, sequence, data[MESSAGE.size : length]
        data = data[_padded(length) :]


def attribute(kind: int, payload: bytes) -> bytes:
    """Return an attribute with its padding."""
    length = ATTRIBUTE.size + len(payload)
    return ATTRIBUTE.pack(length, kind) + payload + bytes(_padded(length) - length)


def attributes(data: bytes | memoryview) -> Iterator[tuple[int, bytes | memoryview]]:
    """Yield (type, payload) of each attribute.

    Raises:
        NetlinkError: one is cut short.
    """
    while data:
        if len(data) < ATTRIBUTE.size:
            raise _cut_short("attribute")
        length, kind = ATTRIBUTE.unpack_from(data)
        if not ATTRIBUTE.size <= length <= len(data):
            raise _cut_short("attribute")
        yield kind & NLA_TYPE_MASK, data[ATTRIBUTE.size : length]
        data = data[_padded(length) :]


def unpack(form: struct.Struct, payload: bytes | memoryview) -> int:
    """Return the integer that is an attribute's payload.

    Raises:
        NetlinkError: the payload is of another size.
    """
    if len(payload) != form.size:
        raise NetlinkError(errno.EBADMSG, f"an attribute has {len(payload)} bytes instead of {form.size}")
    value: int = form.unpack(payload)[0]
    return value


def _padded(length: int) -> int:
    return length + 3 & ~3


def _cut_short(what: str) -> NetlinkError:
    return NetlinkError(errno.EBADMSG, f"a netlink {what} is cut short")


def _command(payload: memoryview) -> int:
    if len(payload) < FAMILY_HEADER.size:
        raise _cut_short("message")
    return payload[0]


def _sockets(fds: Iterable[int]) -> bytes:
    items = (attribute(NBD_SOCK_ITEM | NLA_F_NESTED, attribute(NBD_SOCK_FD, U32.pack(fd))) for fd in fds)
    return attribute(NBD_ATTR_SOCKETS | NLA_F_NESTED, b"".join(items))


def _is_connected(device: bytes | memoryview, index: int) -> bool:
    found = dict(attributes(device))
    if NBD_DEVICE_INDEX not in found or NBD_DEVICE_CONNECTED not in found:
        raise _cut_short("message")
    return unpack(U32, found[NBD_DEVICE_INDEX]) == index and unpack(U8, found[NBD_DEVICE_CONNECTED]) != 0


def _find_group(groups: bytes | memoryview) -> int:
    for _, group in attributes(groups):
        found = dict(attributes(group))
        if bytes(found.get(CTRL_ATTR_MCAST_GRP_NAME, b"")).rstrip(b"\0") == NBD_GROUP:
            return unpack(U32, found.get(CTRL_ATTR_MCAST_GRP_ID, b""))
    return 0


def _raise_error(flags: int, payload: memoryview) -> None:
    """Raise what an NLMSG_ERROR says, unless it says that all is done."""
    if len(payload) < ERRNO.size + MESSAGE.size:
        raise _cut_short("message")
    number = -ERRNO.unpack_from(payload)[0]
    if not number:
        return
    text = os.strerror(number)
    if flags & NLM_F_ACK_TLVS:
        # The request stands between the number and the attributes: its header, and what is not capped of the rest.
        (length, *_) = MESSAGE.unpack_from(payload, ERRNO.size)
        start = ERRNO.size + (MESSAGE.size if flags & NLM_F_CAPPED else _padded(length))
        for kind, value in attributes(payload[start:]):
            if kind == NLMSGERR_ATTR_MSG:
                text = bytes(value).rstrip(b"\0").decode(errors="replace")
    raise NetlinkError(number, text)
