"""What a directory keeps, looked at from outside: a server may be using it."""

from pathlib import Path

from zramd.device.backing_dev import check_medium, load_path
from zramd.device.superblock import Identity, StateError, load_identity, refusal
from zramd.device.wanted import Wanted, check_identity
from zramd.layout import PAGE_SIZE, Superblock


def find_kept(directory: Path) -> tuple[Identity, memoryview] | None:
    """Return what the device kept in a directory is, and its superblock, or None if there is none. Nothing is touched.

    Raises:
        StateError: it is damaged.
    """
    path = directory / "superblock"
    try:
        raw = path.read_bytes()[:PAGE_SIZE] if path.is_file() else b""
    except OSError:
        return None  # The start tells of it.
    if len(raw) < PAGE_SIZE:
        return None
    words = memoryview(raw).cast("Q")

    def read_dictionary(number: int, length: int) -> bytes:
        place = directory / f"dictionary{number}"
        if not place.is_file():  # nobody waits for the other end of a pipe
            raise ValueError(f"the region {place.name} is missing, or no file")
        return place.read_bytes()[:length]

    try:
        identity = load_identity(words, read_dictionary)
    except StateError as error:
        raise refusal(directory, error) from error
    return (identity, words) if identity else None


def check_kept(directory: Path, wanted: Wanted) -> None:
    """Check that what is kept in a directory, if anything is, can be taken up as it is wanted. Nothing is touched.

    Raises:
        StateError: it cannot.
    """
    found = find_kept(directory)
    if found is None:
        return
    identity, words = found
    check_identity(identity, words[Superblock.FIRST_DISKSIZE], wanted, directory)
    kept = load_path(words)
    # One that is kept may be in use.
    if wanted.backing is not None and (kept is None or kept.resolve() != wanted.backing.resolve()):
        try:
            check_medium(wanted.backing)
        except OSError as error:
            raise StateError(f"{wanted.backing} cannot be the backing store: {error.strerror}") from error
