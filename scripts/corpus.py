"""Real pages: a file of 4 KiB pages collected from this machine, the same for every server and every codec.

It has programs, libraries, source, other text, and memory of processes, in equal parts if there is enough. It is kept
under build/, readable for its owner only, since memory may hold secrets.
"""

import os
import random
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from harness import Interrupt, StepError, mib

from zramd.device.collecting import memory_of
from zramd.layout import PAGE_SIZE

BUILD = Path(__file__).resolve().parent.parent / "build"
FILES = {
    "programs": (["/usr/bin", "/usr/sbin"], ["*"]),
    "libraries": (["/usr/lib"], ["*.so", "*.so.*"]),
    "source": (["/usr/lib/python3", "/usr/lib/python3.11", "/usr/include", str(BUILD.parent)], ["*.py", "*.h", "*.c"]),
    "text": (["/usr/share", "/etc", "/var/lib/dpkg"], ["*.txt", "*.html", "*.xml", "*.conf", "*.list", "*.md", "*.po"]),
}
MOST_PAGES = 2048  # of one file, so that a few large ones are not all


@dataclass(frozen=True, slots=True)
class Corpus:
    """The file, and its size in bytes."""

    path: Path
    size: int


def collect(size: int, interrupt: Interrupt) -> Corpus:
    """Return the corpus of so many bytes, from its file or newly collected.

    Raises:
        StepError: this machine has not so many pages.
    """
    path = BUILD / f"corpus-{size >> 20}M"
    if not path.exists() or path.stat().st_size != size:
        BUILD.mkdir(exist_ok=True)
        unfinished = path.with_suffix(".new")
        unfinished.touch(mode=0o600)
        try:
            with unfinished.open("wb") as file:
                for page in _pages(size // PAGE_SIZE, interrupt):
                    file.write(page)
            unfinished.rename(path)
        finally:
            unfinished.unlink(missing_ok=True)
    return Corpus(path, size)


def _pages(count: int, interrupt: Interrupt) -> Iterator[bytes]:
    sources = {kind: _file_pages(*where) for kind, where in FILES.items()}
    sources["memory"] = _memory_pages()
    share = count // len(sources)
    left = count
    for source in sources.values():
        for page in islice(source, share):
            interrupt.check()
            left -= 1
            yield page
    # Few machines have enough of every kind; what is short of one is made up from the others.
    for source in sources.values():
        for page in islice(source, left):
            interrupt.check()
            left -= 1
            yield page
    if left:
        found = mib((count - left) * PAGE_SIZE)
        raise StepError(f"a corpus of {mib(count * PAGE_SIZE)} is too much for this machine, which has {found}")


def _file_pages(directories: list[str], patterns: list[str]) -> Iterator[bytes]:
    """Yield the pages of files, in an order that is the same on every run; a file's last page ends in zeros."""
    paths = sorted({path for name in directories for pattern in patterns for path in Path(name).rglob(pattern)})
    random.Random(1).shuffle(paths)  # noqa: S311 (the same order every time)
    for path in paths:
        with suppress(OSError):
            if path.is_file() and not path.is_symlink() and BUILD not in path.parents:
                with path.open("rb") as file:
                    for _ in range(MOST_PAGES):
                        if not (page := file.read(PAGE_SIZE)):
                            break
                        yield page.ljust(PAGE_SIZE, b"\0")


def _memory_pages() -> Iterator[bytes]:
    """Yield pages that processes of this user have of their own."""
    for process in sorted(Path("/proc").glob("[0-9]*")):
        with suppress(OSError):
            if process.stat().st_uid == os.geteuid():
                yield from _process_pages(process)


def _process_pages(process: Path) -> Iterator[bytes]:
    with (process / "mem").open("rb", buffering=0) as memory:
        for extent in memory_of(int(process.name)):
            for offset in range(extent.offset, extent.offset + extent.pages * PAGE_SIZE, PAGE_SIZE):
                page = os.pread(memory.fileno(), PAGE_SIZE, offset)
                if len(page) == PAGE_SIZE:
                    yield page
