"""What on this machine stands in the way of swapping to a disk, or makes it slower than it could be.

Each finding says what was found and what to do about it. What is looked at is the machine, not a server; what a running
server lacks, `zramd status` tells.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

NOSWAP_KERNEL = (6, 4)
"""The first Linux with tmpfs that is never swapped out."""
MIN_FREE_SHARE = 16
"""At least this part of memory (1/16), up to `MIN_FREE_MOST`, is to be kept free for what frees memory."""
MIN_FREE_MOST = 64 << 10
"""KiB."""
CAPABILITIES = {"CAP_IPC_LOCK": 14, "CAP_SYS_ADMIN": 21, "CAP_SYS_NICE": 23, "CAP_SYS_RESOURCE": 24}
NEEDED_FOR = {
    "CAP_IPC_LOCK": "to lock memory",
    "CAP_SYS_ADMIN": "to attach /dev/nbdN",
    "CAP_SYS_NICE": "for real-time threads",
    "CAP_SYS_RESOURCE": "for PR_SET_IO_FLUSHER and the OOM score",
}


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


def examine(root: Path = Path("/")) -> Iterator[Finding]:
    """Yield what is found, looking at the files of the kernel under `root`.

    Raises:
        OSError: /proc cannot be read.
    """
    release = (root / "proc/sys/kernel/osrelease").read_text().strip()
    version = tuple(map(int, re.findall(r"\d+", release)[:2]))
    yield _nbd(root, release)
    yield from _capabilities(root)
    yield _noswap(root, version, release)
    yield _min_free(root)
    yield _page_cluster(root)
    yield _zswap(root)


def _nbd(root: Path, release: str) -> Finding:
    modules = root / "lib/modules" / release
    lists = [modules / "modules.builtin", modules / "modules.dep"]
    known = any("/nbd.ko" in path.read_text() for path in lists if path.exists())
    if (root / "sys/module/nbd").exists() or known:
        return Finding("nbd", Verdict.OK, "the kernel has an NBD client")
    remedy = "install the module of this kernel, or use `zramd attach --fuse`, which is slower and not for swap"
    return Finding("nbd", Verdict.PROBLEM, f"the kernel ({release}) has no NBD client", remedy)


def _capabilities(root: Path) -> Iterator[Finding]:
    status = (root / "proc/self/status").read_text()
    match = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    effective = int(match[1], 16) if match else 0
    for name, bit in CAPABILITIES.items():
        if effective >> bit & 1:
            yield Finding(name, Verdict.OK, f"there, {NEEDED_FOR[name]}")
        else:
            remedy = "run as root, or give it to the container or unit"
            yield Finding(name, Verdict.PROBLEM, f"missing, {NEEDED_FOR[name]}", remedy)


def _noswap(root: Path, version: tuple[int, ...], release: str) -> Finding:
    if version >= NOSWAP_KERNEL:
        return Finding("noswap", Verdict.OK, "regions can lie on a tmpfs that is never swapped out")
    if "memory" in _read(root / "sys/fs/cgroup/cgroup.controllers").split():
        remedy = "run the server in a cgroup with memory.swap.max=0, as zramd@.service does (MemorySwapMax=0)"
        return Finding("noswap", Verdict.ADVICE, f"Linux {release} may swap a tmpfs out", remedy)
    remedy = "use Linux 6.4 or newer, or cgroup version 2 with the memory controller"
    return Finding("noswap", Verdict.PROBLEM, f"Linux {release} would swap the regions out to themselves", remedy)


def _min_free(root: Path) -> Finding:
    match = re.search(r"^MemTotal:\s*(\d+)", (root / "proc/meminfo").read_text(), re.MULTILINE)
    total = int(match[1]) if match else 0
    kept = int(_read(root / "proc/sys/vm/min_free_kbytes") or "0")
    wanted = min(total // MIN_FREE_SHARE, MIN_FREE_MOST)
    text = f"{kept} KiB are kept free for what frees memory"
    if kept >= wanted:
        return Finding("min_free", Verdict.OK, text)
    return Finding("min_free", Verdict.ADVICE, text, f"sysctl vm.min_free_kbytes={wanted}: a server restarts sooner")


def _page_cluster(root: Path) -> Finding:
    pages = 1 << int(_read(root / "proc/sys/vm/page-cluster") or "0")
    text = f"the kernel reads {pages} page{'s' * (pages > 1)} at once from swap"
    if pages == 1:
        return Finding("page-cluster", Verdict.OK, text)
    return Finding("page-cluster", Verdict.ADVICE, text, "sysctl vm.page-cluster=0: nothing has to be sought in memory")


def _zswap(root: Path) -> Finding:
    if _read(root / "sys/module/zswap/parameters/enabled") != "Y":
        return Finding("zswap", Verdict.OK, "off")
    remedy = "echo N > /sys/module/zswap/parameters/enabled, or boot with zswap.enabled=0"
    return Finding("zswap", Verdict.ADVICE, "on: pages are compressed, and kept, twice", remedy)


def _read(path: Path) -> str:
    """Return a small file's text without its last newline, "" if it is not there."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
