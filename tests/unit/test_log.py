import logging
import threading

import pytest

from zramd import log


def record(text: str, level: int = logging.WARNING) -> logging.LogRecord:
    return logging.LogRecord("zramd", level, "", 0, text, (), None)


def test_a_flood_is_cut_off_until_the_period_is_over_and_then_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("zramd.log.time.monotonic", lambda: now[0])
    throttle = log.Throttle()
    passed = [throttle.filter(record("flood")) for _ in range(log.MAX_LINES + 7)]
    assert passed == [True] * log.MAX_LINES + [False] * 7
    assert throttle.filter(record("a defect", logging.ERROR))
    now[0] += log.PERIOD_SECONDS
    after = record("after")
    assert throttle.filter(after)
    assert after.getMessage() == "(7 lines were left out) after"
    following = record("following")
    assert throttle.filter(following)
    assert following.getMessage() == "following"


class Reader(logging.Handler):
    """Somebody who takes lines only while `taking` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.taking = threading.Event()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.taking.wait(20)
        self.lines.append(record.getMessage())


def test_a_log_that_nobody_reads_holds_up_nobody_who_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    root, reader = logging.getLogger(), Reader()
    monkeypatch.setattr(root, "handlers", [reader])
    with log.logging_aside():
        for number in range(log.MAX_WAITING + 50):
            logging.getLogger("zramd").warning("line %d", number)
        assert reader.lines == []
        reader.taking.set()
    # All that fitted, and perhaps what the thread had taken already.
    assert log.MAX_WAITING <= len(reader.lines) <= log.MAX_WAITING + 1
    assert reader.lines[0] == "line 0"
    assert root.handlers == [reader]
