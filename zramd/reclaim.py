"""What keeps a process going that stands in the path of memory reclaim: the kernel swaps to it to free memory.

Such a process must not need memory to free memory, and must not wait for itself. Memory locked alone does not do
that: a machine that swaps to a locked server freezes as soon as the server, or the kernel on its behalf, allocates a
page. What is done about it, each where the process may:

    heap         what malloc once had is never given back, and some of it is had in advance
    OOM score    -1000: the kernel never chooses this process
    IO flusher   PR_SET_IO_FLUSHER: an allocation on behalf of this thread does not wait for swap or file system I/O
    real time    SCHED_RR: such a thread may take some of the reserve below the min watermark (ALLOC_MIN_RESERVE)
    memory lock  mlockall; a server that takes another's place is populated only when the machine swaps again

IO flusher and real time are each thread's own; new threads and processes inherit them from the one that starts them.

It imports next to nothing: what is loaded is locked.
"""

import ctypes
import gc
import os
import time
from collections.abc import Callable

MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT = 1, 2, 4
PR_SET_IO_FLUSHER, PR_GET_IO_FLUSHER = 57, 58
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""glibc's mallopt."""
MMAP_THRESHOLD_MAX = 32 << 20
"""Bytes; glibc refuses a higher one."""
NEVER = (1 << 31) - 1

HEAP_BYTES = 8 << 20
"""Had in advance from malloc, for the buffers of connections that are still to come: 2 MiB each by default."""
HEAP_BLOCK = 1 << 20
SMALL_OBJECTS = 1 << 20
"""Bytes had in advance from Python's allocator of small objects."""
PRIORITY = 1
MADV_POPULATE_WRITE = 23
OWN_BYTES = 64 << 10
"""Copied at a time of what a fork shares."""
OWN_SECONDS = 0.01
"""Between two times."""
WAIT_SECONDS = 0.5
"""Between two looks whether it may go on with that."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.malloc.argtypes, _libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
_libc.free.argtypes, _libc.free.restype = [ctypes.c_void_p], None
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Measure:
    """One of the things that can be done; `missing` says in a few words what it would need, "" if it is in force."""

    __slots__ = ("missing", "name")

    def __init__(self, name: str, missing: str) -> None:
        self.name = name
        self.missing = missing

    @property
    def in_force(self) -> bool:
        """Say whether it was done."""
        return not self.missing


def protect(heap_bytes: int = HEAP_BYTES, *, whole: bool = True) -> list[Measure]:
    """Do what can be done for this process, whose other threads are still to be started; return what that is.

    To be called once everything that it will ever use is loaded and was used once. What it maps later is not populated,
    but locked as it is touched. `heap_bytes` are had in advance from malloc. Without `whole`, nothing is populated: for
    the fork of a process that has it all in memory, at a time when there may be none to copy that to.
    """
    keep_heap(heap_bytes)
    if whole and heap_bytes:
        keep_small_objects()
    gc.collect()
    gc.freeze()
    return [spare_from_oom(), *protect_thread(), lock_memory(whole=whole)]


def protect_thread() -> list[Measure]:
    """Make the calling thread an IO flusher and a real-time thread, unless it is both already."""
    return [flush_io(), run_in_real_time()]


def keep_heap(size: int) -> None:
    """Let malloc keep what it once had, in one heap, and get `size` bytes in advance."""
    for parameter, value in (
        (M_MMAP_THRESHOLD, MMAP_THRESHOLD_MAX),
        (M_TRIM_THRESHOLD, NEVER),
        (M_ARENA_MAX, 1),
    ):
        _libc.mallopt(parameter, value)
    # One of more than the threshold would be mapped for itself. They are populated by what locks them.
    for block in [_libc.malloc(HEAP_BLOCK) for _ in range(size // HEAP_BLOCK)]:
        _libc.free(block)


def keep_small_objects() -> None:
    """Let Python's allocator of small objects have memory in advance."""
    # Some of each of its arenas stay, or it would unmap them.
    _kept.extend([bytes(256) for _ in range(SMALL_OBJECTS // 256)][::64])


_kept: list[bytes] = []


def lock_memory(*, whole: bool = True) -> Measure:
    """Lock all memory there is (without `whole`, as it is touched), and what comes as it is touched.

    Two calls: with ONFAULT alone, code that has not yet run stays on disk; without it, what is mapped later would be
    populated whole, sparse regions of any size included.
    """
    name = "memory lock"
    everything = MCL_CURRENT | MCL_FUTURE
    for flags in (everything, everything | MCL_ONFAULT) if whole else (everything | MCL_ONFAULT,):
        if _libc.mlockall(flags):
            reason = os.strerror(ctypes.get_errno())
            _libc.munlockall()
            return Measure(name, f"{reason}: needs CAP_IPC_LOCK, or LimitMEMLOCK=infinity")
    return Measure(name, "")


def private_ranges() -> list[tuple[int, int]]:
    """Return where the memory is, from start to end, that a fork has copies of as soon as it writes there."""
    ranges = []
    with open("/proc/self/maps") as maps:
        for line in maps:
            place, access, _ = line.split(maxsplit=2)
            if access == "rw-p":
                start, _, end = place.partition("-")
                ranges.append((int(start, 16), int(end, 16)))
    return ranges


def own_memory(ranges: list[tuple[int, int]], may: Callable[[], bool]) -> None:
    """Copy, a little at a time, what a fork shares: what was protected without being populated then is so whole.

    It waits while `may` says no, or memory is not free: what populates holds up what maps, and that all page faults.
    """
    for start, end in ranges:
        for at in range(start, end, OWN_BYTES):
            _wait_for_memory(may)
            _libc.madvise(at, min(OWN_BYTES, end - at), MADV_POPULATE_WRITE)
            time.sleep(OWN_SECONDS)
    _wait_for_memory(may)
    keep_small_objects()


def _wait_for_memory(may: Callable[[], bool]) -> None:
    """Wait until an allocation finds memory without reclaiming any: the kernel's low watermark is at 5/4 of the min."""
    while True:
        with open("/proc/meminfo") as meminfo, open("/proc/sys/vm/min_free_kbytes") as least:
            free = next(int(line.split()[1]) for line in meminfo if line.startswith("MemFree:"))
            if may() and free * 4 >= int(least.read()) * 5:
                return
        time.sleep(WAIT_SECONDS)


def locked_bytes() -> int:
    """Return how much memory of this process is locked."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmLck:"))


def spare_from_oom() -> Measure:
    """Have the kernel choose another process when it is out of memory."""
    name = "OOM score"
    try:
        with open("/proc/self/oom_score_adj") as file:
            score = int(file.read())
        if score > -1000:
            with open("/proc/self/oom_score_adj", "w") as file:
                file.write("-1000")
    except OSError as error:
        return Measure(name, f"{error.strerror}: needs CAP_SYS_RESOURCE, or OOMScoreAdjust=-1000")
    return Measure(name, "")


def flush_io() -> Measure:
    """Mark the calling thread as one that reclaim waits for; what counts is what the kernel then says of it."""
    name = "IO flusher"
    number = 0
    if _libc.prctl(PR_GET_IO_FLUSHER, 0, 0, 0, 0) == 1:
        return Measure(name, "")
    if _libc.prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0):
        number = ctypes.get_errno()
    elif _libc.prctl(PR_GET_IO_FLUSHER, 0, 0, 0, 0) == 1:
        return Measure(name, "")
    return Measure(name, f"{os.strerror(number)}: needs CAP_SYS_RESOURCE (Linux 5.6)")


def run_in_real_time() -> Measure:
    """Schedule the calling thread by SCHED_RR, at the lowest priority of it."""
    name = "real time"
    try:
        if os.sched_getscheduler(0) != os.SCHED_RR:
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(PRIORITY))
    except OSError as error:
        return Measure(name, f"{error.strerror}: needs CAP_SYS_NICE, or LimitRTPRIO=1")
    if os.sched_getscheduler(0) != os.SCHED_RR:
        return Measure(name, "the kernel does not do it")
    return Measure(name, "")
