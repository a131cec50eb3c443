"""A file is replaced whole or not at all, and nothing else is left."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from zramd.replacement import replaced


@pytest.fixture(params=["unnamed", "named"])
def target(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a file, on a file system with and without files that have no name."""
    if request.param == "named":
        monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY | os.O_WRONLY)
    target = tmp_path / "file"
    target.write_bytes(b"old")
    target.chmod(0o644)
    return target


def test_what_was_written_takes_the_place_of_what_was_there(target: Path) -> None:
    with replaced(target) as fd:
        os.write(fd, b"new")
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert list(target.parent.iterdir()) == [target]


def test_a_failure_leaves_what_was_there_and_nothing_else(target: Path) -> None:
    def interrupted() -> None:
        with replaced(target) as fd:
            os.write(fd, b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.read_bytes() == b"old"
    assert list(target.parent.iterdir()) == [target]


def test_a_file_that_was_not_there_is_made_only_when_it_is_complete(target: Path) -> None:
    target.unlink()
    with pytest.raises(OSError, match="28"), replaced(target):
        raise OSError(28, "full")
    assert list(target.parent.iterdir()) == []
    with replaced(target) as fd:
        os.write(fd, b"new")
    assert target.read_bytes() == b"new"


@pytest.mark.parametrize("kind", ["link", "dangling", "directory", "pipe"])
def test_what_is_no_file_is_neither_followed_nor_replaced(target: Path, kind: str) -> None:
    other = target.with_name("other")
    target.rename(other)
    if kind == "directory":
        target.mkdir()
    elif kind == "pipe":
        os.mkfifo(target)
    else:
        target.symlink_to(other if kind == "link" else "nothing")
    with pytest.raises(OSError, match="not replaced"), replaced(target):
        pass
    assert other.read_bytes() == b"old"
    assert sorted(target.parent.iterdir()) == [target, other]


def test_a_link_that_is_put_there_meanwhile_is_not_followed(target: Path) -> None:
    other = target.with_name("other")

    def overtaken() -> None:
        with replaced(target) as fd:
            os.write(fd, b"new")
            target.rename(other)
            target.symlink_to(other)

    with pytest.raises(OSError, match="symbolic link"):
        overtaken()
    assert other.read_bytes() == b"old"


WRITE_AND_WAIT = """
import os, sys
from pathlib import Path
from zramd.replacement import replaced
with replaced(Path(sys.argv[1])) as fd:
    os.write(fd, b"new")
    print("written", flush=True)
    sys.stdin.read()
"""


def test_a_process_that_is_killed_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    try:
        os.close(os.open(tmp_path, os.O_WRONLY | os.O_TMPFILE))
    except OSError:
        pytest.skip("the file system of temporary files cannot have files without a name: set TMPDIR to one on ext4")
    target = tmp_path / "file"
    target.write_bytes(b"old")
    command = [sys.executable, "-c", WRITE_AND_WAIT, str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"written\n"
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]
