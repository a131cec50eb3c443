"""Unpack and compile Linux on an ext4 file system on a zramd device, and report what that cost.

It is the whole way that data takes: file system, block device, NBD, compression, pool, and back, with every
file checked by checksum. Whatever happens, nothing stays mounted, attached or running.
"""

import argparse
import contextlib
import sys
from functools import partial
from pathlib import Path

from harness import (
    Display,
    Interrupt,
    Sample,
    Server,
    StepError,
    Steps,
    make_directory,
    mib,
    ratio,
    run_to_end,
    serve,
    unmount_at_end,
)

# What may stay after the trim: the metadata of an empty file system (bitmaps, inode tables once used).
LEFT_AFTER_TRIM = 0.05
# What part of the memory that the pool frees must leave the process.
GIVEN_BACK = 0.9


def build(steps: Steps, device: Path, mountpoint: Path) -> None:
    """Go through the steps on `device`."""
    tree, sums = mountpoint / "linux", steps.directory / "SHA256SUMS"
    checksum = 'cd "$1" && find . -type f -exec sha256sum {} + >"$2"'
    verify = 'cd "$1" && sha256sum --check --quiet "$2"'
    steps.make_ext4(device, mountpoint)
    steps.build_linux(tree)
    steps.step("checksum", ["sh", "-c", checksum, "sh", tree, sums])
    steps.step("unmount", ["umount", mountpoint])
    steps.step("fsck", ["e2fsck", "-f", "-n", device])
    steps.mount("mount again", device, mountpoint)
    steps.step("verify", ["sh", "-c", verify, "sh", tree, sums])
    steps.step("delete", ["rm", "-r", tree])
    steps.step("sync", ["sync", "-f", mountpoint])
    steps.step("trim", ["fstrim", mountpoint])


def report(steps: Steps, server: Server, peak: Sample, trimmed: Sample) -> None:
    """Print what the demo found."""
    show = steps.display.line
    show("")
    for title, seconds in {**steps.times, "all steps": sum(steps.times.values())}.items():
        show(f"{title:34}{seconds:8.1f} s")
    show("")
    show(f"{'':34}{'at peak':>12}{'after trim':>14}")
    sizes = ["orig_data_size", "compr_data_size", "mem_used_total"]
    meanings = ["data stored", "compressed to", "memory used"]
    for meaning, name in zip(meanings, sizes, strict=True):
        held = [getattr(sample.mm_stat, name) for sample in (peak, trimmed)]
        show(f"{f'{meaning} ({name})':34}{mib(held[0]):>12}{mib(held[1]):>14}")
    show(f"{'daemon resident (VmRSS)':34}{mib(peak.resident):>12}{mib(trimmed.resident):>14}")
    show(f"{'ratio (data / memory used)':34}{ratio(peak.mm_stat):>12.2f}{ratio(trimmed.mm_stat):>14.2f}")
    show("")
    show(f"mm_stat at peak:    {peak.mm_stat_line}")
    show(f"mm_stat after trim: {trimmed.mm_stat_line}")
    show(f"the most the daemon ever held resident (VmHWM): {mib(server.memory('VmHWM'))}")


def check_trim(peak: Sample, trimmed: Sample) -> None:
    """Check that the memory of deleted files came back, to the pool and to the machine."""
    for name in ("orig_data_size", "mem_used_total"):
        before, after = getattr(peak.mm_stat, name), getattr(trimmed.mm_stat, name)
        if after > before * LEFT_AFTER_TRIM:
            raise StepError(f"the trim did not give the memory back: {name} was {before} and is {after}")
    freed = peak.mm_stat.mem_used_total - trimmed.mm_stat.mem_used_total
    if peak.resident - trimmed.resident < freed * GIVEN_BACK:
        raise StepError(f"the pool freed {freed} bytes, but VmRSS went from {peak.resident} to {trimmed.resident}")


def run(size: str, algorithm: str, interrupt: Interrupt, display: Display) -> None:
    """Set everything up, go through the steps, report, and undo it all."""
    with contextlib.ExitStack() as undo:
        directory, mountpoint = make_directory(undo, "demo")
        server, device = serve(undo, directory, interrupt, "--size", size, "--algorithm", algorithm)
        display.line(f"zramd serves {size} with {algorithm}, attached as {device.path} ({type(device).__name__})")
        unmount_at_end(undo, mountpoint, display)
        steps = Steps(directory, interrupt, display, server.summary)
        build(steps, device.path, mountpoint)
        trimmed = server.sample()
        peak = server.peak or trimmed
        report(steps, server, peak, trimmed)
        check_trim(peak, trimmed)
    display.line("every checksum matched, the memory came back, everything is detached and stopped")


def main() -> int:
    """Run the demo; return its exit status."""
    parser = argparse.ArgumentParser(prog="demo", description="Compile Linux on a zramd device.")
    parser.add_argument("--size", default="4G", help="size of the device; it needs 2G (default: %(default)s)")
    parser.add_argument("--algorithm", default="lz4", help="compression algorithm (default: %(default)s)")
    options = parser.parse_args()
    return run_to_end("demo", partial(run, options.size, options.algorithm))


if __name__ == "__main__":
    sys.exit(main())
