"""What the policy does next, as a function of what it sees: no clock, no device, no thread."""

from dataclasses import dataclass, field
from enum import StrEnum

from zramd.device.recompression import Recompression
from zramd.device.survey import Survey
from zramd.layout import PAGE_SIZE
from zramd.policy.pressure import Pressure
from zramd.policy.rules import Rules
from zramd.sizes import format_size

EARLIER = 4
"""When memory is short, a page is idle in one part in so many of the time."""
WRITE_BATCH = 32
"""Pages: fewer are not written back unless there are no more (the kernel's writeback_batch_size)."""
SURVEY_SECONDS = 30.0
"""Least time between two counts of pages,"""
SURVEY_SHARE = 100
"""and, in the time that one takes, how many times as long as that; so that they take no more than a hundredth."""


class Action(StrEnum):
    """What there is to do."""

    NOTHING = "nothing"
    SURVEY = "survey"
    RECOMPRESS = "recompress"
    WRITE_BACK = "writeback"


@dataclass(frozen=True, slots=True)
class Situation:
    """What the policy sees.

    Attributes:
        used, limit: bytes of the pool, and most of them (0: any number).
        requests: of clients, a second.
        pressure: of the machine on memory, None if that is not known.
        survey: the last count, None if something was done since.
        survey_age: seconds since the last count ended; None if there was none.
        survey_seconds: what it took.
        budget: bytes that may be written back now, by the budget of a day and by writeback_limit.
        pressing: whether memory was above the high watermark, and not below the low one since.
        other_work: the kind of work that somebody else has under way, if any.
        secondary, store: whether there is an algorithm to recompress with, and a backing store.
    """

    used: int
    limit: int = 0
    requests: float = 0.0
    pressure: Pressure | None = None
    survey: Survey | None = None
    survey_age: float | None = None
    survey_seconds: float = 0.0
    budget: int = 0
    pressing: bool = False
    other_work: str | None = None
    secondary: bool = True
    store: bool = True


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do, and why, in sentences.

    Attributes:
        pressing: as in Situation, for the next time.
        idle_seconds: mark pages of this age as idle first; None: do not mark any.
        order: which pages to recompress.
        max_pages: most pages to write back.
    """

    action: Action
    reasons: tuple[str, ...]
    pressing: bool = False
    idle_seconds: int | None = None
    order: Recompression | None = None
    max_pages: int = 0


@dataclass(slots=True)
class _Case:
    """One decision on its way: the situation, and the reasons so far."""

    rules: Rules
    situation: Situation
    pressing: bool
    reasons: list[str] = field(default_factory=list)

    def decide(self, action: Action, *reasons: str, **more: object) -> Decision:
        return Decision(action, (*self.reasons, *reasons), self.pressing, **more)  # type: ignore[arg-type]


def ages(rules: Rules) -> tuple[int, ...]:
    """Return the ages in seconds by which a survey has to count pages."""
    return (rules.idle_after, _earlier(rules.idle_after), rules.writeback_after or rules.idle_after)


def pause(survey_seconds: float) -> float:
    """Return how long a survey is good for that took so many seconds."""
    return max(SURVEY_SECONDS, SURVEY_SHARE * survey_seconds)


def _earlier(seconds: int) -> int:
    return -(-seconds // EARLIER)


def decide(rules: Rules, situation: Situation) -> Decision:
    """Say what to do now."""
    used, low = situation.used, rules.low.resolve(situation.limit)
    high = rules.high.resolve(situation.limit)
    # Without a low watermark, the high one is both.
    floor = low if low is not None else high
    pressing = high is not None and (used > high or (situation.pressing and floor is not None and used >= floor))
    case = _Case(rules, situation, pressing)
    if situation.other_work:
        return case.decide(Action.NOTHING, f"{situation.other_work} is under way, which somebody else asked for.")
    if pressing:
        case.reasons.append(
            f"{format_size(used)} of memory are used, after more than the high watermark of {format_size(high or 0)}: "
            "pages are idle earlier, and I/O is not waited for."
        )
    elif situation.requests > rules.busy_requests:
        return case.decide(
            Action.NOTHING,
            f"I/O is busy: {situation.requests:.0f} requests a second, more than {rules.busy_requests}.",
        )
    pressure = situation.pressure
    some, full = (pressure.some, pressure.full) if pressure else (0.0, 0.0)
    waiting = some >= rules.pressure_some or full >= rules.pressure_full
    if waiting:
        case.reasons.append(f"Tasks waited for memory in {some:.1f}% of the last 10 s: pages are idle earlier.")
    if not pressing and not waiting and low is not None and used < low:
        return case.decide(
            Action.NOTHING,
            f"{format_size(used)} of memory are used, less than the low watermark of {format_size(low)}.",
        )
    return _choose(case, short=pressing or waiting, thrashing=full >= rules.pressure_full)


def _choose(case: _Case, *, short: bool, thrashing: bool) -> Decision:
    """Choose between counting, recompressing and writing back. Memory may be short; the machine may be thrashing."""
    situation = case.situation
    if not situation.secondary and not _may_write_back(case):
        return case.decide(
            Action.NOTHING,
            "There is no algorithm to recompress with, and no writeback: set one of them up (recomp_algorithm, "
            "writeback-device and writeback-after).",
        )
    if situation.survey is not None:
        recompress = _recompress(case, short=short, thrashing=thrashing)
        write_back = _write_back(case, short=short)
        # Writing back frees whole pages for little processor time; recompression costs no writes.
        for decision in (write_back, recompress) if short else (recompress, write_back):
            if decision:
                return decision
    wait = pause(situation.survey_seconds)
    if situation.survey_age is not None and situation.survey_age < wait:
        return case.decide(Action.NOTHING, f"Pages are counted again in {wait - situation.survey_age:.0f} s.")
    return case.decide(Action.SURVEY, "It is time to count the pages that are idle or huge.")


def _may_write_back(case: _Case) -> bool:
    return case.situation.store and bool(case.rules.writeback_after)


def _recompress(case: _Case, *, short: bool, thrashing: bool) -> Decision | None:
    survey, asked = case.situation.survey, case.rules.recompression
    if survey is None or not case.situation.secondary:
        return None
    if thrashing:
        case.reasons.append("All tasks wait for memory, and need the processors: nothing is recompressed.")
        return None
    age = _earlier(case.rules.idle_after) if short else case.rules.idle_after
    threshold = asked.threshold if asked else 0
    both = asked is None or not (asked.idle or asked.huge)
    if asked is not None and asked.idle and asked.huge:
        pages, what = survey.improvable_huge[age], "huge pages"
    elif both or (asked is not None and asked.idle):
        pages, what = survey.improvable[age], "pages"
    else:
        pages, what = 0, "pages"
    if pages:
        order = Recompression(idle=True, huge=what == "huge pages", threshold=threshold)
        reason = f"{pages} {what} were not touched for {age} s, and not yet recompressed."
        return case.decide(Action.RECOMPRESS, reason, idle_seconds=age, order=order)
    if survey.huge and (both or (asked is not None and not asked.idle)):
        reason = f"{survey.huge} pages are huge, and not yet recompressed."
        return case.decide(Action.RECOMPRESS, reason, order=Recompression(huge=True, threshold=threshold))
    case.reasons.append(f"None of {survey.objects} pages that were not touched for {age} s is left to recompress.")
    return None


def _write_back(case: _Case, *, short: bool) -> Decision | None:
    survey, rules = case.situation.survey, case.rules
    if survey is None or not _may_write_back(case):
        return None
    age = min(rules.idle_after, rules.writeback_after) if short else rules.writeback_after
    idle, room = survey.idle[age], case.situation.budget // PAGE_SIZE
    if not idle:
        case.reasons.append(f"No page was left alone for {age} s: nothing is written back.")
        return None
    if room < min(idle, WRITE_BATCH):
        case.reasons.append(
            f"{idle} pages were not touched for {age} s, but only {format_size(case.situation.budget)} may be written "
            f"now, by the budget of {format_size(rules.write_budget)} a day and by writeback_limit."
        )
        return None
    reason = f"{idle} pages were not touched for {age} s, and {format_size(case.situation.budget)} may be written now."
    return case.decide(Action.WRITE_BACK, reason, idle_seconds=age, max_pages=min(idle, room))
