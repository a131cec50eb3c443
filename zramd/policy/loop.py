"""The thread that carries a disk's policy out: it wakes every few seconds, looks, decides, and lets another work."""

import logging
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from zramd.device.disk import Disk
from zramd.device.fetching import PageError
from zramd.device.life import BusyError, UninitialisedError
from zramd.device.survey import Survey
from zramd.device.writeback import Selection, WritebackType
from zramd.layout import PAGE_SIZE
from zramd.memory import NoMemoryError
from zramd.policy.budget import Budget
from zramd.policy.decision import Action, Decision, Situation, ages, decide, pause
from zramd.policy.pressure import Pressure, read_pressure
from zramd.policy.rules import Mode, Rules
from zramd.sizes import format_size

WAKE_SECONDS = 5.0
RATE_SECONDS = 1.0
"""Least time over which requests a second are counted."""

log = logging.getLogger(__name__)
# Who has a policy is told what it does.
log.setLevel(logging.INFO)


class Policy:
    """The policy of one disk. While it is off there is no thread, and it costs nothing."""

    def __init__(self, disk: Disk, rules: Rules, pressure: Callable[[], Pressure | None] = read_pressure) -> None:
        self.rules = rules
        self._disk = disk
        self._pressure = pressure
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._stop.set()
        self._budget = Budget(rules.write_budget, time.monotonic())
        self._survey: Survey | None = None
        self._surveyed: float | None = None
        self._survey_seconds = 0.0
        self._pressing = False
        self._requests = 0
        self._rate = 0.0
        self._looked = time.monotonic()
        self._worker: threading.Thread | None = None
        self._doing: Decision | None = None
        self._last: Decision | None = None
        self._logged = Action.NOTHING

    def switch(self, mode: Mode) -> None:
        """Let the policy act, say what it would do, or do neither, from now on."""
        with self._lock:
            self.rules = replace(self.rules, mode=mode)
            if mode is Mode.OFF:
                self._stop.set()
                self._cancel()
                self._last = None
            elif self._stop.is_set():
                self._stop = threading.Event()
                self._note_requests()
                thread = threading.Thread(target=self._run, args=(self._stop,), name="policy", daemon=True)
                thread.start()

    def explain(self) -> str:
        """Return what there is to do now, and why, a sentence a line; count pages for that."""
        try:
            if self._stop.is_set():
                # Nobody has looked at requests lately.
                self._note_requests()
                time.sleep(RATE_SECONDS)
            self._look()
        except UninitialisedError as error:
            return f"{self.rules.mode}: nothing.\n{error}.\n"
        decision = decide(self.rules, self._situation(fresh=True))
        return _tell(self.rules.mode, decision)

    def last(self) -> str:
        """Return what was decided last, and why."""
        return _tell(self.rules.mode, self._last) if self._last else f"{self.rules.mode}\n"

    def _run(self, stop: threading.Event) -> None:
        while not stop.wait(WAKE_SECONDS):
            try:
                with self._lock:
                    if not stop.is_set():
                        self.step()
            except UninitialisedError:
                self._survey = self._last = None

    def step(self) -> Decision:
        """Look, decide, and begin or end work accordingly.

        Raises:
            UninitialisedError: the disk has no size.
        """
        decision = decide(self.rules, self._situation())
        self._pressing = decision.pressing
        self._log(decision)
        self._last = decision
        if self._doing is not None:
            if decision.action is not self._doing.action:
                self._cancel()
        elif decision.action is Action.SURVEY or (
            decision.action is not Action.NOTHING and self.rules.mode is not Mode.DRY_RUN
        ):
            self._begin(decision)
        return decision

    def _log(self, decision: Decision) -> None:
        """Log what is to change pages, once for as long as it is the same."""
        if decision.action in (Action.RECOMPRESS, Action.WRITE_BACK) and decision.action is not self._logged:
            mark = " (dry run)" if self.rules.mode is Mode.DRY_RUN else ""
            log.info("%s: policy%s: %s", self._disk.name, mark, " ".join((f"{decision.action}.", *decision.reasons)))
        if decision.action is not Action.SURVEY:
            self._logged = decision.action

    def _situation(self, *, fresh: bool = False) -> Situation:
        """Return what there is to see. `fresh`: count on the last survey being new, and on nothing being under way."""
        device = self._disk.require_opened().device
        now = time.monotonic()
        self._note_requests()
        stat = self._disk.mm_stat()
        doing = self._doing is not None
        age = None if self._surveyed is None else now - self._surveyed
        if self.rules.mode is Mode.DRY_RUN and not fresh and age is not None and age >= pause(self._survey_seconds):
            self._survey = None  # nothing was done that would have made it void
        others = [work.kind for work in self._disk.works.under_way() if not self._is_mine(work.thread)]
        return Situation(
            used=stat.mem_used_total,
            limit=stat.mem_limit,
            requests=self._rate,
            pressure=self._pressure(),
            survey=self._survey,
            # What is being done goes on for as long as it would be begun.
            survey_age=None if doing else 0.0 if fresh else age,
            survey_seconds=self._survey_seconds,
            budget=min(self._budget.left(now), self._limit()),
            pressing=self._pressing,
            other_work=others[0].value if others else None,
            secondary=bool(device.identity.algorithms.secondary),
            store=device.backing is not None,
        )

    def _limit(self) -> int:
        """Return the bytes that writeback_limit leaves."""
        settings = self._disk.writeback
        return settings.limit * PAGE_SIZE if settings.limited else sys.maxsize

    def _is_mine(self, thread: int) -> bool:
        return self._worker is not None and self._worker.ident == thread

    def _note_requests(self) -> None:
        now, stat = time.monotonic(), self._disk.request_stat()
        requests = stat.reads + stat.writes
        if now - self._looked >= RATE_SECONDS:
            # After a reset there are fewer than before.
            self._rate = max(0, requests - self._requests) / (now - self._looked)
            self._requests, self._looked = requests, now

    def _cancel(self) -> None:
        for work in self._disk.works.under_way():
            if self._is_mine(work.thread):
                work.cancelled = True

    def _begin(self, decision: Decision) -> None:
        self._doing = decision
        self._worker = threading.Thread(target=self._work, args=(decision,), name="policy-work", daemon=True)
        self._worker.start()

    def _work(self, decision: Decision) -> None:
        try:
            self._carry_out(decision)
        except (BusyError, UninitialisedError) as error:
            log.info("%s: policy: %s", self._disk.name, error)
        except (OSError, NoMemoryError, PageError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            log.warning("%s: policy: %s: %s", self._disk.name, decision.action, reason)
        finally:
            if decision.action is not Action.SURVEY:
                self._survey = None  # it holds no more
            self._doing = None

    def _carry_out(self, decision: Decision) -> None:
        if decision.action is Action.SURVEY:
            self._look()
            return
        if decision.idle_seconds is not None:
            self._disk.mark_idle(decision.idle_seconds)
        if decision.action is Action.WRITE_BACK:
            self._write_back(decision.max_pages)
            self._compact()
        if decision.order is not None:
            outcome = self._disk.recompress(decision.order)
            log.info(
                "%s: policy: %d of %d pages recompressed, %d bytes saved%s",
                self._disk.name,
                outcome.recompressed,
                outcome.tried,
                outcome.saved,
                ", cut short" * outcome.cancelled,
            )
            if outcome.recompressed and not outcome.cancelled:
                self._compact()

    def _compact(self) -> None:
        """Give back the memory between objects: what became smaller, or is gone, has left gaps."""
        before = self._disk.mm_stat().pages_compacted
        self._disk.compact()
        pages = self._disk.mm_stat().pages_compacted - before
        log.info("%s: policy: %s of memory given back by compaction", self._disk.name, format_size(pages * PAGE_SIZE))

    def _write_back(self, most: int) -> None:
        """Write back idle pages. The budget pays for all that is written, what is moved on the store too."""
        before = self._disk.bd_stat().writes
        try:
            outcome = self._disk.write_back(lambda pages: [Selection(WritebackType.IDLE, 0, pages - 1)], most)
        finally:
            self._budget.spend((self._disk.bd_stat().writes - before) * PAGE_SIZE)
        log.info(
            "%s: policy: %d pages written back, %d bytes of memory%s",
            self._disk.name,
            outcome.written,
            outcome.bytes_written,
            ", cut short" * outcome.cancelled,
        )

    def _look(self) -> None:
        """Count pages."""
        threshold = self.rules.recompression.threshold if self.rules.recompression else 0
        survey = self._disk.survey(ages(self.rules), threshold)
        if survey is not None:
            self._survey, self._survey_seconds, self._surveyed = survey, survey.seconds, time.monotonic()


def _tell(mode: Mode, decision: Decision) -> str:
    return "".join(f"{line}\n" for line in (f"{mode}: {decision.action}.", *decision.reasons))
