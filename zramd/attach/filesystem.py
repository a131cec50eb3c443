"""A file system on an attached device: made where there is nothing, mounted, and unmounted."""

import re
from pathlib import Path

from zramd.attach.attachment import AttachError, find_tool, require_root, require_unused, run_tool

_MODE = re.compile(r"(?:^|,)X-mount\.mode=([0-7]{3,4})(?:,|$)")
"""An option of mount(8), which knows it since util-linux 2.39."""


def contents(device: Path) -> set[str]:
    """Return the types of all file systems, swap areas and partition tables that are found on a device.

    Raises:
        AttachError: it cannot be looked at.
    """
    found = run_tool([find_tool("wipefs", "util-linux"), "--no-act", "--noheadings", "--output", "TYPE", device])
    return set(found.split())


def mount(device: Path, mount_point: Path, fs_type: str, options: str) -> None:
    """Mount a device, with a directory made for that if need be. A file system is made only where there is nothing.

    Raises:
        AttachError: it is in use, has something else on it, or cannot be mounted.
    """
    require_root()
    require_unused(device)
    tool = find_tool("mount", "mount")
    found = contents(device)
    if found and fs_type not in found:
        there_is = ", ".join(sorted(found))
        raise AttachError(f"there is {there_is} on {device}, not {fs_type}: set fs-type, or remove it with wipefs -a")
    if not found:
        run_tool([find_tool(f"mkfs.{fs_type}", "e2fsprogs, xfsprogs or btrfs-progs"), device])
    try:
        mount_point.mkdir(mode=0o755, parents=True, exist_ok=True)
        run_tool([tool, "-t", fs_type, *(["-o", options] if options else []), device, mount_point])
        if mode := _MODE.search(options):
            mount_point.chmod(int(mode[1], 8))
    except OSError as error:
        raise AttachError(f"cannot use {mount_point}: {error.strerror}") from error


def unmount(device: Path) -> None:
    """Unmount a device wherever it is mounted.

    Raises:
        AttachError: it is not mounted, or is in use.
    """
    require_root()
    run_tool([find_tool("umount", "mount"), "--all-targets", device])
