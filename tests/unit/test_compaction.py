"""Compaction of a device that others use."""

import random
import threading

import pytest

from tests.property.test_device import make_data, read, recount, write
from zramd.device import slices
from zramd.device.disk import Disk
from zramd.device.opening import OpenDevice
from zramd.device.zram import Device
from zramd.layout import PAGE_SIZE

PAGES = 4096


def fragment(device: Device, generator: random.Random) -> dict[int, bytes]:
    """Write pages of many sizes and discard most of them. Return what stays, by page."""
    pages = {}
    for page in range(PAGES):
        pages[page] = generator.randbytes(generator.randrange(1, 3000)).ljust(PAGE_SIZE, b"\1")
        write(device, page * PAGE_SIZE, bytearray(pages[page]))
    for page in generator.sample(sorted(pages), PAGES * 3 // 4):
        with device:
            device.discard(page * PAGE_SIZE, PAGE_SIZE)
        del pages[page]
    return pages


def check(device: Device, pages: dict[int, bytes]) -> None:
    for page, data in pages.items():
        assert read(device, page * PAGE_SIZE, PAGE_SIZE) == data
    stat = device.mm_stat()
    assert stat == recount(device, stat)


def test_compaction_frees_what_the_class_table_calls_freeable(opened: OpenDevice) -> None:
    device = opened.device
    pages = fragment(device, random.Random(1))
    freeable = sum(stat.freeable for stat in device.class_stats())
    before = device.mm_stat()
    device.compact()
    after = device.mm_stat()
    assert freeable > 100
    assert after.pages_compacted == freeable
    assert before.mem_used_total - after.mem_used_total == freeable * PAGE_SIZE
    assert after.mem_used_max == before.mem_used_max
    assert sum(stat.freeable for stat in device.class_stats()) == 0
    check(device, pages)
    device.compact()
    assert device.mm_stat() == after


def test_objects_move_while_other_connections_read_and_write_them(
    opened: OpenDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Many more slices than usual, so that the others come in between.
    monkeypatch.setattr(slices, "SLICE_SECONDS", 0)
    device = opened.device
    pages = fragment(device, random.Random(2))
    done = threading.Event()
    failures: list[object] = []
    written: list[dict[int, bytes]] = [{}, {}]

    def reader(seed: int) -> None:
        generator = random.Random(seed)
        kept = sorted(page for page in pages if page % 2)
        try:
            while not done.is_set():
                page = generator.choice(kept)
                assert read(device, page * PAGE_SIZE, PAGE_SIZE) == pages[page]
        except BaseException as error:
            failures.append(error)

    def writer(seed: int) -> None:
        generator = random.Random(seed)
        try:
            while not done.is_set():
                page = generator.randrange(PAGES // 4) * 4 + seed * 2
                data = make_data("half", generator.randrange(1000), PAGE_SIZE)
                write(device, page * PAGE_SIZE, data)
                written[seed][page] = bytes(data)
                if generator.random() < 0.5:
                    gone = generator.choice(sorted(written[seed]))
                    with device:
                        device.discard(gone * PAGE_SIZE, PAGE_SIZE)
                    written[seed][gone] = bytes(PAGE_SIZE)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for work in (reader, writer) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        device.compact()
    done.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert device.mm_stat().pages_compacted > 100
    assert all(written)
    check(device, pages | written[0] | written[1])


def test_a_second_compaction_at_the_same_time_does_nothing(opened: OpenDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    device, disk = opened.device, Disk("zram0", None)
    disk.opened = opened
    fragment(device, random.Random(3))
    monkeypatch.setattr(slices, "SLICE_SECONDS", 0)
    first_is_paused, go_on = threading.Event(), threading.Event()

    def pause(_: float) -> None:
        first_is_paused.set()
        go_on.wait()

    monkeypatch.setattr("zramd.device.slices.time.sleep", pause)
    first = threading.Thread(target=disk.compact)
    first.start()
    first_is_paused.wait()
    before = device.mm_stat()
    disk.compact()
    assert device.mm_stat() == before
    go_on.set()
    first.join()
    assert device.mm_stat().pages_compacted > before.pages_compacted


def test_a_device_that_goes_away_ends_its_compaction(opened: OpenDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    device = opened.device
    fragment(device, random.Random(4))
    monkeypatch.setattr(slices, "SLICE_SECONDS", 0)
    monkeypatch.setattr("zramd.device.slices.time.sleep", lambda _: opened.destroy())
    device.compact()
    assert sum(stat.freeable for stat in device.class_stats()) > 0
