"""What on this machine stands in the way of a disk, and of swapping to it, or makes it slower than it could be.

Each finding says what was found and what to do about it. What is looked at is the machine and what this process may
do; what a running server lacks, `zramd status` tells.
"""

from collections.abc import Iterator
from pathlib import Path

from zramd.doctor import kernel, memory, rights, setup, swap
from zramd.doctor.finding import Finding, Verdict
from zramd.doctor.machine import Answer, Machine, Planned

__all__ = ["Finding", "Machine", "Verdict", "examine"]


def examine(machine: Machine) -> Iterator[Finding]:
    """Yield what is found."""
    answers = list(machine.servers())
    findings, configured = setup.configuration(machine)
    yield from kernel.examine(machine)
    yield from rights.examine(machine)
    yield swap.examine(machine)
    yield from findings
    yield from setup.examine(machine, answers)
    served = [disk for disk in map(_served, answers) if disk is not None]
    names = {disk.name for disk in served}
    yield from memory.examine(machine, [*served, *(disk for disk in configured if disk.name not in names)])


def _served(answer: Answer) -> Planned | None:
    facts = answer.facts
    if facts is None or not isinstance(used := facts.get("mm_stat"), dict):
        return None
    # By default the regions lie beside the socket.
    state: Path | None = answer.path.with_suffix("")
    state = state if state and state.is_dir() else None
    size, swap = facts.get("disksize"), facts.get("measures") is not None
    size = size if isinstance(size, int) else 0
    return Planned(str(facts.get("name")), size, used["mem_limit"], used["mem_used_total"], state, swap)
