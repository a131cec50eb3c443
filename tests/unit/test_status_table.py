"""What `zramd status` prints of what a server tells, to the byte, and where on this machine it finds a disk."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from zramd.attach.nodes import nodes
from zramd.attach.sysfs import BlockDevice
from zramd.cli import main
from zramd.cli.columns import COLUMNS, DEFAULT, Shown, format_time
from zramd.cli.meaning import meaning
from zramd.device.requests import LATENCY_BOUNDS

MM_STAT = "orig_data_size compr_data_size mem_used_total mem_limit mem_used_max same_pages pages_compacted huge_pages"
UUID = "4b813ad6-2300-4b63-9ab8-937546fdf2d2"
URI = "nbd+unix:///?socket=/run/zramd/zram0.nbd"


def facts(*memory: int, name: str = "zram0", latency: int = 0, **more: Any) -> dict[str, Any]:
    """Return what a server tells of a disk with these numbers in mm_stat, and requests in one bucket of latency."""
    buckets = [0] * (len(LATENCY_BOUNDS) + 1)
    buckets[latency] = 100 * (latency > 0)
    told = {
        "name": name,
        "uuid": None,
        "uris": [],
        "swaps": [],
        "measures": None,
        "initstate": 1,
        "disksize": 4 << 30,
        "comp_algorithm": "lz4",
        "engine": "python",
        "connections": 0,
        "mm_stat": dict(zip(f"{MM_STAT} huge_pages_since".split(), [*memory, *[0] * 9], strict=False)),
        "bd_stat": {"pages": 0},
        "backing_dev": None,
        "latency_bounds": list(LATENCY_BOUNDS),
        "requests": {op: {"buckets": buckets} for op in ("read", "write")},
    }
    return told | more


FULL_SIZES = (2469606195, 895483904, 947912704)
FULL = facts(*FULL_SIZES, 1 << 30, 1 << 30, 3992, 30, 12, 57, name="zram12", latency=25, connections=2)
NEW = facts(swaps=["/dev/nbd0"], disksize=512 << 20)


@pytest.fixture
def _served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have two servers that tell these."""
    disks = [NEW, FULL]
    monkeypatch.setattr("zramd.cli.status.find_disks", lambda: range(len(disks)))
    monkeypatch.setattr("zramd.cli.status.ask", lambda number, _: json.dumps(disks[number]))


def run(*arguments: str) -> str:
    done = CliRunner().invoke(main, ["status", *arguments])
    assert (done.exit_code, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.usefixtures("_served")
def test_the_table_is_zramctls_to_the_byte() -> None:
    assert run() == (
        "NAME   ALGORITHM DISKSIZE DATA COMPR TOTAL STREAMS MOUNTPOINT\n"
        "zram0  lz4           512M   0B    0B    0B       1 [SWAP]\n"
        "zram12 lz4             4G 2.3G  854M  904M       1\n"
        "zram0 is swapped to: /dev/nbd0\n"
        "zram0 is not safe to swap to: serve it with --swap\n"
    )
    assert run("--raw", "-n", "-b", "-o", "name,mountpoint,data") == "zram0 [SWAP] 0\nzram12  2469606195\n"
    assert run("zram12", "--output-all", "--raw") == (
        "NAME DISKSIZE DATA COMPR ALGORITHM STREAMS ZERO-PAGES TOTAL MEM-LIMIT MEM-USED MIGRATED COMP-RATIO MOUNTPOINT "
        "HUGE-PAGES HUGE-SINCE BACKEND STATE P99 CLIENTS DEVICE\n"
        "zram12 4G 2.3G 854M lz4 1 3992 904M 1G 1G 30 2.6053  12 57 python in-use 81.8us 2 \n"
    )


@pytest.mark.usefixtures("_served")
def test_json_has_bytes_and_null_in_the_shape_of_util_linux() -> None:
    columns = ("name", "algorithm", "disksize", "data", "compr", "total", "streams", "mountpoint")
    values = ("zram0", "lz4", 512 << 20, 0, 0, 0, 1, "[SWAP]"), ("zram12", "lz4", 4 << 30, *FULL_SIZES, 1, None)
    text = run("--json")
    assert json.loads(text) == {"zramdevices": [dict(zip(columns, row, strict=True)) for row in values]}
    assert text.startswith('{\n   "zramdevices": [\n      {\n         "name": "zram0",\n')
    assert tuple(map(str.upper, columns)) == DEFAULT
    (row,) = json.loads(run("--json", "--output-all", "zram0"))["zramdevices"]
    assert (row["comp-ratio"], row["p99"], row["state"], row["device"]) == (None, None, "idle", "/dev/nbd0")
    assert list(row) == [name.lower() for name in COLUMNS]


def test_the_numbers_are_explained() -> None:
    told = [line for line, _ in meaning(Shown(FULL | {"backing_dev": "/dev/vdb", "bd_stat": {"pages": 1}}, []))]
    assert told == [
        "zram12 is a device of 4G.",
        "2.3G of it (57%) is stored, 4K of that written back; the rest is compressed to 854M. That takes 904M of "
        "memory: 1.4G less than uncompressed, a ratio of 2.61.",
        "It may take 1G of memory (mem_limit), and takes 88% of that; a write that finds no more fails (ENOSPC).",
        "48K in 12 pages did not compress and are stored as they are (huge); 15.6M in 3,992 pages are one word "
        "repeated and take no memory (same-filled); 4K in 1 page is written back to /dev/vdb.",
    ]
    assert [line for line, _ in meaning(Shown(NEW, []))][1:] == [
        "Nothing is stored; it takes memory only for what is.",
        "No mem_limit is set: data that do not compress may take up to 512M of memory.",
    ]
    near = facts(1 << 30, 1 << 29, 95 << 20, 100 << 20)
    assert [line.split("takes ")[1].split(" ")[0] for line, warns in meaning(Shown(near, [])) if warns] == ["95%"]
    little = [line for line, _ in meaning(Shown(facts(1 << 20, 1 << 19, 1 << 19, 1 << 30), []))]
    assert little[1].startswith("1M of it (less than 1%) is stored")
    assert little[2].startswith("It may take 1G of memory (mem_limit), and takes less than 1% of that;")


def test_a_disk_is_found_where_it_is_attached_and_used(tmp_path: Path) -> None:
    texts = {
        "sys/block/nbd0/backend": UUID,
        "sys/block/nbd1/backend": "another",
        "sys/block/loop3/loop/backing_file": "/run/zramd/zramd-loop-x/export/nbd",
        "run/zramd/zramd-loop-x/nbdfuse.pid": "77",
        "proc/77/cmdline": f"nbdfuse\0-P\0/run/x\0/run/zramd/zramd-loop-x/export/nbd\0{URI}\0",
        "proc/swaps": "Filename Type Size Used Priority\n/dev/nbd0p2 partition 1024 0 100",
        "proc/self/mounts": "/dev/nbd01 /no ext4 rw 0 0\n/dev/loop3 /srv/a\\040b ext4 rw 0 0",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n" if text != texts["proc/77/cmdline"] else text)
    assert [node.path for node in nodes(UUID, [URI], str(tmp_path))] == ["/dev/nbd0", "/dev/loop3"]
    assert nodes(None, ["nbd://localhost"], str(tmp_path)) == []
    assert [BlockDevice(name, str(tmp_path)).place() for name in ("nbd0", "loop3", "nbd1")] == [
        "[SWAP]",
        "/srv/a b",
        "",
    ]


def test_times_have_three_digits_or_so() -> None:
    shown = [format_time(each) for each in (0.0, 999.0, 1024.0, 23_456.0, 850_000.0, 1e9, 17.2e9)]
    assert shown == ["0ns", "999ns", "1.0us", "23.5us", "850us", "1s", "17.2s"]
