"""What the disks of a server held and did in the last minutes, in memory of a fixed size."""

import threading
import time
from array import array
from collections.abc import Sequence

from zramd.device.disk import Disk

SAMPLE_SECONDS = 2.0
SAMPLES = 300
"""That are kept: ten minutes."""
MEMORY = ("orig_data_size", "compr_data_size", "mem_used_total", "mem_limit")
"""In bytes, as in mm_stat."""
REQUESTS = ("reads", "read_sectors", "writes", "write_sectors")
"""Counted up to then, as in stat."""
COLUMNS = MEMORY + REQUESTS


class History:
    """A ring of samples of some disks; a thread takes one every SAMPLE_SECONDS from start() to stop()."""

    def __init__(self, disks: Sequence[Disk]) -> None:
        self._disks = disks
        self._lock = threading.Lock()
        self._taken = 0
        self._times = array("d", [0]) * SAMPLES
        self._values = {disk.name: [array("Q", [0]) * SAMPLES for _ in COLUMNS] for disk in disks}
        self._stopping = threading.Event()

    def start(self) -> None:
        """Take samples from now on."""
        threading.Thread(target=self._run, name="history", daemon=True).start()

    def stop(self) -> None:
        """Take none any more."""
        self._stopping.set()

    def _run(self) -> None:
        self.take()
        while not self._stopping.wait(SAMPLE_SECONDS):
            self.take()

    def take(self) -> None:
        """Take a sample, in place of the oldest one if there are SAMPLES."""
        found = {disk.name: sample(disk) for disk in self._disks}
        with self._lock:
            place = self._taken % SAMPLES
            self._times[place] = time.monotonic()
            for name, values in found.items():
                for column, value in zip(self._values[name], values, strict=True):
                    column[place] = value
            self._taken += 1

    def columns(self) -> tuple[list[float], dict[str, dict[str, list[int]]]]:
        """Return the times of the samples, in seconds of CLOCK_MONOTONIC and in order; and the columns of each disk."""
        with self._lock:
            start, count = self._taken % SAMPLES, min(self._taken, SAMPLES)
            order = [*range(start, count), *range(start)] if count == SAMPLES else [*range(count)]
            return [self._times[place] for place in order], {
                name: {
                    title: [column[place] for place in order] for title, column in zip(COLUMNS, columns, strict=True)
                }
                for name, columns in self._values.items()
            }


def sample(disk: Disk) -> list[int]:
    """Return what COLUMNS are of a disk now."""
    memory, requests = disk.mm_stat(), disk.request_stat()
    return [getattr(memory, title) for title in MEMORY] + [getattr(requests, title) for title in REQUESTS]
