"""Regions of shared memory: create, open, populate, give back to the OS.

A region is one sparse file, on tmpfs or as a memfd, mapped whole. Nobody touches a part of it that was not populated
first, not even to read it: a first touch that the file system has no room for is a SIGBUS, populating is an error.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from zramd.layout import PAGE_SIZE, WORD

MADV_POPULATE_READ, MADV_POPULATE_WRITE = 22, 23  # Linux 5.14; the mmap module has no names for them
FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate64.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class NoMemoryError(Exception):
    """The machine or the file system that holds the regions has no room left."""


class RegionError(Exception):
    """The file system that holds the regions cannot do, or failed to do, what they need."""


class Region:
    """One mapped file of `size` bytes (a multiple of 4096).

    `bytes`, `words` and `halves` are views of the whole mapping; `words` is little-endian 64-bit as the layout asks,
    which is why only little-endian machines are supported.
    """

    def __init__(self, fd: int, size: int, name: str) -> None:
        self.fd = fd
        self.size = size
        self.name = name
        try:
            self.map = mmap.mmap(fd, size)
        except OSError as error:
            os.close(fd)
            raise NoMemoryError(f"cannot map {size} bytes for {name}: {error.strerror}") from error
        # What lies here is other processes' memory: it has no place in a core dump.
        self.map.madvise(mmap.MADV_DONTDUMP)
        self.bytes = memoryview(self.map)
        self.words = self.bytes.cast("Q")
        self.halves = self.bytes.cast("I")

    def populate(self, offset: int, length: int, *, shared: bool = False) -> None:
        """Allocate and map `length` bytes from `offset` (both multiples of 4096), none of which are in use.

        Raises:
            NoMemoryError: there is no room; what could be had was given back, since others may need it, unless the part
                is `shared` with a thread that may populate it too, and then use it.
        """
        try:
            populate(self.bytes, offset, length)
        except NoMemoryError as error:
            if not shared:
                self.punch(offset, length)
            raise NoMemoryError(f"{error} to grow {self.name} by {length} bytes") from error

    def punch(self, offset: int, length: int) -> None:
        """Give `length` bytes from `offset` back to the OS; they read as zeros.

        fallocate, not madvise: a hole can be punched in locked memory too.

        Raises:
            RegionError: the file system cannot punch holes.
        """
        mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
        if _libc.fallocate64(self.fd, mode, offset, length):
            reason = os.strerror(ctypes.get_errno())
            raise RegionError(f"cannot punch a hole in {self.name} ({reason}): keep the state on tmpfs, ext4 or xfs")

    def data_ranges(self) -> Iterator[tuple[int, int]]:
        """Yield (offset, end) of each part that is populated, in bytes. The rest reads as zeros.

        Reading a hole of a shared mapping would allocate it; asking the file system does not.
        """
        end = 0
        while True:
            try:
                start = os.lseek(self.fd, end, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                raise
            if start >= self.size:
                return
            end = os.lseek(self.fd, start, os.SEEK_HOLE)
            yield start, min(end, self.size)

    def map_data(self) -> None:
        """Map each part that is populated, so that touching it needs no memory for page tables."""
        for start, end in self.data_ranges():
            self.map.madvise(MADV_POPULATE_READ, start, end - start)

    def sync(self) -> None:
        """Write the region to its medium. On tmpfs and for a memfd there is none."""
        os.fdatasync(self.fd)

    def close(self) -> None:
        """Unmap. Views taken from the region must have been released."""
        self.words.release()
        self.halves.release()
        self.bytes.release()
        self.map.close()
        os.close(self.fd)


def populate(memory: memoryview, offset: int, length: int) -> None:
    """Allocate and map `length` bytes from `offset` of a view of a whole mapping (both multiples of 4096).

    Raises:
        NoMemoryError: there is no room; a part may have been populated.
    """
    mapping = memory.obj
    assert isinstance(mapping, mmap.mmap)  # noqa: S101 (for the type checker)
    try:
        mapping.madvise(MADV_POPULATE_WRITE, offset, length)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise NoMemoryError("the kernel cannot populate memory: Linux 5.14 or newer is needed") from error
        raise NoMemoryError("no memory left") from error


def private_memory(size: int) -> memoryview:
    """Return at least `size` zeroed bytes of this process that cost nothing until they are touched.

    A memfd: the kernel does not count what is not touched against its limit of committed memory, as it would for
    anonymous memory where overcommitting is forbidden.
    """
    size = round_up_to_page(size)
    fd = os.memfd_create("zramd-private")
    try:
        os.ftruncate(fd, size)
        memory = mmap.mmap(fd, size)
    except OSError as error:
        raise NoMemoryError(f"cannot map {size} bytes: {error.strerror}") from error
    finally:
        os.close(fd)
    memory.madvise(mmap.MADV_DONTDUMP)
    return memoryview(memory)


def record(words: int) -> memoryview:
    """Return private words, all 0."""
    return memoryview(bytearray(words * WORD)).cast("Q")


class SparseTable:
    """A region with a word (or half of one) for each page of the device, populated page by page when first stored to.

    `ready[index >> shift]` says whether the words around `index` may be touched: TABLE_CHUNK_SHIFT for whole words, one
    more for halves. A chunk that is not ready is all zeros and must not be read either, because reading it would
    allocate it. A chunk is one page of the table, 2 MiB of the device: a file system that puts a little everywhere then
    costs little.
    """

    def __init__(self, region: Region) -> None:
        self.region = region
        self.words = region.words
        self.ready = bytearray(region.size // PAGE_SIZE)
        for start, end in region.data_ranges():
            first, count = start // PAGE_SIZE, -(-end // PAGE_SIZE) - start // PAGE_SIZE
            self.ready[first : first + count] = b"\1" * count

    def make_ready(self, first: int, last: int | None = None) -> None:
        """Make the words of a chunk, or of those up to `last`, fit to store to.

        Raises:
            NoMemoryError: there is no room.
        """
        for chunk in range(first, (first if last is None else last) + 1):
            if not self.ready[chunk]:
                self.region.populate(chunk * PAGE_SIZE, PAGE_SIZE)
                self.ready[chunk] = 1

    def make_all_ready(self) -> None:
        """Make all words fit to store to, as a kernel zram does when it gets its size.

        Raises:
            NoMemoryError: there is no room.
        """
        self.region.populate(0, self.region.size, shared=True)
        self.ready[:] = b"\1" * len(self.ready)


class RegionStore:
    """Where the regions of one device live: a private directory, or memfds that die with the process."""

    def __init__(self, directory: Path | None) -> None:
        """Take the directory for this process, or (None) use memfds.

        Raises:
            OSError: the directory cannot be made, is not private, or another process has it.
        """
        if sys.byteorder != "little":
            raise OSError(errno.ENOTSUP, "the layout of the regions is little-endian; this machine is not")
        if mmap.PAGESIZE != PAGE_SIZE:
            raise OSError(errno.ENOTSUP, f"zramd needs a kernel with pages of {PAGE_SIZE} bytes, not {mmap.PAGESIZE}")
        self.directory = directory
        self._lock = -1
        if directory is None:
            return
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except (FileExistsError, NotADirectoryError) as error:
            raise OSError(errno.ENOTDIR, f"{directory} is no directory; a symbolic link to one will not do") from error
        try:
            info = os.fstat(self._lock)
            if info.st_uid != os.geteuid() or stat.S_IMODE(info.st_mode) & 0o077:
                raise OSError(errno.EACCES, f"{directory} must belong to you and be private: chown it and chmod 700")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise OSError(
                errno.EBUSY,
                f"another zramd serves {directory}: stop it, or choose another --state or --volatile",
            ) from error
        except OSError:
            os.close(self._lock)
            raise

    def exists(self, name: str) -> bool:
        """Say whether a region of this name is kept here, and has anything in it."""
        if self.directory is None:
            return False
        try:
            return (self.directory / name).stat().st_blocks > 0
        except FileNotFoundError:
            return False

    def names(self) -> list[str]:
        """Return the names of all files here."""
        return [] if self.directory is None else os.listdir(self.directory)

    def open(self, name: str, size: int, *, create: bool, grow: bool = False) -> Region:
        """Map the region `name` of `size` bytes, new and empty if `create`.

        What a larger one has behind that, since growing it was cut short, is left alone; a smaller one has to `grow`.

        Raises:
            OSError: the file is missing, smaller, or cannot be made.
            NoMemoryError: it cannot be mapped.
        """
        if self.directory is None:
            fd = os.memfd_create(f"zramd-{name}")
        else:
            flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
            if create:
                flags |= os.O_CREAT | os.O_TRUNC
            fd = os.open(self.directory / name, flags, 0o600)
        try:
            found = os.fstat(fd).st_size
            if create or (grow and found < size):
                os.ftruncate(fd, size)
            elif found < size:
                raise OSError(errno.EINVAL, f"the region {name} has {found} bytes instead of {size}")
        except OSError:
            os.close(fd)
            raise
        return Region(fd, size, name)

    def remove(self, name: str) -> None:
        """Remove the region `name`, which nobody has open."""
        if self.directory is not None:
            (self.directory / name).unlink(missing_ok=True)

    def rename(self, old: str, new: str) -> None:
        """Give a region another name, in place of the region that has that."""
        if self.directory is not None:
            os.rename(self.directory / old, self.directory / new)

    def on_disk(self) -> bool:
        """Say whether the regions lie on a disk, so that a flush has something to do."""
        return self.directory is not None and not is_memory_backed(self.directory)

    def close(self) -> None:
        """Let another process have the directory."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def is_memory_backed(path: Path) -> bool:
    """Say whether `path` (which exists) lies on tmpfs or ramfs, by the kernel's mount table."""
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[2] == wanted:
            return fields[fields.index("-") + 1] in ("tmpfs", "ramfs")
    return False


def round_up_to_page(size: int) -> int:
    """Round a number of bytes up to whole pages."""
    return -(-size // PAGE_SIZE) * PAGE_SIZE
