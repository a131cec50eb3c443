"""What the kernel can do, and how it is set up for swap."""

import re
from collections.abc import Iterator

from zramd.doctor.finding import Finding, advice, ok, problem
from zramd.doctor.machine import Machine

NOSWAP_KERNEL = (6, 4)
"""The first Linux with tmpfs that is never swapped out."""
MIN_FREE_SHARE = 16
"""At least this part of memory (1/16), up to `MIN_FREE_MOST`, is to be kept free for what frees memory."""
MIN_FREE_MOST = 64 << 10
"""KiB."""
SWAPPINESS = 100
"""Swap and files cost the same to read again, or swap less: the kernel's document on vm.swappiness."""
NBD_MAJOR = 43


def examine(machine: Machine) -> Iterator[Finding]:
    """Yield what is found."""
    yield _nbd(machine)
    yield _noswap(machine)
    yield _pressure(machine)
    yield _min_free(machine)
    yield _swappiness(machine)
    yield _page_cluster(machine)
    yield _zswap(machine)
    yield _resume(machine)


def has_nbd(machine: Machine) -> bool:
    """Say whether the kernel has an NBD client, loaded or as a module."""
    modules = f"lib/modules/{machine.release}"
    lists = (f"{modules}/modules.builtin", f"{modules}/modules.dep")
    return machine.exists("sys/module/nbd") or any("/nbd.ko" in machine.read(name) for name in lists)


def _nbd(machine: Machine) -> Finding:
    if has_nbd(machine):
        return ok("nbd", "the kernel has an NBD client")
    remedy = "install the module of this kernel, or use `zramd attach --fuse`, which is slower and not for swap"
    return problem("nbd", f"the kernel ({machine.release}) has no NBD client", remedy)


def _noswap(machine: Machine) -> Finding:
    release = machine.release
    if machine.version >= NOSWAP_KERNEL:
        return ok("noswap", "regions can lie on a tmpfs that is never swapped out")
    if "memory" in machine.read("sys/fs/cgroup/cgroup.controllers").split():
        remedy = "run the server in a cgroup with memory.swap.max=0, as zramd@.service does (MemorySwapMax=0)"
        return advice("noswap", f"Linux {release} may swap a tmpfs out", remedy)
    remedy = "use Linux 6.4 or newer, or cgroup version 2 with the memory controller"
    return problem("noswap", f"Linux {release} would swap the regions out to themselves", remedy)


def _pressure(machine: Machine) -> Finding:
    if machine.exists("proc/pressure/memory"):
        return ok("pressure", "the kernel tells of pressure on memory")
    return advice("pressure", "the policy cannot see pressure on memory", "boot with psi=1")


def _min_free(machine: Machine) -> Finding:
    kept = int(machine.read("proc/sys/vm/min_free_kbytes") or "0")
    wanted = min((machine.memory("MemTotal") >> 10) // MIN_FREE_SHARE, MIN_FREE_MOST)
    text = f"{kept} KiB are kept free for what frees memory"
    if kept >= wanted:
        return ok("min_free", text)
    return advice("min_free", text, f"sysctl vm.min_free_kbytes={wanted}: a server that died starts again sooner")


def _swappiness(machine: Machine) -> Finding:
    found = int(machine.read("proc/sys/vm/swappiness") or "60")
    if found >= SWAPPINESS:
        return ok("swappiness", f"at {found}, the kernel takes swap to cost no more than reading files again")
    remedy = f"sysctl vm.swappiness={SWAPPINESS}: this swap is memory"
    return advice("swappiness", f"at {found}, the kernel takes swap to cost more than reading files again", remedy)


def _page_cluster(machine: Machine) -> Finding:
    pages = 1 << int(machine.read("proc/sys/vm/page-cluster") or "0")
    text = f"the kernel reads {pages} page{'s' * (pages > 1)} at once from swap"
    if pages == 1:
        return ok("page-cluster", text)
    return advice("page-cluster", text, "sysctl vm.page-cluster=0: nothing has to be sought in memory")


def _zswap(machine: Machine) -> Finding:
    if machine.read("sys/module/zswap/parameters/enabled") != "Y":
        return ok("zswap", "off")
    remedy = "echo N > /sys/module/zswap/parameters/enabled, or boot with zswap.enabled=0"
    return advice("zswap", "on: pages are compressed, and kept, twice", remedy)


def _resume(machine: Machine) -> Finding:
    """Hibernation saves memory to the resume device, which must not be memory itself."""
    match = re.search(r"(?:^|\s)resume=(\S+)", machine.read("proc/cmdline"))
    device = match[1] if match else ""
    number = machine.read("sys/power/resume")  # of the device, as the kernel found it
    zram = re.search(r"^ *(\d+) zram$", machine.read("proc/devices"), re.MULTILINE)
    majors = {str(NBD_MAJOR), zram[1] if zram else str(NBD_MAJOR)}
    if re.match(r"(/dev/)?(nbd|zram)\d", device) or number.partition(":")[0] in majors:
        remedy = "let resume= name swap on a disk, or boot with noresume"
        return problem("resume", f"the machine would hibernate to {device or number}, which is memory", remedy)
    return ok("resume", f"the machine resumes from {device}" if device else "no hibernation to a disk in memory")
