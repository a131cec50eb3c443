"""Long work: what excludes what, how it is seen, and how it is cancelled."""

import json
import re
import threading
from pathlib import Path

import pytest

from tests.property.test_device import make_data, read, write
from zramd.device.codecs import codec
from zramd.device.disk import Disk
from zramd.device.life import BusyError
from zramd.device.recompression import Recompression
from zramd.device.wanted import Wanted
from zramd.device.work import WorkKind, Works, WorkUnderWayError
from zramd.layout import PAGE_SIZE
from zramd.status import attributes, control
from zramd.status.attributes import AttributeRefusedError, Served

SIZE = 64 * PAGE_SIZE


@pytest.mark.parametrize(
    ("first", "second", "together"),
    [
        (WorkKind.RECOMPRESS, WorkKind.RECOMPRESS, False),
        (WorkKind.RECOMPRESS, WorkKind.WRITEBACK, False),
        (WorkKind.WRITEBACK, WorkKind.RESTORE, False),
        (WorkKind.TRAIN, WorkKind.TRAIN, False),
        (WorkKind.TRAIN, WorkKind.RECOMPRESS, True),
        (WorkKind.COMPACT, WorkKind.RECOMPRESS, True),
        (WorkKind.IDLE, WorkKind.IDLE, True),
    ],
)
def test_what_may_be_under_way_together(first: WorkKind, second: WorkKind, together: bool) -> None:
    works = Works()
    with works.begin(first):
        if together:
            with works.begin(second):
                assert [work.kind for work in works.under_way()] == [first, second]
        else:
            with pytest.raises(WorkUnderWayError, match=first), works.begin(second):
                pass
    with works.begin(second):
        pass
    assert works.under_way() == []


def test_work_is_over_when_it_fails() -> None:
    works = Works()
    with pytest.raises(ValueError, match="full"), works.begin(WorkKind.WRITEBACK):
        raise ValueError("full")
    assert works.under_way() == []


def test_only_the_kind_that_is_named_is_cancelled() -> None:
    works = Works()
    with works.begin(WorkKind.TRAIN) as train, works.begin(WorkKind.COMPACT) as compact:
        assert works.cancel(WorkKind.TRAIN) == [train]
        assert (train.cancelled, compact.cancelled) == (True, False)
        assert works.cancel() == [train, compact]
        assert compact.cancelled


def test_a_recompression_is_seen_and_cancelled_from_outside() -> None:
    disk = Disk("zram0", None)
    served = Served(disk, (), Path("/admin"))
    opened = disk.open(Wanted(SIZE, codec("lz4"), secondary={1: codec("zstd", 19)}))
    contents = bytes(make_data("text", 1, SIZE))
    write(opened.device, 0, bytearray(contents))
    with opened.device:
        # It waits for the lock in its first slice.
        thread = threading.Thread(target=disk.recompress, args=(Recompression(),))
        thread.start()
        while not disk.works.under_way():
            thread.join(0.01)
        with pytest.raises(BusyError, match="recompress is under way"):
            disk.recompress(Recompression())
        assert re.fullmatch(r"recompress: 0 in \d+\.\d s\n", attributes.read(served, "work"))
        control.write(served, "cancel", "recompress")
        assert [work.cancelled for work in disk.works.under_way()] == [True]
    thread.join()
    assert attributes.read(served, "work") == ""
    assert read(opened.device, 0, SIZE) == contents
    outcome = disk.recompress(Recompression())
    assert outcome.tried == SIZE // PAGE_SIZE
    opened.close()


def test_work_is_among_all_there_is_to_know() -> None:
    disk = Disk("zram0", None)
    with disk.works.begin(WorkKind.TRAIN) as work:
        work.done, work.total, work.saved = 3, 9, 4096
        (facts,) = json.loads(attributes.read(Served(disk, (), Path("/admin")), "json"))["work"]
    assert facts["seconds"] >= 0
    assert {name: facts[name] for name in ("kind", "done", "total", "saved", "cancelled")} == {
        "kind": "train",
        "done": 3,
        "total": 9,
        "saved": 4096,
        "cancelled": False,
    }


def test_cancel_takes_a_kind_of_work() -> None:
    served = Served(Disk("zram0", None), (), Path("/admin"))
    control.write(served, "cancel", "all")
    with pytest.raises(AttributeRefusedError, match=r"^EINVAL .*recompress"):
        control.write(served, "cancel", "everything")
