"""Regions that were damaged, or are another disk's: a refusal in one line, or pages that are right or errors.

What nothing can tell from what is right is left out, unless the disk has checksums: the bytes of stored pages, and
where a huge page lies, which has no header. With checksums too: the pattern of a same-filled page, and whether it has
one.
"""

import os
import random
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.crash.client import enter, receive_all
from tests.crash.servers import SECONDS, ForkedServers, Starter
from tests.nbd_bytes import EIO, READ, REPLY_BYTES, SIMPLE, reply
from tests.property.test_crash import State, snapshot
from tests.property.test_device import make_data, read, write
from zramd.device.codecs import codec
from zramd.device.opening import OpenDevice
from zramd.device.wanted import Wanted
from zramd.device.zram import Device
from zramd.layout import (
    ENTRY_HANDLE_MASK,
    ENTRY_SIZE_MASK,
    ENTRY_SIZE_SHIFT,
    HANDLE_INDEX_MASK,
    HANDLE_INDEX_SHIFT,
    HANDLE_ZSPAGE_SHIFT,
    PAGE_SIZE,
    WORD,
)
from zramd.memory import RegionStore
from zramd.native import choose

PAGES = 320
SIZE = PAGES * PAGE_SIZE
FLIPS = 40
"""Of single bits, in each kind of word."""
KINDS = ["text", "half", "random", "pattern", "zero"]


@dataclass(frozen=True)
class Kept:
    """A disk that a server was killed on.

    Attributes:
        words: where words of each kind are, as (region, offset in bytes): `entry`, `handle`, `header` and `payload`.
    """

    state: State
    contents: bytes
    words: dict[str, list[tuple[str, int]]]

    @property
    def regions(self) -> list[str]:
        """The names of those that have anything in them."""
        return [name for name, _, parts in self.state.regions if parts]


def make(seed: int, *, integrity: bool = False) -> Kept:
    generator = random.Random(seed)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        wanted = Wanted(SIZE, codec("lz4", 1, bytes(make_data("text", seed, 6000))), integrity=integrity)
        opened = OpenDevice(RegionStore(Path(name) / "state"), wanted)
        device = opened.device
        for _ in range(2 * PAGES):
            page = generator.randrange(PAGES)
            kind, length = generator.choice(KINDS), generator.randrange(100, PAGE_SIZE)
            write(device, page * PAGE_SIZE, make_data(kind, generator.randrange(999), length).ljust(PAGE_SIZE, b"\0"))
        with device:
            device.discard(PAGES // 2 * PAGE_SIZE, 20 * PAGE_SIZE)
        kept = Kept(snapshot(opened.regions), read(device, 0, SIZE), find_words(device))
        opened.close()
    return kept


def find_words(device: Device) -> dict[str, list[tuple[str, int]]]:
    """Return where words of each kind are. A huge page has no header, and its handle is left out."""
    words: dict[str, list[tuple[str, int]]] = {"entry": [], "handle": [], "header": [], "payload": []}
    for page, entry in device.entries():
        words["entry"].append(("page_table", page * WORD))
        handle, length = entry & ENTRY_HANDLE_MASK, entry >> ENTRY_SIZE_SHIFT & ENTRY_SIZE_MASK
        if not length:
            continue
        word, size_class = device.pool.handle_region.words[handle], device.pool.geometry.class_of[length]
        offset = (word >> HANDLE_ZSPAGE_SHIFT) * size_class.zspage_bytes
        offset += (word >> HANDLE_INDEX_SHIFT & HANDLE_INDEX_MASK) * size_class.size
        region = f"arena{size_class.pages}"
        if not size_class.huge:
            words["handle"].append(("handles", handle * WORD))
            words["header"].append((region, offset))
        words["payload"].append((region, offset + size_class.header))
    return words


@pytest.fixture(scope="module")
def kept() -> Kept:
    return make(1)


@pytest.fixture(scope="module")
def kept_with_checksums() -> Kept:
    return make(2, integrity=True)


@pytest.fixture(scope="module")
def starter() -> Iterator[Starter]:
    servers = ForkedServers(choose())
    yield servers
    servers.close()


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


def is_refused(starter: Starter, directory: Path, contents: bytes) -> bool:
    """Serve what is in `directory`. Say whether that is refused, in one line; else every page is right, or an error."""
    server = starter.start(directory, "--state", str(directory / "state"))
    served = False
    while not served and not server.has_died():
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(SECONDS)
            try:
                enter(sock, server.unix)
            except (FileNotFoundError, ConnectionError, EOFError):
                server.has_died(0.001)
                continue
            served = True
            _check_pages(sock, contents)
    server.kill()
    status, said = server.end(), server.errors.read_text()
    if served:
        assert (status, said) == (-9, "")
        return False
    assert status == 1, said
    assert said.startswith(f"Error: {directory}/state: "), said
    assert said.endswith("; remove the directory to start afresh\n"), said
    assert said.count("\n") == 1
    return True


def _check_pages(sock: socket.socket, contents: bytes) -> None:
    sock.sendall(b"".join(SIMPLE.request(READ, page, page * PAGE_SIZE, PAGE_SIZE) for page in range(PAGES)))
    for page in range(PAGES):
        answer = receive_all(sock, REPLY_BYTES)
        if answer != reply(page, error=EIO):
            assert answer == reply(page)
            assert receive_all(sock, PAGE_SIZE) == contents[page * PAGE_SIZE : (page + 1) * PAGE_SIZE], f"page {page}"


def _truncate(path: Path, generator: random.Random) -> None:
    os.truncate(path, generator.randrange(path.stat().st_size))


def _empty(path: Path, _: random.Random) -> None:
    os.truncate(path, 0)


def _remove(path: Path, _: random.Random) -> None:
    path.unlink()


def _directory(path: Path, _: random.Random) -> None:
    path.unlink()
    path.mkdir()


def _link(path: Path, _: random.Random) -> None:
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


def _pipe(path: Path, _: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def _hole(path: Path, _: random.Random) -> None:
    size = path.stat().st_size
    os.truncate(path, 0)
    os.truncate(path, size)


def _overwrite(path: Path, content: Callable[[int], bytes]) -> None:
    """Overwrite all of a file that is populated."""
    with path.open("r+b") as file:
        end = 0
        while True:
            try:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError:
                return
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            os.pwrite(file.fileno(), content(end - start), start)


def _zeros(path: Path, _: random.Random) -> None:
    _overwrite(path, bytes)


def _noise(path: Path, generator: random.Random) -> None:
    _overwrite(path, generator.randbytes)


GONE = [_truncate, _empty, _remove, _directory, _link, _pipe]
OVERWRITTEN = [_hole, _zeros, _noise]


def name_of(do: Callable[[Path, random.Random], None]) -> str:
    return do.__name__.removeprefix("_")


@pytest.mark.parametrize("do", GONE, ids=name_of)
def test_a_region_that_is_not_all_there_is_refused(
    do: Callable[[Path, random.Random], None], kept: Kept, directory: Path, starter: Starter
) -> None:
    generator = random.Random(1)
    for number, (name, _, _) in enumerate(kept.state.regions):
        if name == "accessed":  # kept state of earlier versions has none
            continue
        (directory / str(number)).mkdir()
        kept.state.write_to(directory / str(number) / "state")
        do(directory / str(number) / "state" / name, generator)
        assert is_refused(starter, directory / str(number), kept.contents), name


@pytest.mark.parametrize("do", OVERWRITTEN, ids=name_of)
def test_a_region_that_was_overwritten_is_refused(
    do: Callable[[Path, random.Random], None], kept: Kept, directory: Path, starter: Starter
) -> None:
    generator = random.Random(1)
    for number, name in enumerate(kept.regions):
        # Of noise, patterns are as good as others. A page table without memory is that of a reset that was cut short.
        if name == "accessed" or (name, do) in (("elements", _noise), ("page_table", _hole)):
            continue
        (directory / str(number)).mkdir()
        kept.state.write_to(directory / str(number) / "state")
        do(directory / str(number) / "state" / name, generator)
        assert is_refused(starter, directory / str(number), kept.contents), name


def flip(kept: Kept, directory: Path, region: str, offset: int, bit: int) -> None:
    """Write a disk to `directory` with another bit in a word."""
    directory.mkdir()
    kept.state.write_to(directory / "state")
    with (directory / "state" / region).open("r+b") as file:
        file.seek(offset)
        word = int.from_bytes(file.read(WORD), "little")
        file.seek(offset)
        file.write((word ^ 1 << bit).to_bytes(WORD, "little"))


@pytest.mark.parametrize("kind", ["header", "handle"])
def test_a_bit_that_flips_where_an_object_lies_is_noticed(
    kind: str, kept: Kept, directory: Path, starter: Starter
) -> None:
    generator = random.Random(kind)
    for number in range(FLIPS):
        region, offset = generator.choice(kept.words[kind])
        bit = generator.randrange(64)
        flip(kept, directory / str(number), region, offset, bit)
        assert is_refused(starter, directory / str(number), kept.contents), (region, offset, bit)


def test_a_bit_that_flips_in_a_page_table_entry_shows_nothing_wrong(
    kept: Kept, directory: Path, starter: Starter
) -> None:
    generator = random.Random(1)
    refused = 0
    for number in range(FLIPS):
        region, offset = generator.choice(kept.words["entry"])
        # Bit 0 of a same-filled page's is whether it has a pattern.
        flip(kept, directory / str(number), region, offset, generator.randrange(1, 64))
        refused += is_refused(starter, directory / str(number), kept.contents)
    assert refused > FLIPS // 2


def test_a_bit_that_flips_in_the_superblock_shows_nothing_wrong(kept: Kept, directory: Path, starter: Starter) -> None:
    generator = random.Random(2)
    (block,) = (parts[0][1] for name, _, parts in kept.state.regions if name == "superblock")
    used = [word for word in range(0, PAGE_SIZE, WORD) if any(block[word : word + WORD])]
    refused = 0
    for number in range(FLIPS):
        flip(kept, directory / str(number), "superblock", generator.choice(used), generator.randrange(64))
        refused += is_refused(starter, directory / str(number), kept.contents)
    assert refused > FLIPS // 4


@pytest.mark.parametrize("kind", ["entry", "handle", "header", "payload"])
def test_with_checksums_a_bit_that_flips_anywhere_shows_nothing_wrong(
    kind: str, kept_with_checksums: Kept, directory: Path, starter: Starter
) -> None:
    generator = random.Random(kind)
    kept = kept_with_checksums
    for number in range(FLIPS // 4):
        region, offset = generator.choice(kept.words[kind])
        flip(kept, directory / str(number), region, offset, generator.randrange(1, 64))
        is_refused(starter, directory / str(number), kept.contents)


@pytest.mark.parametrize("name", ["page_table", "handles", *(f"arena{pages}" for pages in range(2, 9)), "dictionary0"])
def test_a_region_of_another_disk_is_refused(name: str, kept: Kept, directory: Path, starter: Starter) -> None:
    make(3).state.write_to(directory / "other")
    kept.state.write_to(directory / "state")
    (directory / "other" / name).rename(directory / "state" / name)
    assert is_refused(starter, directory, kept.contents)


@pytest.mark.parametrize("name", ["superblock", "arena1", "checksums"])
def test_with_checksums_a_region_of_another_disk_shows_nothing_wrong(
    name: str, kept_with_checksums: Kept, directory: Path, starter: Starter
) -> None:
    make(4, integrity=True).state.write_to(directory / "other")
    kept_with_checksums.state.write_to(directory / "state")
    (directory / "other" / name).rename(directory / "state" / name)
    is_refused(starter, directory, kept_with_checksums.contents)
