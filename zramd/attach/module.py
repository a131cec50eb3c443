"""The kernel's NBD client, which most distributions have as a module."""

from pathlib import Path

from zramd.attach.attachment import AttachError, MissingToolError, find_tool, run_tool


class NoNbdError(AttachError):
    """The kernel has no NBD client."""


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
        NoNbdError: there is none.
    """
    if Path("/sys/module/nbd").exists():
        return
    try:
        run_tool([find_tool("modprobe", "kmod"), "nbd"])
    except MissingToolError:
        raise
    except AttachError as error:
        raise NoNbdError("the kernel has no NBD client, and no module nbd that has it: attach with --fuse") from error
