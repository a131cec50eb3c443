"""Pressure on memory (PSI): /proc/pressure/memory of Linux 4.20 and later."""

import re
from dataclasses import dataclass
from pathlib import Path

FILE = Path("/proc/pressure/memory")


@dataclass(frozen=True, slots=True)
class Pressure:
    """Hundredths of the last ten seconds in which some tasks, or all at once, waited for memory."""

    some: float
    full: float


def parse_pressure(text: str) -> Pressure | None:
    """Return what the file says, None if it is not in the form that is known."""
    found = dict(re.findall(r"^(some|full) avg10=([0-9.]+)", text, re.MULTILINE))
    if found.keys() != {"some", "full"}:
        return None
    return Pressure(float(found["some"]), float(found["full"]))


def read_pressure() -> Pressure | None:
    """Return the pressure now, None if this kernel does not tell it (CONFIG_PSI, or psi=1 on its command line)."""
    try:
        return parse_pressure(FILE.read_text())
    except OSError:
        return None
