"""What a device counts, in the shape of the kernel's statistics files."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MmStat:
    """The kernel's mm_stat. The first five are in bytes."""

    orig_data_size: int = 0
    compr_data_size: int = 0
    mem_used_total: int = 0
    mem_limit: int = 0
    mem_used_max: int = 0
    same_pages: int = 0
    pages_compacted: int = 0
    huge_pages: int = 0
    huge_pages_since: int = 0


@dataclass(frozen=True, slots=True)
class IoStat:
    """The kernel's io_stat. Failures are counted for each request, notify_free for each page.

    There is no bio here: a request of the client counts as one, and the transmission loop splits a request larger than
    its buffer, as the block layer splits a large bio. `failed_backing_reads` are pages that the backing store did not
    return, or not whole; the kernel has nothing like it.
    """

    failed_reads: int = 0
    failed_writes: int = 0
    invalid_io: int = 0
    notify_free: int = 0
    failed_backing_reads: int = 0


@dataclass(frozen=True, slots=True)
class BdStat:
    """The kernel's bd_stat: 4 KiB blocks in use, read and written. Several pages share a block here.

    `count` is what the live objects would fill; reads and writes are those of cleaning too. `pages` are written back.
    """

    count: int = 0
    reads: int = 0
    writes: int = 0
    pages: int = 0


DEFAULT_BATCH_SIZE = 32


@dataclass(frozen=True, slots=True)
class WritebackSettings:
    """What writeback may do, and how it does it.

    `limit` is in pages, and counts only if `limited`. `batch_size` is how many pages are taken, or published, under one
    hold of the device's lock, up to a number that takes a millisecond.
    """

    limit: int = 0
    limited: bool = False
    batch_size: int = DEFAULT_BATCH_SIZE


@dataclass(frozen=True, slots=True)
class RequestStat:
    """Requests and 512-byte sectors read and written, failed ones too. Discards are not counted (Linux 6.18).

    The kernel counts bios; a request here is one of the client's, split as for IoStat.
    """

    reads: int = 0
    read_sectors: int = 0
    writes: int = 0
    write_sectors: int = 0
