"""One arena: the zspages of one chain length, and the private state of each.

An arena hands out zspage numbers. Their memory is populated in batches ahead of need and given back to the OS in
batches behind it, so that resident memory follows the pool without a system call for each zspage.
"""

import logging
from array import array
from collections.abc import Iterable, Iterator

from zramd.layout import PAGE_SIZE
from zramd.memory import NoMemoryError, Region, RegionError

GROW_PAGES = 64
"""Pages populated at once: about 25 microseconds of the kernel's time."""
RESERVE_PAGES = 512
"""Free pages kept resident at most in each arena; when more are free, half of this stays."""


log = logging.getLogger(__name__)


class Arena:
    """The zspages of `pages` pages each.

    The arrays are indexed by zspage: `used` objects; `free`, the head of its free list (object index + 1, 0: none);
    `fresh`, how many of its objects were ever allocated, the rest being free in ascending order; `following` and
    `preceding`, its neighbours on its fullness list (zspage + 1, 0: none). `size_class` is the class index + 1, and 0
    for a zspage that is not in use.
    """

    def __init__(self, region: Region, pages: int) -> None:
        self.region = region
        self.pages = pages
        self.capacity = region.size // (pages * PAGE_SIZE)
        self.used = array("H")
        self.free = array("H")
        self.fresh = array("H")
        self.following = array("I")
        self.preceding = array("I")
        self.size_class = array("B")
        self._populated = array("I")  # free zspages with memory: a stack
        self._punched = array("I")  # free zspages without: a stack
        self._reserve = RESERVE_PAGES // pages

    def __len__(self) -> int:
        """Return how many zspage numbers were ever handed out or prepared."""
        return len(self.used)

    def take(self) -> int:
        """Return a zspage with memory, its contents undefined.

        Raises:
            NoMemoryError: there is no room, in the arena or in the machine.
        """
        if not self._populated:
            self._grow()
        return self._populated.pop()

    def give(self, zspage: int) -> None:
        """Take back a zspage that holds no objects."""
        self.size_class[zspage] = 0
        self._populated.append(zspage)
        if len(self._populated) > self._reserve:
            self._shrink()

    def _grow(self) -> None:
        try:
            self._grow_by(max(1, GROW_PAGES // self.pages))
        except NoMemoryError:
            # There may still be room for the one that is needed.
            self._grow_by(1)

    def _grow_by(self, count: int) -> None:
        if self._punched:
            zspages = array("I", sorted(self._punched[-count:]))
            self._populate(zspages)
            del self._punched[-count:]
        else:
            first = len(self)
            zspages = array("I", range(first, min(first + count, self.capacity)))
            if not zspages:
                raise NoMemoryError(f"no zspage of {self.pages} pages is left: its address range is used up")
            self._populate(zspages)
            self._extend(len(zspages))
        self._populated.extend(reversed(zspages))

    def _populate(self, zspages: "array[int]") -> None:
        span = self.pages * PAGE_SIZE
        for start, end in _runs(zspages):
            self.region.populate(start * span, (end - start) * span)

    def _extend(self, count: int) -> None:
        for column in (self.used, self.free, self.fresh, self.following, self.preceding, self.size_class):
            column.frombytes(bytes(count * column.itemsize))

    def _shrink(self) -> None:
        """Punch the zspages that were given back longest ago, in order of address so that neighbours go together."""
        count = len(self._populated) - self._reserve // 2
        zspages = array("I", sorted(self._populated[:count]))
        del self._populated[:count]
        self._punch(zspages)

    def _punch(self, zspages: "array[int]") -> None:
        """Give free zspages (ascending) back to the OS. Where that fails they stay populated, and are used again."""
        span = self.pages * PAGE_SIZE
        done = 0
        try:
            for start, end in _runs(zspages):
                self.region.punch(start * span, (end - start) * span)
                done += end - start
        except RegionError as error:
            log.warning("memory stays allocated: %s", error)
            self._reserve = self.capacity
        self._punched.extend(zspages[:done])
        self._populated.extend(zspages[done:])

    def restore(self, count: int) -> None:
        """Prepare the private state of `count` zspages found in the region, all of them free so far."""
        self._extend(count - len(self))

    def release_unused(self) -> None:
        """After recovery: punch what no object was found in."""
        self._punch(array("I", (zspage for zspage in range(len(self)) if not self.used[zspage])))


def _runs(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of each run of consecutive numbers in an ascending sequence."""
    first = end = -1
    for number in numbers:
        if number != end:
            if end > first:
                yield first, end
            first = number
        end = number + 1
    if end > first:
        yield first, end
