"""Size-class geometry: pure functions of the chain size (most pages in a zspage) and the fit rule.

The rules are those of Linux 6.18's mm/zsmalloc.c for 4 KiB pages, and the numbers below are its constants.
"""

from dataclasses import dataclass, field
from enum import IntEnum
from functools import cache

from zramd.layout import FULL, PAGE_SIZE, WORD

MIN_ALLOC = 32
CLASS_STEP = 16
RAW_CLASSES = 255
MIN_CHAIN_SIZE = 4
MAX_CHAIN_SIZE = 16
DEFAULT_CHAIN_SIZE = 8


class FitRule(IntEnum):
    """How many pages the zspages of a class get.

    LEAST_WASTE: the smallest chain with the fewest wasted bytes; a power-of-two size takes one page (Linux 6.3 and
    later). BEST_USAGE: the smallest chain with the highest whole percentage used (the kernels that the table in
    zsmalloc.rst was made with).
    """

    LEAST_WASTE = 0
    BEST_USAGE = 1


@dataclass(frozen=True, slots=True)
class SizeClass:
    """One class: objects of `size` bytes (header included), `objects` of them in a zspage of `pages` pages."""

    index: int
    size: int
    pages: int
    objects: int

    @property
    def huge(self) -> bool:
        """One object fills one page: it has no header, and its payload may be 4096 bytes."""
        return self.pages == 1 and self.objects == 1

    @property
    def zspage_bytes(self) -> int:
        """Bytes in a zspage."""
        return self.pages * PAGE_SIZE

    @property
    def header(self) -> int:
        """Bytes in front of the payload."""
        return 0 if self.huge else WORD


def chain_pages(size: int, chain_size: int, rule: FitRule) -> int:
    """Return how many pages (1..chain_size) a zspage of objects of `size` bytes has."""
    chains = range(1, chain_size + 1)
    if rule is FitRule.BEST_USAGE:

        def usage(pages: int) -> int:
            total = pages * PAGE_SIZE
            return (total - total % size) * 100 // total

        return max(chains, key=usage)
    if size & (size - 1) == 0:
        return 1
    return min(chains, key=lambda pages: pages * PAGE_SIZE % size)


@dataclass(frozen=True, slots=True)
class Geometry:
    """The classes of a pool.

    `classes[raw]` is the class that raw class `raw` (0..254) was merged into, so that a class stands at its own
    index too. `huge_limit` is the payload size from which an object takes a whole page (zs_huge_class_size).
    `class_of[length]` is the class that takes a payload of `length` bytes (1..4096).
    """

    chain_size: int
    rule: FitRule
    classes: tuple[SizeClass, ...]
    huge_limit: int
    class_of: tuple[SizeClass, ...] = field(repr=False)

    def kept(self) -> list[SizeClass]:
        """Return the distinct classes, smallest first."""
        return [size_class for raw, size_class in enumerate(self.classes) if size_class.index == raw]

    @property
    def watermark(self) -> int:
        """Return the size of the largest class that is not huge."""
        return self.huge_limit + WORD - 1

    def lookup(self, length: int) -> int:
        """Return the index of the class for `length` bytes with no header, as zs_lookup_class_index does."""
        return self.classes[_raw_class(length)].index


@cache
def geometry(chain_size: int = DEFAULT_CHAIN_SIZE, rule: FitRule = FitRule.LEAST_WASTE) -> Geometry:
    """Compute the classes for a chain size of 4 to 16 pages.

    From the largest raw class down, a class with the same pages and objects as the one kept last becomes an alias of
    it (Linux: can_merge in zs_create_pool).

    Raises:
        ValueError: the chain size is out of range.
    """
    if not MIN_CHAIN_SIZE <= chain_size <= MAX_CHAIN_SIZE:
        raise ValueError(f"chain size {chain_size} is not one of {MIN_CHAIN_SIZE} to {MAX_CHAIN_SIZE} pages")
    classes: list[SizeClass] = []
    huge_limit = 0
    for raw in reversed(range(RAW_CLASSES)):
        size = min(MIN_ALLOC + raw * CLASS_STEP, PAGE_SIZE)
        pages = chain_pages(size, chain_size, rule)
        objects = pages * PAGE_SIZE // size
        if not classes or (pages, objects) != (classes[-1].pages, classes[-1].objects):
            kept = SizeClass(raw, size, pages, objects)
            if not huge_limit and pages != 1 and objects != 1:
                huge_limit = size - WORD + 1
        classes.append(kept)
    classes.reverse()
    class_of = tuple(classes[_raw_class(length + WORD)] for length in range(PAGE_SIZE + 1))
    return Geometry(chain_size, rule, tuple(classes), huge_limit, class_of)


def _raw_class(size: int) -> int:
    """Return the smallest raw class with room for `size` bytes, or the largest: a whole page has no header."""
    return min(max(0, -(-(size - MIN_ALLOC) // CLASS_STEP)), RAW_CLASSES - 1)


@cache
def fullness_groups(objects: int) -> bytes:
    """Return the fullness group of a zspage of so many objects, by how many are in use."""
    return bytes(fullness_group(used, objects) for used in range(objects + 1))


def fullness_group(used: int, objects: int) -> int:
    """Return the fullness group (0 empty, 1..10 by tenths, 11 full) of a zspage with `used` of `objects` in use."""
    if used == 0:
        return 0
    if used == objects:
        return FULL
    return 100 * used // objects // 10 + 1
