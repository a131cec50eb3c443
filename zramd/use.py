"""What the block device of a disk is used for."""

from dataclasses import dataclass
from pathlib import Path

DEFAULT_SWAP_PRIORITY = 100
DEFAULT_FILE_SYSTEM = "ext2"
DEFAULT_OPTIONS = "discard"
"""As zram-generator has them."""


@dataclass(frozen=True, slots=True)
class Use:
    """What the block device of a disk is for: a file system at `mount_point`, or else swap. `options` are of either."""

    mount_point: Path | None = None
    fs_type: str = DEFAULT_FILE_SYSTEM
    options: str = DEFAULT_OPTIONS
    swap_priority: int = DEFAULT_SWAP_PRIORITY


DEFAULT_USE = Use()
