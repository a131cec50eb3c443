"""Recompression: pages are compressed anew with a codec that takes longer and makes them smaller.

Which pages, in which order, and what counts as a success is as in Linux 6.18 (recompress_store and recompress_slot in
zram_drv.c). A page is decompressed and compressed without the device's lock; if it was touched meanwhile, it stays.
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from zramd.device.algorithms import Decompressors, codec_number, entry_bits
from zramd.device.codecs import CodecError
from zramd.device.entry import HUGE, IN_MEMORY, STATE_MASK, size_of
from zramd.device.fetching import PageError
from zramd.device.slices import in_slices, pause
from zramd.device.work import Work, WorkKind
from zramd.device.zram import Device
from zramd.layout import (
    ENTRY_IDLE,
    ENTRY_INCOMPRESSIBLE,
    ENTRY_TAKEN,
    PAGE_SIZE,
    PRIORITIES,
)

BUCKET_BYTES = 64
"""Pages whose stored sizes differ by less may be taken in any order (PP_BUCKET_SIZE_RANGE)."""
BATCH = 8
"""Pages taken and stored under one hold of the lock each."""

PAGE_TYPES = {"idle": (True, False), "huge": (False, True), "huge_idle": (True, True)}
"""(idle, huge) of each type of page that a recompression may be for."""


@dataclass(frozen=True, slots=True)
class Recompression:
    """Which pages to recompress.

    Attributes:
        idle, huge: only pages that are so; with both, that are both.
        threshold: only objects of at least so many bytes, and only if they become smaller than that; 0: none.
        max_pages: most attempts; None: all.
        priority: the one codec to try; None: from the page's next on upwards, until one makes progress.
    """

    idle: bool = False
    huge: bool = False
    threshold: int = 0
    max_pages: int | None = None
    priority: int | None = None


@dataclass(slots=True)
class Outcome:
    """What came of it: pages tried and made smaller, and bytes (of objects) before and after of the latter."""

    candidates: int = 0
    tried: int = 0
    recompressed: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    cancelled: bool = False

    @property
    def saved(self) -> int:
        """Bytes by which objects became smaller."""
        return self.bytes_before - self.bytes_after


class Recompressor:
    """Recompresses pages of a device in the calling thread; others may look at `outcome` and `work`, and cancel it."""

    def __init__(self, device: Device, order: Recompression, work: Work | None = None) -> None:
        self.outcome = Outcome()
        self.work = work or Work(WorkKind.RECOMPRESS)
        self._device = device
        self._order = order
        self._page = bytearray(PAGE_SIZE)
        self._decompressors = Decompressors(device.identity.algorithms)
        self._choose()

    def _choose(self) -> None:
        """Take the codecs that the device has now."""
        device, algorithms = self._device, self._device.identity.algorithms
        self._generation = device.generation
        self._highest = max(algorithms.secondary, default=0)
        self._codecs = {
            priority: chosen
            for priority, chosen in algorithms.secondary.items()
            if self._order.priority in (None, priority)
        }
        self._numbers = {priority: algorithms.number(priority) for priority in self._codecs}
        self._compress = {
            priority: device.page_compressor(chosen, self._page) for priority, chosen in self._codecs.items()
        }

    def run(self) -> Outcome:
        """Recompress what there is.

        Raises:
            NoMemoryError: there is no room to store a page anew, before its old object can be freed.
            PageError: a page is damaged.
        """
        buckets = [array("Q") for _ in range(PAGE_SIZE // BUCKET_BYTES + 1)]
        in_slices(self._device, self._scan(buckets))
        self.outcome.candidates = sum(map(len, buckets))
        most = self._order.max_pages
        self.work.total = self.outcome.candidates if most is None else min(most, self.outcome.candidates)
        # The kernel takes the largest first, and of one bucket the page that was found last.
        for bucket in reversed(buckets):
            while bucket and not self.work.cancelled and not self._device.retired:
                batch = bucket[-BATCH:]
                del bucket[-BATCH:]
                more = self._recompress(list(reversed(batch)))
                self.work.done = min(self.work.done + len(batch), self.work.total)
                self.work.changed = self.outcome.recompressed
                self.work.saved = self.outcome.saved
                if not more:
                    return self.outcome
                pause()
        self.outcome.cancelled = self.work.cancelled or self._device.retired
        return self.outcome

    def _scan(self, buckets: list["array[int]"]) -> Iterator[None]:
        for first, entries in self._device.chunks():
            for offset, entry in enumerate(entries):
                if self._is_candidate(entry):
                    buckets[size_of(entry) // BUCKET_BYTES].append(first + offset)
            if self.work.cancelled:
                return
            yield

    def _is_candidate(self, entry: int) -> bool:
        state = entry & STATE_MASK
        return (
            state in IN_MEMORY
            and not entry & ENTRY_INCOMPRESSIBLE
            and codec_number(entry) % PRIORITIES < max(self._codecs, default=0)
            and (not self._order.idle or bool(entry & ENTRY_IDLE))
            and (not self._order.huge or state == HUGE)
        )

    def _recompress(self, batch: list[int]) -> bool:
        """Recompress some pages. Return whether there may be more."""
        device = self._device
        done = [(index, entry, *self._try(index, entry, data)) for index, entry, data in self._take(batch)]
        with device:
            # What has a codec's number must be of that codec: one that has changed meanwhile may have lost its number.
            for index, entry, stored, priority in done if device.generation == self._generation else []:
                if not device.retired and device.entry(index) == entry:
                    self._store(index, entry, stored, priority)
        return self._order.max_pages is None or self.outcome.tried < self._order.max_pages

    def _take(self, batch: list[int]) -> list[tuple[int, int, bytes]]:
        """Return (page, entry, object) of those that are still candidates."""
        device, order = self._device, self._order
        taken: list[tuple[int, int, bytes]] = []
        with device:
            self._decompressors.refresh(device.generation)
            if device.generation != self._generation:
                self._choose()
            for index in [] if device.retired else batch:
                entry = device.entry(index)
                if not self._is_candidate(entry) or size_of(entry) < order.threshold:
                    continue
                if order.max_pages is not None and self.outcome.tried >= order.max_pages:
                    break
                self.outcome.tried += 1
                entry = entry & ~ENTRY_IDLE | ENTRY_TAKEN
                device.replace_entry(index, entry)
                try:
                    taken.append((index, entry, device.stored(entry).tobytes()))
                except CodecError as error:
                    raise PageError(f"page {index} is damaged: {error}") from error
        return taken

    def _try(self, index: int, entry: int, data: bytes) -> tuple[bytes | None, int]:
        """Return a page compressed so that it makes progress, or None; and the priority that was tried last."""
        device, threshold = self._device, self._order.threshold
        try:
            self._page[:] = data if entry & STATE_MASK == HUGE else self._decompressors.page(entry, data)
        except CodecError as error:
            raise PageError(f"page {index} is damaged: {error}") from error
        tried = 0
        for priority in sorted(self._codecs):
            if priority <= codec_number(entry) % PRIORITIES:
                continue
            tried = priority
            stored = self._compress[priority]()
            if device.class_index(len(stored)) < device.class_index(size_of(entry)) and (
                not threshold or len(stored) < threshold
            ):
                return stored, priority
        return None, tried

    def _store(self, index: int, entry: int, stored: bytes | None, priority: int) -> None:
        """Publish what was compressed anew, or that nothing came of it. The caller holds the lock."""
        if stored is None:
            spent = ENTRY_INCOMPRESSIBLE if priority == self._highest else 0
            self._device.replace_entry(index, entry & ~ENTRY_TAKEN | spent)
            return
        self._device.restore(index, stored, entry_bits(self._numbers[priority]))
        self.outcome.recompressed += 1
        self.outcome.bytes_before += size_of(entry)
        self.outcome.bytes_after += len(stored)
