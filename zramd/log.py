"""The log: lines on standard error, and no more of them than somebody can read."""

import logging
import sys
import time

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


def start_log() -> None:
    """Log warnings to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("zramd: %(message)s"))
    handler.addFilter(Throttle())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
