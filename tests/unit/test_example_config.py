import re
from pathlib import Path
from typing import Any

import pytest

from zramd import config
from zramd.config.document import Table
from zramd.settings import Settings

EXAMPLE = Path(__file__).parents[2] / "configs" / "zramd.toml"


@pytest.fixture(autouse=True)
def _places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zramd.config.keys.make_runtime_directory", lambda: tmp_path)
    monkeypatch.setattr("zramd.config.keys.state_directory", lambda name: tmp_path / name)


def test_the_example_as_it_is_serves_one_disk_with_all_defaults() -> None:
    settings = config.load(EXAMPLE)
    (disk,) = settings.disks
    assert settings == Settings(disks=(disk,))


def test_the_example_names_every_key_and_each_line_of_it_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: set[tuple[str, str]] = set()
    take = Table.take

    def note(table: Table, key: str, *arguments: Any) -> Any:
        taken.add((table.name, key))
        return take(table, key, *arguments)

    monkeypatch.setattr(Table, "take", note)
    # Only one of these, and names that every machine has.
    text = EXAMPLE.read_text().replace("#psk-file", "# psk-file").replace("#volatile", "# volatile")
    text = text.replace("#swap-priority", "# swap-priority")
    text = text.replace('mode = "off"', 'mode = "require"').replace('"disk"', '"root"')
    full = tmp_path / "full.toml"
    full.write_text(re.sub(r"(?m)^#(?=[a-z\[])", "", text))
    settings = config.load(full)
    assert [disk.name for disk in settings.disks] == ["zram0", "zram1"]
    named = {
        (table, key)
        for table, body in re.findall(r"(?ms)^#?\[([\w.]+)\]$(.*?)(?=^#?\[|\Z)", EXAMPLE.read_text())
        for key in re.findall(r"(?m)^#([a-z-]+) = ", body)
    }
    assert {pair for pair in taken if "zram1" not in pair[0]} == {pair for pair in named if "zram1" not in pair[0]}
