"""How many requests were answered, and how long they took: counted by each connection, summed when somebody asks."""

import threading
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import add
from time import monotonic_ns

from zramd.layout import (
    COMMANDS,
    LATENCY_BUCKETS,
    LATENCY_SHIFT,
    LATENCY_STEP_SHIFT,
    REQUEST_WORDS,
    REQUESTS_IN_FLIGHT,
    RequestRecord,
)
from zramd.memory import record

OPERATIONS = {"read": 0, "write": 1, "flush": 3, "trim": 4, "write_zeroes": 6, "cache": 5, "block_status": 7}
"""What is counted, by the numbers that the commands have in NBD."""
_STEPS = 1 << LATENCY_STEP_SHIFT
LATENCY_BOUNDS = tuple(
    _STEPS + number % _STEPS << LATENCY_SHIFT - LATENCY_STEP_SHIFT + number // _STEPS
    for number in range(LATENCY_BUCKETS - 1)
)
"""Nanoseconds that the requests in a bucket took at most; the last bucket has no bound."""

# Plain integers: an enum member costs more than what it is used in.
_ERRORS, _BYTES, _NANOSECONDS, _BUCKETS, _END = map(int, RequestRecord)
_FLUSH = OPERATIONS["flush"]


class RequestCounters:
    """What one connection has answered, in words that the compiled engine counts in too: see `RequestRecord`.

    `counts` and `sizes` (in bytes) are of those that will be answered next, by command.
    """

    def __init__(self) -> None:
        self.words = record(REQUEST_WORDS)
        self.counts = [0] * COMMANDS
        self.sizes = [0] * COMMANDS

    def add(self, command: int, length: int) -> None:
        """Note a request that will be answered next."""
        if command < COMMANDS:
            self.counts[command] += 1
            self.sizes[command] += length

    def fail(self, command: int, length: int) -> None:
        """Note that what was, or will be, added fails."""
        if command < COMMANDS:
            self.words[command * _END + _ERRORS] += 1
            self.sizes[command] -= length

    def note_answers(self, received_at: int) -> None:
        """Count what was added: it was received at that time (`monotonic_ns`), and is answered now."""
        latency = monotonic_ns() - received_at
        words, counts, sizes = self.words, self.counts, self.sizes
        bucket = _BUCKETS + bisect_left(LATENCY_BOUNDS, latency)
        for command, count in enumerate(counts):
            if count:
                row = command * _END
                words[row + _NANOSECONDS] += count * latency
                words[row + bucket] += count
                if command != _FLUSH:
                    words[row + _BYTES] += sizes[command]
                counts[command] = sizes[command] = 0
        words[REQUESTS_IN_FLIGHT] = 0


@dataclass(frozen=True, slots=True)
class OperationStat:
    """Requests of one operation, answered since the server started; `bytes` are of those without an error.

    `buckets` are by latency, up to each of LATENCY_BOUNDS and beyond.
    """

    count: int
    errors: int
    bytes: int
    nanoseconds: int
    buckets: list[int]


class Requests:
    """What all connections of a disk have answered. It outlives them, and resets."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connected: list[RequestCounters] = []
        self._ended = {command: [0] * _END for command in OPERATIONS.values()}

    @contextmanager
    def counting(self) -> Iterator[RequestCounters]:
        """Return the counters of a connection that begins; what they have stays when it ends."""
        counters = RequestCounters()
        with self._lock:
            self._connected.append(counters)
        try:
            yield counters
        finally:
            with self._lock:
                self._connected.remove(counters)
                self._ended = {command: _sum(row, [counters], command) for command, row in self._ended.items()}

    def stat(self) -> dict[str, OperationStat]:
        """Return what was answered, by operation."""
        with self._lock:
            rows = {name: _sum(self._ended[command], self._connected, command) for name, command in OPERATIONS.items()}
        stats = {}
        for name, row in rows.items():
            buckets = row[_BUCKETS:]
            stats[name] = OperationStat(sum(buckets), row[_ERRORS], row[_BYTES], row[_NANOSECONDS], buckets)
        return stats

    @property
    def in_flight(self) -> int:
        """How many are received and not answered yet, by a look that stops nobody."""
        with self._lock:
            return sum(counters.words[REQUESTS_IN_FLIGHT] for counters in self._connected)


def _sum(total: list[int], connections: list[RequestCounters], command: int) -> list[int]:
    """Return what a command has with the words of connections added."""
    start = command * _END
    for words in (counters.words for counters in connections):
        # Most connections use two commands: the rest is not worth adding.
        if words[start + _NANOSECONDS] or words[start + _ERRORS]:
            total = list(map(add, total, words[start : start + _END]))
    return total
