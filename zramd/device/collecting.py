"""Pages of files, of a pipe and of the memory of processes, chosen at random: no more is read than is chosen.

A file's last page ends in zeros, as in the page cache. Holes are pages of zeros that nobody reads.
"""

import errno
import os
import random
import stat
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

from zramd.layout import PAGE_SIZE, WORD

DRAWN = 8
"""So many times the wanted pages are read at most: some are same-filled, which no codec sees."""
PRESENT = 1 << 63
"""In a word of /proc/PID/pagemap: the page is in memory. Others would read as zeros that nobody has written."""
LARGEST_MAPPING = 1 << 18
"""Pages: larger mappings are reserved and hardly used, as those of sanitizers."""


@dataclass(frozen=True, slots=True)
class Extent:
    """Some pages of a file one after the other, from an offset in bytes."""

    path: str
    offset: int
    pages: int


@dataclass(slots=True)
class Found:
    """What there is to choose from: extents with data, pages in holes, files that could not be read, and why."""

    extents: list[Extent] = field(default_factory=list)
    holes: int = 0
    skipped: list[str] = field(default_factory=list)

    @property
    def pages(self) -> int:
        """In all, holes and data."""
        return self.holes + sum(extent.pages for extent in self.extents)


@dataclass(slots=True)
class Collected:
    """Pages that were chosen, none of them same-filled, in random order, and what they were chosen from.

    Attributes:
        total: pages in all.
        holes: of these, in holes.
        read: of the others, how many were looked at.
        zero: of those that were looked at, all zeros.
        same: of those, another word over and over.
    """

    pages: list[bytes]
    total: int
    holes: int = 0
    read: int = 0
    zero: int = 0
    same: int = 0

    @property
    def objects(self) -> int:
        """How many of all pages a pool would have an object for, as far as those tell that were looked at."""
        return self._of_all(self.read - self.zero - self.same)

    @property
    def zeros(self) -> int:
        """How many of all pages are zeros."""
        return self.holes + self._of_all(self.zero)

    def _of_all(self, looked_at: int) -> int:
        return round((self.total - self.holes) * looked_at / max(1, self.read))


def find(paths: Iterable[Path], pids: Iterable[int] = (), check: Callable[[], None] = lambda: None) -> Found:
    """Look for the data of files, of all files below directories, and in the memory of processes.

    `check` is called now and then, and may raise to end it.

    Raises:
        OSError: one of `paths`, or the memory of one of the processes, cannot be read. What is below a directory is
            skipped then.
    """
    found = Found()
    for path in paths:
        if path.is_dir():
            for below in _files(path, found.skipped):
                check()
                try:
                    _add_file(found, below)
                except OSError as error:
                    found.skipped.append(f"{below}: {error.strerror}")
        else:
            _add_file(found, str(path))
    for pid in pids:
        found.extents += memory_of(pid)
    return found


def _files(directory: Path, skipped: list[str]) -> Iterator[str]:
    """Yield the regular files below a directory; symbolic links are not followed."""

    def note(error: OSError) -> None:
        skipped.append(f"{error.filename}: {error.strerror}")

    for place, _, names in os.walk(directory, onerror=note):
        for name in names:
            path = os.path.join(place, name)
            with suppress(FileNotFoundError):
                if stat.S_ISREG(os.lstat(path).st_mode):
                    yield path


def _add_file(found: Found, path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        info = os.fstat(fd)
        if not (stat.S_ISREG(info.st_mode) or stat.S_ISBLK(info.st_mode)):
            raise OSError(errno.EINVAL, "it is no file and no disk", path)
        size = os.lseek(fd, 0, os.SEEK_END)
        pages = -(-size // PAGE_SIZE)
        data = 0
        for start, end in _data(fd, size) if info.st_blocks * 512 < size else [(0, size)]:
            first = start // PAGE_SIZE
            count = -(-end // PAGE_SIZE) - first
            data += count
            if count:
                found.extents.append(Extent(path, first * PAGE_SIZE, count))
        found.holes += pages - data
    finally:
        os.close(fd)


def _data(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the parts of a file that are no holes."""
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            if error.errno != errno.EINVAL:
                raise
            start = end  # a block device, which knows of no holes
            yield start, size
            return
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end


def memory_of(pid: int) -> Iterator[Extent]:
    """Yield what a process has in memory of its own: private, writable and of no file.

    Raises:
        OSError: there is no such process, or it is somebody else's.
    """
    memory = f"/proc/{pid}/mem"
    with open(f"/proc/{pid}/pagemap", "rb") as pagemap, open(memory, "rb"), open(f"/proc/{pid}/maps") as maps:
        for fields in map(str.split, maps.read().splitlines()):
            if fields[1] != "rw-p" or fields[4] != "0":
                continue
            first, end = (int(address, 16) // PAGE_SIZE for address in fields[0].split("-"))
            if end - first <= LARGEST_MAPPING:
                pagemap.seek(first * WORD)
                words = array("Q", pagemap.read((end - first) * WORD))
                for start, count in _runs(words):
                    yield Extent(memory, (first + start) * PAGE_SIZE, count)


def _runs(words: "array[int]") -> Iterator[tuple[int, int]]:
    """Yield (first, count) of the runs of pages that are in memory."""
    start = None
    for number, word in enumerate([*words, 0]):
        if word & PRESENT:
            start = number if start is None else start
        elif start is not None:
            yield start, number - start
            start = None


def collect(found: Found, wanted: int, check: Callable[[], None] = lambda: None) -> Collected:
    """Return some pages of what was found, each with the same chance, and as many as are wanted if there are so many.

    Raises:
        OSError: a file cannot be read.
    """
    data = found.pages - found.holes
    generator = random.Random()  # noqa: S311 (it has nothing to hide)
    drawn = sorted(generator.sample(range(data), min(data, DRAWN * wanted)))
    reservoir = _Reservoir(wanted, generator, Collected([], found.pages, found.holes))
    ends = list(accumulate(extent.pages for extent in found.extents))
    opened, fd = "", -1
    try:
        for number in drawn:
            check()
            which = bisect_right(ends, number)
            extent = found.extents[which]
            if extent.path != opened:
                if fd >= 0:
                    os.close(fd)
                opened, fd = extent.path, os.open(extent.path, os.O_RDONLY | os.O_CLOEXEC)
            place = extent.offset + (number - (ends[which] - extent.pages)) * PAGE_SIZE
            try:
                page = os.pread(fd, PAGE_SIZE, place)
            except OSError:
                if not extent.path.startswith("/proc/"):
                    raise
                page = b""  # the process has given it back
            reservoir.add(page)
    finally:
        if fd >= 0:
            os.close(fd)
    return reservoir.result()


def collect_stream(stream: BinaryIO, wanted: int, check: Callable[[], None] = lambda: None) -> Collected:
    """Return some pages of a stream, which is read to its end; what was found in it is exact.

    Raises:
        OSError: it cannot be read.
    """
    reservoir = _Reservoir(wanted, random.Random(), Collected([], 0))  # noqa: S311 (it has nothing to hide)
    while page := stream.read(PAGE_SIZE):
        check()
        reservoir.add(page)
    collected = reservoir.result()
    collected.total = collected.read
    return collected


class _Reservoir:
    """Keeps so many of the pages that are added, each with the same chance, and counts the others."""

    def __init__(self, wanted: int, generator: random.Random, collected: Collected) -> None:
        self._wanted, self._generator, self._collected = wanted, generator, collected
        self._seen = 0

    def add(self, page: bytes) -> None:
        collected = self._collected
        if not page:
            return  # the file has become shorter
        page = page.ljust(PAGE_SIZE, b"\0")
        collected.read += 1
        if page == page[:WORD] * (PAGE_SIZE // WORD):
            if any(page[:WORD]):
                collected.same += 1
            else:
                collected.zero += 1
            return
        self._seen += 1
        if len(collected.pages) < self._wanted:
            collected.pages.append(page)
        elif (place := int(self._generator.random() * self._seen)) < self._wanted:
            collected.pages[place] = page

    def result(self) -> Collected:
        self._generator.shuffle(self._collected.pages)
        return self._collected
