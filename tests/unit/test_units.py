"""The systemd units, as systemd reads them and rates their confinement."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

UNITS = Path(__file__).parents[2] / "systemd"
EXPOSURE = 25
"""Tenths: most that `systemd-analyze security` may find of the server."""


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """Return a directory with all units for a disk zram0, and a `zramd` that is there."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze: apt-get install systemd")
    for unit in UNITS.iterdir():
        text = unit.read_text().replace("/usr/local/bin/zramd", str(Path(sys.executable).with_name("zramd")))
        (tmp_path / unit.name.replace("@.", "@zram0.")).write_text(text)
    return tmp_path


def analyze(*arguments: str | Path) -> str:
    """Run systemd-analyze; return what it complained of."""
    result = subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stderr


def test_systemd_has_nothing_to_say_against_any_unit(units: Path) -> None:
    found = sorted(path for path in units.iterdir() if path.suffix in (".service", ".socket", ".timer"))
    assert len(found) == 10
    assert analyze("verify", "--man=no", *found) == ""


def test_the_server_is_confined(units: Path) -> None:
    analyze("security", "--offline=yes", f"--threshold={EXPOSURE}", units / "zramd@zram0.service")


def test_users_are_made_by_sysusers(tmp_path: Path) -> None:
    if shutil.which("systemd-sysusers") is None:
        pytest.skip("needs systemd-sysusers: apt-get install systemd")
    (tmp_path / "etc").mkdir()
    subprocess.run(["systemd-sysusers", f"--root={tmp_path}", UNITS / "zramd.sysusers.conf"], check=True)
    assert "\nzramd:" in "\n" + (tmp_path / "etc/passwd").read_text()
