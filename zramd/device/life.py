"""The life of a disk: set up, initialised by its disksize, connected to, grown, reset, by the rules of Linux 6.18.

A disk without a device is uninitialised: it has a name and settings, but no size, and nobody can connect to it.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from zramd.device.algorithms import PRIMARY
from zramd.device.codecs import NAMES, Codec, Parameters, codec
from zramd.device.counters import BdStat, IoStat, MmStat, RequestStat, WritebackSettings
from zramd.device.opening import CodecInUseError, OpenDevice
from zramd.device.requests import Requests
from zramd.device.wanted import DEFAULT_ALGORITHM, Wanted
from zramd.device.work import Works
from zramd.layout import PAGE_SIZE
from zramd.memory import RegionStore
from zramd.zsmalloc.stats import ClassStat

RESET_SECONDS = 5.0
"""How long a forced reset waits for the clients that it disconnects."""

HangUp = Callable[[], None]
"""Ends a client's connection soon; called from another thread."""


class BusyError(Exception):
    """The disk is in use, or in a state in which this cannot be done."""


class UnderWayError(BusyError):
    """The disk is at other work, after which this can be done."""


class UninitialisedError(Exception):
    """The disk has no size yet."""


class Life:
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
        self.requests = Requests()
        self._changed = threading.Condition()
        self._clients: list[HangUp] = []
        self._shut_for = ""
        self._writeback = WritebackSettings()
        self._asked = 0
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
        self._asked = wanted.disksize or 0
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
            UninitialisedError: the disk has no size yet, or is just being made another.
        """
        with self._changed:
            opened = self.require_opened()
            if self._shut_for:
                raise UninitialisedError(f"{self.name} is being {self._shut_for}")
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

    def bd_stat(self) -> BdStat:
        """Return the counters of the backing store."""
        opened = self.opened
        return opened.device.bd_stat() if opened else BdStat()

    @property
    def backing_path(self) -> Path | None:
        """Where pages are written back to, None if that is nowhere."""
        opened = self.opened
        return opened.backing_path if opened else self._backing

    @property
    def writeback(self) -> WritebackSettings:
        """What writeback may do."""
        opened = self.opened
        return opened.device.writeback if opened else self._writeback

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
            with self._shut("enlarged", force=True):
                opened.abandon()
                try:
                    self.opened = self._open_device(Wanted(disksize, grow=True))
                except BaseException:
                    self.opened = self._open_device(Wanted())
                    raise

    def _open_device(self, wanted: Wanted) -> OpenDevice:
        return OpenDevice(RegionStore(self._directory), wanted, swap=self._swap)

    def reset(self, *, force: bool = False) -> None:
        """Throw the contents away, and forget size, limit, codec, parameters and counters.

        `force` disconnects the clients first.

        Raises:
            BusyError: a client is connected.
            RegionError: the regions cannot be given back.
        """
        with self._control, self._shut("reset", force):
            opened, self.opened = self.opened, None
            if opened:
                self._writeback = opened.device.writeback  # which outlives a reset (Linux 6.18)
            self._forget_settings()
            if opened:
                opened.destroy()

    @contextmanager
    def _shut(self, why: str, force: bool) -> Iterator[None]:
        """Let no client in for as long as the context lasts; those that are in must have left, or (`force`) leave.

        Raises:
            BusyError: they have not.
        """
        with self._changed:
            if self._clients and not force:
                remedy = "end them, or force the reset" if why == "reset" else "end them"
                raise BusyError(f"connections to {self.name}: {len(self._clients)}; {remedy}")
            self._shut_for = why
            for hang_up in self._clients:
                hang_up()
            left = self._changed.wait_for(lambda: not self._clients, RESET_SECONDS)
        try:
            if not left:
                raise BusyError(f"a client of {self.name} did not end within {RESET_SECONDS:g} s")
            yield
        finally:
            self._shut_for = ""
