import logging

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
