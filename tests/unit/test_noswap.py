"""Directories whose contents stay in memory."""

import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from zramd import noswap

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount")


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "a" / "state"
    yield directory
    subprocess.run(["umount", str(directory)], stderr=subprocess.DEVNULL)


@needs_root
def test_a_directory_is_mounted_once_and_keeps_what_it_holds(directory: Path) -> None:
    if tuple(map(int, platform.release().split(".")[:2])) < (6, 4):
        pytest.skip("needs Linux 6.4, for tmpfs that is never swapped out")
    noswap.mount(directory)
    assert noswap.check(directory).in_force
    assert directory.stat().st_mode & 0o777 == 0o700
    (directory / "superblock").write_bytes(b"x")
    noswap.mount(directory)
    assert (directory / "superblock").read_bytes() == b"x"
    mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f" {directory} " in line]
    assert len(mounts) == 1


@needs_root
def test_what_is_kept_is_not_mounted_over(directory: Path) -> None:
    directory.mkdir(parents=True)
    (directory / "superblock").write_bytes(b"x")
    noswap.mount(directory)
    assert (directory / "superblock").read_bytes() == b"x"


@pytest.mark.parametrize(("limits", "swaps"), [(["max", "0"], False), (["0", "max"], False), (["max", "9"], True)])
def test_a_cgroup_that_may_not_swap_keeps_them_too(
    limits: list[str], swaps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outer, inner = limits
    group = tmp_path / "system.slice" / "zramd.service"
    group.mkdir(parents=True)
    (group / "memory.swap.max").write_text(f"{inner}\n")
    (group.parent / "memory.swap.max").write_text(f"{outer}\n")
    (tmp_path / "cgroup").write_text("1:name=systemd:/\n0::/system.slice/zramd.service\n")
    monkeypatch.setattr(noswap, "CGROUPS", tmp_path)
    monkeypatch.setattr(noswap, "OWN_CGROUP", tmp_path / "cgroup")
    measure = noswap.check(tmp_path)
    assert measure.in_force == (not swaps)
    assert measure.missing == "" or str(tmp_path) in measure.missing
