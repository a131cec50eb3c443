"""`zramd swapon` and `swapoff`: swapping to an attached device, and not any more."""

import subprocess
import sys
from pathlib import Path

import click

from zramd.attach.attachment import AttachError, find_tool, last_line, require_root, require_unused, run_tool
from zramd.attach.filesystem import contents
from zramd.attach.kernel import attached_nbd_devices
from zramd.attach.loop import attached_loop_devices
from zramd.attach.swaps import read_swaps
from zramd.cli.attach import DEVICE, attached_device
from zramd.cli.progress import LOOK_SECONDS, noted_interrupts, show
from zramd.cli.use import find_use, use_options
from zramd.sizes import format_size

MAX_PRIORITY = 32767


@click.command()
@click.argument("device", type=DEVICE, required=False)
@click.option(
    "--priority",
    type=click.IntRange(-1, MAX_PRIORITY),
    help="Of two swap areas, the one with the higher priority is used first. Default: swap-priority of the "
    "configuration, or 100.",
)
@click.option("--no-discard", is_flag=True, help="Do not tell the server which pages have been freed.")
@click.option("--force", is_flag=True, help="Even if there is something on DEVICE; it is lost.")
@use_options
def swapon(
    device: Path | None, priority: int | None, no_discard: bool, force: bool, disk: str | None, config: Path | None
) -> None:
    """Make a swap area of DEVICE, by default the one that is attached, and swap to it.

    Refused if there is a file system on it, or a partition table. The server should run with --swap. The configuration
    may have swap-priority and options for the disk.

    \b
    Example:
      zramd swapon
    """
    try:
        require_root()
        chosen = device or attached_device()
        found = find_use(chosen, disk, config)
        if found.use.mount_point is not None:
            raise AttachError(f"{found.where} has a mount-point: zramd mount, or remove that to swap to the disk")
        require_unused(chosen)
        if (kinds := contents(chosen) - {"swap"}) and not force:
            raise AttachError(f"there is something on {chosen} ({', '.join(sorted(kinds))}): --force makes swap of it")
        run_tool([find_tool("mkswap", "util-linux"), *(["--force"] if force else []), chosen])
        words = [word for word in found.use.options.split(",") if word]
        if no_discard:
            words = [word for word in words if word.partition("=")[0] != "discard"]
        options = [f"--priority={found.use.swap_priority if priority is None else priority}"]
        options += [f"--options={','.join(words)}"] if words else []
        run_tool([find_tool("swapon", "mount"), *options, chosen])
    except AttachError as error:
        raise click.ClickException(str(error)) from error


@click.command()
@click.argument("device", type=DEVICE, required=False)
def swapoff(device: Path | None) -> None:
    """Stop swapping to DEVICE, by default the attached one that is swapped to. On a terminal, show what is left.

    All that was swapped out has to go back into memory, or into other swap. Ctrl-C stops that as soon as the
    kernel is done with the process at hand; what is left then stays swapped out, and nothing is lost.

    \b
    Example:
      zramd swapoff && zramd detach /dev/nbd0
    """
    try:
        require_root()
        chosen = device or _swapped_device()
        if _bytes_left(chosen) is None:
            raise AttachError(f"{chosen} is not swapped to")
        with noted_interrupts() as interrupts:
            # A session of its own: Ctrl-C is for this process, which passes it on.
            child = subprocess.Popen(
                [find_tool("swapoff", "mount"), chosen],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            errors = _wait(child, chosen, interrupts)
        if child.returncode:
            left = _bytes_left(chosen)
            still = "" if left is None else f"; {format_size(left)} are left on {chosen}, which is swapped to as before"
            raise AttachError(f"{errors}{still}")
    except AttachError as error:
        raise click.ClickException(str(error)) from error


def _swapped_device() -> Path:
    """Return the one attached device that is swapped to."""
    attached = {*attached_nbd_devices(), *attached_loop_devices()}
    swapped = [Path(swap.path) for swap in read_swaps() if Path(swap.path) in attached]
    if len(swapped) != 1:
        there_are = (
            f"there are {' '.join(map(str, swapped))}" if swapped else "none that zramd has attached is swapped to"
        )
        raise AttachError(f"which device? {there_are}")
    return swapped[0]


def _bytes_left(device: Path) -> int | None:
    """Return how much is swapped out to a device, None if it is no swap area."""
    return next((swap.used for swap in read_swaps() if swap.path == str(device)), None)


def _wait(child: subprocess.Popen[str], device: Path, interrupts: list[int]) -> str:
    """Wait for swapoff, show what is left, and stop it if asked to. Return why it failed, if it did."""
    shows = sys.stderr.isatty()
    while True:
        try:
            _, errors = child.communicate(timeout=LOOK_SECONDS)
            break
        except subprocess.TimeoutExpired:
            if interrupts:
                child.terminate()  # it ends in the middle of its system call, which leaves the rest where it was
            if shows and (left := _bytes_left(device)) is not None:
                show(f"{format_size(left):>8} left ")
    if shows:
        show("")
    return "swapoff was stopped" if interrupts else f"swapoff failed: {last_line(errors)}"
