"""Compression of what is written, outside the device's lock."""

from zramd.device.algorithms import PRIMARY, Algorithms, entry_bits
from zramd.layout import PAGE_SIZE, WORD

Prepared = int | bytes | bytearray | memoryview
"""One page as it will be stored: the pattern of a same-filled page, a compressed object, or the raw page."""

_PAGE_MASK = PAGE_SIZE - 1
_WORDS = PAGE_SIZE // WORD


class Stream:
    """What one thread compresses with, and the buffer that it compresses from (the kernel's zcomp_strm).

    `bits` are those that tell the codec in the entries of pages, `generation` is the device's at that time.
    """

    __slots__ = ("_compress", "_huge_limit", "bits", "buffer", "generation", "view")

    def __init__(self, buffer: bytearray, huge_limit: int, algorithms: Algorithms, generation: int) -> None:
        self.buffer = buffer
        self.view = memoryview(buffer)
        self._huge_limit = huge_limit
        self.choose(algorithms, generation)

    def choose(self, algorithms: Algorithms, generation: int) -> None:
        """Compress with what is primary from now on. The caller holds the device's lock."""
        self._compress = algorithms.primary.compressor(self.buffer)
        self.bits = entry_bits(algorithms.number(PRIMARY))
        self.generation = generation

    def prepare(self, start: int, length: int, offset: int) -> list[Prepared]:
        """Compress the whole pages of a write: `length` bytes at `start` in the buffer, for `offset` on the device.

        No lock is needed. Raw pages in the result are views of the buffer.
        """
        if (offset | length) & _PAGE_MASK:
            first, end = whole_pages(offset, length)
            start, length = start + first, end - first
        buffer, compress, limit = self.buffer, self._compress, self._huge_limit
        prepared: list[Prepared] = []
        for page in range(start, start + length, PAGE_SIZE):
            # The last bytes of the first and the last word: they differ on most pages, and cost no object to look at.
            if buffer[page + 7] == buffer[page + 4095]:
                word = buffer[page : page + WORD]
                if buffer[page : page + PAGE_SIZE] == word * _WORDS:
                    prepared.append(int.from_bytes(word, "little"))
                    continue
            stored = compress(page)
            prepared.append(stored if len(stored) < limit else self.view[page : page + PAGE_SIZE])
        return prepared


def whole_pages(offset: int, length: int) -> tuple[int, int]:
    """Return where the whole pages of a request start and end, in bytes from its start; equal if it has none.

    What lies before the start is the end of a page, what lies after the end is the start of one (or a part of the
    inside of one).
    """
    head = min(-offset & _PAGE_MASK, length)
    return head, head + (length - head & ~_PAGE_MASK)
