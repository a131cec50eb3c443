"""What `zramd doctor` makes of a machine, of which the files are made up."""

import json
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from zramd.cli import main
from zramd.doctor import Finding, Machine, Verdict, examine
from zramd.doctor.machine import Answer
from zramd.status.client import NOBODY_LISTENS

LIMITS = """Limit                     Soft Limit           Hard Limit           Units
Max open files            1024                 {files}               files
Max locked memory         8388608              {locked}              bytes
Max realtime priority     0                    {priority}
"""
SWAPS = "Filename\tType\tSize\tUsed\tPriority\n"
ALL, NONE = "CapEff:\t000001ffffffffff\n", "CapEff:\t0000000000000000\n"
TOOLS = ("modprobe", "mkswap", "swapon", "wipefs", "nbdfuse", "fusermount3", "losetup")
MODULES = "lib/modules/6.12.9-amd64/modules.dep"
CONFIG = "etc/zramd/zram0.toml"
UNIT = "etc/systemd/system/zramd@.service"
GO_UNIT = "usr/lib/systemd/system/zramd.service"
HEALTHY: dict[str, str] = {
    "proc/sys/kernel/osrelease": "6.12.9-amd64\n",
    "proc/self/status": f"Name:\tzramd\n{ALL}",
    "proc/self/limits": LIMITS.format(files=4096, locked=8388608, priority=0),
    "proc/meminfo": "MemTotal:         430080 kB\nMemFree: 1 kB\nMemAvailable: 204800 kB\n",
    "proc/pressure/memory": "some avg10=0.00\n",
    "proc/sys/fs/file-nr": "992\t0\t9223372036854775807\n",
    "proc/sys/vm/min_free_kbytes": "26880\n",
    "proc/sys/vm/swappiness": "100\n",
    "proc/sys/vm/page-cluster": "0\n",
    "proc/cmdline": "root=/dev/sda1 quiet resume=UUID=1234\n",
    "proc/devices": "Block devices:\n  8 sd\n 43 nbd\n252 zram\n",
    "proc/swaps": SWAPS,
    "sys/power/resume": "8:2\n",
    "sys/module/zswap/parameters/enabled": "N\n",
    "dev/fuse": "",
    MODULES: "kernel/drivers/block/nbd.ko.xz:\n",
    CONFIG: '[zram0]\nsize = "100M"\nstate = "/run/zramd/zram0"\n',
    UNIT: "[Service]\nExecStart=/usr/local/bin/zramd serve --config /etc/zramd/%i.toml\n",
    "usr/local/bin/zramd": "#!/usr/bin/python3\n",
}


class MadeUp(Machine):
    """A machine with some room on each file system, and with servers that answer as told."""

    def __init__(self, root: Path, room: int = 1 << 30, answers: tuple[Answer, ...] = ()) -> None:
        super().__init__(root)
        self._room, self._answers = room, answers

    def room(self, path: Path) -> int:
        return self._room

    def servers(self) -> Iterator[Answer]:
        yield from self._answers


def make(root: Path, changes: dict[str, str | None] | None = None) -> Path:
    """Make the files of a machine that is well but for some; None is a missing one."""
    for name, text in (HEALTHY | (changes or {})).items():
        if text is not None:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
    for tool in TOOLS:
        path = root / "usr/sbin" / tool
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return root


def findings(machine: Machine) -> dict[str, Finding]:
    return {finding.name: finding for finding in examine(machine)}


def served(limit: int, size: int, used: int = 0) -> Answer:
    memory = {"mem_limit": limit, "mem_used_total": used}
    facts = {"name": "zram0", "disksize": size, "measures": None, "mm_stat": memory}
    return Answer(Path("/run/zramd/zram0.status"), facts)


def test_a_machine_that_is_well_has_nothing_to_do(tmp_path: Path) -> None:
    found = list(examine(MadeUp(make(tmp_path))))
    assert [finding for finding in found if finding.verdict is not Verdict.OK or finding.remedy] == []
    assert len({finding.name for finding in found}) == len(found) == 22


@pytest.mark.parametrize(
    ("changes", "name", "verdict", "remedy"),
    [
        ({MODULES: None}, "nbd", Verdict.PROBLEM, "zramd attach --fuse"),
        ({"proc/sys/kernel/osrelease": "6.1.0-56-amd64\n"}, "noswap", Verdict.PROBLEM, "6.4 or newer"),
        (
            {"proc/sys/kernel/osrelease": "6.1.0\n", "sys/fs/cgroup/cgroup.controllers": "cpu memory pids\n"},
            "noswap",
            Verdict.ADVICE,
            "MemorySwapMax=0",
        ),
        ({"proc/pressure/memory": None}, "pressure", Verdict.ADVICE, "psi=1"),
        ({"proc/sys/vm/min_free_kbytes": "26879\n"}, "min_free", Verdict.ADVICE, "vm.min_free_kbytes=26880"),
        (
            {"proc/meminfo": "MemTotal: 16000000 kB\nMemAvailable: 16000000 kB\n"},
            "min_free",
            Verdict.ADVICE,
            "vm.min_free_kbytes=65536",
        ),
        ({"proc/sys/vm/swappiness": "60\n"}, "swappiness", Verdict.ADVICE, "vm.swappiness=100"),
        ({"proc/sys/vm/page-cluster": "3\n"}, "page-cluster", Verdict.ADVICE, "vm.page-cluster=0"),
        ({"sys/module/zswap/parameters/enabled": "Y\n"}, "zswap", Verdict.ADVICE, "zswap.enabled=0"),
        ({"proc/cmdline": "resume=/dev/nbd0 quiet\n"}, "resume", Verdict.PROBLEM, "noresume"),
        ({"sys/power/resume": "43:0\n"}, "resume", Verdict.PROBLEM, "noresume"),
        ({"sys/power/resume": "252:0\n"}, "resume", Verdict.PROBLEM, "noresume"),
        ({"proc/self/status": "CapEff:\t0000000001a00000\n"}, "locked memory", Verdict.PROBLEM, "LimitMEMLOCK"),
        ({"proc/self/status": "CapEff:\t0000000001204000\n"}, "real time", Verdict.PROBLEM, "LimitRTPRIO"),
        ({"proc/self/status": "CapEff:\t0000000001804000\n"}, "CAP_SYS_ADMIN", Verdict.PROBLEM, "run as root"),
        ({"proc/self/status": "CapEff:\t0000000000a04000\n"}, "CAP_SYS_RESOURCE", Verdict.PROBLEM, "run as root"),
        (
            {"proc/self/limits": LIMITS.format(files=256, locked="unlimited", priority=1)},
            "open files",
            Verdict.PROBLEM,
            "LimitNOFILE=320",
        ),
        ({"proc/sys/fs/file-nr": "9000\t0\t10000\n"}, "file-max", Verdict.PROBLEM, "fs.file-max=20000"),
        (
            {"proc/swaps": f"{SWAPS}/dev/nbd0 partition 4096 0 -2\n/dev/sda2 partition 4096 0 5\n"},
            "swap",
            Verdict.ADVICE,
            "zramd swapon --priority 6 /dev/nbd0",
        ),
        (
            {"proc/swaps": f"{SWAPS}/dev/nbd0 partition 4096 0 100\n/dev/zram0 partition 4096 0 5\n"},
            "swap",
            Verdict.ADVICE,
            "swapoff /dev/zram0",
        ),
        ({CONFIG: '[zram0]\nsiez = "1G"\n'}, "config", Verdict.PROBLEM, "config check"),
        ({"usr/bin/zramd": "\x7fELF"}, "name", Verdict.PROBLEM, "remove that package"),
        ({GO_UNIT: "[Service]\nExecStart=/usr/bin/zramd start\n"}, "name", Verdict.PROBLEM, "disable --now"),
        ({UNIT: "[Service]\nExecStart=/usr/bin/true\n"}, "units", Verdict.PROBLEM, "remove it"),
        ({"usr/local/bin/zramd": None}, "units", Verdict.PROBLEM, "ln -s"),
        ({MODULES: None, "dev/fuse": None}, "tools", Verdict.PROBLEM, "modprobe fuse"),
        ({CONFIG: '[zram0]\nsize = "1G"\nvolatile = true\n'}, "memory zram0", Verdict.ADVICE, "at most 840M"),
        ({CONFIG: '[zram0]\nsize = "800M"\nvolatile = true\n'}, "memory zram0", Verdict.ADVICE, "resident-limit"),
        ({CONFIG: '[zram0]\nsize = "410M"\nvolatile = true\n'}, "memory zram0", Verdict.ADVICE, "make it smaller"),
    ],
)
def test_a_machine_with_one_fault_is_told_of_that_one(
    changes: dict[str, str | None], name: str, verdict: Verdict, remedy: str, tmp_path: Path
) -> None:
    found = findings(MadeUp(make(tmp_path, changes)))
    assert found[name].verdict is verdict
    assert remedy in found[name].remedy
    consequences = {MODULES: "nbd", "proc/meminfo": "min_free", "proc/sys/kernel/osrelease": "nbd"}
    expected = {name, *(consequences[file] for file in changes if file in consequences)}
    assert {finding.name for finding in found.values() if finding.verdict is not Verdict.OK} == expected


@pytest.mark.parametrize(
    ("file", "text", "name"),
    [
        ("proc/self/limits", LIMITS.format(files="unlimited", locked="unlimited", priority=1), "locked memory"),
        ("proc/self/limits", LIMITS.format(files="unlimited", locked="unlimited", priority=1), "real time"),
        ("proc/swaps", f"{SWAPS}/dev/nbd0 partition 4096 0 100\n/dev/sda2 partition 4096 0 5\n", "swap"),
        ("proc/swaps", f"{SWAPS}/dev/sda2 partition 4096 0 5\n", "swap"),
    ],
)
def test_what_is_well_in_another_way_is_no_finding(file: str, text: str, name: str, tmp_path: Path) -> None:
    found = findings(MadeUp(make(tmp_path, {"proc/self/status": NONE, file: text})))
    assert found[name].verdict is Verdict.OK


def test_drop_ins_and_sizes_by_memory_are_looked_at_too(tmp_path: Path) -> None:
    drop_in = "usr/lib/zramd/zramd.toml.d/10-size.toml"
    root = make(tmp_path, {CONFIG: None, drop_in: '[zram7]\nsize = "ram / 4"\nvolatile = true\n'})
    found = findings(MadeUp(root))
    assert found["config"].text.endswith("etc/zramd/zramd.toml has zram7")
    assert found["memory zram7"].text.startswith("105M takes 52.5M at 2:1")


def test_units_are_not_to_start_a_checkout_in_a_home_directory(tmp_path: Path) -> None:
    root = make(tmp_path, {"usr/local/bin/zramd": None})
    (root / "usr/local/bin").mkdir(parents=True)
    (root / "usr/local/bin/zramd").symlink_to("/home/me/zramd/.venv/bin/zramd")
    found = findings(MadeUp(root))["units"]
    assert (found.verdict, "/home/me/zramd" in found.text) == (Verdict.PROBLEM, True)


def test_a_missing_tool_is_named_with_its_package(tmp_path: Path) -> None:
    root = make(tmp_path)
    (root / "usr/sbin/mkswap").unlink()
    found = findings(MadeUp(root))["tools"]
    assert (found.verdict, found.remedy) == (Verdict.PROBLEM, "apt-get install util-linux")


@pytest.mark.parametrize(
    ("room", "verdict"), [(100 << 20, Verdict.OK), (99 << 20, Verdict.ADVICE), (49 << 20, Verdict.PROBLEM)]
)
def test_the_file_system_of_the_regions_has_room_for_them_or_not(room: int, verdict: Verdict, tmp_path: Path) -> None:
    assert findings(MadeUp(make(tmp_path), room))["room zram0"].verdict is verdict


def test_a_disk_that_is_served_is_looked_at_rather_than_the_one_of_that_name_in_the_configuration(
    tmp_path: Path,
) -> None:
    # 300 MiB are expected of it, 100 MiB of which it has already, and 200 MiB are free.
    found = findings(MadeUp(make(tmp_path), answers=(served(300 << 20, 1 << 30, 100 << 20),)))
    assert found["server"].verdict is Verdict.OK
    assert "1G takes 300M by its limit; 300M of memory are free" in found["memory zram0"].text


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (f"no server answers at /run/zramd/zram0.status: {NOBODY_LISTENS}", Verdict.OK),
        ("the server at /run/zramd/zram0.status closed the connection without an answer", Verdict.PROBLEM),
    ],
)
def test_a_socket_that_nobody_listens_on_is_none_but_one_of_something_else_is(
    error: str, verdict: Verdict, tmp_path: Path
) -> None:
    answer = Answer(Path("/run/zramd/zram0.status"), None, error)
    assert findings(MadeUp(make(tmp_path), answers=(answer,)))["server"].verdict is verdict


def test_the_command_tells_the_same_as_text_and_as_json_and_fails_if_there_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = MadeUp(make(tmp_path, {MODULES: None}))
    monkeypatch.setattr("zramd.doctor.Machine", lambda: machine)
    shown = CliRunner().invoke(main, ["doctor"])
    facts = CliRunner().invoke(main, ["doctor", "--json"])
    assert shown.exit_code == facts.exit_code == 1
    listed = json.loads(facts.output)
    lines = [line for line in shown.output.splitlines() if not line.startswith(" ")]
    assert len(lines) == len(listed)
    assert all(line.endswith(found["text"]) for line, found in zip(lines, listed, strict=True))
    monkeypatch.setattr("zramd.doctor.Machine", lambda: MadeUp(make(tmp_path)))
    assert CliRunner().invoke(main, ["doctor"]).exit_code == 0
