"""What the policy decides: each thing that it sees changes the decision in the direction that it should."""

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zramd.device.recompression import Recompression
from zramd.device.survey import Survey
from zramd.layout import PAGE_SIZE
from zramd.policy.budget import DAY, Budget
from zramd.policy.decision import Action, Decision, Situation, ages, decide
from zramd.policy.pressure import Pressure, parse_pressure
from zramd.policy.rules import Rules, Watermark, parse_watermark

MIB = 1 << 20
RULES = Rules(idle_after=600, writeback_after=3600, low=Watermark(100 * MIB), high=Watermark(200 * MIB))
NOTHING_IDLE = Survey(5000, {150: 0, 600: 0, 3600: 0}, {150: 0, 600: 0, 3600: 0}, {150: 0, 600: 0, 3600: 0})
SURVEY = Survey(
    objects=5000,
    idle={150: 900, 600: 500, 3600: 100},
    improvable={150: 800, 600: 400, 3600: 50},
    improvable_huge={150: 80, 600: 40, 3600: 5},
    huge=70,
)
SITUATION = Situation(used=150 * MIB, survey=SURVEY, survey_age=10.0, budget=64 * MIB)


def decision(rules: Rules = RULES, **changes: Any) -> Decision:
    return decide(rules, replace(SITUATION, **changes))


def test_idle_pages_are_recompressed_first_and_then_written_back() -> None:
    made = decision()
    assert (made.action, made.idle_seconds, made.order) == (Action.RECOMPRESS, 600, Recompression(idle=True))
    assert "400 pages were not touched for 600 s" in made.reasons[-1]
    done = replace(SURVEY, improvable=dict.fromkeys(SURVEY.improvable, 0), huge=0)
    made = decision(survey=done)
    assert (made.action, made.idle_seconds, made.max_pages) == (Action.WRITE_BACK, 3600, 100)
    assert "100 pages were not touched for 3600 s" in made.reasons[-1]


def test_huge_pages_are_recompressed_when_no_page_is_idle() -> None:
    made = decision(survey=replace(NOTHING_IDLE, huge=70))
    assert (made.action, made.idle_seconds, made.order) == (Action.RECOMPRESS, None, Recompression(huge=True))
    assert "70 pages are huge" in made.reasons[-1]


@pytest.mark.parametrize(
    ("asked", "order", "idle_seconds"),
    [
        (None, Recompression(idle=True), 600),
        (Recompression(threshold=99), Recompression(idle=True, threshold=99), 600),
        (Recompression(idle=True), Recompression(idle=True), 600),
        (Recompression(huge=True), Recompression(huge=True), None),
        (Recompression(idle=True, huge=True, threshold=9), Recompression(idle=True, huge=True, threshold=9), 600),
    ],
)
def test_the_configuration_says_which_pages_to_recompress(
    asked: Recompression | None, order: Recompression, idle_seconds: int | None
) -> None:
    made = decision(replace(RULES, recompression=asked))
    assert (made.action, made.order, made.idle_seconds) == (Action.RECOMPRESS, order, idle_seconds)


@pytest.mark.parametrize(
    ("changes", "action", "words"),
    [
        ({"used": 99 * MIB}, Action.NOTHING, "99M of memory are used, less than the low watermark of 100M"),
        ({"requests": 1001.0}, Action.NOTHING, "1001 requests a second, more than 1000"),
        ({"requests": 1000.0}, Action.RECOMPRESS, ""),
        ({"other_work": "compact"}, Action.NOTHING, "compact is under way"),
        ({"secondary": False}, Action.WRITE_BACK, "100 pages"),
        ({"store": False, "survey": NOTHING_IDLE}, Action.NOTHING, "counted again in 20 s"),
        ({"secondary": False, "store": False}, Action.NOTHING, "no algorithm to recompress with"),
        ({"survey": NOTHING_IDLE, "survey_age": 31.0}, Action.SURVEY, "time to count"),
        ({"survey": None, "survey_age": None}, Action.SURVEY, "time to count"),
        ({"survey": None, "survey_age": 31.0, "survey_seconds": 2.0}, Action.NOTHING, "in 169 s"),
        ({"secondary": False, "budget": 31 * PAGE_SIZE}, Action.NOTHING, "only 124K may be written"),
        # Memory is short: earlier, and what frees most comes first.
        ({"used": 201 * MIB}, Action.WRITE_BACK, "more than the high watermark of 200M"),
        ({"used": 201 * MIB, "requests": 99999.0}, Action.WRITE_BACK, "I/O is not waited for"),
        ({"used": 201 * MIB, "other_work": "compact"}, Action.NOTHING, "compact is under way"),
        ({"used": 201 * MIB, "store": False}, Action.RECOMPRESS, "not touched for 150 s"),
        ({"pressure": Pressure(9.9, 0.0)}, Action.RECOMPRESS, "not touched for 600 s"),
        ({"pressure": Pressure(10.0, 0.0)}, Action.WRITE_BACK, "waited for memory in 10.0%"),
        ({"pressure": Pressure(10.0, 0.0), "store": False}, Action.RECOMPRESS, "not touched for 150 s"),
        ({"pressure": Pressure(10.0, 0.0), "used": 50 * MIB}, Action.WRITE_BACK, "waited for memory"),
        ({"pressure": Pressure(10.0, 0.0), "requests": 1001.0}, Action.NOTHING, "I/O is busy"),
        ({"pressure": Pressure(50.0, 10.0)}, Action.WRITE_BACK, "not touched for 600 s"),
        ({"pressure": Pressure(50.0, 10.0), "store": False}, Action.NOTHING, "nothing is recompressed"),
    ],
)
def test_what_is_seen_changes_what_is_done(changes: dict[str, Any], action: Action, words: str) -> None:
    made = decision(**changes)
    assert made.action is action
    assert words in " ".join(made.reasons)


def test_between_the_watermarks_it_depends_on_which_was_crossed_last() -> None:
    pressing, seen = False, []
    for used in (99, 150, 200, 201, 199, 150, 100, 99, 150):
        pressing = decision(used=used * MIB, pressing=pressing).pressing
        seen.append(pressing)
    assert seen == [False, False, False, True, True, True, True, False, False]


def test_with_only_a_high_watermark_it_is_both() -> None:
    rules = replace(RULES, low=Watermark())
    assert decision(rules, used=201 * MIB).pressing
    assert decision(rules, used=200 * MIB, pressing=True).pressing
    assert not decision(rules, used=199 * MIB, pressing=True).pressing


def test_a_share_of_a_limit_is_no_watermark_without_one() -> None:
    rules = replace(RULES, low=parse_watermark("50%"), high=parse_watermark(" 80 % "))
    assert decision(rules, used=81 * MIB, limit=100 * MIB).pressing
    assert not decision(rules, used=80 * MIB, limit=100 * MIB).pressing
    assert decision(rules, used=49 * MIB, limit=100 * MIB).action is Action.NOTHING
    assert decision(rules, used=1, limit=0).action is Action.RECOMPRESS
    for text in ("0%", "101%", "some", "5 %%"):
        with pytest.raises(ValueError, match=r"share|size"):
            parse_watermark(text)


counts = st.integers(0, 10000)


@st.composite
def situations(draw: st.DrawFn) -> Situation:
    survey = None
    if draw(st.booleans()):
        idle, improvable, huge = ({age: draw(counts) for age in ages(RULES)} for _ in range(3))
        survey = Survey(draw(counts), idle, improvable, huge, draw(counts))
    return Situation(
        used=draw(st.integers(0, 300 * MIB)),
        limit=draw(st.sampled_from([0, 250 * MIB])),
        requests=draw(st.floats(0, 5000)),
        pressure=draw(st.none() | st.builds(Pressure, st.floats(0, 100), st.floats(0, 100))),
        survey=survey,
        survey_age=draw(st.none() | st.floats(0, 1e6)),
        survey_seconds=draw(st.floats(0, 10)),
        budget=draw(st.integers(0, 100 * MIB)),
        pressing=draw(st.booleans()),
        other_work=draw(st.sampled_from([None, "save"])),
        secondary=draw(st.booleans()),
        store=draw(st.booleans()),
    )


@given(situations())
def test_whatever_is_seen_there_are_things_that_are_never_done(situation: Situation) -> None:
    made = decide(RULES, situation)
    assert made.reasons
    assert all(re.fullmatch(r".*[.]", reason) for reason in made.reasons)
    if made.action is Action.WRITE_BACK:
        assert situation.store
        assert 0 < made.max_pages * PAGE_SIZE <= situation.budget
        assert situation.survey is not None
        assert made.max_pages <= max(situation.survey.idle.values())
    if made.action is Action.RECOMPRESS:
        assert situation.secondary
        assert made.order is not None
        assert situation.pressure is None or situation.pressure.full < RULES.pressure_full
    if situation.other_work or (situation.requests > RULES.busy_requests and not made.pressing):
        assert made.action is Action.NOTHING
    # More of what nobody waits for never stops it from doing something.
    if made.action is not Action.NOTHING:
        quieter = replace(situation, requests=0.0, budget=situation.budget * 2)
        assert decide(RULES, quieter).action is not Action.NOTHING


@given(st.integers(0, 1 << 40), st.lists(st.tuples(st.floats(0, DAY / 4), st.floats(0, 1)), max_size=60))
def test_no_day_has_more_than_its_budget(per_day: int, steps: list[tuple[float, float]]) -> None:
    now, budget, written = 0.0, Budget(per_day, 0.0), []
    for pause, share in steps:
        now += pause
        size = int(budget.left(now) * share)
        budget.spend(size)
        written.append((now, size))
        assert sum(size for moment, size in written if moment > now - DAY) <= per_day + 1


def test_a_budget_refills_continuously_and_starts_empty() -> None:
    budget = Budget(24 << 20, 100.0)
    assert budget.left(100.0) == 0
    after_a_minute = budget.left(160.0)
    assert 0 < after_a_minute < 1 << 20
    assert budget.left(1e9) == 1 << 20
    budget.spend(1 << 20)
    assert budget.left(1e9) == 0
    assert abs(budget.left(1e9 + 60) - after_a_minute) <= 1


def test_pressure_is_read_as_the_kernel_writes_it() -> None:
    text = "some avg10=12.34 avg60=5.00 avg300=1.00 total=123456\nfull avg10=0.50 avg60=0.10 avg300=0.00 total=1234\n"
    assert parse_pressure(text) == Pressure(12.34, 0.5)
    assert parse_pressure("") is None
    assert parse_pressure("some avg10=1.00 avg60=0.00 avg300=0.00 total=0\n") is None
