"""What keeps a process going that stands in the path of memory reclaim: the kernel swaps to it to free memory.

Such a process must not need memory to free memory, and must not wait for itself. Memory locked alone does not do
that: a machine that swaps to a locked server freezes as soon as the server, or the kernel on its behalf, allocates a
page. What is done about it, each where the process may:

    heap         what malloc once had is never given back, and some of it is had in advance
    OOM score    -1000: the kernel never chooses this process
    IO flusher   PR_SET_IO_FLUSHER: an allocation on behalf of this thread does not wait for swap or file system I/O
    real time    SCHED_RR: such a thread may take some of the reserve below the min watermark (ALLOC_MIN_RESERVE)
    memory lock  mlockall

IO flusher and real time are each thread's own; new threads and processes inherit them from the one that starts them.

It imports next to nothing: what is loaded is locked.
"""

import ctypes
import gc
import os

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

_libc = ctypes.CDLL(None, use_errno=True)


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


def protect(heap_bytes: int = HEAP_BYTES) -> list[Measure]:
    """Do what can be done for this process, whose other threads are still to be started; return what that is.

    To be called once everything that it will ever use is loaded and was used once. What it maps later is not populated,
    but locked as it is touched. `heap_bytes` are had in advance from malloc.
    """
    keep_heap(heap_bytes)
    gc.collect()
    gc.freeze()
    return [spare_from_oom(), *protect_thread(), lock_memory()]


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
    # One of more than the threshold would be mapped for itself.
    blocks = [bytearray(HEAP_BLOCK) for _ in range(size // HEAP_BLOCK)]
    del blocks
    if size:
        # Some of each of the allocator's arenas stay, or it would unmap them.
        _kept.extend([bytes(256) for _ in range(SMALL_OBJECTS // 256)][::64])


_kept: list[bytes] = []


def lock_memory() -> Measure:
    """Lock all memory there is, and what comes as it is touched.

    Two calls: with ONFAULT alone, code that has not yet run stays on disk; without it, what is mapped later would be
    populated whole, sparse regions of any size included.
    """
    name = "memory lock"
    for flags in (MCL_CURRENT | MCL_FUTURE, MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT):
        if _libc.mlockall(flags):
            reason = os.strerror(ctypes.get_errno())
            _libc.munlockall()
            return Measure(name, f"{reason}: needs CAP_IPC_LOCK, or LimitMEMLOCK=infinity")
    return Measure(name, "")


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
