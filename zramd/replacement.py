"""A file that is replaced as a whole, or not at all."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MODE = 0o600
_NO_UNNAMED = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL)
"""What O_TMPFILE fails with on file systems, and kernels, that have no files without a name."""


@contextmanager
def replaced(path: Path) -> Iterator[int]:
    """Give a descriptor to write a new file to, which takes the name `path` when the context ends without an exception.

    Until then the file has no name, so that nothing is left of it however the process ends, unless it is killed in the
    instant between a name beside `path` and that one. On a file system without such files it always has the former. It
    is on its medium before it takes the name, and the name before the context is left. Only its owner can read it.

    Raises:
        OSError: it cannot be written; or `path` is something else than a file, such as a symbolic link.
    """
    if not path.name:
        raise OSError(errno.EISDIR, "it is no file")
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    temporary = f".{path.name}.{os.getpid()}"
    try:
        _require_file(path.name, directory)
        fd, is_named = _create(temporary, directory)
        try:
            os.fchmod(fd, MODE)
            yield fd
            os.fsync(fd)
            _require_file(path.name, directory)
            if not is_named:
                # With a directory given, Python follows the link to the file, as is meant here.
                os.link(f"/proc/self/fd/{fd}", temporary, src_dir_fd=directory, dst_dir_fd=directory)
                is_named = True
            os.rename(temporary, path.name, src_dir_fd=directory, dst_dir_fd=directory)
            is_named = False
            os.fsync(directory)
        finally:
            os.close(fd)
            if is_named:
                os.unlink(temporary, dir_fd=directory)
    finally:
        os.close(directory)


def _require_file(name: str, directory: int) -> None:
    with suppress(FileNotFoundError):
        mode = os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
        if not stat.S_ISREG(mode):
            kind = "a symbolic link" if stat.S_ISLNK(mode) else "no file"
            raise OSError(errno.EEXIST, f"it is {kind}, which is not replaced")


def _create(name: str, directory: int) -> tuple[int, bool]:
    """Return a new file, and whether it has the name."""
    flags = os.O_WRONLY | os.O_CLOEXEC
    try:
        return os.open(".", flags | os.O_TMPFILE, MODE, dir_fd=directory), False
    except OSError as error:
        if error.errno not in _NO_UNNAMED:
            raise
    return os.open(name, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, MODE, dir_fd=directory), True
