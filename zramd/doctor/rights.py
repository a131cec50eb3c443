"""What this process may do: capabilities, and the limits that stand in for them."""

from collections.abc import Iterator

from zramd.doctor.finding import Finding, ok, problem
from zramd.doctor.machine import Machine
from zramd.nbd.limits import DEFAULT_LIMITS
from zramd.sizes import format_size

CAP_IPC_LOCK, CAP_SYS_ADMIN, CAP_SYS_NICE, CAP_SYS_RESOURCE = 14, 21, 23, 24
OWN_FILES = 64
"""Files that a server has open beside its connections: regions, sockets, logs."""
FREE_FILES = 1024
"""Files of the whole machine that should still be free."""
HOW = "run as root; a container or unit has to be given it"


def examine(machine: Machine) -> Iterator[Finding]:
    """Yield what is found."""
    yield _locked_memory(machine)
    yield _real_time(machine)
    for name, bit, purpose in (
        ("CAP_SYS_ADMIN", CAP_SYS_ADMIN, "to attach /dev/nbdN"),
        ("CAP_SYS_RESOURCE", CAP_SYS_RESOURCE, "for PR_SET_IO_FLUSHER and the OOM score"),
    ):
        if machine.has_capability(bit):
            yield ok(name, f"there, {purpose}")
        else:
            yield problem(name, f"missing, {purpose}", HOW)
    yield _open_files(machine)
    yield _files_of_machine(machine)


def _locked_memory(machine: Machine) -> Finding:
    limit = machine.limit("Max locked memory")
    if machine.has_capability(CAP_IPC_LOCK):
        return ok("locked memory", "no limit, by CAP_IPC_LOCK")
    if limit is None:
        return ok("locked memory", "no limit")
    remedy = "run as root, or LimitMEMLOCK=infinity in the unit"
    return problem("locked memory", f"{format_size(limit)} at most: a server for swap locks all it has", remedy)


def _real_time(machine: Machine) -> Finding:
    if machine.has_capability(CAP_SYS_NICE):
        return ok("real time", "allowed, by CAP_SYS_NICE")
    limit = machine.limit("Max realtime priority")
    if limit is None or limit >= 1:
        return ok("real time", "allowed")
    remedy = "run as root, or LimitRTPRIO=1 in the unit"
    return problem("real time", "not allowed: a server for swap may wait for those that wait for it", remedy)


def _open_files(machine: Machine) -> Finding:
    wanted = DEFAULT_LIMITS.connections + OWN_FILES
    limit = machine.limit("Max open files")
    if limit is None or limit >= wanted:
        return ok("open files", f"{'no limit' if limit is None else limit}")
    remedy = f"LimitNOFILE={wanted} in the unit, or ulimit -n {wanted}"
    return problem("open files", f"{limit} at most, for up to {DEFAULT_LIMITS.connections} connections", remedy)


def _files_of_machine(machine: Machine) -> Finding:
    words = machine.read("proc/sys/fs/file-nr").split()
    used, _, most = (int(word) for word in words) if len(words) == 3 else (0, 0, 1 << 63)
    if most - used >= FREE_FILES:
        return ok("file-max", f"{used} files are open on the machine")
    return problem("file-max", f"{used} of at most {most} files are open", f"sysctl fs.file-max={2 * most}")
