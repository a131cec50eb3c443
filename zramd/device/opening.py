"""Making a device, or finding it again in the regions that an earlier process left."""

import errno
import logging
import os
import re
from dataclasses import replace
from pathlib import Path

from zramd.backing import DamagedObjectError, Store
from zramd.device.algorithms import PRIMARY, store_codec, store_level
from zramd.device.backing_dev import find_store, forget_store, load_path, make_store
from zramd.device.cleaning import Reclaimer
from zramd.device.codecs import Codec
from zramd.device.native import NativeDevice
from zramd.device.state import Tables
from zramd.device.superblock import (
    Identity,
    StateError,
    check_boot,
    load_identity,
    note_boot,
    note_end,
    refusal,
    store_identity,
)
from zramd.device.wanted import Wanted, check_identity, new_identity
from zramd.device.zram import Device
from zramd.layout import ACCESSED_BYTES, CODECS, MAGIC, PAGE_SHIFT, PAGE_SIZE, PRIORITIES, UNFINISHED, WORD, Superblock
from zramd.memory import NoMemoryError, Region, RegionStore, SparseTable, round_up_to_page
from zramd.native import Engine, choose
from zramd.zsmalloc import Pool, geometry
from zramd.zsmalloc.ahead import Ahead
from zramd.zsmalloc.pool import max_disksize

log = logging.getLogger(__name__)


_SUPERBLOCK, _PAGE_TABLE = "superblock", "page_table"
_NEW_DICTIONARY = "dictionary.new"
_ANY_REGION = re.compile(r"superblock|page_table|elements|accessed|handles|checksums|arena\d+|dictionary(\d|\.new)")
_NO_REGION = (errno.ELOOP, errno.EISDIR, errno.ENXIO)
"""What opening a symbolic link, a directory or a socket fails with."""


class CodecInUseError(Exception):
    """There is no room for another codec, since pages have the earlier ones."""


class OpenDevice:
    """A device and the regions under it.

    Attributes:
        recovered: whether the device was found in kept regions.
        regions: all of them, open.
        on_disk: whether the regions lie on a disk.
        backing_path: where pages are written back to, None if that is nowhere; the store may be missing.
        flush: writes them to it, and may raise OSError; None where they lie in memory.
    """

    def __init__(self, store: RegionStore, wanted: Wanted, *, swap: bool = False) -> None:
        """Open the device kept in `store`, or make one there. For `swap`, memory is populated ahead of need.

        Raises:
            StateError: what is kept is damaged or is not what was asked for.
            NoMemoryError: there is no room for the regions.
            RegionError: their file system is not fit for them.
            OSError: the regions cannot be opened.
            EngineError: the engine that was asked for cannot be had.
        """
        self._store = store
        self._grow = wanted.grow
        self.regions: list[Region] = []
        self._ahead: Ahead | None = None
        self._backing: Store | None = None
        self._reclaimer: Reclaimer | None = None
        self.backing_path: Path | None = None
        self.on_disk = store.on_disk()
        self.flush = self._flush if self.on_disk else None
        try:
            identity = self._find(wanted)
            self.recovered = identity is not None
            if identity is None:
                identity = wanted.filled or new_identity(wanted)
            try:
                self.device = self._build(identity, wanted)
            except StateError as error:
                raise refusal(self._store.directory, error) from error
            self._apply(wanted)
            self._find_backing(wanted.backing)
            self._ahead = self._populate_ahead() if swap else None
        except BaseException:
            self.close()
            raise

    def _find(self, wanted: Wanted) -> Identity | None:
        identity, first_disksize = None, 0
        try:
            # Reading a superblock that was never populated could be a SIGBUS.
            if self._store.exists(_SUPERBLOCK):
                superblock = self._open_kept(_SUPERBLOCK, PAGE_SIZE)
                try:
                    identity = load_identity(superblock.words, self._read_dictionary)
                    first_disksize = superblock.words[Superblock.FIRST_DISKSIZE]
                    if superblock.words[Superblock.MAGIC] == UNFINISHED:
                        log.warning("%s: a restore was cut short, and has left nothing", self._store.directory)
                        self._store.remove(_PAGE_TABLE)
                    if identity is not None:
                        check_boot(superblock.words)
                finally:
                    superblock.close()
            if identity is None and self._store.exists(_PAGE_TABLE):
                raise StateError("there is a page table, but no superblock that belongs to it")
            if identity is None:
                # What is made may have fewer regions than what was left, and would never touch the others.
                for name in filter(_ANY_REGION.fullmatch, self._store.names()):
                    self._store.remove(name)
        except StateError as error:
            raise refusal(self._store.directory, error) from error
        if identity is not None and wanted.grow and wanted.disksize is not None:
            return replace(identity, disksize=round_up_to_page(wanted.disksize))
        if identity is not None:
            check_identity(identity, first_disksize, wanted, self._store.directory)
        return identity

    def _read_dictionary(self, number: int, length: int) -> bytes:
        try:
            region = self._open_kept(_dictionary(number), round_up_to_page(length))
        except StateError as error:
            raise ValueError(str(error)) from error
        try:
            # Not from the mapping, since a part of it may have no memory.
            return os.pread(region.fd, length, 0)
        finally:
            region.close()

    def _build(self, identity: Identity, wanted: Wanted) -> Device:
        self._superblock = superblock = self._open(_SUPERBLOCK, PAGE_SIZE)
        if self.recovered:
            note_boot(superblock.words)
            if self.on_disk:
                superblock.sync()
        else:
            superblock.populate(0, PAGE_SIZE)
        pages = identity.disksize >> PAGE_SHIFT
        table = SparseTable(self._open(_PAGE_TABLE, round_up_to_page(pages * WORD)))
        elements_region = self._open("elements", round_up_to_page(pages * WORD))
        if not self.recovered:
            elements_region.punch(0, PAGE_SIZE)  # to find out now whether the file system can
        elements = SparseTable(elements_region)
        accessed = SparseTable(self._open_new("accessed", round_up_to_page(pages * ACCESSED_BYTES)))
        self._tables = table, accessed
        pool = Pool(geometry(identity.chain_size, identity.rule), pages, self._open, checksums=identity.integrity)
        make = NativeDevice if choose() is Engine.NATIVE else Device
        device = make(identity, superblock, Tables(table, elements, accessed), pool)
        if self.recovered:
            device.recover()
        else:
            for number, chosen in enumerate(identity.algorithms.codecs):
                if chosen and chosen.dictionary:
                    self._keep_dictionary(number, self._new_dictionary(chosen.dictionary))
            store_identity(superblock.words, identity, UNFINISHED if wanted.filled else MAGIC)
        if wanted.grow:
            words = superblock.words
            words[Superblock.FIRST_DISKSIZE] = words[Superblock.FIRST_DISKSIZE] or words[Superblock.DISKSIZE]
            # Last: until here, the disk has its old size, and its regions just some room.
            words[Superblock.DISKSIZE] = identity.disksize
        return device

    def _new_dictionary(self, dictionary: bytes) -> Region:
        """Return a region with a dictionary that is not yet anybody's."""
        region = self._store.open(_NEW_DICTIONARY, round_up_to_page(len(dictionary)), create=True)
        try:
            region.populate(0, region.size)
        except NoMemoryError:
            region.close()
            self._store.remove(_NEW_DICTIONARY)
            raise
        region.bytes[: len(dictionary)] = dictionary
        return region

    def _keep_dictionary(self, number: int, new: Region) -> None:
        """Let a codec, which is not in use, have a new dictionary."""
        name = _dictionary(number)
        for region in [region for region in self.regions if region.name == name]:
            self.regions.remove(region)
            region.close()
        self._store.rename(new.name, name)
        new.name = name
        self.regions.append(new)

    def set_algorithm(self, priority: int, chosen: Codec | None) -> None:
        """Let a priority have a codec from now on, or (not the primary one) none. Takes the lock.

        Pages keep the codec that they have, and each priority has room for two, of any level.

        Raises:
            CodecInUseError: pages have the one before, the codec and yet another one.
            NoMemoryError, OSError: there is no room for the dictionary.
        """
        device, algorithms = self.device, self.device.identity.algorithms
        before = algorithms.at(priority)
        if (before and before.key) == (chosen and chosen.key):
            return
        current = algorithms.number(priority)
        other = (current + PRIORITIES) % CODECS
        for number in (current, other):
            kept = algorithms.codecs[number]
            if kept and chosen and kept.format == chosen.format:
                self._change_level(priority, number, chosen)
                return
        # A codec that no page has yet gives its number up: then the priority has its earlier one for a moment.
        number = current if before and not device.codec_pages(current) and device.codec_pages(other) else other
        self._require_no_pages(number)
        dictionary = self._new_dictionary(chosen.dictionary) if chosen and chosen.dictionary else None
        words = self._superblock.words
        with device.lock:
            try:
                # The current codec may have got its first page meanwhile.
                self._require_no_pages(number)
            except CodecInUseError:
                if dictionary:
                    dictionary.close()
                raise
            if number == current:
                words[Superblock.ALTERNATES] = algorithms.alternates ^ 1 << priority
            else:
                algorithms.alternates ^= 1 << priority
            store_codec(words, number, None)
            if dictionary:
                self._keep_dictionary(number, dictionary)
            store_codec(words, number, chosen)
            algorithms.codecs[number] = chosen
            # One word, stored last: until here the priority has its old codec.
            words[Superblock.ALTERNATES] = algorithms.alternates
            device.note_codecs()

    def _change_level(self, priority: int, number: int, chosen: Codec) -> None:
        """Let a priority have that of its two numbers whose codec is this one but for the level. Takes the lock."""
        device, algorithms, words = self.device, self.device.identity.algorithms, self._superblock.words
        with device.lock:
            store_level(words, number, chosen.level)
            if algorithms.number(priority) != number:
                algorithms.alternates ^= 1 << priority
            algorithms.codecs[number] = chosen
            words[Superblock.ALTERNATES] = algorithms.alternates
            device.note_codecs()

    def _require_no_pages(self, number: int) -> None:
        if pages := self.device.codec_pages(number):
            raise CodecInUseError(
                f"stored pages ({pages}) still have an earlier algorithm of priority {number % PRIORITIES}: "
                "they have to be written anew, or recompressed, before there is room for another"
            )

    def finish(self, first_disksize: int) -> None:
        """Let the device, which was filled, be one. `first_disksize` in bytes may be asked for, too; 0: none."""
        words = self._superblock.words
        words[Superblock.FIRST_DISKSIZE] = first_disksize
        words[Superblock.MAGIC] = MAGIC

    def _populate_ahead(self) -> Ahead:
        for region in self.regions:
            region.map_data()
        for table in self._tables:
            table.make_all_ready()
        ahead = Ahead(self.device.pool, self.device.lock)
        ahead.start()
        return ahead

    def _open(self, name: str, size: int) -> Region:
        region = self._open_kept(name, size) if self.recovered else self._store.open(name, size, create=True)
        self.regions.append(region)
        return region

    def _open_kept(self, name: str, size: int) -> Region:
        """Open a region that must be there.

        Raises:
            StateError: it is not, or not as it must be.
            NoMemoryError, OSError: as RegionStore.open.
        """
        try:
            return self._store.open(name, size, create=False, grow=self._grow)
        except FileNotFoundError as error:
            raise StateError(f"the region {name} is missing") from error
        except OSError as error:
            if error.errno in _NO_REGION:
                raise StateError(f"the region {name} is no file") from error
            if error.errno == errno.EINVAL:
                raise StateError(error.strerror) from error
            raise

    def _open_new(self, name: str, size: int) -> Region:
        """Open a region that kept state of an earlier version may not have."""
        if self.recovered and not self._store.exists(name):
            region = self._store.open(name, size, create=True)
            self.regions.append(region)
            return region
        return self._open(name, size)

    def _apply(self, wanted: Wanted) -> None:
        """Let kept state have the codecs that are asked for, as far as pages leave room for them."""
        asked = {PRIMARY: wanted.codec} if wanted.codec else {}
        for priority, chosen in (asked | wanted.secondary).items():
            try:
                self.set_algorithm(priority, chosen)
            except CodecInUseError as error:
                log.warning("%s is not used: %s", chosen.name, error)

    def _find_backing(self, wanted: Path | None) -> None:
        words, kept = self._superblock.words, load_path(self._superblock.words)
        path, pages = wanted or kept, self.device.bd_stat().pages
        self.backing_path = path
        if path is None:
            return
        # It may have been moved; or another one is asked for, which has to wait until this one has no pages.
        for place in dict.fromkeys((path, kept if pages else path) if kept else ()):
            try:
                self._attach(find_store(words, place))
                self.backing_path = place
                return
            except (OSError, DamagedObjectError) as error:
                reason = error.strerror if isinstance(error, OSError) else error
                log.warning("the backing store %s cannot be used: %s", place, reason)
        if pages:
            log.warning("reads of %d pages that are written back fail until a start that finds it", pages)
            return
        try:
            self.set_backing(wanted)
        except OSError as error:
            raise StateError(f"{wanted} cannot be the backing store: {error.strerror}") from error

    def _attach(self, backing: Store) -> None:
        try:
            self.device.attach(backing)
        except DamagedObjectError:
            backing.close()
            raise
        self._backing = backing
        self._reclaimer = Reclaimer(self.device, backing)

    def _detach(self, *, wait: bool) -> None:
        """Let go of the store; `wait` until nobody is reading from it or writing to it."""
        if self._backing:
            if self._reclaimer:
                self._reclaimer.stop()
            self._backing.close(wait=wait)
            self._backing = None

    def set_backing(self, path: Path | None) -> None:
        """Have another backing store, or none. No page is written back, and nobody is just doing that.

        Raises:
            OSError: the path cannot be one.
        """
        if self._backing:
            self.device.attach(None)
            # Somebody may still read what was overwritten since: not waited for, it may hang.
            self._detach(wait=False)
        self.backing_path = None
        forget_store(self._superblock.words)
        if path:
            self._attach(make_store(self._superblock.words, path))
            self.backing_path = path

    def _flush(self) -> None:
        if self._backing:
            self._backing.medium.sync()
        for region in self.regions:
            region.sync()

    def leave(self) -> None:
        """Make the regions fit to be used after a restart of the machine too. No more may be written to the device.

        Raises:
            OSError: the medium failed.
        """
        # Never released: what still runs elsewhere, such as a compaction, must not touch the regions again.
        self.device.lock.acquire()
        if self.flush:
            self.flush()
        note_end(self._superblock.words)
        if self.on_disk:
            self._superblock.sync()

    def close(self) -> None:
        """Unmap the regions. Nobody may use the device any more."""
        self._stop_ahead()
        self._detach(wait=True)
        for region in self.regions:
            region.close()
        self.regions.clear()
        self._store.close()

    def require_growth(self, disksize: int) -> None:
        """Check that the device may grow to so many bytes.

        Raises:
            ValueError: it may not.
        """
        identity = self.device.identity
        limit = max_disksize(geometry(identity.chain_size, identity.rule))
        if not identity.disksize < disksize <= limit:
            raise ValueError(f"the disk has {identity.disksize} bytes: it can grow to up to {limit}, not to {disksize}")

    def abandon(self) -> None:
        """Let go of the regions, which stay as they are for who opens them next. Nobody is connected any more."""
        self._stop_ahead()
        with self.device.lock:
            self.device.retire()
        # Who opens it next may write where this is still writing. Others may look at the counters meanwhile.
        self._detach(wait=True)
        with self.device.lock:
            self.close()

    def _stop_ahead(self) -> None:
        if self._ahead:
            self._ahead.stop()
            self._ahead = None

    def destroy(self) -> None:
        """Forget the contents and remove the regions. Nobody is connected to the device any more.

        Cut short at any moment, it leaves the device whole, or empty, or nothing.

        Raises:
            RegionError: the file system failed.
        """
        self._stop_ahead()
        with self.device.lock:
            self.device.retire()
            regions = {region.name: region for region in self.regions}
            for name in (_PAGE_TABLE, _SUPERBLOCK):
                regions[name].punch(0, regions[name].size)
            # Dictionaries that an earlier process made are not among the open ones.
            for name in filter(_ANY_REGION.fullmatch, self._store.names()):
                self._store.remove(name)
            # A store that hangs holds up no reset.
            self._detach(wait=False)
            self.close()


def _dictionary(number: int) -> str:
    """Return the name of the region with the dictionary of a codec."""
    return f"dictionary{number}"
