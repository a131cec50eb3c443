"""Long work on a device, in slices of a fraction of a millisecond beside I/O."""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zramd.device.zram import Device

SLICE_SECONDS = 0.0002
PAUSE_SECONDS = 0.0001
"""Between two slices. A lock that is let go and taken again at once stays with its thread: sleeping hands it on."""


def in_slices(device: "Device", steps: Iterator[None]) -> None:
    """Run `steps`, each of which leaves the device whole, under its lock; stop early if the device goes away."""
    while True:
        with device:
            end = time.monotonic() + SLICE_SECONDS
            while not device.retired:
                if next(steps, True):
                    return
                if time.monotonic() >= end:
                    break
            else:
                return
        pause()


def pause() -> None:
    """Hand the device's lock on."""
    time.sleep(PAUSE_SECONDS)
