"""The NBD protocol's numbers and frames. No I/O happens here.

Source: doc/proto.md of the NetworkBlockDevice/nbd project, with its branch extension-ext-header. All integers are
big-endian.

Handshake:

    greeting        u64 NBDMAGIC, u64 IHAVEOPT, u16 handshake flags                          server, 18 bytes
    client flags    u32                                                                      client
    option          u64 IHAVEOPT, u32 option, u32 length, data                               client
    option reply    u64 OPTION_REPLY_MAGIC, u32 option, u32 type, u32 length, data           server
    EXPORT_NAME     u64 size, u16 transmission flags, 124 zeros unless NO_ZEROES             server, then transmission

Data of options and of their replies:

    INFO, GO        u32 length, name, u16 count, count times u16 information type            client
    ..META_CONTEXT  u32 length, name, u32 count, count times (u32 length, query)             client
    SERVER          u32 length, name, description                                            server
    INFO            u16 information type, what it is (see INFO_EXPORT, INFO_BLOCK_SIZE)      server
    META_CONTEXT    u32 context id, name                                                     server

Transmission, requests. Only a WRITE has a payload, or with extended headers whatever has the flag PAYLOAD_LEN; `length`
is then that of the payload:

    request         u32 REQUEST_MAGIC, u16 flags, u16 type, u64 cookie, u64 offset, u32 length [, payload]
    extended        u32 EXTENDED_REQUEST_MAGIC, u16 flags, u16 type, u64 cookie, u64 offset, u64 length [, payload]
    payload of a BLOCK_STATUS       u64 length of the range, then u32 context ids

Transmission, replies:

    simple reply    u32 SIMPLE_REPLY_MAGIC, u32 error, u64 cookie [, data of a READ without error]
    chunk           u32 CHUNK_MAGIC, u16 flags, u16 type, u64 cookie, u32 length, payload
    extended chunk  u32 EXTENDED_CHUNK_MAGIC, u16 flags, u16 type, u64 cookie, u64 request offset, u64 length, payload

    payload of OFFSET_DATA          u64 offset, data
               OFFSET_HOLE          u64 offset, u32 length
               BLOCK_STATUS         u32 context id, then u32 length, u32 status of each extent
               BLOCK_STATUS_EXT     u32 context id, u32 number of extents, then u64 length, u64 status of each
               ERROR                u32 error, u16 length, text
               ERROR_OFFSET         u32 error, u16 length, text, u64 offset
"""

import struct
from enum import IntEnum, IntFlag

NBDMAGIC = 0x4E42444D41474943
IHAVEOPT = 0x49484156454F5054
OPTION_REPLY_MAGIC = 0x3E889045565A9
REQUEST_MAGIC = 0x25609513
EXTENDED_REQUEST_MAGIC = 0x21E41C71
SIMPLE_REPLY_MAGIC = 0x67446698
CHUNK_MAGIC = 0x668E33EF
EXTENDED_CHUNK_MAGIC = 0x6E8A278C

GREETING = struct.Struct(">QQH")
CLIENT_FLAGS = struct.Struct(">I")
OPTION = struct.Struct(">QII")
OPTION_REPLY = struct.Struct(">QIII")
EXPORT = struct.Struct(">QH")
INFO_EXPORT = struct.Struct(">HQH")
INFO_BLOCK_SIZE = struct.Struct(">HIII")
REQUEST = struct.Struct(">IHHQQI")
EXTENDED_REQUEST = struct.Struct(">IHHQQQ")
SIMPLE_REPLY = struct.Struct(">IIQ")
CHUNK = struct.Struct(">IHHQI")
EXTENDED_CHUNK = struct.Struct(">IHHQQQ")
DATA_CHUNK = struct.Struct(">IHHQIQ")
EXTENDED_DATA_CHUNK = struct.Struct(">IHHQQQQ")
"""Chunks of OFFSET_DATA up to the data."""
HOLE = struct.Struct(">QI")
ERROR = struct.Struct(">IH")
EXTENT = struct.Struct(">II")
EXTENDED_EXTENT = struct.Struct(">QQ")
U16 = struct.Struct(">H")
U32 = struct.Struct(">I")
U64 = struct.Struct(">Q")

EXPORT_NAME_PADDING = bytes(124)
MAX_STRING = 4096
"""The longest string that the protocol allows, in bytes."""
CHUNK_DONE = 1
"""Flag of a chunk: the last one of a reply."""


class HandshakeFlag(IntFlag):
    """What the server offers and the client takes up."""

    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class Option(IntEnum):
    """What a client asks for before transmission."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class OptionReply(IntEnum):
    """Types of option replies; those from 2**31 + 1 on are errors, and may carry a text."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 2**31 + 1
    ERR_POLICY = 2**31 + 2
    ERR_INVALID = 2**31 + 3
    ERR_TLS_REQD = 2**31 + 5
    ERR_UNKNOWN = 2**31 + 6
    ERR_SHUTDOWN = 2**31 + 7
    ERR_TOO_BIG = 2**31 + 9
    ERR_EXT_HEADER_REQD = 2**31 + 10


class Info(IntEnum):
    """Information that INFO and GO give."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class TransmissionFlag(IntFlag):
    """What an export can do."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12


class Command(IntEnum):
    """Types of requests."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(IntFlag):
    """Flags of requests."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5


class Chunk(IntEnum):
    """Types of chunks."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = 0x8001
    ERROR_OFFSET = 0x8002


class Allocation(IntFlag):
    """Status of an extent in the context base:allocation."""

    HOLE = 1
    ZERO = 2


class Error(IntEnum):
    """Error numbers as they stand in replies, whatever the machine calls them."""

    EPERM = 1
    EIO = 5
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95


class SessionError(Exception):
    """The client broke the protocol: this session ends, and nothing else does."""


class ClientLeftError(SessionError):
    """The client closed the connection where more was to come."""
