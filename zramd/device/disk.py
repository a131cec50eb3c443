"""A disk, and the long work that is done on it: compaction, recompression, writeback, saving and restoring."""

import errno
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from zramd.backing import FullError
from zramd.device.backing_dev import check_medium
from zramd.device.codecs import CodecError
from zramd.device.counters import WritebackSettings
from zramd.device.fetching import PageError
from zramd.device.idle import mark_idle
from zramd.device.image import Counts, Header, take_header
from zramd.device.life import BusyError, Life, UnderWayError
from zramd.device.recompression import Outcome, Recompression, Recompressor
from zramd.device.restoring import Source, fill, identity_for
from zramd.device.saving import save
from zramd.device.slices import in_slices
from zramd.device.snapshot import SnapshotLostError
from zramd.device.state import uptime
from zramd.device.survey import Survey, take_survey
from zramd.device.wanted import Wanted
from zramd.device.work import Work, WorkKind, WorkUnderWayError
from zramd.device.writeback import LimitError, Selection, Writeback, WritebackOutcome
from zramd.layout import PAGE_SHIFT


class Disk(Life):
    """A disk over its whole life, with `works` for the work that is under way."""

    @contextmanager
    def work(self, kind: WorkKind) -> Iterator[Work]:
        """Have work under way for as long as the context lasts.

        Raises:
            UnderWayError: there is other work that excludes it.
        """
        try:
            with self.works.begin(kind) as work:
                yield work
        except WorkUnderWayError as error:
            raise UnderWayError(f"{self.name}: {error}") from error

    def compact(self) -> None:
        """Compact the pool. While another thread does so, there is nothing to do.

        Raises:
            UninitialisedError: there is no pool.
        """
        device = self.require_opened().device
        with suppress(WorkUnderWayError), self.works.begin(WorkKind.COMPACT) as work:
            device.compact(work)

    def mark_idle(self, seconds: int | None) -> int:
        """Mark pages that were not touched for so many seconds as idle, and the others as not; None: all.

        Return how many are idle.

        Raises:
            UninitialisedError: there are no pages.
        """
        device = self.require_opened().device
        with self.work(WorkKind.IDLE) as work:
            in_slices(device, mark_idle(device, None if seconds is None else uptime() - seconds, work))
            return work.changed

    def survey(self, ages: Sequence[int], threshold: int) -> Survey | None:
        """Count what is worth recompressing or writing back, by ages in seconds; None if that was cancelled.

        Raises:
            UninitialisedError: there are no pages.
        """
        device = self.require_opened().device
        found = Survey()
        with self.work(WorkKind.SURVEY) as work:
            started = time.thread_time()
            in_slices(device, take_survey(device, ages, threshold, uptime(), found, work))
            found.seconds = time.thread_time() - started
            return None if work.cancelled or device.retired else found

    def recompress(self, order: Recompression) -> Outcome:
        """Recompress pages.

        Raises:
            UninitialisedError: there are no pages.
            ValueError: there is no such codec, or the threshold is that of huge pages.
            BusyError: other work that changes pages is under way.
            NoMemoryError: there is no room to do it in.
            PageError: a page is damaged.
        """
        device = self.require_opened().device
        if order.threshold >= device.pool.geometry.huge_limit:
            raise ValueError(f"the threshold must be less than {device.pool.geometry.huge_limit}, that of huge pages")
        secondary = device.identity.algorithms.secondary
        if order.priority not in (None, *secondary) or not secondary:
            raise ValueError("there is no such algorithm to recompress with: set recomp_algorithm")
        with self.work(WorkKind.RECOMPRESS) as work:
            return Recompressor(device, order, work).run()

    def set_backing(self, path: Path | None) -> None:
        """Choose a file or block device to write pages back to, or (None) none.

        The kernel wants that before disksize. Here it can be done, and done otherwise, while no page is written back.

        Raises:
            BusyError: pages are written back, or just being so.
            OSError: the path cannot be one; NotBlockError: since it is neither.
        """
        with self._control, self.work(WorkKind.WRITEBACK):
            if any(work.kind is WorkKind.SAVE for work in self.works.under_way()):
                raise BusyError(f"{self.name} is being saved, perhaps with pages that are written back")
            if pages := self.bd_stat().pages:
                raise BusyError(f"{pages} pages are written back to {self.backing_path}")
            if path and path != self.backing_path:
                check_medium(path)
            if self.opened:
                self.opened.set_backing(path)
            else:
                self._backing = path

    def set_writeback(self, change: Callable[[WritebackSettings], WritebackSettings]) -> None:
        """Change what writeback may do."""
        with self._control:
            if self.opened:
                device = self.opened.device
                with device:
                    device.writeback = change(device.writeback)
            else:
                self._writeback = change(self._writeback)

    def write_back(self, select: Callable[[int], list[Selection]], most: int | None = None) -> WritebackOutcome:
        """Write back the pages that `select` names, given how many pages there are; at most so many.

        Raises:
            UninitialisedError: there are no pages.
            BusyError: other work that changes pages is under way.
            OSError: ENODEV, there is no backing store; ENOSPC, it is full; EIO, the limit is used up; or it failed.
            ValueError, PageError: as `select`; a page is damaged.
        """
        device = self.require_opened().device
        with self.work(WorkKind.WRITEBACK) as work:
            if device.backing is None:
                where = self.backing_path
                reason = f"the backing store {where} is missing" if where else "set backing_dev first"
                raise OSError(errno.ENODEV, reason)
            try:
                return Writeback(device, device.backing, select(device.disksize >> PAGE_SHIFT), work, most).run()
            except FullError as error:
                raise OSError(errno.ENOSPC, str(error)) from error
            except LimitError as error:
                raise OSError(errno.EIO, str(error)) from error

    def save(self, target: int, is_cancelled: Callable[[], bool] = lambda: False) -> Counts:
        """Write the disk as it is now to a descriptor, which stays open. Clients go on meanwhile.

        Raises:
            UninitialisedError: there is nothing to save.
            BusyError: a save is under way; or the disk goes away, or is written to faster than it can be saved.
            NoMemoryError: there is no room to do it in.
            PageError: a page is damaged.
            OSError: the target failed; ECANCELED.
        """
        device = self.require_opened().device
        with self.work(WorkKind.SAVE) as work:
            try:
                return save(device, target, work, is_cancelled)
            except SnapshotLostError as error:
                raise BusyError(str(error)) from error
            except CodecError as error:
                raise PageError(str(error)) from error

    def restore(self, fd: int, disksize: int = 0, is_cancelled: Callable[[], bool] = lambda: False) -> Header:
        """Make the disk what an image is, which is read from a descriptor. It has no contents yet, and no client.

        It gets `disksize` bytes, or (0) the larger of its own size and the saved one. Algorithms and chain size are
        those that were saved. If it fails once pages were read, the disk is uninitialised; cut short, too.

        Raises:
            BusyError: the disk holds something, or a client is connected.
            ImageError: the image is damaged, or cannot be used for this disk.
            RegionError, NoMemoryError, StateError: as OpenDevice.
            OSError: it cannot be read, or is too large for the memory limit; ECANCELED.
        """
        with self._control, self.work(WorkKind.RESTORE) as work:
            before = self._require_empty()
            source = Source(fd, lambda: work.cancelled or is_cancelled())
            header = take_header(source.take)
            if self._chain_size not in (None, header.chain_size):
                raise ValueError(f"it was saved with chain size {header.chain_size}: serve the disk with that")
            identity = identity_for(header, disksize or max(before, header.disksize), integrity=self._integrity)
            # After a reset there is no size, and still the next server is started with the one that this one was.
            first = before or (self._asked if self._asked <= identity.disksize else 0)
            mem_limit, backing, writeback = self.mm_stat().mem_limit, self.backing_path, self.writeback
            with self._shut("restored", force=False):
                # Somebody may have written to it before the door was shut.
                self._require_empty()
                opened, self.opened = self.opened, None
                # If this fails, they are for the next one.
                self._mem_limit, self._backing, self._writeback = mem_limit, backing, writeback
                if opened:
                    opened.destroy()
                opened = self._open_device(Wanted(filled=identity, backing=backing))
                try:
                    fill(opened.device, header, source, mem_limit, work)
                    opened.device.set_mem_limit(mem_limit)
                    with opened.device:
                        opened.device.writeback = writeback
                    opened.finish(first)
                except BaseException:
                    opened.destroy()
                    raise
                self.opened = opened
            return header

    def _require_empty(self) -> int:
        """Check that nothing would be lost by a restore. Return the size, 0 if the disk is uninitialised."""
        if self.opened and self.mm_stat().orig_data_size:
            raise BusyError(f"{self.name} holds data: reset it first")
        return self.disksize
