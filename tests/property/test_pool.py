"""The pool against a model of the kernel's allocator, and against its own invariants."""

import random
from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from zramd.layout import PAGE_SIZE
from zramd.memory import Region, RegionStore
from zramd.zsmalloc import FitRule, Pool, SizeClass, geometry
from zramd.zsmalloc.classes import FULL, fullness_group
from zramd.zsmalloc.recovery import recover

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
    """The rules of mm/zsmalloc.c (find_get_zspage, obj_malloc, obj_free, fix_fullness_group) in plain Python."""

    def __init__(self, chain_size: int, rule: FitRule) -> None:
        self.geometry = geometry(chain_size, rule)
        self.lists: dict[tuple[int, int], deque[ModelZspage]] = {}
        self.pages = 0

    def _list(self, size_class: SizeClass, group: int) -> deque[ModelZspage]:
        return self.lists.setdefault((size_class.index, group), deque())

    def malloc(self, length: int) -> tuple[ModelZspage, int]:
        size_class = self.geometry.class_of(length)
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
        return zspage, index

    def free(self, zspage: ModelZspage, index: int) -> None:
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
        size_class = pool.geometry.class_of(len(payload))
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
        self.places: dict[int, tuple[ModelZspage, int]] = {}
        self.serial = 0
        self.recovered = False

    def _store(self, length: int) -> int:
        self.serial += 1
        payload = random.Random(self.serial).randbytes(length)
        handle = self.pool.malloc(length, payload)
        assert handle not in self.live
        self.live[handle] = payload
        self.places[handle] = self.model.malloc(length)
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
        self.places[handle] = self.model.malloc(length)
        return handle

    def _free(self, handle: int) -> None:
        self.pool.free(handle)
        del self.live[handle]
        self.model.free(*self.places.pop(handle))
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

    def teardown(self) -> None:
        del self.pool
        for region in self.regions.values():
            region.close()


TestPool = PoolMachine.TestCase


@pytest.mark.parametrize(
    ("chain_size", "rule_"), [(4, FitRule.LEAST_WASTE), (8, FitRule.BEST_USAGE), (16, FitRule.LEAST_WASTE)]
)
def test_a_long_history_takes_the_same_objects_as_the_kernels_rules(chain_size: int, rule_: FitRule) -> None:
    generator = random.Random(chain_size)
    pool = make_pool({}, chain_size, rule_)
    model = ModelPool(chain_size, rule_)
    places: dict[int, tuple[ModelZspage, int]] = {}
    handles: list[int] = []
    for step in range(30000):
        if len(handles) < OBJECTS and generator.random() < (0.7 if step % 6000 < 3000 else 0.3):
            length = min(PAGE_SIZE, int(generator.lognormvariate(6.5, 1)) + 1)
            handle = pool.malloc(length)
            places[handle] = model.malloc(length)
            handles.append(handle)
            word = pool.handle_region.words[handle]
            assert word >> 1 & 0x7FFF == places[handle][1]
        elif handles:
            index = generator.randrange(len(handles))
            handles[index], handles[-1] = handles[-1], handles[index]
            handle = handles.pop()
            pool.free(handle)
            model.free(*places.pop(handle))
        assert pool.pages == model.pages


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
