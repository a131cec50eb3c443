"""The layout of a device's memory: the contract that every implementation of the hot path works on.

A device is a directory of flat files (or memfds), each mapped shared. All words are 64 bits, little-endian.
Everything here survives the daemon; what can be recomputed from it (fullness lists, in-use counts, statistics)
is private memory of the process and is rebuilt at start.

    superblock   one page           geometry, codecs, lifetime counters: see `Superblock`
    page_table   8 bytes a page     the only commit record: a page is what its entry says
    elements     8 bytes a page     the fill pattern of a same-filled page whose pattern is not zero; sparse
    accessed     4 bytes a page     when the page was last read or written, in seconds of CLOCK_BOOTTIME; sparse
    handles      8 bytes a handle   where an object lies now; compaction changes this word and nothing else
    checksums    8 bytes a handle   XXH3 of an object's payload, only with INTEGRITY; stored before the page's entry
    arena1..N    k pages a zspage   zspages of k pages, back to back: zspage z starts at byte z * k * 4096
    dictionaryN  bytes              the dictionary of codec N, if it has one

Page-table entry. 0 is an empty page, so that a hole in the file is an empty part of the device.

     63    62 61  60  59  58  57 56  55   53 52         40 39                              0
    +--------+---+---+---+---+------+-------+-------------+--------------------------------+
    | unused | T | A | N | I | prio | state | stored size | handle, place, 1 = has element |
    +--------+---+---+---+---+------+-------+-------------+--------------------------------+
      T: taken by work that will replace the entry, unless somebody touches the page (the kernel's PP_SLOT)
      N: incompressible   I: idle   size: 0..4096
      place: of a page that is written back, where its object starts in the backing store, in units of 16 bytes. It is
      as it was in memory, compressed; a page that was huge has a size of 4096.
      prio, A: which of the device's codecs. Each of the four priorities has had up to two; a page keeps the one that it
      was stored with. The number of a codec is prio + 4 * A.

Handle word. A free handle's word links to the next free handle; this list, like every other, is rebuilt at start.

     63                  32 31          16 15            1   0
    +----------------------+--------------+---------------+---+
    |        zspage        |  size class  | object index  | 1 |   in use
    +----------------------+--------------+---------------+---+
    |                 next free handle, 0: none           | 0 |   free
    +-----------------------------------------------------+---+

Object. In a class that is not huge, an object starts with one word, as in the kernel:

    in use:  handle << 1 | 1, then the payload
    free:    (index of the next free object + 1) << 1; the list of a zspage is LIFO

An object of the huge class is a whole page without that word. Objects that were never allocated in the life of their
zspage hold whatever was there before; the private count `fresh` bounds them.

Crash rule. A write allocates an object and its handle, copies the payload in, stores the page-table entry (one aligned
8-byte store), and only then frees what the old entry held. An object that no entry reaches is free.
An element is stored before the entry that refers to it; where only the pattern changes, the element is the commit.

Private memory, which both engines work on, is zeroed at start and rebuilt from the regions:

    zspage record, 16 bytes, one array for each arena; a list link is a zspage + 1, 0 being none:

     0      2      4       6            7        8           12          16
    +------+------+-------+------------+--------+-----------+-----------+
    | used | free | fresh | size class | unused | following | preceding |
    +------+------+-------+------------+--------+-----------+-----------+
      used: objects in use   free: head of the zspage's free list, index + 1   fresh: objects ever allocated, the rest
      being free in ascending order   size class: index + 1, 0 for a zspage that is not in use

    segment record, 16 bytes, one for each segment of a backing store (see zramd/backing/store.py):

     0                       8
    +-----------------------+----------------------+
    | units of live objects | next emptied segment |
    +-----------------------+----------------------+
      next: a segment without live objects is on a list, which ends with `NOBODY`; 0: it is not on it. Segment 0 has no
      objects: its record has the sum of all, and the head of the list.

    records of words:  `ArenaRecord`, `ClassRecord`, `PoolRecord` and `DeviceRecord`

    snapshot, while one is read: what pages that have changed since were. `copied` has a word for each page, 0 if the
    page has not changed:

     63  62   61 60                     40 39                              0
    +---+-------+-------------------------+--------------------------------+
    | 1 |   0   | as in the entry, but of |   where its copy starts in the |
    |   |       | a pattern the size is 8 |   store, in words, 0 is none;  |
    |   |       |                         |   written back: where it lies  |
    +---+-------+-------------------------+--------------------------------+

    store: the checksum of an object (0 without INTEGRITY, and of a pattern), then its bytes, filled up to a word
"""

from enum import IntEnum

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
WORD = 8
"""Bytes in a word; also the size of an object's header (the kernel's ZS_HANDLE_SIZE)."""
TABLE_CHUNK_SHIFT = 9
"""Words of the page table, or of the elements, that are populated together: a page of them, for 2 MiB of the device."""


PRIORITIES = 4
CODECS = 2 * PRIORITIES
ACCESSED_BYTES = 4
ACCESSED_CHUNK_SHIFT = 10
"""Access times that are populated together: a page of them."""


class PageState(IntEnum):
    """What a page-table entry refers to."""

    EMPTY = 0
    SAME_FILLED = 1
    COMPRESSED = 2
    HUGE = 3
    WRITTEN_BACK = 4


ENTRY_HANDLE_MASK = (1 << 40) - 1
ENTRY_SIZE_SHIFT = 40
ENTRY_SIZE_MASK = 0x1FFF
ENTRY_STATE_SHIFT = 53
ENTRY_STATE_MASK = 0x7
ENTRY_PRIORITY_SHIFT = 56
ENTRY_PRIORITY_MASK = 0x3
ENTRY_IDLE = 1 << 58
ENTRY_INCOMPRESSIBLE = 1 << 59
ENTRY_ALTERNATE = 1 << 60
ENTRY_TAKEN = 1 << 61
ENTRY_RESERVED_MASK = 0x3 << 62
ENTRY_HAS_ELEMENT = 1
ENTRY_LASTING_MASK = (1 << 61) - 1 & ~ENTRY_HANDLE_MASK
"""What of an entry says the same on any device."""
COPIED = 1 << 63
"""In a snapshot's word for a page."""

HANDLE_IN_USE = 1
HANDLE_INDEX_SHIFT = 1
HANDLE_INDEX_MASK = 0x7FFF
HANDLE_CLASS_SHIFT = 16
HANDLE_CLASS_MASK = 0xFFFF
HANDLE_ZSPAGE_SHIFT = 32

HEADER_IN_USE = 1


class Superblock(IntEnum):
    """Word offsets in the superblock page. `MAGIC` is stored last when a device is made.

    A codec is 6 words: 2 of name (ASCII, zero-filled), 1 of level + 2**63, 1 of bytes in its dictionary, 2 of the
    dictionary's BLAKE2b. There is room for eight, two for each priority; one that is not set has no name.
    """

    MAGIC = 0
    VERSION = 1
    PAGE_SIZE = 2
    DISKSIZE = 3  # bytes
    CHAIN_SIZE = 4  # pages
    FIT_RULE = 5
    UUID = 6  # two words
    MEM_LIMIT = 8  # pages, 0: none
    FIRST_DISKSIZE = 9  # bytes, before the device grew; 0: it never did
    BOOT_ID = 10  # two words: the boot under which the regions are in use; 0: they were left in order
    ALTERNATES = 12  # a bit for each priority: whether its codec now is the one with the higher number
    FEATURES = 13  # bits: see INTEGRITY
    CODECS = 16  # eight times six words
    # Lifetime counters.
    MEM_USED_MAX = 64  # pages
    PAGES_COMPACTED = 65
    HUGE_PAGES_SINCE = 66
    FAILED_READS = 67
    FAILED_WRITES = 68
    NOTIFY_FREE = 69
    READS = 70  # requests
    READ_SECTORS = 71  # of 512 bytes
    WRITES = 72
    WRITE_SECTORS = 73
    # The backing store; meaningless without BACKED.
    BACKING_UUID = 128  # two words
    BACKING_KEY = 130  # four words
    BACKING_SEGMENTS = 134  # how many it has
    BACKING_NONCES = 135  # so many may have been used
    BACKING_READS = 136  # blocks
    BACKING_WRITES = 137
    FAILED_BACKING_READS = 138  # pages
    # Settings of writeback, which stay what they are when the store is changed.
    WRITEBACK_LIMIT = 140  # pages
    WRITEBACK_LIMIT_ENABLE = 141
    WRITEBACK_BATCH_SIZE = 142  # pages, 0: the default
    BACKING_PATH = 256  # to the end of the page, filled up with zeros


ZSPAGE_BYTES = 16
ZSPAGE_USED, ZSPAGE_FREE, ZSPAGE_FRESH = 0, 1, 2
"""Offsets in a zspage record in halves of 32 bits."""
ZSPAGE_CLASS = 6
"""In bytes."""
ZSPAGE_FOLLOWING, ZSPAGE_PRECEDING = 2, 3
"""In units of 32 bits."""

FULLNESS_GROUPS = 12
FULL = FULLNESS_GROUPS - 1


LATENCY_SHIFT, MAX_LATENCY_SHIFT = 10, 34
"""The lowest bound of a bucket of latency, and the highest, as powers of two of nanoseconds."""
LATENCY_STEP_SHIFT = 2
"""Buckets in an octave."""
LATENCY_BUCKETS = (MAX_LATENCY_SHIFT - LATENCY_SHIFT << LATENCY_STEP_SHIFT) + 2
COMMANDS = 8
"""NBD's commands have lower numbers."""

NOBODY = (1 << 64) - 1
"""In a record, where no number is meant."""


class ArenaRecord(IntEnum):
    """Private words of an arena."""

    POPULATED = 0  # free zspages with memory: the height of their stack
    RESERVE = 1  # how many of them are kept at most
    LOW = 2  # with so many left, more are wanted soon; `NOBODY` if nobody is to be told
    WAKE = 3  # the eventfd that tells it


class ClassRecord(IntEnum):
    """Private words of a size class."""

    FILLED = 0  # bit for each fullness group whose list is not empty
    ZSPAGES = 1
    LIVE = 2  # objects in use
    HEADS = 3  # a word for each fullness group: the first zspage of its list, + 1
    COUNTS = HEADS + FULLNESS_GROUPS  # a word for each fullness group: the length of its list
    END = COUNTS + FULLNESS_GROUPS


class PoolRecord(IntEnum):
    """Private words of a pool."""

    PAGES = 0  # in zspages, the kernel's zs_get_total_pages
    FREE_HANDLE = 1  # head of the list of free handles
    NEXT_HANDLE = 2  # the first that was never used
    READY_HANDLES = 3  # how many may be touched
    LOW_HANDLE = 4  # once this one is handed out, more are wanted soon; `NOBODY` if nobody is to be told
    WAKE = 5  # the eventfd that tells it
    END = 6


class DeviceRecord(IntEnum):
    """Private words of a device."""

    PAGES_STORED = 0
    COMPR_DATA_SIZE = 1
    SAME_PAGES = 2
    HUGE_PAGES = 3
    NOTED_PAGES = 4  # up to so many in the pool nothing is to be noted: the mark is as high, the limit is no lower
    GENERATION = 5  # how often a codec was changed: what was compressed before must be so anew
    BACKED_PAGES = 6  # pages that are written back
    CODEC_PAGES = 7  # a word for each codec: the compressed pages that it has, in memory or written back
    SNAPSHOT_FROM = CODEC_PAGES + CODECS  # the first page that is still to be read; `NOBODY`: there is no snapshot
    SNAPSHOT_USED = SNAPSHOT_FROM + 1  # words of the store, the first of which is never used
    SNAPSHOT_READY = SNAPSHOT_USED + 1  # words of the store that may be touched
    END = SNAPSHOT_READY + 1


class RequestRecord(IntEnum):
    """Private words of a connection, for each of NBD's commands: of those that were answered.

    Latency is what passes from receiving the request to handing its reply to the kernel. Bucket 0 is up to 1024 ns,
    the next ones a quarter of an octave each (1280, 1536, 1792, 2048, 2560 ... ns), the last beyond 2^34 ns.
    """

    ERRORS = 0
    BYTES = 1  # of those without an error
    NANOSECONDS = 2  # latency, of all together
    BUCKETS = 3  # a word for each bucket of latency
    END = BUCKETS + LATENCY_BUCKETS


REQUESTS_IN_FLIGHT = COMMANDS * RequestRecord.END
"""In a connection's words: how many are received and not answered yet."""
REQUEST_WORDS = REQUESTS_IN_FLIGHT + 1

INTEGRITY = 1
"""In FEATURES: each object has a checksum."""
BACKED = 2
"""In FEATURES: the device has a backing store."""

BACKING_UNIT_SHIFT = 4
SEGMENT_SHIFT = 18
SEGMENT_UNITS_SHIFT = SEGMENT_SHIFT - BACKING_UNIT_SHIFT
"""From a place to its segment."""
OBJECT_OVERHEAD = 40
"""Bytes of an object in a backing store beside its data."""
MAGIC = int.from_bytes(b"zramd\x00SB", "little")
UNFINISHED = int.from_bytes(b"zramd\x00S?", "little")
"""In place of the magic: the device is being filled. It is nothing if that is cut short."""
VERSION = 1
CODEC_WORDS = 6
CODEC_NAME_WORDS = 2
CODEC_LEVEL = 2
CODEC_DICTIONARY_BYTES = 3
CODEC_DICTIONARY_HASH = 4
"""Word offsets in a codec."""
CODEC_HASH_WORDS = 2
CODEC_LEVEL_BIAS = 1 << 63
