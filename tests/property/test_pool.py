"""The pool against a model of the kernel's allocator, and against its own invariants."""

import random
from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from zramd.layout import FULL, FULLNESS_GROUPS, HANDLE_INDEX_MASK, HANDLE_INDEX_SHIFT, PAGE_SIZE
from zramd.memory import Region, RegionStore
from zramd.zsmalloc import FitRule, Pool, SizeClass, compact, geometry
from zramd.zsmalloc.classes import fullness_group
from zramd.zsmalloc.recovery import recover
from zramd.zsmalloc.stats import class_stats

OBJECTS = 1 << 16


@dataclass(eq=False)
class ModelZspage:
    size_class: SizeClass
    free: deque[int]
    used: set[int] = field(default_factory=set)

    @property
    def group(self) -> int:
        return fullness_group(len(self.used), self.size_class.objects)


class ModelPool:
    """mm/zsmalloc.c's find_get_zspage, obj_malloc, obj_free, fix_fullness_group and __zs_compact in plain Python.

    `places` says where the object of each handle lies; compaction changes it.
    """

    def __init__(self, chain_size: int, rule: FitRule) -> None:
        self.geometry = geometry(chain_size, rule)
        self.lists: dict[tuple[int, int], deque[ModelZspage]] = {}
        self.pages = 0
        self.pages_compacted = 0
        self.places: dict[int, tuple[ModelZspage, int]] = {}

    def _list(self, size_class: SizeClass, group: int) -> deque[ModelZspage]:
        return self.lists.setdefault((size_class.index, group), deque())

    def malloc(self, handle: int, length: int) -> None:
        size_class = self.geometry.class_of[length]
        for group in reversed(range(FULL)):
            if self._list(size_class, group):
                zspage = self._list(size_class, group)[0]
                break
        else:
            zspage = ModelZspage(size_class, deque(range(size_class.objects)))
            self.pages += size_class.pages
            group = 0
            self._list(size_class, group).appendleft(zspage)
        index = zspage.free.popleft()
        zspage.used.add(index)
        self._regroup(zspage, group)
        self.places[handle] = zspage, index

    def free(self, handle: int) -> None:
        zspage, index = self.places.pop(handle)
        before = zspage.group
        zspage.used.remove(index)
        zspage.free.appendleft(index)
        self._regroup(zspage, before)
        if not zspage.used:
            self._list(zspage.size_class, 0).remove(zspage)
            self.pages -= zspage.size_class.pages

    def _regroup(self, zspage: ModelZspage, before: int) -> None:
        if zspage.group != before:
            self._list(zspage.size_class, before).remove(zspage)
            self._list(zspage.size_class, zspage.group).appendleft(zspage)

    def zspages(self, size_class: SizeClass) -> list[ModelZspage]:
        return [zspage for group in range(FULLNESS_GROUPS) for zspage in self._list(size_class, group)]

    def freeable(self, size_class: SizeClass, isolated: ModelZspage | None) -> int:
        zspages = self.zspages(size_class) + ([isolated] if isolated else [])
        spare = sum(size_class.objects - len(zspage.used) for zspage in zspages)
        return spare // size_class.objects * size_class.pages

    def compact(self) -> None:
        handles = {place: handle for handle, place in self.places.items()}
        for size_class in reversed(self.geometry.kept()):
            destination = None
            while self.freeable(size_class, destination):
                destination = destination or self._isolate(size_class, range(10, 0, -1))
                source = self._isolate(size_class, range(1, 11)) if destination else None
                if destination is None or source is None:
                    break
                for index in sorted(source.used):
                    place = destination.free.popleft()
                    destination.used.add(place)
                    source.used.remove(index)
                    source.free.appendleft(index)
                    handle = handles.pop((source, index))
                    handles[destination, place] = handle
                    self.places[handle] = destination, place
                    if destination.group == FULL:
                        break
                if source.used:
                    self._list(size_class, source.group).appendleft(source)
                else:
                    self.pages -= size_class.pages
                    self.pages_compacted += size_class.pages
                if destination.group == FULL:
                    self._list(size_class, FULL).appendleft(destination)
                    destination = None
            if destination:
                self._list(size_class, destination.group).appendleft(destination)

    def _isolate(self, size_class: SizeClass, groups: range) -> ModelZspage | None:
        for group in groups:
            if self._list(size_class, group):
                return self._list(size_class, group).popleft()
        return None


def make_pool(regions: dict[str, Region], chain_size: int, rule_: FitRule, objects: int = OBJECTS) -> Pool:
    """Make a pool on `regions`, which are opened anew unless they are there already."""
    store = RegionStore(None)

    def open_region(name: str, size: int) -> Region:
        if name not in regions:
            regions[name] = store.open(name, size, create=True)
        return regions[name]

    return Pool(geometry(chain_size, rule_), objects, open_region)


def check_invariants(pool: Pool, live: dict[int, bytes]) -> None:
    """Check that every byte has one owner, that counts equal a recount, and that every object holds its payload."""
    pages = 0
    owned: dict[tuple[int, int], dict[int, int]] = {}
    for handle, payload in live.items():
        view = pool.map(handle, len(payload))
        assert view == payload
        size_class = pool.geometry.class_of[len(payload)]
        whole = pool.map(handle)
        assert len(whole) == size_class.size - size_class.header
        arena = pool.arenas[size_class.pages - 1]
        base = memoryview(arena.region.map)
        start = _offset_in(base, whole) - size_class.header
        zspage, within = divmod(start, size_class.zspage_bytes)
        index, rest = divmod(within, size_class.size)
        assert rest == 0
        objects = owned.setdefault((size_class.pages, zspage), {})
        assert index not in objects
        objects[index] = handle
        assert arena.size_class[zspage] == size_class.index + 1
    for (chain, zspage), objects in owned.items():
        arena = pool.arenas[chain - 1]
        assert arena.used[zspage] == len(objects)
        pages += chain
    in_use = {(a.pages, z) for a in pool.arenas for z in range(len(a)) if a.size_class[z]}
    assert in_use == set(owned)
    assert pool.pages == pages
    for state in {id(state): state for state in pool.classes}.values():
        listed = []
        for group in range(12):
            zspage, before = state.heads[group], 0  # the head's `preceding` means nothing
            assert bool(zspage) == bool(state.filled >> group & 1)
            while zspage:
                assert not before or state.arena.preceding[zspage - 1] == before
                assert state.group_of[state.arena.used[zspage - 1]] == group
                listed.append(zspage - 1)
                before, zspage = zspage, state.arena.following[zspage - 1]
        mine = [z for z in range(len(state.arena)) if state.arena.size_class[z] == state.size_class.index + 1]
        assert state.zspages == len(mine)
        assert sorted(listed) == [z for z in mine if state.arena.used[z] < state.size_class.objects]


def _offset_in(base: memoryview, view: memoryview) -> int:
    import ctypes

    address = ctypes.addressof(ctypes.c_char.from_buffer(view))
    return address - ctypes.addressof(ctypes.c_char.from_buffer(base))


class PoolMachine(RuleBasedStateMachine):
    handles = Bundle("handles")

    def __init__(self) -> None:
        super().__init__()
        self.regions: dict[str, Region] = {}
        self.pool = make_pool(self.regions, 8, FitRule.LEAST_WASTE)
        self.model = ModelPool(8, FitRule.LEAST_WASTE)
        self.live: dict[int, bytes] = {}
        self.pages_compacted = 0
        self.serial = 0
        self.recovered = False

    def _store(self, length: int) -> int:
        self.serial += 1
        payload = random.Random(self.serial).randbytes(length)
        handle = self.pool.malloc(length, payload)
        assert handle not in self.live
        self.live[handle] = payload
        self.model.malloc(handle, length)
        return handle

    @rule(target=handles, length=st.integers(1, PAGE_SIZE))
    def store(self, length: int) -> int:
        return self._store(length)

    @rule(length=st.sampled_from([1, 24, 100, 1000, 1352, 2000, 2720, 3624, 4096]), count=st.integers(2, 300))
    def store_many(self, length: int, count: int) -> None:
        for _ in range(count):
            self._store(length)

    @rule(target=handles, length=st.integers(1, PAGE_SIZE))
    def malloc_then_fill(self, length: int) -> int:
        handle = self.pool.malloc(length)
        payload = random.Random(length).randbytes(length)
        view = self.pool.map(handle, length)
        view[:] = payload
        self.pool.unmap(view)
        self.live[handle] = payload
        self.model.malloc(handle, length)
        return handle

    def _free(self, handle: int) -> None:
        self.pool.free(handle)
        del self.live[handle]
        self.model.free(handle)
        with pytest.raises(LookupError):
            self.pool.free(handle)
        with pytest.raises(LookupError):
            self.pool.map(handle)

    @rule(handle=consumes(handles))
    def free(self, handle: int) -> None:
        if handle in self.live:
            self._free(handle)

    @rule(seed=st.integers(0, 1000), share=st.floats(0.1, 1))
    def free_many(self, seed: int, share: float) -> None:
        generator = random.Random(seed)
        for handle in sorted(self.live):
            if generator.random() < share:
                self._free(handle)

    @rule()
    def compact(self) -> None:
        self.pages_compacted += sum(compact(self.pool))
        self.model.compact()
        assert not any(stat.freeable for stat in class_stats(self.pool))

    @rule(steps=st.integers(1, 20), seed=st.integers(0, 1000))
    def compact_beside_other_work(self, steps: int, seed: int) -> None:
        """Between two steps the pool is whole and may be used; from then on the model's lists are another's."""
        generator = random.Random(seed)
        for _ in zip(range(steps), compact(self.pool), strict=False):
            check_invariants(self.pool, self.live)
            if generator.random() < 0.5:
                self._store(generator.choice([24, 1000, 2000, 3000]))
            elif self.live:
                self._free(generator.choice(sorted(self.live)))
            self.recovered = True

    @rule()
    def restart(self) -> None:
        """A new process on the same regions; the order inside the lists is its own from then on."""
        self.pool = make_pool(self.regions, 8, FitRule.LEAST_WASTE)
        recover(self.pool, ((handle, len(payload)) for handle, payload in self.live.items()))
        self.recovered = True

    @invariant()
    def holds_together(self) -> None:
        check_invariants(self.pool, self.live)

    @invariant()
    def uses_the_memory_that_the_kernel_would(self) -> None:
        if not self.recovered:
            assert self.pool.pages == self.model.pages
            assert self.pages_compacted == self.model.pages_compacted

    @invariant()
    def statistics_equal_a_recount(self) -> None:
        for stat in class_stats(self.pool):
            size_class = self.pool.geometry.classes[stat.index]
            arena = self.pool.arenas[size_class.pages - 1]
            used = [arena.used[z] for z in range(len(arena)) if arena.size_class[z] == stat.index + 1]
            groups = [fullness_group(count, size_class.objects) for count in used]
            assert stat.groups == tuple(groups.count(group) for group in range(1, FULLNESS_GROUPS))
            assert stat.obj_used == sum(used)
            assert stat.obj_allocated == len(used) * size_class.objects
            assert stat.pages_used == len(used) * size_class.pages
            assert stat.freeable == (stat.obj_allocated - stat.obj_used) // size_class.objects * size_class.pages

    def teardown(self) -> None:
        del self.pool
        for region in self.regions.values():
            region.close()


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=40)


@pytest.mark.parametrize(
    ("chain_size", "rule_"), [(4, FitRule.LEAST_WASTE), (8, FitRule.BEST_USAGE), (16, FitRule.LEAST_WASTE)]
)
def test_a_long_history_takes_the_same_objects_as_the_kernels_rules(chain_size: int, rule_: FitRule) -> None:
    generator = random.Random(chain_size)
    pool = make_pool({}, chain_size, rule_)
    model = ModelPool(chain_size, rule_)
    handles: list[int] = []
    pages_compacted = 0
    for step in range(30000):
        if len(handles) < OBJECTS and generator.random() < (0.7 if step % 6000 < 3000 else 0.3):
            length = min(PAGE_SIZE, int(generator.lognormvariate(6.5, 1)) + 1)
            handle = pool.malloc(length)
            model.malloc(handle, length)
            handles.append(handle)
            assert index_of(pool, handle) == model.places[handle][1]
        elif handles:
            index = generator.randrange(len(handles))
            handles[index], handles[-1] = handles[-1], handles[index]
            handle = handles.pop()
            pool.free(handle)
            model.free(handle)
        if step % 1500 == 1499:
            pages_compacted += sum(compact(pool))
            model.compact()
            assert all(index_of(pool, handle) == model.places[handle][1] for handle in handles)
        assert pool.pages == model.pages
    assert pages_compacted == model.pages_compacted > 20


def index_of(pool: Pool, handle: int) -> int:
    """Return which object of its zspage a handle's object is."""
    return pool.handle_region.words[handle] >> HANDLE_INDEX_SHIFT & HANDLE_INDEX_MASK


@pytest.mark.parametrize("length", [0, PAGE_SIZE + 1])
def test_objects_have_1_to_4096_bytes(length: int) -> None:
    pool = make_pool({}, 8, FitRule.LEAST_WASTE)
    with pytest.raises(ValueError, match="1 to 4096"):
        pool.malloc(length)
    with pytest.raises(ValueError, match="1 to 4096"):
        pool.malloc(length, bytes(length))
    assert pool.pages == 0


def test_a_view_that_was_given_up_cannot_be_used() -> None:
    pool = make_pool({}, 8, FitRule.LEAST_WASTE)
    view = pool.map(pool.malloc(4, b"data"), 4)
    pool.unmap(view)
    with pytest.raises(ValueError, match="released"):
        view.tobytes()


def test_memory_goes_back_to_the_system_when_objects_are_freed() -> None:
    regions: dict[str, Region] = {}
    pool = make_pool(regions, 8, FitRule.LEAST_WASTE, 65536)

    def populated() -> int:
        arenas = (region for name, region in regions.items() if name.startswith("arena"))
        return sum(end - start for region in arenas for start, end in region.data_ranges())

    handles = [pool.malloc(1 + 37 * number % PAGE_SIZE) for number in range(30000)]
    full = populated()
    assert full < pool.pages * PAGE_SIZE + 8 * 64 * PAGE_SIZE
    random.Random(1).shuffle(handles)
    for handle in handles:
        pool.free(handle)
    assert pool.pages == 0
    assert populated() <= 8 * 512 * PAGE_SIZE < full / 2
