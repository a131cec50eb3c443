"""What the doctor says of one thing that it looked at."""

from dataclasses import dataclass
from enum import Enum


class Verdict(Enum):
    """How bad a finding is."""

    OK = "ok"
    ADVICE = "advice"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that was looked at, with one line on it; `remedy` is "" where there is nothing to do."""

    name: str
    verdict: Verdict
    text: str
    remedy: str = ""


def ok(name: str, text: str) -> Finding:
    """Return a finding that asks for nothing."""
    return Finding(name, Verdict.OK, text)


def advice(name: str, text: str, remedy: str) -> Finding:
    """Return what would be safer or faster otherwise."""
    return Finding(name, Verdict.ADVICE, text, remedy)


def problem(name: str, text: str, remedy: str) -> Finding:
    """Return what does not work, or is not safe."""
    return Finding(name, Verdict.PROBLEM, text, remedy)
