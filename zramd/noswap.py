"""Regions that cannot be swapped out, not even while no server lives to hold them locked.

Otherwise the kernel would, in the seconds between a server's end and its successor's start, write them to where it
swaps to: to the disk that they hold.

Two things keep them in memory: a tmpfs mounted with `noswap` (Linux 6.4), or a cgroup that may not swap, which is the
one that the pages are charged to. ramfs cannot be swapped out either, but neither gives back a part of a file nor says
which parts there are; hugetlbfs has no pages of 4 KiB.
"""

import ctypes
import os
from pathlib import Path

from zramd.reclaim import Measure

MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
OPTIONS = "noswap,mode=0700,size=100%"
"""Of the mount: as much as there is memory; the disk has a limit of its own."""

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")

_libc = ctypes.CDLL(None, use_errno=True)


def mount(directory: Path) -> None:
    """Mount a tmpfs that is never swapped out on a directory, made if need be, if that can be done.

    Not over what is kept there already, which would be hidden.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if os.geteuid() == 0 and not any(directory.iterdir()) and "noswap" not in _mount_options(directory):
        place, options = str(directory).encode(), OPTIONS.encode()
        _libc.mount(b"zramd", place, b"tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options)


def check(directory: Path) -> Measure:
    """Say whether what lies in a directory stays in memory."""
    name = "unswappable regions"
    if "noswap" in _mount_options(directory) or not _may_swap():
        return Measure(name, "")
    return Measure(name, f"{directory} needs a tmpfs with noswap (Linux 6.4), or a cgroup with memory.swap.max=0")


def _mount_options(directory: Path) -> list[str]:
    """Return the options of the file system, rather than the mount, that a directory lies on."""
    info = os.stat(directory).st_dev
    device = f"{os.major(info)}:{os.minor(info)}"
    options: list[str] = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[2] == device:
            options = fields[-1].split(",")
    return options


def _may_swap() -> bool:
    """Say whether the cgroup (version 2) of this process, and all above it, let it be swapped out."""
    for line in OWN_CGROUP.read_text().splitlines():
        if line.startswith("0::"):
            group = CGROUPS / line.removeprefix("0::/")
            for level in (group, *group.parents):
                try:
                    if (level / "memory.swap.max").read_text().strip() == "0":
                        return False
                except OSError:
                    continue
    return True
