"""Which files make up a configuration: one, and the drop-ins beside it, whose keys replace those of the file.

As systemd does, in the order of zram-generator: a file of the system may lie in each of DIRECTORIES, of which the first
that has it counts. Drop-ins are those of all of them, sorted by name; of two with one name that in the first directory
counts, and if it is a symbolic link to /dev/null, neither.
"""

import os
from pathlib import Path

from zramd.paths import CONFIGURATIONS as DIRECTORIES

DEFAULT_NAME = "zramd.toml"
SUFFIX = ".toml"


def find(name: str = DEFAULT_NAME, root: Path = Path("/")) -> Path | None:
    """Return where the system's file of that name is, or would be if it has only drop-ins; None if there is neither.

    Raises:
        OSError: as below.
    """
    places = [root / directory / name for directory in DIRECTORIES]
    for path in places:
        if os.path.lexists(path):
            return path
    path = root / "etc/zramd" / name
    return path if drop_ins(path, root) else None


def drop_ins(path: Path, root: Path = Path("/")) -> list[Path]:
    """Return the drop-ins of a file, in the order in which they count: later ones win.

    Raises:
        OSError: a directory of them cannot be read.
    """
    directories = [root / directory for directory in DIRECTORIES]
    if path.parent not in directories:
        directories = [path.parent]
    found: dict[str, Path] = {}
    for directory in directories:
        for name in _list(directory / f"{path.name}.d"):
            found.setdefault(name, directory / f"{path.name}.d" / name)
    return [found[name] for name in sorted(found) if os.path.realpath(found[name]) != os.devnull]


def _list(directory: Path) -> list[str]:
    try:
        return [name for name in os.listdir(directory) if name.endswith(SUFFIX)]
    except (FileNotFoundError, NotADirectoryError):
        return []
