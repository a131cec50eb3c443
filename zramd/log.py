"""The log: lines on standard error, and no more of them than somebody can read."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from logging.handlers import QueueHandler
from queue import Full, Queue
from threading import Thread

PERIOD_SECONDS = 60.0
MAX_LINES = 50
"""In a period. Whoever may connect must not be able to fill the log."""


class Throttle(logging.Filter):
    """Lets MAX_LINES pass in each period, and says with the next one how many it did not."""

    def __init__(self) -> None:
        super().__init__()
        self._start = time.monotonic()
        self._lines = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Say whether a record passes; errors always do. Threads that race here pass a line more or less."""
        if record.levelno >= logging.ERROR:
            return True
        now = time.monotonic()
        if now - self._start >= PERIOD_SECONDS:
            left_out = self._lines - MAX_LINES
            if left_out > 0:
                record.msg = f"({left_out} lines were left out) {record.msg}"
            self._start, self._lines = now, 0
        self._lines += 1
        return self._lines <= MAX_LINES


MAX_WAITING = 1000
"""Lines that nobody takes off standard error; more are dropped."""


END_SECONDS = 1.0
"""For the lines that wait at the end."""


class _Dropping(QueueHandler):
    def enqueue(self, record: logging.LogRecord) -> None:
        with suppress(Full):
            self.queue.put_nowait(record)


@contextmanager
def logging_aside() -> Iterator[None]:
    """Have what is logged written by a thread of its own while this lasts.

    Who reads the log, such as journald, may be waiting for memory that only the threads that log can free.
    """
    root = logging.getLogger()
    handlers = root.handlers[:]
    waiting: Queue[logging.LogRecord | None] = Queue(MAX_WAITING)

    def write() -> None:
        while record := waiting.get():
            for handler in handlers:
                handler.handle(record)

    thread = Thread(target=write, name="log", daemon=True)
    thread.start()
    root.handlers[:] = [_Dropping(waiting)]
    try:
        yield
    finally:
        root.handlers[:] = handlers
        with suppress(Full):
            waiting.put(None, timeout=END_SECONDS)
            thread.join(END_SECONDS)


def start_log() -> None:
    """Log warnings to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("zramd: %(message)s"))
    handler.addFilter(Throttle())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
