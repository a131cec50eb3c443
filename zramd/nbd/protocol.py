"""The NBD protocol's numbers and frames. No I/O happens here.

Source: doc/proto.md of the NetworkBlockDevice/nbd project. All integers are big-endian.

    greeting        u64 NBDMAGIC, u64 IHAVEOPT, u16 handshake flags                          server, 18 bytes
    client flags    u32                                                                      client
    option          u64 IHAVEOPT, u32 option, u32 length, data                               client
    option reply    u64 OPTION_REPLY_MAGIC, u32 option, u32 type, u32 length, data           server
    EXPORT_NAME     u64 size, u16 transmission flags, 124 zeros unless NO_ZEROES             server, then transmission
    request         u32 REQUEST_MAGIC, u16 flags, u16 type, u64 cookie, u64 offset, u32 length [, payload of a WRITE]
    simple reply    u32 SIMPLE_REPLY_MAGIC, u32 error, u64 cookie [, data of a READ without error]
"""

import struct
from enum import IntEnum, IntFlag

NBDMAGIC = 0x4E42444D41474943
IHAVEOPT = 0x49484156454F5054
OPTION_REPLY_MAGIC = 0x3E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698

GREETING = struct.Struct(">QQH")
CLIENT_FLAGS = struct.Struct(">I")
OPTION = struct.Struct(">QII")
OPTION_REPLY = struct.Struct(">QIII")
EXPORT = struct.Struct(">QH")
REQUEST = struct.Struct(">IHHQQI")
SIMPLE_REPLY = struct.Struct(">IIQ")
INFO_EXPORT = struct.Struct(">HQH")
INFO_BLOCK_SIZE = struct.Struct(">HIII")
U16 = struct.Struct(">H")
U32 = struct.Struct(">I")

EXPORT_NAME_PADDING = bytes(124)
MAX_NAME = 4096
"""The longest string that the protocol allows, in bytes."""


class HandshakeFlag(IntFlag):
    """What the server offers and the client takes up."""

    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class Option(IntEnum):
    """What a client asks for before transmission."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    INFO = 6
    GO = 7


class OptionReply(IntEnum):
    """Types of option replies; those from 2**31 + 1 on are errors, and may carry a text."""

    ACK = 1
    SERVER = 2
    INFO = 3
    ERR_UNSUP = 2**31 + 1
    ERR_INVALID = 2**31 + 3
    ERR_UNKNOWN = 2**31 + 6


class Info(IntEnum):
    """Information that INFO and GO give."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class TransmissionFlag(IntFlag):
    """What an export can do."""

    HAS_FLAGS = 1 << 0
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    CAN_MULTI_CONN = 1 << 8
    SEND_CACHE = 1 << 10


class Command(IntEnum):
    """Types of requests."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6


class CommandFlag(IntFlag):
    """Flags of requests."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1


class Error(IntEnum):
    """Error numbers as they stand in replies, whatever the machine calls them."""

    NONE = 0
    EIO = 5
    EINVAL = 22
    ENOSPC = 28
