"""What is done for a process in the path of memory reclaim, each in a process of its own."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from zramd.reclaim import HEAP_BYTES

NOBODY = 65534
PROTECT = """
import json, os, mmap, threading
from zramd import reclaim
threading.stack_size(512 << 10)
if {user}:
    os.setgroups([]); os.setgid({user}); os.setuid({user})
measures = {{measure.name: measure.missing for measure in reclaim.protect()}}
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
before = int(status["VmRSS"].split()[0])
later = mmap.mmap(-1, 256 << 20)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
inherited = []
thread = threading.Thread(target=lambda: inherited.extend(
    [os.sched_getscheduler(0), reclaim._libc.prctl(reclaim.PR_GET_IO_FLUSHER, 0, 0, 0, 0)]))
thread.start(); thread.join()
print(json.dumps({{
    "measures": measures, "policy": os.sched_getscheduler(0), "inherited": inherited,
    "locked": int(status["VmLck"].split()[0]), "grown": int(status["VmRSS"].split()[0]) - before,
    "oom": int(open("/proc/self/oom_score_adj").read()),
}}))
"""
FORK = """
import os
from zramd import reclaim
reclaim.OWN_SECONDS = 0
def own():
    lines = dict(line.split(":", 1) for line in list(open("/proc/self/smaps_rollup"))[1:])
    return int(lines["Private_Dirty"].split()[0]) >> 10
shared = bytearray(b"x") * (32 << 20)
if child := os.fork():
    os.waitpid(child, 0)
else:
    reclaim.protect(whole=False)
    ranges = reclaim.private_ranges()
    before, looks = own(), []
    reclaim.own_memory(ranges, lambda: looks.append(1) is None)
    print(before, own(), len(looks) > 32 << 20 >> 16, flush=True)
    os._exit(0)
"""


def protect(user: int) -> dict[str, Any]:
    """Return what a process of a user (0: of this one's) finds after protecting itself."""
    command = [sys.executable, "-c", PROTECT.format(user=user)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_what_is_said_to_be_in_force_is_in_force() -> None:
    found = protect(0)
    measures = found["measures"]
    assert list(measures) == ["OOM score", "IO flusher", "real time", "memory lock"]
    assert (measures["OOM score"] == "") == (found["oom"] == -1000)
    assert (measures["real time"] == "") == (found["policy"] == os.SCHED_RR)
    assert (measures["memory lock"] == "") == (found["locked"] > 0)
    policy, io_flusher = found["inherited"]
    assert policy == found["policy"]
    assert (io_flusher == 1) == (measures["IO flusher"] == "")


def test_what_is_mapped_later_is_not_populated() -> None:
    found = protect(0)
    if found["measures"]["memory lock"]:
        pytest.skip(f"memory lock: {found['measures']['memory lock']}")
    assert found["locked"] > 256 << 10
    assert found["grown"] < 16 << 10


def test_a_fork_shares_its_memory_until_it_is_told_to_have_its_own() -> None:
    result = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=60, check=True)
    before, after, looked = result.stdout.split()
    assert int(before) < 16
    assert int(after) > 32 + (HEAP_BYTES >> 20)
    assert looked == "True"


def test_who_may_do_nothing_is_told_what_it_takes_and_goes_on() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become somebody who may do nothing")
    found = protect(NOBODY)
    for name, capability in (
        ("OOM score", "CAP_SYS_RESOURCE"),
        ("IO flusher", "CAP_SYS_RESOURCE"),
        ("real time", "CAP_SYS_NICE"),
        ("memory lock", "CAP_IPC_LOCK"),
    ):
        assert f"needs {capability}" in found["measures"][name]
    assert found["locked"] == 0
