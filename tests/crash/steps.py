"""The named steps at which a server is killed: each once, with what a kill there leaves behind.

In the Python engine, and in what both engines share, a step stands behind a statement of the source, and is put there
by tests/crash/launcher.py. A step that is `compiled` stands in zramd/native/*.pxi too, as step("NAME").
"""

from dataclasses import dataclass
from enum import Enum


class Phase(Enum):
    """What a server is doing when it passes a step."""

    MAKING = "making a disk"
    OPENING = "opening the regions that another server left"
    GROWING = "serving a disk that is new"
    SERVING = "serving"
    ENLARGING = "making a disk larger"
    RESETTING = "resetting a disk"
    RESTORING = "restoring a disk"


@dataclass(frozen=True)
class Step:
    """A step of `phase`, behind the statement of `function` that begins with `statement`.

    It is passed at least `most` times in a moment of serving. `leaves_disk` says that the disk has what is restored.
    """

    name: str
    leaves: str
    function: str
    statement: str
    most: int = 1
    phase: Phase = Phase.SERVING
    compiled: bool = False
    leaves_disk: bool = False


_POOL, _ARENA = "zramd.zsmalloc.pool:Pool", "zramd.zsmalloc.arena:Arena"
_COMPACTION, _RECOVERY = "zramd.zsmalloc.compaction", "zramd.zsmalloc.recovery"
_DEVICE, _PAGES = "zramd.device.zram:Device", "zramd.device.pages:Pages"
_OPENING = "zramd.device.opening:OpenDevice"

WRITING = (
    Step(
        "handle-stored",
        "a handle in use that no entry has, of an object that has no header and no payload yet",
        f"{_POOL}.malloc",
        "handles[handle] = zspage << HANDLE_ZSPAGE_SHIFT",
        most=400,
        compiled=True,
    ),
    Step(
        "header-stored",
        "an object that no entry reaches, without its payload",
        f"{_POOL}.malloc",
        "state.words[offset >> 3] = handle << 1 | HEADER_IN_USE",
        most=300,
        compiled=True,
    ),
    Step(
        "payload-copied",
        "a whole object that no entry reaches",
        f"{_POOL}.malloc",
        "if payload is not None:",
        most=400,
        compiled=True,
    ),
    Step(
        "mark-raised",
        "such an object, and mem_used_max that counts its zspage",
        f"{_PAGES}._note_use",
        "highest = words[Superblock.MEM_USED_MAX] =",
        most=20,
        phase=Phase.GROWING,
        compiled=True,
    ),
    Step(
        "element-stored",
        "a pattern that no entry refers to, or that changes a page which had another",
        f"{_PAGES}._store",
        "self._elements.words[index] = page",
        most=100,
        compiled=True,
    ),
    Step(
        "entry-stored",
        "the new page, and the object of the old one, which no entry reaches any more",
        f"{_PAGES}._store",
        "table[index] = entry",
        most=400,
        compiled=True,
    ),
    Step(
        "object-freed",
        "the old object with the header of a free one, its handle still in use",
        f"{_POOL}.free",
        "state.words[zspage * state.span + index * state.size >> 3] = state.free[zspage] << 1",
        most=100,
        compiled=True,
    ),
    Step(
        "zspage-freed",
        "a zspage without objects, populated or punched, and a handle in use that leads to it",
        f"{_POOL}.free",
        "state.release_zspage(zspage, before)",
        most=50,
        compiled=True,
    ),
    Step(
        "handle-freed",
        "nothing but a free handle, whose link means nothing to the next server",
        f"{_POOL}.free",
        "handles[handle] = self.record[_FREE_HANDLE] << 1",
        most=300,
        compiled=True,
    ),
    Step(
        "applied",
        "all requests of a batch carried out, and none answered",
        "zramd.nbd.transmission:Transmission._apply",
        "with device:",
        most=15,
        compiled=True,
    ),
)
TRIMMING = (
    Step(
        "entry-cleared",
        "an empty page, and the object that it had, which no entry reaches any more",
        f"{_DEVICE}.discard",
        "table[index] = 0",
        most=100,
        compiled=True,
    ),
)
COMPACTING = (
    Step(
        "object-copied",
        "an object twice, its handle leading to the old place",
        f"{_COMPACTION}:_move_objects",
        "memory[target:target + size] = memory[start:start + size]",
        most=50,
    ),
    Step(
        "object-moved",
        "an object twice, its handle leading to the new place",
        f"{_COMPACTION}:_move_objects",
        "handles[header >> 1] =",
        most=50,
    ),
    Step(
        "place-freed",
        "the old place with the header of a free object",
        f"{_COMPACTION}:_move_objects",
        "words[start >> 3] = free[source] << 1",
        most=50,
    ),
    Step(
        "source-freed",
        "a zspage without objects, populated or punched",
        f"{_COMPACTION}:_step",
        "state.release_zspage(source, FULL)",
        most=10,
    ),
    Step(
        "compaction-counted",
        "pages_compacted that counts what the pool no longer has",
        f"{_DEVICE}._compact",
        "self._words[Superblock.PAGES_COMPACTED] += pages",
        most=20,
    ),
)
RECOMPRESSING = (
    Step(
        "page-recompressed",
        "a page with its smaller object, and the one that it had, which no entry reaches any more",
        f"{_PAGES}.restore",
        "self._table.words[index] =",
        most=2,
    ),
)
GROWING = (
    Step(
        "handles-populated",
        "a part of the handle table, of zeros",
        f"{_POOL}.grow_handles",
        "try:",
        phase=Phase.GROWING,
    ),
    Step(
        "table-populated",
        "a page of the page table or of the elements, of zeros",
        "zramd.memory:SparseTable.make_ready",
        "self.region.populate(",
        most=3,
        phase=Phase.GROWING,
    ),
    Step(
        "zspages-populated",
        "some zspages of zeros, which belong to no class",
        f"{_ARENA}.populate",
        "self.region.populate(",
        most=12,
    ),
    Step(
        "zspages-punched",
        "some zspages that have no memory any more",
        f"{_ARENA}._punch",
        "self.region.punch(",
        most=4,
    ),
)
OPENING = (
    Step(
        "boot-noted",
        "the regions as they were found",
        f"{_OPENING}._build",
        "note_boot(superblock.words)",
        phase=Phase.OPENING,
    ),
    Step(
        "objects-adopted",
        "the regions as they were found",
        f"{_RECOVERY}:recover",
        "_adopt(pool, objects, seen, present)",
        phase=Phase.OPENING,
    ),
    Step(
        "free-object-linked",
        "places that no handle in use leads to, some of them with the headers of free objects",
        f"{_RECOVERY}:_rebuild_lists",
        "words[offset >> 3] = arena.free[zspage] << 1",
        most=5,
        phase=Phase.OPENING,
    ),
    Step(
        "free-handle-linked",
        "handles that no entry has, some of them free now",
        f"{_RECOVERY}:_rebuild_handles",
        "handles[handle] = free << 1",
        most=5,
        phase=Phase.OPENING,
    ),
    Step(
        "handles-cleared",
        "no handle in use that no entry has",
        f"{_RECOVERY}:_rebuild_handles",
        "pool.handle_region.bytes[top * WORD:ready * WORD] =",
        phase=Phase.OPENING,
    ),
    Step(
        "unused-punched",
        "no memory in zspages without objects, of some arenas",
        f"{_ARENA}.release_unused",
        "self._punch(",
        most=8,
        phase=Phase.OPENING,
    ),
    Step(
        "recovered",
        "the regions as they will be served",
        "zramd.device.state:DeviceState.recover",
        "self._words[Superblock.MEM_USED_MAX] =",
        phase=Phase.OPENING,
    ),
)
MAKING = (
    Step(
        "regions-made",
        "regions without memory, and a superblock of zeros",
        f"{_OPENING}._build",
        "device = make(",
        phase=Phase.MAKING,
    ),
    Step(
        "identity-stored",
        "a superblock without its magic, so no disk",
        "zramd.device.superblock:store_identity",
        "note_boot(words)",
        phase=Phase.MAKING,
    ),
)
ENLARGING = (
    Step(
        "region-enlarged",
        "a disk of the old size, some of its regions with room for the new one",
        "zramd.memory:RegionStore.open",
        "os.ftruncate(fd, size)",
        most=8,
        phase=Phase.ENLARGING,
    ),
    Step(
        "first-size-stored",
        "a disk of the old size, which may be asked for by that too",
        f"{_OPENING}._build",
        "words[Superblock.FIRST_DISKSIZE] =",
        phase=Phase.ENLARGING,
    ),
    Step(
        "size-stored",
        "a disk of the new size",
        f"{_OPENING}._build",
        "words[Superblock.DISKSIZE] =",
        phase=Phase.ENLARGING,
    ),
)
_STORE, _BACKING_DEV = "zramd.backing.store:Store", "zramd.device.backing_dev"
WRITING_BACK = (
    Step(
        "backing-described",
        "a superblock with the key of a store that no disk has yet",
        f"{_BACKING_DEV}:make_store",
        "_store_path(words, path)",
        phase=Phase.GROWING,
    ),
    Step(
        "backing-attached",
        "a disk with an empty store",
        f"{_BACKING_DEV}:make_store",
        "words[Superblock.FEATURES] |= BACKED",
        phase=Phase.GROWING,
    ),
    Step(
        "nonces-reserved",
        "numbers that nobody will use",
        f"{_STORE}._next_nonce",
        "self._kept[Kept.NONCES] =",
    ),
    Step(
        "page-taken",
        "a page that is said to be taken by nobody any more",
        "zramd.device.writeback:Writeback._take",
        "device.replace_entry(index, entry)",
        most=200,
    ),
    Step(
        "segment-written",
        "objects in the store that no entry reaches",
        f"{_STORE}.flush",
        "self.medium.write(",
        most=5,
    ),
    Step(
        "page-written-back",
        "a page in the store, and its object in memory, which no entry reaches any more",
        f"{_PAGES}.write_back",
        "self._table.words[index] =",
        most=200,
    ),
    Step(
        "backed-moved",
        "an object twice in the store, the entry leading to the new one",
        f"{_PAGES}.move_backed",
        "self._table.words[index] =",
    ),
    Step(
        "segment-given-back",
        "a segment without live objects, which the medium has forgotten",
        f"{_STORE}.give_back",
        "self.medium.discard(",
        most=2,
    ),
)
RESETTING = (
    Step(
        "region-emptied",
        "no page table: every page is empty; or no superblock either: no disk",
        f"{_OPENING}.destroy",
        "regions[name].punch(",
        most=2,
        phase=Phase.RESETTING,
    ),
    Step(
        "region-removed",
        "some regions of no disk",
        f"{_OPENING}.destroy",
        "self._store.remove(name)",
        most=8,
        phase=Phase.RESETTING,
    ),
)
RESTORING = (
    Step(
        "page-placed",
        "some pages of a disk that does not count",
        f"{_PAGES}.place",
        "self._table.words[index] = entry | handle",
        most=50,
        phase=Phase.RESTORING,
    ),
    Step(
        "filled",
        "all pages of a disk that does not count",
        f"{_PAGES}.note_filled",
        "self._words[Superblock.HUGE_PAGES_SINCE] =",
        phase=Phase.RESTORING,
    ),
    Step(
        "restored",
        "the disk that was saved",
        f"{_OPENING}.finish",
        "words[Superblock.MAGIC] =",
        phase=Phase.RESTORING,
        leaves_disk=True,
    ),
)
STEPS = (
    *WRITING,
    *TRIMMING,
    *COMPACTING,
    *RECOMPRESSING,
    *WRITING_BACK,
    *GROWING,
    *OPENING,
    *MAKING,
    *ENLARGING,
    *RESETTING,
    *RESTORING,
)
