"""Trials of codecs on pages of a device in use: what they are told by, and that the device does not notice."""

import base64
import json
import random
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest

from tests.property.test_device import make_data, read, write
from zramd.device.codecs import codec
from zramd.device.disk import Disk
from zramd.device.idle import mark_idle
from zramd.device.life import BusyError
from zramd.device.opening import OpenDevice
from zramd.device.recompression import Recompression
from zramd.device.sampling import sample_pages
from zramd.device.slices import in_slices
from zramd.device.trial import pool_memory, run_trial
from zramd.device.wanted import Wanted
from zramd.device.work import Work, WorkKind
from zramd.layout import PAGE_SIZE
from zramd.memory import RegionStore
from zramd.status import control
from zramd.status.attributes import AttributeRefusedError, Served
from zramd.zsmalloc import geometry

PAGES = 512
SIZE = PAGES * PAGE_SIZE
KINDS = ("text", "half", "random", "zero")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk("zram0", tmp_path / "state")
    opened = disk.open(Wanted(SIZE, codec("lz4"), secondary={1: codec("zstd", 3)}))
    for page in range(PAGES):
        write(opened.device, page * PAGE_SIZE, make_data(KINDS[page % 4], page, PAGE_SIZE))
    yield disk
    if disk.opened:
        disk.opened.close()


def records(seed: int, count: int) -> bytearray:
    """Return pages that have long parts in common with those of other seeds, but hardly any with themselves."""
    common = [random.Random(number).randbytes(200) for number in range(200)]
    generator = random.Random(seed)
    pages = bytearray()
    for _ in range(count):
        page = b"".join(part + generator.randbytes(56) for part in generator.sample(common, 16))
        pages += page[:PAGE_SIZE]
    return pages


def ask(disk: Disk, name: str, value: str) -> str:
    return control.write(Served(disk, (), Path("/admin")), name, value)


def test_a_sample_is_of_pages_with_an_object_and_changes_nothing(disk: Disk) -> None:
    device = disk.require_opened().device
    disk.recompress(Recompression(max_pages=200))
    in_slices(device, mark_idle(device, None))
    with device:
        for page in range(PAGES):
            device._times[page] = 7
        before = dict(device.entries())
    sample = sample_pages(device, 100, Work(WorkKind.TRAIN))
    everything = sample_pages(device, 10**6, Work(WorkKind.TRAIN))
    with device:
        assert (dict(device.entries()), set(device.access_times(0, PAGES))) == (before, {7})
    contents = read(device, 0, SIZE)
    stored = [contents[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] for page in range(PAGES) if page % 4 != 3]
    assert (len(sample.pages), sample.objects) == (100, len(stored))
    assert set(sample.pages) <= set(stored)
    assert sorted(everything.pages) == sorted(stored)


def test_a_sample_has_no_favourites(disk: Disk) -> None:
    device = disk.require_opened().device
    contents = read(device, 0, SIZE)
    first_half = {contents[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] for page in range(PAGES // 2)}
    found = [page for _ in range(20) for page in sample_pages(device, 48, Work(WorkKind.TRAIN)).pages]
    assert 0.4 < sum(page in first_half for page in found) / len(found) < 0.6


@pytest.mark.parametrize("chain_size", [4, 8, 16])
def test_memory_is_what_a_pool_takes_for_these_objects(chain_size: int) -> None:
    pages = make_data("half", 1, 100 * PAGE_SIZE) + make_data("text", 2, 100 * PAGE_SIZE)
    pages += make_data("random", 3, 20 * PAGE_SIZE)
    trial = run_trial(codec("zstd", 3), pages)
    assert trial is not None
    opened = OpenDevice(RegionStore(None), Wanted(len(pages), codec("zstd", 3), chain_size))
    write(opened.device, 0, pages)
    stat = opened.device.mm_stat()
    opened.close()
    assert pool_memory(trial.lengths, chain_size, 220) == stat.mem_used_total
    # Lengths were found with the chain size that takes the fewest pages for huge ones.
    assert geometry(chain_size).huge_limit <= geometry(16).huge_limit
    assert trial.ratio >= 220 * PAGE_SIZE / stat.compr_data_size
    # A sample stands for all.
    opened = OpenDevice(RegionStore(None), Wanted(10 * len(pages), codec("zstd", 3), chain_size))
    write(opened.device, 0, pages * 10)
    assert pool_memory(trial.lengths, chain_size, 2200) == opened.device.mm_stat().mem_used_total
    opened.close()


def test_an_estimate_has_each_codec_with_what_it_takes(disk: Disk) -> None:
    facts = json.loads(ask(disk, "estimate", "samples=64"))
    assert (facts["samples"], facts["objects"]) == (64, PAGES * 3 // 4)
    assert facts["used"] == disk.mm_stat().mem_used_total
    rows = {(row["name"], row["level"]): row for row in facts["rows"]}
    assert {"lz4", "lz4hc", "zstd"} == {name for name, _ in rows}
    assert rows["zstd", 9]["ratio"] > rows["lz4", 1]["ratio"] > 1
    assert all(row["compress"] > 0 and list(row["memory"]) == ["4", "8", "16"] for row in facts["rows"])
    assert disk.works.under_way() == []


def test_training_gains_on_pages_that_have_something_in_common(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    device = disk.require_opened().device
    with device:
        device.discard(0, SIZE)
    write(device, 0, records(1, PAGES))
    facts = json.loads(ask(disk, "train", "size=65536 priority=2 level=3 install=1"))
    assert facts["trained_on"] + facts["held_out"] == PAGES
    levels = {tried["level"]: tried for tried in facts["levels"]}
    for tried in levels.values():
        assert tried["trained"]["ratio"] > 1.5 * tried["plain"]["ratio"]
        assert tried["trained"]["memory"] < tried["plain"]["memory"]
    assert facts["gain"] > 0
    assert facts["installed"] == 2
    made = device.identity.algorithms.secondary[2]
    assert (made.name, made.level, made.dictionary) == ("zstd", 3, base64.b64decode(facts["dictionary"]))
    before, contents = disk.mm_stat().mem_used_total, read(device, 0, SIZE)
    disk.recompress(Recompression(priority=2))
    after = disk.mm_stat().mem_used_total
    with monkeypatch.context() as patched:
        patched.setattr(disk, "use_codec", Mock(side_effect=BusyError("pages have two")))
        facts = json.loads(ask(disk, "train", "size=65536 priority=2 level=3 install=1"))
    assert (facts["installed"], facts["refusal"], facts["gain"] > 0) == (None, "pages have two", True)
    # What was promised by held-out pages holds for all.
    assert abs(after - levels[3]["trained"]["memory"]) < 0.2 * before
    # It is part of what is kept.
    disk.require_opened().close()
    reopened = disk.open(Wanted())
    assert reopened.device.identity.algorithms.secondary[2].dictionary == made.dictionary
    assert read(reopened.device, 0, SIZE) == contents


def test_training_on_pages_that_have_nothing_in_common_is_no_gain_and_not_installed(disk: Disk) -> None:
    device = disk.require_opened().device
    with device:
        device.discard(0, SIZE)
    pages = bytearray()
    for number in range(PAGES):
        # Each compresses well, but with an alphabet of its own.
        generator = random.Random(number)
        letters = generator.randbytes(8)
        pages += bytes(generator.choices(letters, k=PAGE_SIZE))
    write(device, 0, pages)
    facts = json.loads(ask(disk, "train", "size=65536 priority=2 level=9 install=1"))
    assert facts["installed"] is None
    assert 2 not in device.identity.algorithms.secondary
    assert facts["gain"] <= 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("estimate", "samples=0"),
        ("estimate", "samples=8193"),
        ("estimate", "samples=many"),
        ("train", "size=100"),
        ("train", "size=2000000"),
        ("train", "priority=0"),
        ("train", "priority=4"),
        ("train", "level=23"),
        ("train", "install=yes"),
    ],
)
def test_what_cannot_be_tried_is_refused(disk: Disk, name: str, value: str) -> None:
    with pytest.raises(AttributeRefusedError, match=r"^EINVAL "):
        ask(disk, name, value)
    assert disk.works.under_way() == []


def test_too_few_pages_are_refused(disk: Disk) -> None:
    device = disk.require_opened().device
    with device:
        device.discard(99 * PAGE_SIZE, SIZE)
    with pytest.raises(AttributeRefusedError, match=r"^EINVAL 75 pages .*100"):
        ask(disk, "train", "size=4096")
    with device:
        device.discard(0, SIZE)
    with pytest.raises(AttributeRefusedError, match=r"^EINVAL no page"):
        ask(disk, "estimate", "samples=5")


@pytest.mark.parametrize("name", ["train", "estimate"])
def test_cancelled_it_has_changed_nothing(disk: Disk, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def cancel() -> None:
        disk.works.cancel()

    monkeypatch.setattr("zramd.device.sampling.pause", cancel)
    value = "priority=2 install=1" if name == "train" else "samples=100"
    assert ask(disk, name, value) == "cancelled: nothing has changed\n"
    assert 2 not in disk.require_opened().device.identity.algorithms.secondary
