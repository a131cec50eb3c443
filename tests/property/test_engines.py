"""The two engines side by side: the same requests leave the same replies, counters and bytes, to the last one.

Which zspage and object an allocation takes, and which handle, is part of the bytes.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import zstandard
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.nbd_bytes import (
    DF,
    EXTENDED,
    FAST_ZERO,
    FLUSH,
    FUA,
    NO_HOLE,
    READ,
    SIMPLE,
    STRUCTURED,
    TRIM,
    WRITE_ZEROES,
    Dialect,
    Peer,
    exchange,
)
from tests.property.test_device import make_data
from tests.unit.test_transmission import parse_replies
from zramd import native
from zramd.device.codecs import Codec, codec
from zramd.device.opening import OpenDevice
from zramd.device.wanted import Wanted
from zramd.layout import PAGE_SIZE, WORD, Superblock
from zramd.memory import RegionStore
from zramd.nbd.limits import Limits
from zramd.nbd.terms import Mode, Terms
from zramd.nbd.transmission import Transmission

engine = pytest.importorskip(
    "zramd.native.engine", reason="no compiled engine: install gcc, liblz4-dev, libzstd-dev, and zramd again"
)

PAGES = 1500
SIZE = PAGES * PAGE_SIZE
MODES = {SIMPLE: Mode.SIMPLE, STRUCTURED: Mode.STRUCTURED, EXTENDED: Mode.EXTENDED}
LIMITS = [Limits(), Limits(memory=256 << 10)]
DICTIONARY = bytes(make_data("text", 99, 4096))
CODECS = [("lz4", 1, b""), ("lz4", 9, b""), ("lz4", 1, DICTIONARY), ("lz4hc", 9, b""), ("lz4hc", 4, DICTIONARY)]
CODECS += [("zstd", 3, b""), ("zstd", -5, b""), ("zstd", 12, b""), ("zstd", 3, DICTIONARY)]


@contextmanager
def using(chosen: native.Engine) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(native.VARIABLE, chosen.value)
        yield


def same_library(made: Codec) -> Codec:
    """Return a codec of the Python engine that compresses with the compiled one's library."""

    def compressor(source: bytearray) -> Callable[[int], bytes]:
        compress = engine.Codec(made).compress_page
        view = memoryview(source)
        return lambda offset: compress(view[offset : offset + PAGE_SIZE])

    return Codec(made.name, made.level, made.dictionary, compressor, made.decompressor)


def open_device(chosen: native.Engine, made: Codec) -> OpenDevice:
    with using(chosen):
        wanted = Wanted(disksize=SIZE, codec=same_library(made), integrity=made.level % 2 == 1)
        return OpenDevice(RegionStore(None), wanted)


def regions(opened: OpenDevice) -> dict[str, bytes]:
    """Return all that is populated, and where; the superblock without the UUID, and no times."""
    found = {}
    for region in opened.regions:
        if region.name == "accessed":
            continue
        parts = [(start, region.bytes[start:end].tobytes()) for start, end in region.data_ranges()]
        if region.name == "superblock":
            ((start, block),) = parts
            parts = [(start, block[: Superblock.UUID * WORD]), (start, block[Superblock.MEM_LIMIT * WORD :])]
        found[region.name] = repr([(start, hash(data)) for start, data in parts]).encode()
    return found


def records(opened: OpenDevice) -> list[bytes]:
    """Return the private state of a device: that of its arenas, classes, pool and counters."""
    device, pool = opened.device, opened.device.pool
    found = [device.record.tobytes(), pool.record.tobytes()]
    found += [state.record.tobytes() for state in pool.classes]
    for arena in pool.arenas:
        found += [arena.record.tobytes(), arena.zspages[: len(arena) * 16].tobytes()]
        found.append(arena.populated[: arena.record[0]].tobytes())
    return found


class Both(RuleBasedStateMachine):
    """Two devices, each with a connection of its own to which the same is said."""

    @initialize(
        made=st.sampled_from(CODECS), dialect=st.sampled_from([SIMPLE, STRUCTURED, EXTENDED]), seed=st.integers(0, 9)
    )
    def start(self, made: tuple[str, int, bytes], dialect: Dialect, seed: int) -> None:
        self.dialect = dialect
        self.generator = random.Random(seed)
        self.opened = [open_device(chosen, codec(*made)) for chosen in native.Engine]
        assert type(self.opened[0].device) is not type(self.opened[1].device)

    def _talk(self, stream: bytes, limits: Limits, reads: dict[int, int]) -> None:
        replies = []
        for opened in self.opened:
            terms = Terms(MODES[self.dialect])

            def serve(sock: object, opened: OpenDevice = opened, terms: Terms = terms) -> None:
                Transmission(sock, opened.device, opened.flush, terms, limits).run()  # type: ignore[arg-type]

            with Peer(serve) as peer:
                replies.append(
                    by_cookie(self.dialect, self.dialect.without_texts(exchange(peer.client, stream)), reads)
                )
                assert peer.join() is None
        assert replies[0] == replies[1]

    def _some_request(self, cookie: int, reads: dict[int, int], *, aligned: bool) -> bytes:
        generator, dialect = self.generator, self.dialect
        kind = generator.choices(
            ["write", "read", "trim", "zeroes", "flush", "wrong"], [10, 6, 3, 1, 1, 1 - aligned], k=1
        )[0]
        count = generator.choice([1, 1, 1, 2, 8, 32, 128, 150])
        page = generator.randrange(PAGES - count)
        offset, length = page * PAGE_SIZE, count * PAGE_SIZE
        if not aligned and generator.random() < 0.3:
            offset, length = offset + generator.randrange(PAGE_SIZE), length - generator.randrange(PAGE_SIZE)
        fua = generator.choice([0, 0, FUA])
        if kind == "write":
            data = make_data(
                generator.choice(["zero", "pattern", "text", "half", "random"]), generator.randrange(1000), length
            )
            mixed = bytearray(data)
            for start in range(0, length - PAGE_SIZE, PAGE_SIZE):
                if generator.random() < 0.3:
                    mixed[start : start + PAGE_SIZE] = make_data(
                        generator.choice(["zero", "short pattern", "text", "random"]), start, PAGE_SIZE
                    )
            return dialect.write(cookie, offset, bytes(mixed), fua)
        if kind == "read":
            reads[cookie] = length
            df = generator.choice([0, 0, DF]) if dialect.structured else 0
            return dialect.request(READ, cookie, offset, length, fua | df)
        if kind == "trim":
            return dialect.request(TRIM, cookie, offset, length, fua)
        if kind == "zeroes":
            return dialect.request(WRITE_ZEROES, cookie, offset, length, generator.choice([0, NO_HOLE, FAST_ZERO]))
        if kind == "flush":
            return dialect.request(FLUSH, cookie)
        return dialect.request(generator.choice([READ, TRIM, 77]), cookie, SIZE, length)

    @rule(count=st.integers(1, 60), aligned=st.booleans(), limits=st.sampled_from(LIMITS))
    def requests(self, count: int, aligned: bool, limits: Limits) -> None:
        reads: dict[int, int] = {}
        stream = b"".join(self._some_request(cookie, reads, aligned=aligned) for cookie in range(count))
        self._talk(stream, limits, reads)

    @rule(page=st.integers(0, PAGES - 1), count=st.integers(1, 400))
    def overwrite_pages(self, page: int, count: int) -> None:
        kinds = ["text", "half", "random", "zero"]
        writes = (
            self.dialect.write(
                cookie,
                (page + self.generator.randrange(200)) % PAGES * PAGE_SIZE,
                bytes(make_data(self.generator.choice(kinds), cookie, PAGE_SIZE)),
            )
            for cookie in range(count)
        )
        self._talk(b"".join(writes), LIMITS[0], {})

    @rule()
    def compact(self) -> None:
        for opened in self.opened:
            opened.device.compact()

    @rule(spare=st.integers(0, 40))
    def write_at_the_limit(self, spare: int) -> None:
        for opened in self.opened:
            opened.device.set_mem_limit(opened.device.mm_stat().mem_used_total + spare * PAGE_SIZE)
        reads: dict[int, int] = {}
        stream = b"".join(self._some_request(cookie, reads, aligned=True) for cookie in range(40))
        self._talk(stream, LIMITS[0], reads)
        for opened in self.opened:
            opened.device.set_mem_limit(0)

    @rule()
    def discard_most(self) -> None:
        self._talk(self.dialect.request(TRIM, 1, 0, SIZE - SIZE // 10), LIMITS[0], {})

    @invariant()
    def the_same_to_the_byte(self) -> None:
        if hasattr(self, "opened"):
            python, compiled = self.opened
            assert python.device.mm_stat() == compiled.device.mm_stat()
            assert records(python) == records(compiled)
            assert regions(python) == regions(compiled)

    def teardown(self) -> None:
        for opened in getattr(self, "opened", ()):
            opened.close()


def by_cookie(dialect: Dialect, stream: bytes, reads: dict[int, int]) -> dict[int, object]:
    """Return the replies to each request: what is refused is answered before what is done, or in its turn."""
    if not dialect.structured:
        return dict(parse_replies(stream, reads))
    found: dict[int, object] = {}
    for chunk in dialect.parse(stream):
        found[chunk[2]] = (found.get(chunk[2]), chunk)
    return found


def test_zstd_frames_say_the_same_about_themselves() -> None:
    samples: list[bytes | bytearray | memoryview] = [bytes(make_data("text", seed, 2048)) for seed in range(200)]
    trained = zstandard.train_dictionary(4096, samples).as_bytes()
    page = make_data("text", 777, PAGE_SIZE)
    for dictionary in (b"", trained):
        made = codec("zstd", 3, dictionary)
        frames = [bytes(made.compressor(page)(0)), engine.Codec(made).compress_page(memoryview(page))]
        for frame in frames:
            parameters = zstandard.get_frame_parameters(frame)
            assert (parameters.content_size, parameters.dict_id, parameters.has_checksum) == (PAGE_SIZE, 0, False)
            assert made.decompressor()(memoryview(frame)) == page


TestBoth = Both.TestCase
TestBoth.settings = settings(max_examples=30, stateful_step_count=12, deadline=None)
