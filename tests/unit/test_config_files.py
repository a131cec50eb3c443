"""Files of a configuration and their drop-ins, in machines made up under a directory; what `zramd config` says."""

import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.unit.test_config import WHOLE
from zramd.cli import main
from zramd.config import ConfigError, Configuration, find, load, load_disk
from zramd.config.show import toml
from zramd.device.codecs import codec
from zramd.device.opening import OpenDevice
from zramd.device.superblock import StateError
from zramd.memory import RegionStore
from zramd.settings import Settings
from zramd.use import Use

MAIN = "etc/zramd/zramd.toml"
DROP_INS = "zramd/zramd.toml.d"
MASK = "-> /dev/null"
MEMINFO = {"proc/meminfo": "MemTotal:        8388608 kB\n"}


@pytest.fixture(autouse=True)
def _places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zramd.config.keys.make_runtime_directory", lambda: tmp_path / "run")
    monkeypatch.setattr("zramd.config.keys.state_directory", lambda name: tmp_path / "kept" / name)


def make(root: Path, files: dict[str, str]) -> Path:
    """Make a machine of 8 GiB that has these files."""
    for name, text in {**MEMINFO, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if text == MASK:
            (root / name).symlink_to(os.devnull)
        else:
            (root / name).write_text(text)
    return root


def sizes(root: Path) -> dict[str, tuple[int | None, int | None]]:
    """Return the disksize and the limit of each disk, in MiB."""
    path = find(root=root)
    assert path is not None
    disks = load(path, root=root).disks
    return {
        disk.name: (
            disk.wanted.disksize and disk.wanted.disksize >> 20,
            disk.mem_limit and disk.mem_limit >> 20,
        )
        for disk in disks
    }


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({MAIN: "[zram0]\nsize = '1M'\n"}, {"zram0": (1, None)}),
        # Key by key, and a new disk.
        (
            {
                MAIN: "[zram0]\nsize = '1M'\nresident-limit = '9M'\n",
                f"etc/{DROP_INS}/50-a.toml": "[zram0]\nsize = '2M'\n[zram1]\nsize = '3M'\n",
            },
            {"zram0": (2, 9), "zram1": (3, None)},
        ),
        # By name, wherever they are.
        (
            {
                MAIN: "[zram0]\nsize = '1M'\n",
                f"usr/lib/{DROP_INS}/90.toml": "[zram0]\nsize = '9M'\n",
                f"etc/{DROP_INS}/10.toml": "[zram0]\nsize = '2M'\nresident-limit = '4M'\n",
            },
            {"zram0": (9, 4)},
        ),
        # Of one name, one counts; of two main files, too.
        (
            {
                MAIN: "[zram0]\nsize = '1M'\n",
                "usr/lib/zramd/zramd.toml": "[zram5]\n",
                f"usr/lib/{DROP_INS}/50.toml": "[zram0]\nsize = '5M'\nresident-limit = '5M'\n",
                f"usr/local/lib/{DROP_INS}/50.toml": "[zram0]\nsize = '6M'\n",
            },
            {"zram0": (6, None)},
        ),
        # Done away with; what does not end in .toml was never there.
        (
            {
                MAIN: "[zram0]\nsize = '1M'\n",
                f"usr/lib/{DROP_INS}/50.toml": "[zram0]\nsize = '5M'\n",
                f"etc/{DROP_INS}/50.toml": MASK,
                f"etc/{DROP_INS}/60.toml~": "[zram0]\nsize = '6M'\n",
            },
            {"zram0": (1, None)},
        ),
        # Nothing but a drop-in.
        ({f"usr/lib/{DROP_INS}/50.toml": "[zram0]\nsize = '5M'\n"}, {"zram0": (5, None)}),
        ({"run/zramd/zramd.toml": "[zram7]\nsize = '7M'\n", MAIN: "[zram0]\n"}, {"zram7": (7, None)}),
        # Of the machine's memory; and not on such a machine.
        (
            {
                MAIN: "[zram0]\nsize = 'min(ram / 2, 4GiB) + 1'\nresident-limit = '25%'\n".replace(" + 1", " + 1B")
                + "[zram1]\nhost-memory-limit = '8191M'\n[zram2]\nhost-memory-limit = 'ram'\n"
            },
            {"zram0": (4096, 2048), "zram2": (None, None)},
        ),
    ],
)
def test_files_count_in_their_order_and_key_by_key(
    files: dict[str, str], found: dict[str, tuple[int | None, int | None]], tmp_path: Path
) -> None:
    assert sizes(make(tmp_path, files)) == found


def test_a_file_elsewhere_has_the_drop_ins_beside_it_only(tmp_path: Path) -> None:
    root = make(
        tmp_path, {"a.toml": "[zram0]\n", "a.toml.d/1.toml": "[zram1]\n", "etc/zramd/a.toml.d/1.toml": "[zram2]\n"}
    )
    assert [disk.name for disk in load(root / "a.toml", root=root).disks] == ["zram0", "zram1"]


def test_an_error_names_the_drop_in_and_its_line(tmp_path: Path) -> None:
    name = f"etc/{DROP_INS}/50.toml"
    for line, words in [
        ("zram0.sise = 1", "[zram0] sise: no such key; did you mean size?"),
        (
            "zram0 . size = 'min(ram, 4096)'",
            "[zram0] size: 'min(ram, 4096)' is not a size: column 10: 4096 has no unit",
        ),
        ("zram0.policy.idle-afer = 1", "[zram0.policy] idle-afer: no such key; did you mean idle-after?"),
        ("[zramX]", "[zramX]: no such table"),
    ]:
        root = make(tmp_path, {MAIN: "[zram0]\nsize = '1M'\n", name: f"# one\n\n{line}\n"})
        with pytest.raises(ConfigError) as caught:
            sizes(root)
        assert str(caught.value).startswith(f"{root / name}:3: {words}")


def test_a_disk_by_itself_has_its_own_file_or_its_table_of_the_default_one(tmp_path: Path) -> None:
    root = make(tmp_path, {MAIN: "[zram0]\n[zram1]\nsize = '1M'\n[zram2]\nhost-memory-limit = '1G'\n"})
    assert [disk.name for disk in load_disk("zram1", root=root).disks] == ["zram1"]
    assert load_disk("zram2", root=root).left_out == ("zram2",)
    with pytest.raises(ConfigError, match=r"zramd.toml: there is no disk zram3: add a table \[zram3\]$"):
        load_disk("zram3", root=root)
    with pytest.raises(ConfigError, match="is not the name of a disk"):
        load_disk("../zram0", root=root)
    make(root, {"etc/zramd/zram1.toml": "[zram1]\nsize = '2M'\n"})
    assert load_disk("zram1", root=root).disks[0].wanted.disksize == 2 << 20
    with pytest.raises(ConfigError, match=r"there is neither .*/zram0.toml nor"):
        load_disk("zram0", root=tmp_path / "proc")


@pytest.mark.parametrize(
    ("text", "use"),
    [
        ("", Use()),
        ("swap-priority = -1\noptions = ''", Use(options="", swap_priority=-1)),
        ("mount-point = '/mnt'", Use(Path("/mnt"))),
        ("mount-point = '/mnt'\nfs-type = 'xfs'\noptions = 'noatime'", Use(Path("/mnt"), "xfs", "noatime")),
        ("mount-point = '/mnt'\nswap-priority = 5", ":3: [zram0] swap-priority: `swap-priority` and `mount-point`"),
        ("mount-point = '/mnt'\nfs-type = 'swap'", ":3: [zram0] fs-type: swap has no"),
        ("fs-type = 'ext4'", ":2: [zram0] fs-type: needs a `mount-point`"),
        ("fs-type = '../sh'", ":2: [zram0] fs-type: '../sh' is not the name"),
        ("mount-point = 'mnt'", ":2: [zram0] mount-point: 'mnt' is not an absolute path"),
        ("options = 'a b'", ":2: [zram0] options: 'a b' is not a list"),
        ("swap-priority = 32768", ":2: [zram0] swap-priority: 32768 is not a number from -1 to 32767"),
    ],
)
def test_a_disk_is_swap_or_is_mounted(text: str, use: Use | str, tmp_path: Path) -> None:
    path = make(tmp_path, {"a.toml": f"[zram0]\n{text}\n"}) / "a.toml"
    if isinstance(use, Use):
        assert load(path).disks[0].use == use
    else:
        with pytest.raises(ConfigError) as caught:
            load(path)
        assert str(caught.value).startswith(f"{path}{use}")


SHOWN = {
    MAIN: WHOLE.replace('"sieben"', r'"\u007f ö \"\\"').replace('"512M"', '"min(ram / 3, 1E)"')
    + 'compression-algorithm = "lz4 zstd(level=9) (type=idle)"\n[zram0.policy]\nmemory-high = "80%"\n',
    f"run/{DROP_INS}/9.toml": '[zram1]\nsize = "ram / 7"\nmount-point = "/a"\nfs-type = "xfs"\n'
    'host-memory-limit = "9G"\n[zram2]\nhost-memory-limit = "1G"\n[zram0.policy]\nidle-after = 5\n',
}


def test_what_is_shown_loads_as_what_it_was_of(tmp_path: Path) -> None:
    root = make(tmp_path, SHOWN)
    first = Configuration.read(root / MAIN, root=root)
    lines = list(toml(first))
    (tmp_path / "shown.toml").write_text("\n".join(lines))
    second = Configuration.read(tmp_path / "shown.toml", root=root)
    assert [disk.name for disk in second.settings.disks] == ["zram7", "zram0", "zram1"]
    # Codecs have functions of their own.
    said, meant = (re.sub(r" at 0x\w+", "", repr(each.settings)) for each in (second, first))
    assert said == meant
    page = (8 << 30) // 7 // 4096 * 4096 + 4096
    assert f'size = "ram / 7"  # {page}, {root}/run/{DROP_INS}/9.toml:2' in lines
    assert f"idle-after = 5  # {root}/run/{DROP_INS}/9.toml:9" in lines
    assert f'fs-type = "xfs"  # {root}/run/{DROP_INS}/9.toml:4' in lines
    assert 'unix-mode = "0660"  # ' in "\n".join(lines)
    assert 'status = "{}"  # default'.format(tmp_path / "run/zram1.status") in lines


@pytest.mark.parametrize(
    ("text", "status", "words"),
    [
        ("[zram0]\nsize = '2G'\ncompression-algorithm = 'lz4'\n", 0, ["zramd.toml: zram0 (2G, lz4)"]),
        ("[zram0]\nsise = 1\n", 1, ["Error: ", "zramd.toml:2: [zram0] sise: no such key"]),
        ("[zram0]\nsize = '17G'\n", 0, ["Warning: ", "[zram0] size: more than twice the memory of 8G"]),
        ("[server]\nswap = true\n[zram0]\nvolatile = true\n", 0, ["[zram0] volatile: what is swapped out is lost"]),
        ("[zram0]\n[zram0.policy]\nwriteback-after = 9\n", 0, ["does nothing without writeback-device"]),
        ("[zram0]\n[zram0.policy]\nmemory-low = '9%'\n", 0, ["are of resident-limit, and there is none"]),
    ],
)
def test_check_tells_what_is_wrong_and_what_is_unwise(text: str, status: int, words: list[str], tmp_path: Path) -> None:
    root = make(tmp_path, {MAIN: text})
    result = CliRunner().invoke(main, ["config", "check", "--root", str(root)])
    assert result.exit_code == status
    assert all(word in result.output for word in words)
    assert len(result.output.splitlines()) == (2 if status == 0 and "Warning" in result.output else 1)


def test_without_a_file_there_is_nothing_to_check(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["config", "check", "--root", str(make(tmp_path, {}))])
    assert (result.exit_code, len(result.output.splitlines())) == (1, 1)
    assert f"there is no {tmp_path}/etc/zramd/zramd.toml" in result.output


@pytest.mark.parametrize(
    ("options", "user", "served"),
    [
        (["--check"], 0, 3 << 20),
        (["--check", "--size", "1M"], 0, 1 << 20),
        (["--check"], 1000, None),
    ],
)
def test_the_default_file_is_for_root_without_options(
    options: list[str], user: int, served: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Settings] = []
    path = make(tmp_path, {MAIN: "[zram0]\nsize = '3M'\n"}) / MAIN
    monkeypatch.setattr("zramd.config.find", lambda: path)
    monkeypatch.setattr("zramd.disks.check", given.append)
    monkeypatch.setattr("zramd.log.start_log", lambda: None)
    monkeypatch.setattr("zramd.cli.serve.state_directory", lambda name: tmp_path / name)
    monkeypatch.setattr("zramd.cli.serve.make_runtime_directory", lambda: tmp_path)
    monkeypatch.setattr("os.geteuid", lambda: user)
    result = CliRunner().invoke(main, ["serve", *options])
    assert (result.exit_code, result.output) == (0, f"config:  {path}\n" if served == 3 << 20 else "")
    assert [disk.wanted.disksize for settings in given for disk in settings.disks] == [served]


def test_a_machine_with_too_much_memory_for_any_disk_is_served_none_and_that_is_no_failure(tmp_path: Path) -> None:
    path = make(tmp_path, {"a.toml": "[zram0]\nhost-memory-limit = '1M'\n"}) / "a.toml"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(30)
        environment = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}
        command = [sys.executable, "-m", "zramd", "serve", "--config", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert (done.returncode, done.stderr) == (0, "")
        assert "nothing to serve" in done.stdout
        assert systemd.recv(100) == b"READY=1"
        # But to an upgrade of a server that has disks it is.
        assert subprocess.run([*command, "--check"], capture_output=True).returncode == 1


def test_a_disk_that_is_kept_stays_as_large_as_it_was_when_its_size_was_one_of_the_memory(tmp_path: Path) -> None:
    root = make(tmp_path, {"a.toml": "[zram0]\nsize = 'ram / 1024'\n", "b.toml": "[zram0]\nsize = '9M'\n"})
    (kept,) = load(root / "a.toml", root=root).disks
    OpenDevice(RegionStore(tmp_path / "state"), replace(kept.wanted, codec=codec("lz4"))).close()
    make(root, {"proc/meminfo": "MemTotal: 9437184 kB\n"})
    for name in ("a.toml", "b.toml"):
        (disk,) = load(root / name, root=root).disks
        assert disk.wanted.disksize == 9 << 20
        if name == "a.toml":
            opened = OpenDevice(RegionStore(tmp_path / "state"), disk.wanted)
            assert opened.device.disksize == 8 << 20
            opened.close()
        else:
            with pytest.raises(StateError, match="has 8388608 bytes: ask for the same"):
                OpenDevice(RegionStore(tmp_path / "state"), disk.wanted)


@pytest.mark.parametrize(
    ("lines", "options", "given"),
    [
        ("", [], ["--priority=100", "--options=discard"]),
        ("swap-priority = 7\noptions = 'discard=once,nofail'", [], ["--priority=7", "--options=discard=once,nofail"]),
        ("swap-priority = 7\noptions = 'discard=once,nofail'", ["--no-discard"], ["--priority=7", "--options=nofail"]),
        ("swap-priority = -1\noptions = ''", [], ["--priority=-1"]),
        ("swap-priority = 7", ["--priority", "0", "--disk", "zram1"], ["--priority=0", "--options=discard"]),
    ],
)
def test_swapon_does_as_the_configuration_says_unless_told_otherwise(
    lines: str, options: list[str], given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path, {"a.toml": f"[zram0]\n{lines}\n"}) / "a.toml"
    if "--disk" in options:
        make(tmp_path, {"a.toml.d/1.toml": "[zram1]\n"})
    ran: list[list[str]] = []
    monkeypatch.setattr("zramd.cli.swap.require_root", lambda: None)
    monkeypatch.setattr("zramd.cli.swap.require_unused", lambda _: None)
    monkeypatch.setattr("zramd.cli.swap.contents", lambda _: set())
    monkeypatch.setattr("zramd.cli.swap.find_tool", lambda name, _: name)
    monkeypatch.setattr("zramd.cli.swap.run_tool", ran.append)
    result = CliRunner().invoke(main, ["swapon", "/dev/nbd3", "--config", str(path), *options])
    assert (result.exit_code, result.output) == (0, "")
    assert ran[1] == ["swapon", *given, Path("/dev/nbd3")]
