"""The self-test at start: it passes with what works, and finds what does not."""

import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest

import zramd.device.state
import zramd.zsmalloc.compaction
from tests.property.test_device import make_data
from zramd import native
from zramd.device.codecs import Codec, CodecError, codec
from zramd.device.selftest import SelfTestError, selftest
from zramd.device.zram import Device
from zramd.layout import PAGE_SIZE, DeviceRecord
from zramd.memory import NoMemoryError, Region
from zramd.native import Engine
from zramd.zsmalloc import Pool, recover

DICTIONARY = bytes(make_data("text", 1, 8192))


@pytest.mark.parametrize(
    "works",
    [
        codec("lz4"),
        codec("lz4", 65537),
        codec("lz4", 1, DICTIONARY),
        codec("lz4hc", 12),
        codec("zstd"),
        codec("zstd", -131072),
        codec("zstd", 22),
        codec("zstd", 3, DICTIONARY),
    ],
    ids=lambda works: f"{works.name} {works.level} {len(works.dictionary)}",
)
def test_what_works_passes_and_leaves_nothing_open(works: Codec) -> None:
    selftest(works)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    selftest(works)
    assert len(os.listdir("/proc/self/fd")) == before


def decompressing(change: Callable[[bytes], bytes]) -> Codec:
    """Return a codec that does something to what it decompresses."""
    works = codec("lz4")
    decompress = works.decompressor()
    return replace(works, decompressor=lambda: lambda data: change(decompress(data)))


def fail(_: bytes) -> bytes:
    raise CodecError("out of order")


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (decompressing(lambda page: page[:-1] + bytes([page[-1] ^ 1])), "pages did not come back"),
        (decompressing(lambda page: page[1:]), "pages did not come back"),
        (decompressing(fail), "page 0 is damaged: out of order"),
        (replace(codec("lz4"), compressor=lambda source: lambda _: bytes(source[:PAGE_SIZE])), "not stored as what"),
        (replace(codec("lz4"), compressor=lambda _: lambda _: b"nonsense"), "is damaged"),
    ],
    ids=["a bit", "too short", "no page", "does not compress", "nonsense"],
)
def test_a_broken_library_fails_it(broken: Codec, complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.VARIABLE, Engine.PYTHON.value)
    with pytest.raises(
        SelfTestError, match=rf"^the self-test of lz4 level 1 with the python engine .*{complaint}.*"
    ) as e:
        selftest(broken)
    assert str(e.value).endswith("; install zramd again")
    assert "\n" not in str(e.value)


class BrokenStream:
    """The compiled engine's stream with something wrong."""

    def __init__(self, wrong: str, stream: object) -> None:
        self._wrong = wrong
        self._stream = stream
        self.view = stream.view  # type: ignore[attr-defined]

    def prepare(self, start: int, length: int, offset: int) -> object:
        if self._wrong == "drops the last page":
            length -= PAGE_SIZE
        return self._stream.prepare(start, length, offset)  # type: ignore[attr-defined]

    @property
    def generation(self) -> int:
        return self._stream.generation  # type: ignore[attr-defined, no-any-return]

    @property
    def bits(self) -> int:
        return self._stream.bits  # type: ignore[attr-defined, no-any-return]

    def load_pages(self, first: int, end: int, out: list[bytes], zero_page: bytes) -> list[int]:
        backed: list[int] = self._stream.load_pages(first, end, out, zero_page)  # type: ignore[attr-defined]
        if self._wrong == "flips a bit":
            out[-20] = bytes([out[-20][0] ^ 1]) + out[-20][1:]
        return backed


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ("drops the last page", "pages are not stored as what they are"),
        ("flips a bit", "pages did not come back after they were written"),
    ],
)
def test_a_broken_compiled_engine_fails_it(wrong: str, complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = pytest.importorskip(
        "zramd.native.engine", reason="no compiled engine: install gcc, liblz4-dev, libzstd-dev, and zramd again"
    )
    monkeypatch.setenv(native.VARIABLE, Engine.NATIVE.value)
    make = engine.Stream
    monkeypatch.setattr(engine, "Stream", lambda *arguments: BrokenStream(wrong, make(*arguments)))
    with pytest.raises(SelfTestError, match=f"the native engine failed: {complaint}; set ZRAMD_ENGINE=python"):
        selftest(codec("zstd"))


def nothing(*_: object) -> None:
    pass


def moves_without_telling(pool: Pool, *places: object) -> None:
    """Compact as usual, but leave the handles as they were."""
    before = pool.handle_region.words.tobytes()
    move(pool, *places)  # type: ignore[arg-type]
    pool.handle_region.bytes[:] = before


def forgets_one(pool: Pool, objects: Iterator[tuple[int, int]], most_lost: int) -> None:
    next(objects)
    recover(pool, objects, most_lost)


def miscounts(device: Device, *stored: object) -> None:
    store(device, *stored)  # type: ignore[arg-type]
    device.record[DeviceRecord.SAME_PAGES] += 1


move, store = zramd.zsmalloc.compaction._move_objects, Device._store


@pytest.mark.parametrize(
    ("where", "name", "broken", "complaint"),
    [
        (zramd.zsmalloc.compaction, "_move_objects", moves_without_telling, "StateError: .* carries another handle"),
        (zramd.device.state, "recover", forgets_one, "the counters changed in a recovery"),
        (Device, "_store", miscounts, "the counters are wrong"),
        (Device, "discard", nothing, "after others were discarded"),
        (Device, "compact", nothing, "compaction does not free"),
        (Device, "recover", lambda _: [][0], "IndexError: list index out of range"),
        (Device, "mm_stat", lambda _: SimpleNamespace(orig_data_size=0, same_pages=0), "the counters are wrong"),
    ],
)
def test_a_broken_engine_fails_it(
    where: object, name: str, broken: object, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(native.VARIABLE, Engine.PYTHON.value)
    monkeypatch.setattr(where, name, broken)
    with pytest.raises(SelfTestError, match=complaint):
        selftest(codec("lz4"))


def test_a_machine_without_memory_is_not_called_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise NoMemoryError("no memory left")

    monkeypatch.setattr(Region, "populate", refuse)
    with pytest.raises(NoMemoryError):
        selftest(codec("lz4"))
