"""What a directory keeps, looked at from outside: a server may be using it."""

from pathlib import Path

from zramd.device.backing_dev import check_medium, load_path
from zramd.device.superblock import StateError, load_identity
from zramd.device.wanted import Wanted, check_identity
from zramd.layout import PAGE_SIZE, Superblock


def check_kept(directory: Path, wanted: Wanted) -> None:
    """Check that what is kept in a directory, if anything is, can be taken up as it is wanted. Nothing is touched.

    Raises:
        StateError: it cannot.
    """
    path = directory / "superblock"
    try:
        raw = path.read_bytes()[:PAGE_SIZE] if path.is_file() else b""
    except OSError:
        return  # The start tells of it.
    if len(raw) < PAGE_SIZE:
        return
    words = memoryview(raw).cast("Q")

    def read_dictionary(number: int, length: int) -> bytes:
        place = directory / f"dictionary{number}"
        if not place.is_file():  # nobody waits for the other end of a pipe
            raise ValueError(f"the region {place.name} is missing, or no file")
        return place.read_bytes()[:length]

    try:
        identity = load_identity(words, read_dictionary)
    except StateError as error:
        raise StateError(f"{directory}: {error}; remove the directory to start afresh") from error
    if identity is None:
        return
    check_identity(identity, words[Superblock.FIRST_DISKSIZE], wanted, directory)
    kept = load_path(words)
    # One that is kept may be in use.
    if wanted.backing is not None and (kept is None or kept.resolve() != wanted.backing.resolve()):
        try:
            check_medium(wanted.backing)
        except OSError as error:
            raise StateError(f"{wanted.backing} cannot be the backing store: {error.strerror}") from error
