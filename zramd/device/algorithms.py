"""The codecs of a device, all of which stand in its superblock.

There is one for each of the kernel's four priorities, 0 for what is written and 1 to 3 to recompress with, and those
of earlier times that pages still have.

A page is stored with the number of its codec. So any priority's codec can be changed while the device is used: new
pages get the new one, under the other of the priority's two numbers, provided that no page has that any more. A number
whose codec differs in nothing but the level is kept: its pages are decompressed as before.
"""

import hashlib
from collections.abc import Callable, Sequence

from zramd.device.codecs import Codec, CodecError, Decompress, codec
from zramd.layout import (
    CODEC_DICTIONARY_BYTES,
    CODEC_DICTIONARY_HASH,
    CODEC_HASH_WORDS,
    CODEC_LEVEL,
    CODEC_LEVEL_BIAS,
    CODEC_NAME_WORDS,
    CODEC_WORDS,
    CODECS,
    ENTRY_ALTERNATE,
    ENTRY_PRIORITY_MASK,
    ENTRY_PRIORITY_SHIFT,
    PRIORITIES,
    WORD,
    Superblock,
)

ReadDictionary = Callable[[int, int], bytes]
"""Returns the dictionary of a codec, by its number and the dictionary's size in bytes."""
PRIMARY = 0


class DamagedCodecError(Exception):
    """A codec in the superblock is none, or its dictionary is damaged."""


def codec_number(entry: int) -> int:
    """Return the number of the codec of a page-table entry."""
    priority = entry >> ENTRY_PRIORITY_SHIFT & ENTRY_PRIORITY_MASK
    return priority + PRIORITIES if entry & ENTRY_ALTERNATE else priority


def entry_bits(number: int) -> int:
    """Return what the entry of a page has of the number of its codec."""
    return number % PRIORITIES << ENTRY_PRIORITY_SHIFT | (ENTRY_ALTERNATE if number >= PRIORITIES else 0)


class Algorithms:
    """The codecs of a device, `codecs` by number; `alternates` says which each priority has (see zramd/layout.py)."""

    def __init__(self, codecs: Sequence[Codec | None], alternates: int = 0) -> None:
        self.codecs = list(codecs) + [None] * (CODECS - len(codecs))
        self.alternates = alternates

    def number(self, priority: int) -> int:
        """Return the number of the codec that a priority has now."""
        return priority + PRIORITIES * (self.alternates >> priority & 1)

    def at(self, priority: int) -> Codec | None:
        """Return the codec that a priority has now."""
        return self.codecs[self.number(priority)]

    def copy(self) -> "Algorithms":
        """Return them as they are now."""
        return Algorithms(self.codecs, self.alternates)

    @property
    def primary(self) -> Codec:
        """The codec of what is written."""
        chosen = self.at(PRIMARY)
        assert chosen is not None  # noqa: S101 (it is never taken away)
        return chosen

    @property
    def secondary(self) -> dict[int, Codec]:
        """The codecs to recompress with, by priority."""
        found = {priority: self.at(priority) for priority in range(1, PRIORITIES)}
        return {priority: chosen for priority, chosen in found.items() if chosen is not None}


class Decompressors:
    """Decompressors for all of a device's codecs, for one thread beside those that serve: they need no lock.

    A number may get another codec once no page has it any more. So who copies what is stored calls `refresh` under the
    same hold of the device's lock, and decompresses the copies before the next call.
    """

    def __init__(self, algorithms: Algorithms) -> None:
        self._algorithms = algorithms
        self._generation = -1
        self._made: list[Decompress | None] = []

    def refresh(self, generation: int) -> None:
        """Take notice of codecs that have changed since another generation. The caller holds the device's lock."""
        if generation != self._generation:
            self._made = [chosen.decompressor() if chosen else None for chosen in self._algorithms.codecs]
            self._generation = generation

    def page(self, entry: int, data: bytes) -> bytes:
        """Return the page of an entry that is compressed, with these data.

        Raises:
            CodecError: the data are damaged.
        """
        decompress = self._made[codec_number(entry)]
        if decompress is None:
            raise CodecError("there is no such codec")
        return decompress(memoryview(data))


def load_algorithms(words: memoryview, read_dictionary: ReadDictionary) -> Algorithms:
    """Read the codecs of a superblock. What is not a codec and belongs to no priority is left out: see `store_codec`.

    Raises:
        DamagedCodecError: a priority's codec is none.
    """
    algorithms = Algorithms([], words[Superblock.ALTERNATES])
    for number in range(CODECS):
        try:
            algorithms.codecs[number] = _load_codec(words, number, read_dictionary)
        except (ValueError, OSError) as error:
            if algorithms.number(number % PRIORITIES) == number:
                raise DamagedCodecError(str(error)) from error
    if algorithms.at(PRIMARY) is None:
        raise DamagedCodecError("there is no primary algorithm")
    return algorithms


def _load_codec(words: memoryview, number: int, read_dictionary: ReadDictionary) -> Codec | None:
    start = Superblock.CODECS + number * CODEC_WORDS
    name = words[start : start + CODEC_NAME_WORDS].tobytes().rstrip(b"\0")
    if not name:
        return None
    length = words[start + CODEC_DICTIONARY_BYTES]
    dictionary = read_dictionary(number, length) if length else b""
    at = start + CODEC_DICTIONARY_HASH
    if words[at : at + CODEC_HASH_WORDS].tobytes() != (_hash(dictionary) if length else bytes(CODEC_HASH_WORDS * WORD)):
        raise ValueError("the dictionary is damaged")
    return codec(name.decode("ascii"), words[start + CODEC_LEVEL] - CODEC_LEVEL_BIAS, dictionary)


def store_codec(words: memoryview, number: int, chosen: Codec | None) -> None:
    """Write a codec that no page has, and no priority yet. Its dictionary was stored before."""
    start = Superblock.CODECS + number * CODEC_WORDS
    words[start : start + CODEC_WORDS] = memoryview(bytes(CODEC_WORDS * WORD)).cast("Q")
    if chosen is None:
        return
    store_level(words, number, chosen.level)
    if chosen.dictionary:
        words[start + CODEC_DICTIONARY_BYTES] = len(chosen.dictionary)
        at = start + CODEC_DICTIONARY_HASH
        words[at : at + CODEC_HASH_WORDS] = memoryview(_hash(chosen.dictionary)).cast("Q")
    name = chosen.name.encode().ljust(CODEC_NAME_WORDS * WORD, b"\0")
    words[start : start + CODEC_NAME_WORDS] = memoryview(name).cast("Q")


def store_level(words: memoryview, number: int, level: int) -> None:
    """Write the level of a codec, which pages may have. It is one word."""
    words[Superblock.CODECS + number * CODEC_WORDS + CODEC_LEVEL] = level + CODEC_LEVEL_BIAS


def _hash(dictionary: bytes) -> bytes:
    return hashlib.blake2b(dictionary, digest_size=CODEC_HASH_WORDS * WORD).digest()
