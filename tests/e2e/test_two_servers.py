"""Two servers that are given the same regions: the second is refused, whatever it calls them, and the first goes on."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ServerProcess, start_server
from tests.e2e.test_cli import assert_refused, holds, kill, sockets_in, write_and_check, zramd


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "real" / "state"


@pytest.fixture
def first(tmp_path: Path, state: Path) -> Iterator[ServerProcess]:
    state.parent.mkdir()
    server = start_server(tmp_path, "--state", str(state), "--size", "8M", volatile=False)
    write_and_check(server.unix)
    yield server
    assert holds(server.unix)
    assert server.stop() == (0, "")


@pytest.mark.usefixtures("first")
@pytest.mark.parametrize("size", [[], ["--size", "8M"], ["--size", "16M"]], ids=str)
def test_the_second_is_refused_and_touches_nothing(size: list[str], tmp_path: Path, state: Path) -> None:
    before = sorted((path.name, path.stat().st_ino, path.stat().st_size) for path in state.iterdir())
    done = zramd("serve", "--state", state, *size, *sockets_in(tmp_path))
    assert_refused(done, 1, f"another zramd serves {state}", "--volatile")
    assert sorted((path.name, path.stat().st_ino, path.stat().st_size) for path in state.iterdir()) == before
    assert not (tmp_path / "b.nbd").exists()


@pytest.mark.usefixtures("first")
def test_so_it_is_by_way_of_a_symbolic_link(tmp_path: Path, state: Path) -> None:
    (tmp_path / "way").symlink_to(state.parent)
    done = zramd("serve", "--state", tmp_path / "way" / "state", *sockets_in(tmp_path))
    assert_refused(done, 1, "another zramd serves")
    (tmp_path / "link").symlink_to(state)
    done = zramd("serve", "--state", tmp_path / "link", *sockets_in(tmp_path))
    assert_refused(done, 1, "a symbolic link to one will not do")


@pytest.mark.usefixtures("first")
def test_so_it_is_by_way_of_a_relative_path(tmp_path: Path, state: Path) -> None:
    done = zramd("serve", "--state", os.path.relpath(state), *sockets_in(tmp_path))
    assert_refused(done, 1, "another zramd serves")


@pytest.mark.usefixtures("first")
def test_so_it_is_by_way_of_a_bind_mount(tmp_path: Path, state: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a directory at a second place")
    (tmp_path / "mounted").mkdir(mode=0o700)
    subprocess.run(["mount", "--bind", str(state), str(tmp_path / "mounted")], check=True)
    try:
        done = zramd("serve", "--state", tmp_path / "mounted", *sockets_in(tmp_path))
        assert_refused(done, 1, "another zramd serves")
    finally:
        subprocess.run(["umount", str(tmp_path / "mounted")], check=True)


def test_regions_of_a_server_that_was_killed_are_free_at_once(tmp_path: Path, state: Path) -> None:
    for _ in range(3):
        server = start_server(tmp_path, "--state", str(state), "--size", "8M", volatile=False)
        write_and_check(server.unix)
        kill(server)
    server = start_server(tmp_path, "--state", str(state), volatile=False)
    assert holds(server.unix)
    assert server.stop() == (0, "")


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = zramd("serve", "--state", tmp_path / "file", *sockets_in(tmp_path))
    assert_refused(done, 1, f"{tmp_path}/file is no directory")
