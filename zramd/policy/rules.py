"""The rules of a disk's policy, as its table of the configuration has them."""

import re
from dataclasses import dataclass
from enum import StrEnum

from zramd.device.recompression import Recompression
from zramd.sizes import parse_size


class Mode(StrEnum):
    """Whether the policy acts, only says what it would do, or neither."""

    OFF = "off"
    DRY_RUN = "dry-run"
    ON = "on"


@dataclass(frozen=True, slots=True)
class Watermark:
    """Memory that a pool uses: so many bytes, or so many hundredths of the memory limit."""

    size: int = 0
    percent: int = 0

    def resolve(self, limit: int) -> int | None:
        """Return the bytes for a memory limit (0: none), or None if there is no such mark."""
        if self.percent:
            return limit * self.percent // 100 if limit else None
        return self.size or None


@dataclass(frozen=True, slots=True)
class Rules:
    """What a policy goes by.

    Attributes:
        idle_after: seconds without a read or a write after which a page is idle, and is recompressed.
        writeback_after: seconds after which an idle page is written back; 0: never.
        low, high: memory used. Below `low` nothing is done. Above `high`, and from then on until it is below `low`,
            pages are idle earlier, and I/O is not waited for.
        pressure_some, pressure_full: hundredths of the last ten seconds in which some, or all, tasks of the machine
            waited for memory (PSI, avg10). From the first on pages are idle earlier; from the second on nothing is
            recompressed, since those who wait need the processors.
        write_budget: bytes that may be written back in any 24 hours.
        busy_requests: requests a second above which nothing is done.
        recompression: which pages to recompress; None: those that are idle, and those that are huge.
    """

    mode: Mode = Mode.OFF
    idle_after: int = 600
    writeback_after: int = 0
    low: Watermark = Watermark()
    high: Watermark = Watermark()
    pressure_some: int = 10
    pressure_full: int = 10
    write_budget: int = 4 << 30
    busy_requests: int = 1000
    recompression: Recompression | None = None


DEFAULT_RULES = Rules()


def parse_watermark(text: str) -> Watermark:
    """Return what `70%` (of the memory limit) or `2G` means.

    Raises:
        ValueError: it is neither.
    """
    match = re.fullmatch(r"\s*([0-9]{1,3})\s*%\s*", text, re.ASCII)
    if match is None:
        return Watermark(size=parse_size(text))
    if not 0 < int(match[1]) <= 100:
        raise ValueError(f"{text!r} is not a share of the memory limit: write 1% to 100%")
    return Watermark(percent=int(match[1]))
