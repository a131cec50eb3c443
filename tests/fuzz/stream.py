"""What the parts of the oracle share: a stream to take apart, a disk as its clients know it, and limits."""

import struct
from dataclasses import dataclass, field

PAGE = 4096


class EndError(Exception):
    """A stream ends where more should come."""


@dataclass
class Reader:
    """Takes a stream apart."""

    data: bytes
    position: int = 0

    @property
    def left(self) -> int:
        return len(self.data) - self.position

    def take(self, length: int) -> bytes:
        if length > self.left:
            raise EndError(f"{length} bytes wanted at {self.position}, {self.left} left")
        self.position += length
        return self.data[self.position - length : self.position]

    def unpack(self, layout: str) -> tuple[int, ...]:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def string(self) -> bytes:
        """Take a string behind its length."""
        (length,) = self.unpack(">I")
        return self.take(length)


@dataclass(frozen=True)
class Rules:
    """What the server under test lets a client do; sizes in bytes."""

    option: int
    options: int
    payload: int
    buffer: int
    """A longer request is taken in pieces."""
    tls: str = "off"
    answered: int | None = None
    """Options that the server answers before it is stopped."""


@dataclass
class Disk:
    """An export: what it holds, and which of its pages are allocated. `contents` is None while it has no size."""

    name: bytes
    description: bytes
    contents: bytearray | None
    read_only: bool = False
    allocated: set[int] = field(default_factory=set)

    @property
    def size(self) -> int:
        return len(self.contents or b"")

    def write(self, offset: int, data: bytes) -> None:
        assert self.contents is not None
        self.contents[offset : offset + len(data)] = data
        if data:
            self.allocated |= set(range(offset // PAGE, -(-(offset + len(data)) // PAGE)))

    def trim(self, offset: int, length: int) -> None:
        first, end = -(-offset // PAGE), (offset + length) // PAGE
        if first < end:
            self.write(first * PAGE, bytes((end - first) * PAGE))
            self.allocated -= set(range(first, end))

    def zero(self, offset: int, length: int, *, keep: bool) -> None:
        """Write zeros, and without `keep` free the whole pages among them."""
        self.write(offset, bytes(length))
        if not keep:
            self.trim(offset, length)

    def state(self, page: int) -> int:
        """Return 0 for an empty page, 1 for one that repeats a word, 2 for any other."""
        assert self.contents is not None
        if page not in self.allocated:
            return 0
        data = self.contents[page * PAGE : (page + 1) * PAGE]
        return 1 if data == data[:8] * (PAGE // 8) else 2

    def is_zero(self, page: int) -> bool:
        assert self.contents is not None
        return not any(self.contents[page * PAGE : (page + 1) * PAGE])
