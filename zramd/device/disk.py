"""A disk over its whole life: set up, initialised by its disksize, used, reset. The rules are Linux 6.18's zram's.

A disk without a device is uninitialised: it has a name and settings, but no size, and nobody can connect to it.
"""

import errno
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from zramd.backing import FullError
from zramd.device.algorithms import PRIMARY
from zramd.device.backing_dev import check_medium
from zramd.device.codecs import NAMES, Codec, CodecError, Parameters, codec
from zramd.device.counters import BdStat, IoStat, MmStat, RequestStat, WritebackSettings
from zramd.device.fetching import PageError
from zramd.device.idle import mark_idle
from zramd.device.image import Counts, Header, take_header
from zramd.device.opening import DEFAULT_ALGORITHM, CodecInUseError, OpenDevice, Wanted
from zramd.device.recompression import Outcome, Recompression, Recompressor
from zramd.device.restoring import Source, fill, identity_for
from zramd.device.saving import save
from zramd.device.slices import in_slices
from zramd.device.snapshot import SnapshotLostError
from zramd.device.state import uptime
from zramd.device.survey import Survey, take_survey
from zramd.device.work import Work, WorkKind, Works, WorkUnderWayError
from zramd.device.writeback import LimitError, Selection, Writeback, WritebackOutcome
from zramd.layout import PAGE_SHIFT, PAGE_SIZE
from zramd.memory import RegionStore
from zramd.zsmalloc.stats import ClassStat

RESET_SECONDS = 5.0
"""How long a forced reset waits for the clients that it disconnects."""

HangUp = Callable[[], None]
"""Ends a client's connection soon; called from another thread."""


class BusyError(Exception):
    """The disk is in use, or in a state in which this cannot be done."""


class UninitialisedError(Exception):
    """The disk has no size yet."""


class Disk:
    """A disk called `name` whose regions lie in `directory` (None: in memfds that die with the process).

    If it is for `swap`, its memory is populated ahead of need; with `integrity`, each stored page has a checksum.

    `opened` is the device and its regions, None while the disk is uninitialised. Methods that change the disk exclude
    each other; those that only look wait for nobody but the device's lock.
    """

    def __init__(
        self,
        name: str,
        directory: Path | None,
        chain_size: int | None = None,
        *,
        swap: bool = False,
        integrity: bool = False,
    ) -> None:
        self.name = name
        self._integrity = integrity
        self._swap = swap
        self.opened: OpenDevice | None = None
        self._directory = directory
        self._chain_size = chain_size
        self._control = threading.Lock()
        self.works = Works()
        self._changed = threading.Condition()
        self._clients: list[HangUp] = []
        self._resetting = False
        self._writeback = WritebackSettings()
        self._forget_settings()

    def _forget_settings(self) -> None:
        self._chosen = {PRIMARY: DEFAULT_ALGORITHM}
        self._parameters: dict[int, Parameters] = {}
        self._mem_limit = 0
        self._backing: Path | None = None

    def open(self, wanted: Wanted) -> OpenDevice:
        """Find the disk in kept regions, or make it there.

        Raises:
            StateError, NoMemoryError, RegionError, OSError: as OpenDevice.
        """
        self.opened = self._open_device(wanted)
        return self.opened

    def leave(self) -> bool:
        """Leave the regions in order for the next process; say whether there are any. Nothing can change any more.

        Raises:
            OSError: the medium failed.
        """
        self._control.acquire()
        if self.opened is None:
            return False
        self.opened.leave()
        return True

    @property
    def clients(self) -> int:
        """How many are connected."""
        return len(self._clients)

    @property
    def disksize(self) -> int:
        """Bytes; 0 if the disk is uninitialised."""
        opened = self.opened
        return opened.device.disksize if opened else 0

    def algorithm(self, priority: int = PRIMARY) -> str | None:
        """Return the name of a priority's codec, or of the one chosen for it; None if there is none."""
        opened = self.opened
        if opened is None:
            return self._chosen.get(priority)
        chosen = opened.device.identity.algorithms.at(priority)
        return chosen.name if chosen else None

    def mm_stat(self) -> MmStat:
        """Return the memory counters; all but the limit are 0 while the disk is uninitialised."""
        opened = self.opened
        return opened.device.mm_stat() if opened else MmStat(mem_limit=self._mem_limit)

    def io_stat(self) -> IoStat:
        """Return the failure and discard counters."""
        opened = self.opened
        return opened.device.io_stat() if opened else IoStat()

    def request_stat(self) -> RequestStat:
        """Return the request counters."""
        opened = self.opened
        return opened.device.request_stat() if opened else RequestStat()

    def class_stats(self) -> list[ClassStat]:
        """Return the pool's size classes.

        Raises:
            UninitialisedError: there is no pool.
        """
        return self.require_opened().device.class_stats()

    def require_opened(self) -> OpenDevice:
        """Return the device and its regions.

        Raises:
            UninitialisedError: there is none.
        """
        opened = self.opened
        if opened is None:
            raise UninitialisedError(f"{self.name} is not initialised: set its disksize first")
        return opened

    def _require_uninitialised(self) -> None:
        if self.opened:
            raise BusyError(f"{self.name} is initialised: reset it first")

    @contextmanager
    def connected(self, hang_up: HangUp) -> Iterator[OpenDevice]:
        """Keep the disk from being reset while a client uses it.

        Raises:
            UninitialisedError: the disk has no size yet, or is just being reset.
        """
        with self._changed:
            opened = self.require_opened()
            if self._resetting:
                raise UninitialisedError(f"{self.name} is being reset")
            self._clients.append(hang_up)
        try:
            yield opened
        finally:
            with self._changed:
                self._clients.remove(hang_up)
                self._changed.notify_all()

    def set_algorithm(self, name: str, priority: int = PRIMARY) -> None:
        """Choose a priority's codec by name. Pages that are stored keep theirs; the kernel refuses this after disksize.

        Raises:
            ValueError: there is none of that name, or it cannot have the parameters.
            BusyError: pages are stored with two earlier ones.
            NoMemoryError, OSError: there is no room for its dictionary.
        """
        if name not in NAMES:
            raise ValueError(f"unknown algorithm {name!r}: choose one of {', '.join(NAMES)}")
        with self._control:
            if self.opened:
                self._use(priority, codec(name))
            else:
                self._chosen[priority] = name

    def set_parameters(self, parameters: Parameters, priority: int = PRIMARY) -> None:
        """Set level and dictionary of a priority's codec; what is not given goes back to its default.

        Raises:
            ValueError: no codec is chosen for it, or it cannot have these.
            BusyError: pages are stored with two earlier codecs.
            NoMemoryError, OSError: there is no room for the dictionary.
        """
        with self._control:
            name = self.algorithm(priority)
            if name is None:
                raise ValueError(f"no algorithm has priority {priority}: set recomp_algorithm first")
            chosen = codec(name, parameters.level, parameters.dictionary)
            if self.opened:
                self._use(priority, chosen)
            else:
                self._parameters[priority] = parameters

    def use_codec(self, chosen: Codec, priority: int) -> None:
        """Let a priority have a codec from now on. Pages that are stored keep theirs.

        Raises:
            UninitialisedError: there are no pages.
            BusyError: pages are stored with two earlier ones.
            NoMemoryError, OSError: there is no room for its dictionary.
        """
        with self._control:
            self._use(priority, chosen)

    def _use(self, priority: int, chosen: Codec) -> None:
        try:
            self.require_opened().set_algorithm(priority, chosen)
        except CodecInUseError as error:
            raise BusyError(str(error)) from error

    def initialise(self, disksize: int) -> None:
        """Give the disk its size in bytes, rounded up to pages; it can then be connected to.

        Raises:
            ValueError: the size is 0, or the codec cannot have its parameters.
            BusyError: the disk is initialised.
            StateError, NoMemoryError, RegionError, OSError: as OpenDevice.
        """
        if not disksize:
            raise ValueError("a disk has at least one page")
        with self._control:
            self._require_uninitialised()
            chosen = {priority: self._make(priority) for priority in self._chosen}
            primary = chosen.pop(PRIMARY)
            opened = self._open_device(
                Wanted(
                    disksize,
                    primary,
                    self._chain_size,
                    secondary=chosen,
                    integrity=self._integrity,
                    backing=self._backing,
                )
            )
            opened.device.set_mem_limit(self._mem_limit)
            with opened.device:
                opened.device.writeback = self._writeback
            self.opened = opened

    def _make(self, priority: int) -> Codec:
        parameters = self._parameters.get(priority, Parameters())
        return codec(self._chosen[priority], parameters.level, parameters.dictionary)

    def set_mem_limit(self, limit: int) -> None:
        """Set the memory limit in bytes, rounded up to pages; 0 is none."""
        with self._control:
            if self.opened:
                self.opened.device.set_mem_limit(limit)
            else:
                self._mem_limit = -(-limit // PAGE_SIZE) * PAGE_SIZE

    def reset_mem_used_max(self) -> None:
        """Let the high-water mark of memory start from what is used now."""
        with self._control:
            if self.opened:
                self.opened.device.reset_mem_used_max()

    @contextmanager
    def work(self, kind: WorkKind) -> Iterator[Work]:
        """Have work under way for as long as the context lasts.

        Raises:
            BusyError: there is other work that excludes it.
        """
        try:
            with self.works.begin(kind) as work:
                yield work
        except WorkUnderWayError as error:
            raise BusyError(f"{self.name}: {error}") from error

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

    def bd_stat(self) -> BdStat:
        """Return the counters of the backing store."""
        opened = self.opened
        return opened.device.bd_stat() if opened else BdStat()

    @property
    def backing_path(self) -> Path | None:
        """Where pages are written back to, None if that is nowhere."""
        opened = self.opened
        return opened.backing_path if opened else self._backing

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

    @property
    def writeback(self) -> WritebackSettings:
        """What writeback may do."""
        opened = self.opened
        return opened.device.writeback if opened else self._writeback

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
            identity = identity_for(header, disksize or max(before, header.disksize))
            mem_limit, backing, writeback = self.mm_stat().mem_limit, self.backing_path, self.writeback
            self._disconnect(force=False)
            try:
                # Somebody may have written to it before the door was shut.
                self._require_empty()
                opened, self.opened = self.opened, None
                if opened:
                    opened.destroy()
                opened = self._open_device(Wanted(filled=identity, backing=backing))
                try:
                    fill(opened.device, header, source, mem_limit, work)
                    opened.device.set_mem_limit(mem_limit)
                    with opened.device:
                        opened.device.writeback = writeback
                    opened.finish(before)
                except BaseException:
                    opened.destroy()
                    raise
                self.opened = opened
            finally:
                self._resetting = False
            return header

    def _require_empty(self) -> int:
        """Check that nothing would be lost by a restore. Return the size, 0 if the disk is uninitialised."""
        if self.opened and self.mm_stat().orig_data_size:
            raise BusyError(f"{self.name} holds data: reset it first")
        return self.disksize

    def grow(self, disksize: int) -> None:
        """Make the disk larger: `disksize` bytes, rounded up to pages.

        Clients are disconnected, and find it grown when they connect again; `zramd attach` tells the kernel, and users
        of the block device only wait. Cut short at any moment, it leaves the disk as it was or grown.

        Raises:
            ValueError: the disk would become smaller, or larger than a pool can be; or nothing of it is kept.
            UninitialisedError: it has no size yet.
            BusyError: a client does not leave.
            StateError, NoMemoryError, RegionError, OSError: as OpenDevice; the disk is as it was.
        """
        with self._control:
            opened = self.require_opened()
            if self._directory is None:
                raise ValueError("a volatile disk cannot grow: nothing of it is kept")
            opened.require_growth(disksize)
            self._disconnect(force=True)
            try:
                opened.abandon()
                try:
                    self.opened = self._open_device(Wanted(disksize, grow=True))
                except BaseException:
                    self.opened = self._open_device(Wanted())
                    raise
            finally:
                self._resetting = False

    def _open_device(self, wanted: Wanted) -> OpenDevice:
        return OpenDevice(RegionStore(self._directory), wanted, swap=self._swap)

    def reset(self, *, force: bool = False) -> None:
        """Throw the contents away, and forget size, limit, codec, parameters and counters.

        `force` disconnects the clients first.

        Raises:
            BusyError: a client is connected.
            RegionError: the regions cannot be given back.
        """
        with self._control:
            self._disconnect(force)
            try:
                opened, self.opened = self.opened, None
                if opened:
                    self._writeback = opened.device.writeback  # which outlives a reset (Linux 6.18)
                self._forget_settings()
                if opened:
                    opened.destroy()
            finally:
                self._resetting = False

    def _disconnect(self, force: bool) -> None:
        """Let no client in any more; those that are in must leave."""
        with self._changed:
            if self._clients and not force:
                raise BusyError(f"{len(self._clients)} connected to {self.name}: disconnect them, or force the reset")
            self._resetting = True
            for hang_up in self._clients:
                hang_up()
            if not self._changed.wait_for(lambda: not self._clients, RESET_SECONDS):
                self._resetting = False
                raise BusyError(f"a client of {self.name} did not end within {RESET_SECONDS:g} s")
