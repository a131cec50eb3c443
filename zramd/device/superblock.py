"""What a device is: the settings it was made with, in the first words of the superblock."""

import uuid
from dataclasses import dataclass
from pathlib import Path

from zramd.device.codecs import Codec, codec
from zramd.layout import (
    CODEC_LEVEL_BIAS,
    CODEC_NAME_WORDS,
    MAGIC,
    PAGE_SIZE,
    VERSION,
    WORD,
    Superblock,
)
from zramd.zsmalloc import FitRule, geometry


class StateError(Exception):
    """The kept state of a device cannot be used as asked."""


@dataclass(frozen=True, slots=True)
class Identity:
    """The parts of a device that its regions depend on. `disksize` is in bytes, a multiple of 4096."""

    disksize: int
    codec: Codec
    chain_size: int
    rule: FitRule
    uuid: uuid.UUID


def store_identity(words: memoryview, identity: Identity) -> None:
    """Write the identity to an empty superblock. The magic comes last: without it the device was never made."""
    words[Superblock.VERSION] = VERSION
    words[Superblock.PAGE_SIZE] = PAGE_SIZE
    words[Superblock.DISKSIZE] = identity.disksize
    words[Superblock.CHAIN_SIZE] = identity.chain_size
    words[Superblock.FIT_RULE] = identity.rule
    for word in range(2):
        raw = identity.uuid.bytes[word * WORD : (word + 1) * WORD]
        words[Superblock.UUID + word] = int.from_bytes(raw, "little")
    name = identity.codec.name.encode().ljust(CODEC_NAME_WORDS * WORD, b"\0")
    for word in range(CODEC_NAME_WORDS):
        raw = name[word * WORD : (word + 1) * WORD]
        words[Superblock.CODECS + word] = int.from_bytes(raw, "little")
    words[Superblock.CODECS + CODEC_NAME_WORDS] = identity.codec.level + CODEC_LEVEL_BIAS
    note_boot(words)
    words[Superblock.MAGIC] = MAGIC


def load_identity(words: memoryview) -> Identity | None:
    """Read the identity, or None if making the device was never completed.

    Raises:
        StateError: the superblock is damaged, or of a version that this zramd does not know.
    """
    if not words[Superblock.MAGIC]:
        return None
    if words[Superblock.MAGIC] != MAGIC:
        raise StateError("the superblock is not zramd's, or damaged")
    if words[Superblock.VERSION] != VERSION or words[Superblock.PAGE_SIZE] != PAGE_SIZE:
        raise StateError(f"the layout has version {words[Superblock.VERSION]}; this zramd knows {VERSION}")
    raw = b"".join(words[Superblock.CODECS + word].to_bytes(WORD, "little") for word in range(CODEC_NAME_WORDS))
    identity = b"".join(words[Superblock.UUID + word].to_bytes(WORD, "little") for word in range(2))
    level = words[Superblock.CODECS + CODEC_NAME_WORDS] - CODEC_LEVEL_BIAS
    try:
        geometry(words[Superblock.CHAIN_SIZE], FitRule(words[Superblock.FIT_RULE]))
        return Identity(
            disksize=words[Superblock.DISKSIZE],
            codec=codec(raw.rstrip(b"\0").decode("ascii"), level),
            chain_size=words[Superblock.CHAIN_SIZE],
            rule=FitRule(words[Superblock.FIT_RULE]),
            uuid=uuid.UUID(bytes=identity),
        )
    except ValueError as error:
        raise StateError(f"the superblock is damaged: {error}") from error


def note_boot(words: memoryview) -> None:
    """Note under which boot of the machine the regions are written to."""
    for word, value in enumerate(_boot_id()):
        words[Superblock.BOOT_ID + word] = value


def note_end(words: memoryview) -> None:
    """Note that the regions are complete, and whole on their medium."""
    for word in range(2):
        words[Superblock.BOOT_ID + word] = 0


def check_boot(words: memoryview) -> None:
    """Check that nothing was lost between the regions and their medium.

    A process that is killed loses nothing. A machine that goes down does: the parts of regions on a disk are written
    back in any order, and a page-table entry may then lead to another page's object without anybody noticing.

    Raises:
        StateError: the machine went down while the regions were in use.
    """
    noted = (words[Superblock.BOOT_ID], words[Superblock.BOOT_ID + 1])
    if noted not in ((0, 0), _boot_id()):
        raise StateError("the machine went down while the regions were in use, so they may contradict each other")


def _boot_id() -> tuple[int, int]:
    raw = uuid.UUID(Path("/proc/sys/kernel/random/boot_id").read_text().strip()).bytes
    return int.from_bytes(raw[:WORD], "little"), int.from_bytes(raw[WORD:], "little")
