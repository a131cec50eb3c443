"""The kernel's NBD client, which most distributions have as a module."""

from pathlib import Path

from zramd.attach.attachment import AttachError, MissingToolError, find_tool, run_tool


def has_nbd() -> bool:
    """Say whether the kernel has an NBD client, loaded or as a module that can be loaded."""
    if Path("/sys/module/nbd").exists():
        return True
    try:
        run_tool([find_tool("modprobe", "kmod"), "--dry-run", "--quiet", "nbd"])
    except AttachError:
        return False
    return True


def load_nbd() -> None:
    """Load the kernel's NBD client, unless it is there.

    Raises:
        AttachError: there is none, or nothing that could load it.
    """
    if Path("/sys/module/nbd").exists():
        return
    try:
        run_tool([find_tool("modprobe", "kmod"), "nbd"])
    except MissingToolError as error:
        raise AttachError(f"the kernel has no NBD client, and {error}; or attach with --fuse") from error
    except AttachError as error:
        raise AttachError("the kernel has no NBD client, and no module nbd that has it: attach with --fuse") from error
