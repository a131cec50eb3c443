import subprocess
import sys
from pathlib import Path

import pytest

import zramd
from zramd.attach.swaps import read_swaps, swaps_of

UUID = "0f3c9a52-6d1b-4f0e-9c55-3a1f6f2f7a10"
OTHER = "11111111-2222-3333-4444-555555555555"
HEADER = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"


class Machine:
    """A root directory with the files of the kernel that tell of swap areas and of what lies under them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lines = HEADER
        self.write("proc/swaps", HEADER)

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def swap_on(self, path: str, kind: str = "partition") -> None:
        self.lines += f"{path:<40}{kind}\t1048572\t\t516\t\t100\n"
        self.write("proc/swaps", self.lines)

    def swaps_of(self, *peers: int) -> list[str]:
        return swaps_of(UUID, set(peers), str(self.root))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_without_swap_there_is_none(machine: Machine) -> None:
    assert machine.swaps_of(1) == []


def test_the_list_is_read_in_bytes_and_with_blanks_in_names(machine: Machine) -> None:
    machine.write(
        "proc/swaps",
        HEADER
        + "/dev/nbd0                               partition\t67108860\t\t0\t\t-2\n"
        + "/a\\040b\\134c\\011d/zwölf\\040(deleted)    file\t\t8188\t\t4096\t\t100\n",
    )
    swaps = [(swap.path, swap.kind, swap.size, swap.used, swap.priority) for swap in read_swaps(str(machine.root))]
    assert swaps == [
        ("/dev/nbd0", "partition", 67108860 << 10, 0, -2),
        ("/a b\\c\td/zwölf (deleted)", "file", 8188 << 10, 4096 << 10, 100),
    ]


def test_the_list_of_this_machine_can_be_read() -> None:
    assert all(swap.used <= swap.size for swap in read_swaps())


def test_an_nbd_device_is_found_by_its_backend(machine: Machine) -> None:
    machine.swap_on("/dev/nbd1")
    machine.swap_on("/dev/nbd12")
    machine.write("sys/block/nbd1/backend", f"{OTHER}\n")
    machine.write("sys/block/nbd12/backend", f"{UUID}\n")
    assert machine.swaps_of() == ["/dev/nbd12"]


def test_an_nbd_device_without_a_backend_is_found_by_the_pid_of_its_client(machine: Machine) -> None:
    machine.swap_on("/dev/nbd0")
    machine.write("sys/block/nbd0/pid", "4711\n")
    assert machine.swaps_of(4711, 1) == ["/dev/nbd0"]
    assert machine.swaps_of(471) == []
    assert machine.swaps_of() == []


def test_a_loop_device_is_found_by_the_nbdfuse_behind_its_file(machine: Machine) -> None:
    machine.swap_on("/dev/loop3")
    machine.write("sys/block/loop3/loop/backing_file", "/run/zramd/loop-x/export/nbd\n")
    assert machine.swaps_of(99) == []
    machine.write("run/zramd/loop-x/nbdfuse.pid", "99\n")
    assert machine.swaps_of(99) == ["/dev/loop3"]
    assert machine.swaps_of(98) == []


def test_a_loop_device_on_any_other_file_is_none_of_ours(machine: Machine) -> None:
    machine.swap_on("/dev/loop0")
    machine.write("sys/block/loop0/loop/backing_file", "/swapfile\n")
    assert machine.swaps_of(1) == []


def test_what_is_attached_but_not_swapped_to_does_not_count(machine: Machine) -> None:
    machine.write("sys/block/nbd0/backend", f"{UUID}\n")
    assert machine.swaps_of() == []


def test_other_swap_areas_are_none_of_ours(machine: Machine) -> None:
    machine.swap_on("/dev/sda2")
    machine.swap_on("/var/nbd0", "file")
    machine.swap_on("/dev/nbd1")  # disconnected since it was listed
    machine.write("sys/block/nbd0/backend", f"{UUID}\n")  # attached, but it is the file that is swapped to
    machine.write("sys/block/sda/sda2/pid", "1\n")
    assert machine.swaps_of() == []


def test_a_pid_file_that_is_still_empty_names_nobody(machine: Machine) -> None:
    machine.swap_on("/dev/loop3")
    machine.write("sys/block/loop3/loop/backing_file", "/d/export/nbd\n")
    machine.write("d/nbdfuse.pid", "")
    assert machine.swaps_of(0) == []


@pytest.mark.parametrize("module", ["pathlib", "dataclasses", "typing", "re", "logging", "click", "subprocess"])
def test_it_imports_nothing_heavy(module: str) -> None:
    root = str(Path(zramd.__file__).parents[1])
    code = f"import sys; sys.path.append({root!r}); import zramd.attach.swaps; print({module!r} in sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
