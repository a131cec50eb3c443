"""The long work that a disk has under way: what it is, how far it is, and how it is cancelled.

Work runs in the thread that was asked to do it. Others see it in the disk's `Works`, and may cancel it there.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum


class WorkKind(StrEnum):
    """What is done."""

    COMPACT = "compact"
    IDLE = "idle"
    RECOMPRESS = "recompress"
    WRITEBACK = "writeback"
    SAVE = "save"
    RESTORE = "restore"
    TRAIN = "train"
    ESTIMATE = "estimate"
    SURVEY = "survey"


CHANGES_PAGES = {WorkKind.RECOMPRESS, WorkKind.WRITEBACK, WorkKind.RESTORE}
"""Of these, a disk has at most one under way."""
ANY_NUMBER = {WorkKind.IDLE, WorkKind.SURVEY}
"""Of these it may have several of one kind."""


class WorkUnderWayError(Exception):
    """The disk is at other work, beside which this cannot be done."""


@dataclass(slots=True, eq=False)
class Work:
    """One piece of work, written to by the thread that does it and read by others.

    Attributes:
        done: how many of `total` pages (or parts, as the kind has them) are done; a total of 0 is not known yet.
        changed: pages that are what the work makes of them: idle, smaller, written back.
        saved: bytes that are no longer used in memory.
        thread: the one that does it (its identifier).
        started: in seconds of CLOCK_MONOTONIC.
        cancelled: whether it is to stop soon, with everything whole; set by any thread.
    """

    kind: WorkKind
    done: int = 0
    total: int = 0
    changed: int = 0
    saved: int = 0
    thread: int = field(default_factory=threading.get_ident)
    started: float = field(default_factory=time.monotonic)
    cancelled: bool = False

    @property
    def seconds(self) -> float:
        """How long it has been under way."""
        return time.monotonic() - self.started

    def __str__(self) -> str:
        """Return one line: `recompress: 1200 of 5000 in 3.2 s, 81920 bytes saved`."""
        of = f" of {self.total}" if self.total else ""
        saved = f", {self.saved} bytes saved" if self.saved else ""
        return f"{self.kind}: {self.done}{of} in {self.seconds:.1f} s{saved}{', cancelled' * self.cancelled}"


class Works:
    """The work of one disk."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: list[Work] = []

    @contextmanager
    def begin(self, kind: WorkKind) -> Iterator[Work]:
        """Have work under way for as long as the context lasts.

        Raises:
            WorkUnderWayError: there is other work that excludes it.
        """
        work = Work(kind)
        with self._lock:
            for other in self._under_way:
                if (other.kind is kind and kind not in ANY_NUMBER) or {other.kind, kind} <= CHANGES_PAGES:
                    raise WorkUnderWayError(f"{other.kind} is under way: wait for it, or cancel it")
            self._under_way.append(work)
        try:
            yield work
        finally:
            with self._lock:
                self._under_way.remove(work)

    def under_way(self) -> list[Work]:
        """Return what is under way now, the oldest first."""
        with self._lock:
            return list(self._under_way)

    def cancel(self, kind: WorkKind | None = None) -> list[Work]:
        """Let work of a kind, or all, stop soon. Return it: it may still be under way."""
        cancelled = [work for work in self.under_way() if kind in (None, work.kind)]
        for work in cancelled:
            work.cancelled = True
        return cancelled
