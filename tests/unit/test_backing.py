"""The backing store by itself: objects come back as they were put there, or not at all."""

import mmap
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from zramd.backing import DamagedObjectError, FullError, Kept, Medium, Store
from zramd.backing.objects import HEADER, NONCE, UNIT, units_of
from zramd.backing.store import SEGMENT, require_segments
from zramd.layout import BACKING_UNIT_SHIFT, OBJECT_OVERHEAD, PAGE_SIZE, SEGMENT_UNITS_SHIFT, WORD

KEY = bytes(range(32))
SEGMENTS = 6


def new_words() -> memoryview:
    return memoryview(bytearray(Kept.END * WORD)).cast("Q")


def open_store(path: Path, kept: memoryview) -> Store:
    medium = Medium(path)
    # A copy of the view, since closing the store lets go of it.
    return Store(medium, KEY, kept[:], require_segments(medium))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "medium"
    path.touch()
    os.truncate(path, SEGMENTS * SEGMENT)
    return path


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    store = open_store(path, new_words())
    yield store
    store.close()


def put(store: Store, number: int, data: bytes) -> int:
    """Write an object by itself."""
    if not store.has_room(len(data)):
        store.begin_segment()
    place = store.append(number, data)
    store.flush()
    store.keep(place, len(data))
    return place


def reclaim(store: Store) -> None:
    while emptied := store.take_emptied():
        store.give_back(emptied)


class StoreMachine(RuleBasedStateMachine):
    """A store against a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = TemporaryDirectory(dir="/dev/shm")
        self.path = Path(self.directory.name) / "medium"
        self.path.touch()
        os.truncate(self.path, SEGMENTS * SEGMENT)
        self.kept = new_words()
        self.store = open_store(self.path, self.kept)
        self.objects: dict[int, tuple[int, bytes]] = {}
        self.generator = random.Random(0)

    @rule(count=st.integers(1, 120), length=st.integers(1, PAGE_SIZE))
    def append(self, count: int, length: int) -> None:
        store = self.store
        pending: list[tuple[int, int, bytes]] = []
        for _ in range(count):
            number, data = self.generator.randrange(1 << 40), self.generator.randbytes(length)
            if not store.has_room(length):
                self._publish(pending)
                reclaim(store)
                try:
                    store.begin_segment()
                except FullError:
                    assert not store.has_segments
                    break
            pending.append((store.append(number, data), number, data))
        self._publish(pending)

    def _publish(self, pending: list[tuple[int, int, bytes]]) -> None:
        self.store.flush()
        for place, number, data in pending:
            assert place not in self.objects
            self.objects[place] = number, data
            self.store.keep(place, len(data))
        pending.clear()

    @rule(part=st.floats(0, 1))
    def free(self, part: float) -> None:
        for place in self.generator.sample(sorted(self.objects), int(len(self.objects) * part)):
            _, data = self.objects.pop(place)
            self.store.free(place, len(data))

    @rule()
    def read(self) -> None:
        for place, (number, data) in self.objects.items():
            assert self.store.read(place, number, len(data)) == data
        wanted = [(place, number, len(data)) for place, (number, data) in self.objects.items()]
        assert self.store.read_together(wanted) == dict(self.objects.values())

    @rule()
    def find_them_in_the_sparsest_segment(self) -> None:
        for segment in self.store.sparsest(1):
            found = {place: (number, length) for place, number, length in self.store.objects(segment)}
            for place, (number, data) in self.objects.items():
                if place >> SEGMENT_UNITS_SHIFT == segment:
                    assert found[place] == (number, len(data))
                    assert self.store.unseal(place, number, len(data)) == data

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.store = open_store(self.path, self.kept)
        for place, (_, data) in self.objects.items():
            self.store.adopt(place, len(data))

    @invariant()
    def live_units_equal_a_recount(self) -> None:
        live = [0] * SEGMENTS
        for place, (_, data) in self.objects.items():
            live[place >> SEGMENT_UNITS_SHIFT] += units_of(len(data))
        assert list(self.store.records[2::2]) == live[1:]
        assert self.store.live_bytes == sum(live) * UNIT

    def teardown(self) -> None:
        self.read()
        self.store.close()
        self.directory.cleanup()


TestStore = StoreMachine.TestCase


def test_an_object_is_found_behind_a_write_that_ended_a_unit_before_its_block(store: Store) -> None:
    lengths = PAGE_SIZE - UNIT - OBJECT_OVERHEAD, 100
    put(store, 1, bytes(lengths[0]))
    place = put(store, 7 << 32, bytes(lengths[1]))  # which has the bits where the first one's successor has its length
    assert [length for _, _, length in store.objects(place >> SEGMENT_UNITS_SHIFT)] == [*lengths]


def test_every_byte_of_an_object_is_covered(store: Store, path: Path) -> None:
    data = random.Random(1).randbytes(300)
    place = put(store, 7, data)
    start = place << BACKING_UNIT_SHIFT
    with path.open("r+b") as file:
        for offset in range(OBJECT_OVERHEAD + len(data)):
            file.seek(start + offset)
            (byte,) = file.read(1)
            for changed in (byte ^ 1, byte ^ 0x80):
                file.seek(start + offset)
                file.write(bytes([changed]))
                file.flush()
                with pytest.raises(DamagedObjectError):
                    store.read(place, 7, len(data))
            file.seek(start + offset)
            file.write(bytes([byte]))
            file.flush()
    assert store.read(place, 7, len(data)) == data


def test_an_object_passes_for_no_other(store: Store, path: Path) -> None:
    places = [put(store, number, bytes([number]) * 100) for number in (1, 2)]
    with pytest.raises(DamagedObjectError):
        store.read(places[0], 2, 100)
    with pytest.raises(DamagedObjectError):
        store.read(places[0], 1, 99)
    size = OBJECT_OVERHEAD + 100
    with path.open("r+b") as file:
        file.seek(places[0] << BACKING_UNIT_SHIFT)
        moved = file.read(size)
        file.seek(places[1] << BACKING_UNIT_SHIFT)
        file.write(moved)
    with pytest.raises(DamagedObjectError):
        store.read(places[1], 2, 100)


def test_nothing_of_the_data_can_be_read_on_the_medium(store: Store, path: Path) -> None:
    put(store, 1, b"a secret of some process" * 20)
    assert b"secret" not in path.read_bytes()


def nonces(path: Path) -> list[bytes]:
    """Return those of all objects of a store that was filled without a gap."""
    found, medium, position = [], path.read_bytes(), SEGMENT
    while position < len(medium):
        _, _, _, length, _ = HEADER.unpack_from(medium, position)
        if length:
            found.append(medium[position : position + HEADER.size][NONCE])
            position += units_of(length) << BACKING_UNIT_SHIFT
        else:
            position = (position // PAGE_SIZE + 1) * PAGE_SIZE
    return found


def test_no_nonce_is_used_twice_whenever_the_process_is_killed(path: Path) -> None:
    kept = memoryview(mmap.mmap(-1, PAGE_SIZE)).cast("Q")  # shared with the children
    for life in range(1, 5):
        if not (child := os.fork()):
            store = open_store(path, kept)
            store._hint = life
            store.begin_segment()
            for number in range(20):
                store.append(number, b"data")
            store.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    used = nonces(path)
    assert len(used) == 80
    # The salt would hide it.
    assert len({nonce[4:] for nonce in used}) == 80


def test_nonces_are_reserved_before_they_are_used(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zramd.backing.store.NONCES", 4)
    kept = new_words()
    store = open_store(path, kept)
    store.begin_segment()
    for number in range(20):
        store.append(number, b"data")
        (_, _, counter, _, _) = HEADER.unpack_from(store._buffer, number * (units_of(4) << BACKING_UNIT_SHIFT))
        assert counter < kept[Kept.NONCES]
    store.close()


def test_what_is_appended_after_a_flush_writes_over_no_block(store: Store, path: Path) -> None:
    first = put(store, 1, b"one")
    before = path.read_bytes()
    second = put(store, 2, b"two")
    after = path.read_bytes()
    start = (first << BACKING_UNIT_SHIFT) // PAGE_SIZE * PAGE_SIZE
    assert after[start : start + PAGE_SIZE] == before[start : start + PAGE_SIZE]
    assert second - first == PAGE_SIZE // UNIT


def test_a_segment_without_live_objects_is_given_back(store: Store, path: Path) -> None:
    places = [put(store, number, bytes(PAGE_SIZE)) for number in range(80)]
    used = path.stat().st_blocks
    for place in places:
        store.free(place, PAGE_SIZE)
    reclaim(store)
    # The one that is being filled stays.
    assert path.stat().st_blocks <= used - SEGMENT // 512
    store.end_segment()
    reclaim(store)
    # All of it can be filled again.
    for _ in range(SEGMENTS - 2):
        store.begin_segment()
        store.keep(store.append(1, b"x"), 1)
        store.flush()
    with pytest.raises(FullError):
        store.begin_segment()


def test_a_segment_that_has_ended_is_not_used_again_before_it_is_given_back(store: Store) -> None:
    # A snapshot may still read what was in it.
    place = put(store, 1, b"old")
    store.free(place, 3)
    store.end_segment()
    for _ in range(SEGMENTS - 3):
        put(store, 2, b"new")
        store.end_segment()
    with pytest.raises(FullError):
        store.begin_segment()
    assert store.read(place, 1, 3) == b"old"
    reclaim(store)
    store.begin_segment()


def test_a_segment_that_could_not_be_written_holds_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = put(store, 1, b"kept")

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(store.medium, "write", fail)
        store.append(2, b"lost")
        with pytest.raises(OSError, match="Input/output"):
            store.flush()
    assert not store.has_room(1)
    assert store.read(kept, 1, 4) == b"kept"
    place = put(store, 3, b"later")
    assert place >> SEGMENT_UNITS_SHIFT != kept >> SEGMENT_UNITS_SHIFT
    assert store.read(place, 3, 5) == b"later"


def test_a_segment_that_is_used_again_tells(store: Store) -> None:
    place = put(store, 1, b"first")
    before = store.reused(place)
    store.free(place, 5)
    store.end_segment()
    reclaim(store)
    store._hint = place >> SEGMENT_UNITS_SHIFT
    again = put(store, 1, b"other")
    assert again == place
    assert store.reused(place) != before


@pytest.mark.parametrize("size", [0, 3 * SEGMENT])
def test_a_medium_that_is_too_small_is_refused(path: Path, size: int) -> None:
    os.truncate(path, size)
    medium = Medium(path)
    with pytest.raises(OSError, match="are needed"):
        require_segments(medium)
    medium.close()


@pytest.mark.usefixtures("store")
def test_a_medium_is_one_stores(path: Path) -> None:
    with pytest.raises(OSError, match="another zramd has it"):
        Medium(path)


def test_places_that_cannot_be_are_not_adopted(store: Store) -> None:
    for place in (0, SEGMENTS << SEGMENT_UNITS_SHIFT, (2 << SEGMENT_UNITS_SHIFT) - 1):
        with pytest.raises(DamagedObjectError):
            store.adopt(place, 100)
