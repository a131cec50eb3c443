"""The backing store of a device, as its superblock describes it: which file, which key."""

import errno
import os
import uuid
from pathlib import Path

from zramd.backing import Kept, Medium, Store
from zramd.backing.objects import KEY_BYTES
from zramd.backing.store import check_label, require_segments, write_label
from zramd.layout import BACKED, PAGE_SIZE, WORD, Superblock

_UUID = slice(Superblock.BACKING_UUID, Superblock.BACKING_UUID + 2)
_KEY = slice(Superblock.BACKING_KEY, Superblock.BACKING_KEY + KEY_BYTES // WORD)
_KEPT = slice(Superblock.BACKING_NONCES, Superblock.BACKING_NONCES + Kept.END)
_PATH = slice(Superblock.BACKING_PATH, PAGE_SIZE // WORD)
MAX_PATH = (PAGE_SIZE // WORD - Superblock.BACKING_PATH) * WORD - 1
"""Bytes."""


def check_medium(path: Path) -> None:
    """Find out whether a path can have a backing store.

    Raises:
        OSError: it cannot.
    """
    medium = _open(path)
    try:
        require_segments(medium)
    finally:
        medium.close()


def _open(path: Path) -> Medium:
    if len(os.fsencode(path)) > MAX_PATH:
        raise OSError(errno.ENAMETOOLONG, f"a path has at most {MAX_PATH} bytes here", str(path))
    return Medium(path)


def make_store(words: memoryview, path: Path) -> Store:
    """Make a store for a device that has none; what the path has is overwritten.

    Raises:
        OSError: it cannot be made.
    """
    medium = _open(path)
    try:
        segments = require_segments(medium)
        identity = uuid.uuid4()
        write_label(medium, identity)
        words[_UUID] = memoryview(identity.bytes).cast("Q")
        words[_KEY] = memoryview(os.urandom(KEY_BYTES)).cast("Q")
        words[_KEPT] = memoryview(bytes(Kept.END * WORD)).cast("Q")
        words[Superblock.FAILED_BACKING_READS] = 0
        words[Superblock.BACKING_SEGMENTS] = segments
        _store_path(words, path)
        # Last: until here there is no store.
        words[Superblock.FEATURES] |= BACKED
        return Store(medium, words[_KEY].tobytes(), words[_KEPT], segments)
    except BaseException:
        medium.close()
        raise


def find_store(words: memoryview, path: Path) -> Store:
    """Open the store that a device has, which may have been moved to another path.

    Raises:
        OSError: it cannot be opened.
        DamagedObjectError: it is another one's, or nobody's.
    """
    medium = _open(path)
    try:
        segments = words[Superblock.BACKING_SEGMENTS]
        check_label(medium, uuid.UUID(bytes=words[_UUID].tobytes()), segments)
        store = Store(medium, words[_KEY].tobytes(), words[_KEPT], segments)
        _store_path(words, path)
        return store
    except BaseException:
        medium.close()
        raise


def forget_store(words: memoryview) -> None:
    """Let a device have no store; what is in that means nothing any more."""
    words[Superblock.FEATURES] &= ~BACKED
    words[_KEY] = memoryview(bytes(KEY_BYTES)).cast("Q")


def load_path(words: memoryview) -> Path | None:
    """Return where a device has its store, None if it has none."""
    if not words[Superblock.FEATURES] & BACKED:
        return None
    return Path(os.fsdecode(words[_PATH].tobytes().rstrip(b"\0")))


def _store_path(words: memoryview, path: Path) -> None:
    words[_PATH] = memoryview(os.fsencode(path).ljust(MAX_PATH + 1, b"\0")).cast("Q")
