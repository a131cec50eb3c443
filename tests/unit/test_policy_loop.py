"""The policy on a disk: what it counts, does, and leaves alone."""

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.property.test_device import make_data, read, write
from zramd.backing.store import SEGMENT
from zramd.device.codecs import codec
from zramd.device.disk import Disk
from zramd.device.recompression import Outcome, Recompression
from zramd.device.wanted import Wanted
from zramd.device.work import WorkKind
from zramd.layout import ENTRY_IDLE, PAGE_SIZE
from zramd.policy.decision import Action, Decision
from zramd.policy.loop import Policy
from zramd.policy.rules import Mode, Rules

PAGES = 64
SIZE = PAGES * PAGE_SIZE
KINDS = ("text", "half", "random", "zero")


@pytest.fixture
def disk() -> Iterator[Disk]:
    """Return a disk of 64 pages, every eighth of which was not touched for an hour."""
    disk = Disk("zram0", None)
    opened = disk.open(Wanted(SIZE, codec("lz4"), secondary={1: codec("zstd", 9)}))
    for page in range(PAGES):
        write(opened.device, page * PAGE_SIZE, make_data(KINDS[page % 4], page, PAGE_SIZE))
    with opened.device:
        for page in range(0, PAGES, 8):
            opened.device._times[page] = max(1, opened.device._times[page] - 3600)
    yield disk
    opened.close()


def step(policy: Policy) -> Decision:
    """Let the policy decide and do one thing."""
    made = policy.step()
    if policy._worker:
        policy._worker.join()
    return made


def recompressed(disk: Disk) -> list[int]:
    device = disk.require_opened().device
    with device:
        return [page for page, entry in device.entries() if entry >> 56 & 3]


def idle(disk: Disk) -> list[int]:
    device = disk.require_opened().device
    with device:
        return [page for page, entry in device.entries() if entry & ENTRY_IDLE]


def test_a_survey_counts_by_age_and_touches_nothing(disk: Disk) -> None:
    device = disk.require_opened().device
    with device:
        before = dict(device.entries()), device.access_times(0, PAGES)
    survey = disk.survey([150, 600, 7200], 0)
    assert survey is not None
    assert (survey.objects, survey.huge) == (48, 16)
    assert survey.idle == survey.improvable == {150: 8, 600: 8, 7200: 0}
    assert survey.improvable_huge == {150: 0, 600: 0, 7200: 0}
    with device:
        assert (dict(device.entries()), device.access_times(0, PAGES)) == before
    disk.recompress(Recompression())
    survey = disk.survey([150], 0)
    assert survey is not None
    assert survey.idle == {150: 8}
    assert (survey.improvable, survey.huge) == ({150: 0}, 0)


def test_it_counts_recompresses_what_is_idle_and_rests(disk: Disk) -> None:
    device = disk.require_opened().device
    contents = read(device, 0, SIZE)
    with device:
        for page in range(0, PAGES, 8):
            device._times[page] = 1
    policy = Policy(disk, Rules(mode=Mode.ON, idle_after=100, recompression=Recompression(idle=True)), lambda: None)
    assert step(policy).action is Action.SURVEY
    assert step(policy).action is Action.RECOMPRESS
    assert recompressed(disk) == list(range(0, PAGES, 8))
    # The gaps that this left in the pool are gone.
    assert all(stat.freeable < stat.pages_per_zspage for stat in disk.class_stats())
    made = step(policy)
    assert made.action is Action.NOTHING
    assert "counted again" in made.reasons[-1]
    assert read(device, 0, SIZE) == contents


def test_it_writes_back_no_more_than_the_budget_has(tmp_path: Path) -> None:
    medium = tmp_path / "medium"
    medium.touch()
    os.truncate(medium, 16 * SEGMENT)
    disk = Disk("zram0", None)
    opened = disk.open(Wanted(SIZE, codec("lz4"), backing=medium))
    write(opened.device, 0, make_data("half", 1, SIZE))
    contents = read(opened.device, 0, SIZE)
    rules = Rules(mode=Mode.ON, idle_after=100, writeback_after=100, write_budget=24 * 40 * PAGE_SIZE)
    policy = Policy(disk, rules, lambda: None)
    with opened.device:
        for page in range(PAGES):
            opened.device._times[page] = 1
    assert step(policy).action is Action.SURVEY
    made = step(policy)
    assert made.action is Action.NOTHING
    assert "only 0B may be written now, by the budget of 3.8M a day" in " ".join(made.reasons)
    policy._budget._noted -= 86400  # it is a day later
    disk.set_writeback(lambda settings: replace(settings, limited=True))
    assert step(policy).action is Action.NOTHING
    disk.set_writeback(lambda settings: replace(settings, limited=False))
    made = step(policy)
    assert (made.action, made.max_pages) == (Action.WRITE_BACK, 40)
    assert 0 < disk.bd_stat().pages <= 40
    assert 0 < disk.bd_stat().writes <= 40
    assert policy._budget.left(time.monotonic()) <= (40 - disk.bd_stat().writes) * PAGE_SIZE + PAGE_SIZE
    assert read(opened.device, 0, SIZE) == contents
    opened.close()


def test_a_dry_run_decides_and_does_nothing(disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    policy = Policy(disk, Rules(mode=Mode.DRY_RUN, idle_after=100), lambda: None)
    assert [step(policy).action for _ in range(3)] == [Action.SURVEY, Action.RECOMPRESS, Action.RECOMPRESS]
    assert recompressed(disk) == idle(disk) == []
    assert [record.message for record in caplog.records] == [
        "zram0: policy (dry run): recompress. 8 pages were not touched for 100 s, and not yet recompressed."
    ]
    assert policy.last().startswith("dry-run: recompress.\n")


def test_it_explains_itself_also_while_it_is_off(disk: Disk) -> None:
    policy = Policy(disk, Rules(idle_after=100), lambda: None)
    text = policy.explain()
    assert text == "off: recompress.\n8 pages were not touched for 100 s, and not yet recompressed.\n"
    assert policy.last() == "off\n"
    assert recompressed(disk) == idle(disk) == []
    assert Policy(Disk("zram1", None), Rules()).explain() == (
        "off: nothing.\nzram1 is not initialised: set its disksize first.\n"
    )


def test_it_stops_its_own_work_when_there_is_reason_to_and_leaves_that_of_others(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = threading.Event()

    def recompress(_: Recompression) -> Outcome:
        with disk.works.begin(WorkKind.RECOMPRESS) as work:
            begun.set()
            while not work.cancelled:
                time.sleep(0.01)
        return Outcome(cancelled=True)

    monkeypatch.setattr(disk, "recompress", recompress)
    policy = Policy(disk, Rules(mode=Mode.ON, idle_after=100), lambda: None)
    step(policy)
    assert policy.step().action is Action.RECOMPRESS
    begun.wait()
    # As long as it would be begun, it goes on.
    assert policy.step().action is Action.RECOMPRESS
    assert [work.cancelled for work in disk.works.under_way()] == [False]
    policy._rate = 1e6
    with disk.works.begin(WorkKind.COMPACT) as theirs:
        assert policy.step().action is Action.NOTHING
        assert policy._worker is not None
        policy._worker.join()
        assert not theirs.cancelled
    assert disk.works.under_way() == []


def test_it_waits_while_somebody_else_has_work_under_way(disk: Disk) -> None:
    policy = Policy(disk, Rules(mode=Mode.ON, idle_after=100), lambda: None)
    with disk.works.begin(WorkKind.SAVE):
        made = step(policy)
    assert made.action is Action.NOTHING
    assert "save is under way" in made.reasons[0]
    assert step(policy).action is Action.SURVEY


def test_its_thread_is_there_only_while_it_is_on(disk: Disk) -> None:
    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name == "policy"]

    policy = Policy(disk, Rules(), lambda: None)
    policy.switch(Mode.OFF)
    assert threads() == []
    policy.switch(Mode.ON)
    policy.switch(Mode.DRY_RUN)
    assert threads() == ["policy"]
    policy.switch(Mode.OFF)
    for thread in threading.enumerate():
        if thread.name == "policy":
            thread.join()
    assert threads() == []
