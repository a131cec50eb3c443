"""What a device is: the settings it was made with, in the first words of the superblock."""

import uuid
from dataclasses import dataclass
from pathlib import Path

from zramd.device.algorithms import Algorithms, DamagedCodecError, ReadDictionary, load_algorithms, store_codec
from zramd.device.codecs import Codec
from zramd.layout import BACKED, INTEGRITY, MAGIC, PAGE_SIZE, UNFINISHED, VERSION, WORD, Superblock
from zramd.zsmalloc import FitRule, geometry

UUID_WORDS = 2
NO_BOOT = bytes(UUID_WORDS * WORD)
"""In place of a boot id: the regions are not in use."""
MOST = 1 << 52
"""More than any limit in pages, or any number of requests, sectors or pages in the life of a device."""


class StateError(Exception):
    """The kept state of a device cannot be used as asked."""


def refusal(directory: Path | None, error: StateError) -> StateError:
    """Return an error about what is kept, with where that is and what to do."""
    return StateError(f"{directory}: {error}; remove the directory to start afresh")


@dataclass(frozen=True, slots=True)
class Identity:
    """The parts of a device that its regions depend on.

    `disksize` is in bytes, a multiple of 4096; with `integrity`, each object has a checksum.
    """

    disksize: int
    algorithms: Algorithms
    chain_size: int
    rule: FitRule
    uuid: uuid.UUID
    integrity: bool = False

    @property
    def codec(self) -> Codec:
        """The codec of what is written."""
        return self.algorithms.primary


def store_identity(words: memoryview, identity: Identity, magic: int = MAGIC) -> None:
    """Write the identity to an empty superblock. The magic comes last: without it the device was never made."""
    words[Superblock.VERSION] = VERSION
    words[Superblock.PAGE_SIZE] = PAGE_SIZE
    words[Superblock.DISKSIZE] = identity.disksize
    words[Superblock.CHAIN_SIZE] = identity.chain_size
    words[Superblock.FIT_RULE] = identity.rule
    words[Superblock.FEATURES] = INTEGRITY * identity.integrity
    _store_bytes(words, Superblock.UUID, identity.uuid.bytes)
    for number, chosen in enumerate(identity.algorithms.codecs):
        store_codec(words, number, chosen)
    words[Superblock.ALTERNATES] = identity.algorithms.alternates
    note_boot(words)
    words[Superblock.MAGIC] = magic


def load_identity(words: memoryview, read_dictionary: ReadDictionary) -> Identity | None:
    """Read the identity, or None if making the device was never completed.

    Raises:
        StateError: the superblock is damaged, or of a version that this zramd does not know.
    """
    if words[Superblock.MAGIC] in (0, UNFINISHED):
        return None
    if words[Superblock.MAGIC] != MAGIC:
        raise StateError("the superblock is not zramd's, or damaged")
    if words[Superblock.VERSION] != VERSION:
        raise StateError(f"the layout has version {words[Superblock.VERSION]}; this zramd knows {VERSION}")
    if words[Superblock.FEATURES] & ~(INTEGRITY | BACKED):
        raise StateError(f"the device has features ({words[Superblock.FEATURES]:#x}) that this zramd does not know")
    disksize = words[Superblock.DISKSIZE]
    numbers = [words[Superblock.MEM_LIMIT], *words[Superblock.MEM_USED_MAX : Superblock.WRITE_SECTORS + 1]]
    if words[Superblock.PAGE_SIZE] != PAGE_SIZE or not disksize or disksize % PAGE_SIZE or max(numbers) > MOST:
        raise StateError("the superblock is damaged")
    try:
        geometry(words[Superblock.CHAIN_SIZE], FitRule(words[Superblock.FIT_RULE]))
        return Identity(
            disksize=disksize,
            algorithms=load_algorithms(words, read_dictionary),
            chain_size=words[Superblock.CHAIN_SIZE],
            rule=FitRule(words[Superblock.FIT_RULE]),
            integrity=bool(words[Superblock.FEATURES] & INTEGRITY),
            uuid=uuid.UUID(bytes=_load_bytes(words, Superblock.UUID, UUID_WORDS)),
        )
    except (ValueError, DamagedCodecError) as error:
        raise StateError(f"the superblock is damaged: {error}") from error


def note_boot(words: memoryview) -> None:
    """Note under which boot of the machine the regions are written to."""
    _store_bytes(words, Superblock.BOOT_ID, _boot_id())


def note_end(words: memoryview) -> None:
    """Note that the regions are complete, and whole on their medium."""
    _store_bytes(words, Superblock.BOOT_ID, NO_BOOT)


def check_boot(words: memoryview) -> None:
    """Check that nothing was lost between the regions and their medium.

    A process that is killed loses nothing. A machine that goes down does: the parts of regions on a disk are written
    back in any order, and a page-table entry may then lead to another page's object without anybody noticing.

    Raises:
        StateError: the machine went down while the regions were in use.
    """
    if _load_bytes(words, Superblock.BOOT_ID, UUID_WORDS) not in (NO_BOOT, _boot_id()):
        raise StateError("the machine went down while the regions were in use, so they may contradict each other")


def _boot_id() -> bytes:
    return uuid.UUID(Path("/proc/sys/kernel/random/boot_id").read_text().strip()).bytes


def _store_bytes(words: memoryview, at: int, raw: bytes) -> None:
    """Store whole words of bytes."""
    words[at : at + len(raw) // WORD] = memoryview(raw).cast("Q")


def _load_bytes(words: memoryview, at: int, count: int) -> bytes:
    """Load `count` words as bytes."""
    return words[at : at + count].tobytes()
