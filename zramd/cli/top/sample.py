"""What a server tells of one disk at a moment, and what happened between two such moments."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zramd.status.classes import ClassUse, parse_classes
from zramd.status.client import StatusError, ask
from zramd.status.percentile import percentile

ASK_SECONDS = 3.0
"""A server that does not answer by then counts as not running."""
_QUESTIONS = "json\npolicy\nclasses"
"""On one connection. What comes after a blank line is the next answer; only that to the last has blank lines itself."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A disk at a moment (`at`, in seconds of CLOCK_MONOTONIC).

    `facts` is the attribute json; `policy` are the lines of that attribute, `classes` the size classes in use.
    """

    at: float
    facts: dict[str, Any]
    policy: list[str]
    classes: list[ClassUse]
    pool: ClassUse


@dataclass(frozen=True, slots=True)
class Rate:
    """One operation between two samples: rates a second, and latencies in nanoseconds (None: there was none)."""

    requests: float
    bytes: float
    errors: float
    p50: float | None
    p99: float | None
    longest: float | None


def take(path: Path) -> Sample:
    """Ask the server at a status socket.

    Raises:
        StatusError: it does not answer.
    """
    answers = ask(path, _QUESTIONS, ASK_SECONDS).split("\n\n", 2)
    if len(answers) < _QUESTIONS.count("\n") + 1:
        raise StatusError(f"the server at {path} ended in the middle of its answer")
    facts, policy, classes = answers
    return Sample(time.monotonic(), json.loads(facts), policy.splitlines(), *parse_classes(classes))


def rates(before: Sample, now: Sample) -> dict[str, Rate] | None:
    """Return what each operation did between two samples; None if the server was started anew between them."""
    old, new = before.facts["requests"], now.facts["requests"]
    if any(new[op][key] < old[op][key] for op in new for key in ("count", "errors")):
        return None
    seconds, bounds = now.at - before.at, now.facts["latency_bounds"]
    return {op: _rate(old[op], new[op], seconds, bounds) for op in new}


def _rate(old: dict[str, Any], new: dict[str, Any], seconds: float, bounds: list[int]) -> Rate:
    # Counters are not read all at one moment.
    buckets = [max(0, after - before) for before, after in zip(old["buckets"], new["buckets"], strict=True)]
    return Rate(
        *((new[key] - old[key]) / seconds for key in ("count", "bytes", "errors")),
        *(percentile(bounds, buckets, share) for share in (0.5, 0.99, 1.0)),
    )


def ratio(sample: Sample) -> float | None:
    """Return stored data by the memory that they take, None if they take none."""
    memory = sample.facts["mm_stat"]
    used: int = memory["mem_used_total"]
    return memory["orig_data_size"] / used if used else None


def as_json(sample: Sample, interval: float | None, found: dict[str, Rate] | None) -> dict[str, Any]:
    """Return a sample and the rates since the one before it, ready for JSON: bytes, nanoseconds, seconds."""
    facts = sample.facts
    return {
        "disk": facts["name"],
        "running": True,
        "seconds": interval,
        "operations": {op: dict(_json_rate(rate)) for op, rate in (found or {}).items()},
        "ratio": ratio(sample),
        "disksize": facts["disksize"],
        "mm_stat": facts["mm_stat"],
        "bd_stat": facts["bd_stat"],
        "connections": facts["connections"],
        "inflight": facts["inflight"],
        "pool": _json_use(sample.pool),
        "classes": [_json_use(use) for use in sample.classes],
        "policy": sample.policy,
        "work": facts["work"],
    }


def _json_rate(rate: Rate) -> Iterator[tuple[str, float | None]]:
    yield "requests_per_second", rate.requests
    yield "bytes_per_second", rate.bytes
    yield "errors_per_second", rate.errors
    yield "p50", rate.p50
    yield "p99", rate.p99
    yield "max", rate.longest


def _json_use(use: ClassUse) -> dict[str, int]:
    return {
        "size": use.size,
        "chain": use.chain,
        "objects": use.allocated,
        "used": use.used,
        "memory": use.memory,
        "compactable": use.compactable,
    }
