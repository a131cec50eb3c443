"""How much may be written back: a daily budget that refills continuously."""

DAY = 86400.0
SHARE = 24
"""What is unused adds up to one part in so many of the day's budget. The rest is what comes in over a day, so that no
24 hours ever have more than the budget."""


class Budget:
    """A budget of bytes a day, empty at first: a server that is started over and over writes no more than any other."""

    def __init__(self, per_day: int, now: float) -> None:
        self._most = per_day / SHARE
        self._per_second = (per_day - self._most) / DAY
        self._left = 0.0
        self._noted = now

    def left(self, now: float) -> int:
        """Return the bytes that may be written at a time, in seconds of a clock that never goes back."""
        self._left = min(self._most, self._left + (now - self._noted) * self._per_second)
        self._noted = now
        return int(self._left)

    def spend(self, size: int) -> None:
        """Note that so many bytes were written."""
        self._left -= size
