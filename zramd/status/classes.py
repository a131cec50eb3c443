"""The text of the attribute `classes`, read back; for clients, so nothing of the pool is imported."""

from typing import NamedTuple

from zramd.layout import PAGE_SIZE

_FIELDS = 18
"""Of a class: index, size, eleven fullness groups, and the five that are kept here."""


class ClassUse(NamedTuple):
    """What a size class holds, or all do together (`size` and `chain` are 0 then).

    Attributes:
        size: bytes of an object at most.
        allocated, used: objects that there is room for, and that there are.
        pages: of memory.
        chain: pages of a zspage.
        freeable: pages that compaction would give back.
        occupancy: the share of the room for objects, in bytes, that is used.
    """

    size: int
    allocated: int
    used: int
    pages: int
    chain: int
    freeable: int
    occupancy: float

    @property
    def memory(self) -> int:
        """Bytes of memory."""
        return self.pages * PAGE_SIZE

    @property
    def compactable(self) -> int:
        """Bytes that compaction would give back."""
        return self.freeable * PAGE_SIZE


def parse_classes(text: str) -> tuple[list[ClassUse], ClassUse]:
    """Return the classes that are in use, smallest first, and the pool as a whole."""
    classes, total = [], ClassUse(0, 0, 0, 0, 0, 0, 1.0)
    for line in text.splitlines()[1:]:
        fields = line.split()
        if len(fields) == _FIELDS and fields[15] != "0":
            allocated, used, pages, chain, freeable = map(int, fields[13:])
            classes.append(ClassUse(int(fields[1]), allocated, used, pages, chain, freeable, used / allocated))
        elif fields[:1] == ["Total"]:
            allocated, used, pages, freeable = map(int, fields[12:])
            room = sum(each.allocated * each.size for each in classes)
            filled = sum(each.used * each.size for each in classes)
            total = ClassUse(0, allocated, used, pages, 0, freeable, filled / room if room else 1.0)
    return classes, total
