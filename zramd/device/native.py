"""The device with the compiled engine: the same regions and records, loaded and stored by the page in one call."""

import importlib
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, cast

from zramd.backing import Store
from zramd.device.codecs import Codec, CodecError
from zramd.device.fetching import PageError
from zramd.device.pages import ZERO_PAGE
from zramd.device.snapshot import Copies
from zramd.device.state import Tables
from zramd.device.stream import Prepared, Stream
from zramd.device.superblock import Identity
from zramd.device.zram import Device
from zramd.layout import PAGE_SIZE, WORD
from zramd.memory import Region
from zramd.zsmalloc import Pool

if TYPE_CHECKING:
    from zramd.native import engine


class NativeDevice(Device):
    """A device whose hot path is compiled. `engine` is the extension."""

    snapshot_step = 256

    def __init__(self, identity: Identity, superblock: Region, tables: Tables, pool: Pool) -> None:
        super().__init__(identity, superblock, tables, pool)
        self.engine = importlib.import_module("zramd.native.engine")
        self.lock = cast(threading.Lock, self.engine.Lock())
        self._native: engine.Device = self.engine.Device(self, superblock, tables)

    def stream(self, buffer: bytearray) -> Stream:
        """Return a stream for a thread that receives into `buffer`."""
        return cast(Stream, self.engine.Stream(self._native, buffer, self.identity.algorithms))

    def page_compressor(self, chosen: Codec, page: bytearray) -> Callable[[], bytes]:
        """Return a function that compresses what is in `page`, for one thread."""
        return partial(self.engine.Codec(chosen).compress_page, page)

    def attach(self, backing: Store | None) -> None:
        """Have a backing store from now on. Takes the lock."""
        super().attach(backing)
        with self.lock:
            self._native.attach(backing.records if backing else None)

    def _load_pages(self, first: int, end: int, out: list[bytes | memoryview]) -> list[int]:
        before = len(out)
        try:
            return cast("engine.Stream", self._scratch).load_pages(first, end, out, ZERO_PAGE)
        except CodecError as error:
            del out[before:]
            raise PageError(f"page {error} is damaged") from error

    def _store(self, index: int, prepared: "list[Prepared] | engine.Prepared", bits: int) -> None:
        if isinstance(prepared, list):
            super()._store(index, prepared, bits)
        else:
            self._native.store_pages(index, prepared)

    def discard(self, offset: int, length: int) -> None:
        """Free the whole pages in a range; they read as zeros. The caller holds the lock."""
        self._native.discard_range(offset, length)

    def begin_snapshot(self, copies: Copies) -> None:
        """Copy pages there before they change, from SNAPSHOT_FROM on. The caller holds the lock."""
        self._native.begin_snapshot(copies.covered, copies.copied, copies.store)
        # Made once: to get memory takes longer than to fill it, and this is done under the lock.
        self._entries = memoryview(bytearray(self.snapshot_step * WORD)).cast("Q")
        self._data = memoryview(bytearray(self.snapshot_step * PAGE_SIZE))

    def end_snapshot(self) -> None:
        """Let go of the copies. The caller holds the lock, and has set SNAPSHOT_FROM to `NOBODY`."""
        self._native.end_snapshot()

    def preserve(self, first: int, end: int) -> None:
        """Copy pages aside that are about to change and are still to be read. The caller holds the lock."""
        self._native.preserve_pages(first, end)

    def read_snapshot(self, first: int, end: int) -> tuple[Sequence[int], bytes | memoryview]:
        """Return what pages were when the snapshot was taken: see `Copies.read`. Valid until it is called again."""
        length = self._native.read_snapshot(first, end, self._entries, self._data)
        return self._entries[: end - first], self._data[:length]
