"""What `zramd top` knows of the disks: their servers are asked again and again, those that are gone too."""

import os
import queue
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zramd.cli.top.sample import Rate, Sample, as_json, rates, take
from zramd.status.client import NoServerError, StatusError, find_disks

HISTORY = 200
"""Intervals of which rates are kept."""
FIND_SECONDS = 10.0
"""Between two looks for disks that are new."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What was found at a status socket at a time (CLOCK_MONOTONIC): a sample, or why there is none.

    `runs` is false if nobody listens there, true if there is a server that does not answer.
    """

    path: Path
    at: float
    sample: Sample | None
    trouble: str = ""
    runs: bool = True


class Finder:
    """Asks at the sockets that were named, or at all that are found."""

    def __init__(self, named: list[Path]) -> None:
        self._named = named
        self._paths = dict.fromkeys(named)
        self._found: float | None = None

    def find(self) -> None:
        """Look for disks.

        Raises:
            StatusError: there is none.
        """
        self._found = time.monotonic()
        if not self._named:
            self._paths |= dict.fromkeys(find_disks())

    def ask(self) -> list[Answer]:
        """Ask for each disk that was ever found."""
        if self._found is None or time.monotonic() - self._found >= FIND_SECONDS:
            # If there is none, those that are known do not answer either, and say so.
            with suppress(StatusError):
                self.find()
        return [_ask(path) for path in self._paths]


def _ask(path: Path) -> Answer:
    try:
        return Answer(path, time.monotonic(), take(path))
    except StatusError as error:
        return Answer(path, time.monotonic(), None, str(error), not isinstance(error, NoServerError))


@dataclass(slots=True)
class Tracker:
    """One disk, by its status socket.

    Attributes:
        now: the last sample, None before the first.
        rates: by operation over the last interval of `seconds`, None if there are none.
        history: requests a second, all operations together, the last one last.
        trouble: why the server does not answer, empty if it does.
        runs: whether there is a server.
        gone: since when it does not answer.
        restarts: how often the counters began anew.
        ended: the last work that was under way and is no more, and when that was noticed.
    """

    path: Path
    now: Sample | None = None
    rates: dict[str, Rate] | None = None
    seconds: float | None = None
    history: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY))
    trouble: str = ""
    runs: bool = True
    gone: float = 0.0
    restarts: int = 0
    ended: tuple[dict[str, Any], float] | None = None

    @property
    def name(self) -> str:
        """What the disk is called."""
        return str(self.now.facts["name"]) if self.now else self.path.stem

    def note(self, answer: Answer) -> None:
        """Take in what was found."""
        before, self.rates, self.seconds, self.runs = self.now, None, None, answer.runs
        if answer.sample is None:
            if not self.trouble:
                self.gone = answer.at
            self.trouble = answer.trouble
            return
        self.now, self.trouble = answer.sample, ""
        if before is None:
            return
        self._note_work(before, answer.sample)
        self.rates = rates(before, answer.sample)
        if self.rates is None:
            self.restarts += 1
            return
        self.seconds = answer.sample.at - before.at
        self.history.append(sum(rate.requests for rate in self.rates.values()))

    def _note_work(self, before: Sample, now: Sample) -> None:
        under_way = {(work["kind"], work["started"]) for work in now.facts["work"]}
        for work in before.facts["work"]:
            if (work["kind"], work["started"]) not in under_way:
                self.ended = work, now.at

    def json(self) -> dict[str, Any]:
        """Return it ready for JSON."""
        if self.trouble or self.now is None:
            return {"disk": self.name, "running": False, "error": self.trouble}
        return as_json(self.now, self.seconds, self.rates)


def note(trackers: list[Tracker], answers: list[Answer]) -> None:
    """Take in a round of answers; disks that are new come last."""
    known = {tracker.path: tracker for tracker in trackers}
    for answer in answers:
        if answer.path not in known:
            known[answer.path] = Tracker(answer.path)
            trackers.append(known[answer.path])
        known[answer.path].note(answer)


class Asking(threading.Thread):
    """Asks every `interval` seconds, and lets a pipe know that there are `answers`: keys are answered meanwhile."""

    def __init__(self, finder: Finder, interval: float, wake: int) -> None:
        super().__init__(name="asking", daemon=True)
        self.answers: queue.SimpleQueue[list[Answer]] = queue.SimpleQueue()
        self._finder = finder
        self._interval = interval
        self._paused = False
        self._wake = wake
        self._changed = threading.Event()

    def run(self) -> None:
        """Ask for as long as the process lives."""
        due = time.monotonic()
        while True:
            if not self._paused:
                self.answers.put(self._finder.ask())
                os.write(self._wake, b".")
            due = max(due + self._interval, time.monotonic())
            self._changed.wait(None if self._paused else max(due - time.monotonic(), 0.0))
            if self._changed.is_set():
                self._changed.clear()
                due = time.monotonic()

    def change(self, interval: float, *, paused: bool) -> None:
        """Ask so often from now on, or not at all."""
        self._interval, self._paused = interval, paused
        self._changed.set()
