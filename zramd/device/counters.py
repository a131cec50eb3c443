"""What a device counts, in the shape of the kernel's statistics files."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MmStat:
    """The kernel's mm_stat. The first five are in bytes."""

    orig_data_size: int
    compr_data_size: int
    mem_used_total: int
    mem_limit: int
    mem_used_max: int
    same_pages: int
    pages_compacted: int
    huge_pages: int
    huge_pages_since: int


@dataclass(frozen=True, slots=True)
class IoStat:
    """The kernel's io_stat. Failures are counted for each request, notify_free for each page.

    The transmission loop splits a request larger than its buffer, as the block layer splits a large bio.
    """

    failed_reads: int
    failed_writes: int
    invalid_io: int
    notify_free: int


@dataclass(frozen=True, slots=True)
class RequestStat:
    """Requests and 512-byte sectors read and written, failed ones too. Discards are not counted (Linux 6.18)."""

    reads: int
    read_sectors: int
    writes: int
    write_sectors: int
