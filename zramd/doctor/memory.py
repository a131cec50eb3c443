"""Memory, and room for the regions, beside the sizes of the disks that are served or configured."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from zramd.doctor.finding import Finding, advice, ok, problem
from zramd.doctor.kernel import NOSWAP_KERNEL
from zramd.doctor.machine import Machine, Planned
from zramd.sizes import format_size


def examine(machine: Machine, disks: Iterable[Planned]) -> Iterator[Finding]:
    """Yield what is found."""
    disks = list(disks)
    free = machine.memory("MemAvailable")
    if not disks:
        yield ok("memory", f"{format_size(free)} are free, and no disk is served or configured")
    for disk in disks:
        yield _memory(machine, disk)
        if disk.state is not None:
            yield _room(machine, disk, disk.state)


def _memory(machine: Machine, disk: Planned) -> Finding:
    name, size = f"memory {disk.name}", format_size(disk.size)
    total, free = machine.memory("MemTotal"), machine.memory("MemAvailable") + disk.used
    if not disk.size:
        return ok(name, f"it has no size; {format_size(free)} are free")
    if disk.expected > total:
        return advice(
            name,
            f"{size} would take {format_size(disk.expected)} {disk.basis}, of {format_size(total)} of memory",
            f"make it smaller, at most {format_size(2 * total)}, or give it a resident-limit",
        )
    if disk.most > total:
        return advice(
            name,
            f"{size} would take all memory ({format_size(total)}) if it does not compress",
            f"give it a resident-limit, such as {format_size(total // 2)}: zramd set mem_limit=",
        )
    if disk.expected > free:
        return advice(
            name,
            f"{size} takes {format_size(disk.expected)} {disk.basis}, and {format_size(free)} of memory are free",
            "make it smaller, or end what takes memory",
        )
    return ok(name, f"{size} takes {format_size(disk.expected)} {disk.basis}; {format_size(free)} of memory are free")


def _room(machine: Machine, disk: Planned, state: Path) -> Finding:
    name = f"room {disk.name}"
    if disk.swap and machine.version >= NOSWAP_KERNEL:
        return ok(name, f"{state} is to be a tmpfs of its own, as large as memory")
    room = machine.room(state) + disk.used
    found = f"{state} has room for {format_size(room)}"
    if room >= disk.most:
        return ok(name, found)
    remedy = "make that file system larger (mount -o remount,size=...), or choose another state directory"
    if room < disk.expected:
        text = f"{found}, and {format_size(disk.size)} take {format_size(disk.expected)} {disk.basis}"
        return problem(name, text, f"{remedy}: writes fail with ENOSPC when it is full")
    text = f"{found}, and {format_size(disk.size)} that do not compress take {format_size(disk.most)}"
    return advice(name, text, f"{remedy}: writes fail with ENOSPC when it is full")
