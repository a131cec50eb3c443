"""What `zramd doctor` makes of a machine, of which the files are made up."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from zramd.cli import main
from zramd.doctor import Verdict, examine

HEALTHY = {
    "proc/sys/kernel/osrelease": "6.12.9-amd64\n",
    "proc/self/status": "Name:\tzramd\nCapEff:\t000001ffffffffff\n",
    "proc/meminfo": "MemTotal:         430080 kB\nMemFree: 1 kB\n",
    "proc/sys/vm/min_free_kbytes": "26880\n",
    "proc/sys/vm/page-cluster": "0\n",
    "sys/module/zswap/parameters/enabled": "N\n",
    "lib/modules/6.12.9-amd64/modules.dep": "kernel/drivers/block/nbd.ko.xz:\n",
}


def machine(root: Path, **changes: str | None) -> Path:
    """Make a machine that is well but for some changes to its files; None is a missing one."""
    for name, text in (HEALTHY | changes).items():
        if text is not None:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
    return root


def test_a_machine_that_is_well_has_nothing_to_do(tmp_path: Path) -> None:
    findings = list(examine(machine(tmp_path)))
    assert len(findings) == 9
    assert all(finding.verdict is Verdict.OK and not finding.remedy for finding in findings)


@pytest.mark.parametrize(
    ("file", "text", "name", "verdict", "remedy"),
    [
        ("lib/modules/6.12.9-amd64/modules.dep", None, "nbd", Verdict.PROBLEM, "zramd attach --fuse"),
        ("proc/self/status", "CapEff:\t0000000001a04000\n", "CAP_SYS_RESOURCE", Verdict.OK, ""),
        ("proc/self/status", "CapEff:\t0000000000a04000\n", "CAP_SYS_RESOURCE", Verdict.PROBLEM, "run as root"),
        ("proc/self/status", "CapEff:\t0000000001a00000\n", "CAP_IPC_LOCK", Verdict.PROBLEM, "run as root"),
        ("proc/self/status", "CapEff:\t0000000001204000\n", "CAP_SYS_NICE", Verdict.PROBLEM, "run as root"),
        ("proc/self/status", "CapEff:\t0000000001804000\n", "CAP_SYS_ADMIN", Verdict.PROBLEM, "run as root"),
        ("proc/sys/kernel/osrelease", "6.4.0\n", "noswap", Verdict.OK, ""),
        ("proc/sys/kernel/osrelease", "6.1.0-56-amd64\n", "noswap", Verdict.PROBLEM, "6.4 or newer"),
        ("proc/sys/vm/min_free_kbytes", "26879\n", "min_free", Verdict.ADVICE, "vm.min_free_kbytes=26880"),
        ("proc/meminfo", "MemTotal: 16000000 kB\n", "min_free", Verdict.ADVICE, "vm.min_free_kbytes=65536"),
        ("proc/sys/vm/page-cluster", "3\n", "page-cluster", Verdict.ADVICE, "vm.page-cluster=0"),
        ("sys/module/zswap/parameters/enabled", "Y\n", "zswap", Verdict.ADVICE, "zswap.enabled=0"),
    ],
)
def test_a_machine_with_one_fault_is_told_of_that_one(
    file: str, text: str | None, name: str, verdict: Verdict, remedy: str, tmp_path: Path
) -> None:
    findings = {finding.name: finding for finding in examine(machine(tmp_path, **{file: text}))}
    assert findings[name].verdict is verdict
    assert remedy in findings[name].remedy
    others = [finding for finding in findings.values() if finding.name not in (name, "nbd", "noswap")]
    assert all(finding.verdict is Verdict.OK for finding in others)


def test_before_6_4_a_cgroup_keeps_regions_in_memory(tmp_path: Path) -> None:
    changes = {"proc/sys/kernel/osrelease": "6.1.0\n", "sys/fs/cgroup/cgroup.controllers": "cpu memory pids\n"}
    findings = {finding.name: finding for finding in examine(machine(tmp_path, **changes))}
    assert findings["noswap"].verdict is Verdict.ADVICE
    assert "MemorySwapMax=0" in findings["noswap"].remedy


def test_the_command_prints_a_line_for_each_and_fails_if_there_is_a_problem() -> None:
    expected = list(examine())
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == int(any(finding.verdict is Verdict.PROBLEM for finding in expected))
    lines = result.output.splitlines()
    assert [line.split()[:2] for line in lines] == [[finding.verdict.value, finding.name] for finding in expected]
