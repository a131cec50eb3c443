"""The control words: what each takes, refuses and does, by the kernel's rules (Linux 6.18; algorithm_params: 7.1)."""

import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard

from tests.property.test_device import make_data, read, write
from zramd.device import codecs
from zramd.device.disk import Disk
from zramd.device.life import BusyError, UninitialisedError
from zramd.device.opening import OpenDevice
from zramd.device.wanted import Wanted
from zramd.device.zram import Device
from zramd.layout import PAGE_SIZE
from zramd.memory import NoMemoryError
from zramd.status import attributes, control
from zramd.status.attributes import AttributeRefusedError, Served

PYTHON = Path(os.__file__).read_bytes()
ZEROS = " ".join(["       0"] * 9) + "\n"


class Words:
    """A disk in `directory`, and its control words."""

    def __init__(self, directory: Path) -> None:
        self.disk = Disk("zram3", directory)
        self.swaps: list[str] = []
        self.stopped = 0
        self._served = Served(self.disk, (), Path("/admin"), swaps=lambda: self.swaps, stop=self._stop)

    def _stop(self) -> None:
        self.stopped += 1

    def set(self, *assignments: str) -> None:
        for assignment in assignments:
            name, _, value = assignment.partition("=")
            control.write(self._served, name, value)

    def refuses(self, assignment: str, error: str) -> None:
        with pytest.raises(AttributeRefusedError, match=rf"^{error} ."):
            self.set(assignment)

    def read(self, name: str) -> str:
        return attributes.read(self._served, name)

    @property
    def opened(self) -> OpenDevice:
        assert self.disk.opened is not None
        return self.disk.opened


@pytest.fixture
def words(tmp_path: Path) -> Iterator[Words]:
    """Return a disk that is not initialised."""
    words = Words(tmp_path / "state")
    yield words
    if words.disk.opened:
        words.disk.opened.close()


def test_an_uninitialised_disk_has_attributes_but_no_pool(words: Words) -> None:
    assert words.read("disksize") == "0\n"
    assert words.read("initstate") == "0\n"
    assert words.read("mm_stat") == ZEROS
    assert words.read("io_stat") == "       0        0 0        0\n"
    assert words.read("comp_algorithm") == "[lz4] lz4hc zstd \n"
    for name in ("classes", "compact"):
        with pytest.raises(AttributeRefusedError, match=r"^EINVAL .*disksize"):
            words.set("compact=1") if name == "compact" else words.read(name)
    with pytest.raises(UninitialisedError), words.disk.connected(lambda: None):
        pass


@pytest.mark.parametrize(
    ("value", "size"),
    [("5000", 8192), ("1.5M", 4096), ("2Mjunk", 2 << 20), ("0x1000", 4096), ("010000", 4096), ("1G", 1 << 30)],
)
def test_disksize_is_read_as_the_kernel_reads_it_and_rounded_up(words: Words, value: str, size: int) -> None:
    words.set(f"disksize={value}")
    assert words.read("disksize") == f"{size}\n"
    assert words.read("initstate") == "1\n"


def test_a_disk_gets_its_size_once(words: Words) -> None:
    for value in ("0", "none", "-1", "0M"):
        words.refuses(f"disksize={value}", "EINVAL")
    assert words.read("initstate") == "0\n"
    words.set("disksize=1M")
    words.refuses("disksize=1M", "EBUSY")
    # What is wrong with the number comes first.
    words.refuses("disksize=0", "EINVAL")


def test_comp_algorithm_is_a_name(words: Words) -> None:
    for name in ("lz4hc", "zstd", "lz4"):
        words.set(f"comp_algorithm={name}")
        assert f"[{name}]" in words.read("comp_algorithm")
    for wrong in ("gzip", "LZ4", " lz4", "lz4 ", "zstd(level=9)", "x" * 127):
        words.refuses(f"comp_algorithm={wrong}", "EINVAL")
    words.refuses("comp_algorithm=" + "x" * 128, "E2BIG")
    words.set("comp_algorithm=zstd", "disksize=1M")
    words.refuses("comp_algorithm=gzip", "EINVAL")
    assert words.opened.device.identity.codec.name == "zstd"
    words.set("comp_algorithm=lz4")
    assert words.opened.device.identity.codec.name == "lz4"


def test_a_limit_set_before_the_size_holds(words: Words) -> None:
    words.set("mem_limit=5000")
    assert words.read("mem_limit") == "8192\n"
    words.refuses("mem_limit=much", "EINVAL")
    words.set("disksize=1M")
    assert words.read("mm_stat").split()[3] == "8192"


def test_mem_used_max_is_accepted_without_effect_before_the_size(words: Words) -> None:
    words.set("mem_used_max=0")
    words.refuses("mem_used_max=1", "EINVAL")


@pytest.mark.parametrize("value", ["0", "", "x", "-1", "1 force", "1.5"])
def test_reset_takes_a_number_that_is_not_0(words: Words, value: str) -> None:
    words.set("disksize=1M")
    words.refuses(f"reset={value}", "EINVAL")
    words.refuses("reset=65536", "ERANGE")
    assert words.read("initstate") == "1\n"


def test_reset_forgets_everything(words: Words, tmp_path: Path) -> None:
    (tmp_path / "dict").write_bytes(PYTHON[:4096])
    words.set("comp_algorithm=zstd", f"algorithm_params=level=7 dict={tmp_path}/dict", "disksize=1M", "mem_limit=1M")
    write(words.opened.device, 0, make_data("random", 1, 8 * PAGE_SIZE))
    with words.opened.device as _:
        words.opened.device.discard(0, PAGE_SIZE)
    assert list((tmp_path / "state").iterdir())
    words.set("reset=1")
    assert list((tmp_path / "state").iterdir()) == []
    assert words.read("mm_stat") == ZEROS
    assert words.read("io_stat") == "       0        0 0        0\n"
    assert words.read("stat") == " ".join(["       0"] * 17) + "\n"
    assert words.read("disksize") == "0\n"
    assert words.read("comp_algorithm") == "[lz4] lz4hc zstd \n"
    words.set("disksize=1M")
    made = words.opened.device.identity.codec
    assert (made.name, made.level, made.dictionary) == ("lz4", 1, b"")
    assert read(words.opened.device, 0, 8 * PAGE_SIZE) == bytes(8 * PAGE_SIZE)
    words.set("reset=65535", "reset=1")


def test_reset_waits_for_nobody_and_is_refused_while_a_client_is_connected(words: Words) -> None:
    words.set("disksize=1M")
    with words.disk.connected(lambda: None):
        words.refuses("reset=1", "EBUSY")
        assert words.read("initstate") == "1\n"
    words.set("reset=1")
    assert words.read("initstate") == "0\n"


def test_a_forced_reset_hangs_up_and_lets_nobody_in_until_it_is_done(words: Words) -> None:
    words.set("disksize=1M")
    hung_up = threading.Event()
    refused: list[str] = []

    def client() -> None:
        with words.disk.connected(hung_up.set):
            connected.set()
            hung_up.wait()
            try:
                with words.disk.connected(lambda: None):
                    pass
            except UninitialisedError as error:
                refused.append(str(error))

    connected = threading.Event()
    thread = threading.Thread(target=client)
    thread.start()
    connected.wait()
    words.set("reset=force")
    thread.join()
    assert refused == ["zram3 is being reset"]
    assert words.read("initstate") == "0\n"


def test_a_client_that_does_not_go_keeps_its_disk(words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zramd.device.life.RESET_SECONDS", 0.05)
    words.set("disksize=1M")
    with words.disk.connected(lambda: None):
        with pytest.raises(BusyError, match="did not end"):
            words.disk.reset(force=True)
        write(words.opened.device, 0, make_data("text", 1, PAGE_SIZE))
        with words.disk.connected(lambda: None):
            pass


def test_parameters_replace_one_another(words: Words) -> None:
    words.set(
        "comp_algorithm=zstd", "algorithm_params=level=9 unknown=5", "algorithm_params=algo=zstd priority=0 level=-3"
    )
    words.refuses("algorithm_params=level", "EINVAL")
    words.refuses("algorithm_params=level=high", "EINVAL")
    words.refuses("algorithm_params=level=0x3", "EINVAL")
    words.refuses("algorithm_params=level=23", "EINVAL")
    words.refuses("algorithm_params=algo=lz4 level=3", "EINVAL")
    words.refuses("algorithm_params=priority=1 level=3", "EINVAL")
    words.set("disksize=1M")
    assert words.opened.device.identity.codec.level == -3
    words.refuses("algorithm_params=level=23", "EINVAL")
    words.set("algorithm_params=level=3")
    assert words.opened.device.identity.codec.level == 3


def test_parameters_that_another_algorithm_cannot_have_are_refused_with_the_size(words: Words) -> None:
    words.set("comp_algorithm=zstd", "algorithm_params=level=19", "comp_algorithm=lz4hc")
    words.refuses("disksize=1M", "EINVAL")
    assert words.read("initstate") == "0\n"
    words.set("algorithm_params=level=12", "disksize=1M")


def bad_dictionaries(directory: Path) -> Iterator[tuple[str, str]]:
    """Yield (algorithm, path) of dictionaries that cannot be used."""
    contents = {"empty": b"", "long": bytes(65537), "huge": bytes((1 << 20) + 1)}
    contents["damaged"] = b"\x37\xa4\x30\xec" + random.Random(1).randbytes(5000)
    for name, content in contents.items():
        (directory / name).write_bytes(content)
    os.mkfifo(directory / "fifo")
    (directory / "folder").mkdir()
    for algorithm in codecs.NAMES:
        for name in ("empty", "huge", "fifo", "folder", "missing"):
            yield algorithm, str(directory / name)
        yield algorithm, "relative"
    yield "lz4", str(directory / "long")
    yield "lz4hc", str(directory / "long")
    yield "zstd", str(directory / "damaged")


def test_a_bad_dictionary_is_refused_when_it_is_set(words: Words, tmp_path: Path) -> None:
    for algorithm, path in bad_dictionaries(tmp_path):
        words.set(f"comp_algorithm={algorithm}")
        words.refuses(f"algorithm_params=dict={path}", "EINVAL")
    words.set("disksize=1M")


@pytest.mark.parametrize("algorithm", codecs.NAMES)
def test_a_dictionary_helps_and_is_kept_with_the_disk(words: Words, tmp_path: Path, algorithm: str) -> None:
    data = bytearray(PYTHON[: 8 * PAGE_SIZE])
    words.set(f"comp_algorithm={algorithm}", "disksize=1M")
    write(words.opened.device, 0, data)
    without = words.disk.mm_stat().compr_data_size
    (tmp_path / "a dictionary").write_bytes(PYTHON[: 8 * PAGE_SIZE])
    words.set(
        "reset=1", f"comp_algorithm={algorithm}", f'algorithm_params=dict="{tmp_path}/a dictionary"', "disksize=1M"
    )
    write(words.opened.device, 0, data)
    assert words.disk.mm_stat().compr_data_size < without / 2
    (tmp_path / "a dictionary").unlink()
    words.opened.close()
    opened = words.disk.open(Wanted())
    assert opened.recovered
    assert read(opened.device, 0, len(data)) == data
    words.set("reset=1")
    assert list((tmp_path / "state").iterdir()) == []


def test_a_trained_dictionary_works_with_a_level(words: Words, tmp_path: Path) -> None:
    samples: list[bytes | bytearray | memoryview] = [PYTHON[start : start + 500] for start in range(0, 30000, 50)]
    (tmp_path / "trained").write_bytes(zstandard.train_dictionary(4096, samples).as_bytes())
    words.set("comp_algorithm=zstd", f"algorithm_params=level=19 dict={tmp_path}/trained", "disksize=1M")
    write(words.opened.device, 0, bytearray(PYTHON[: 4 * PAGE_SIZE]))
    assert read(words.opened.device, 0, 4 * PAGE_SIZE) == PYTHON[: 4 * PAGE_SIZE]


def test_the_whole_device_works_without_the_one_shot_call(words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "one-shot" in words.read("codecs")
    monkeypatch.setenv("ZRAMD_ENGINE", "python")
    monkeypatch.setattr(codecs, "_one_shot", lambda: None)
    assert "streaming" in words.read("codecs")
    words.set("disksize=1M")
    write(words.opened.device, 0, bytearray(PYTHON[: 8 * PAGE_SIZE]))
    assert read(words.opened.device, 0, 8 * PAGE_SIZE) == PYTHON[: 8 * PAGE_SIZE]


def test_classes_is_zsmallocs_table_to_the_character(words: Words) -> None:
    words.set("disksize=1M")
    write(words.opened.device, 0, make_data("random", 1, 2 * PAGE_SIZE))
    for page in range(2, 7):
        write(words.opened.device, page * PAGE_SIZE, make_data("half", page, PAGE_SIZE))
    lines = words.read("classes").split("\n")
    assert lines[0] == (
        " class  size       10%       20%       30%       40%       50%       60%       70%       80%       90%"
        "       99%      100% obj_allocated   obj_used pages_used pages_per_zspage freeable"
    )
    assert len(lines) == 1 + 119 + 1 + 1 + 1
    assert (
        lines[1]
        == "     0    32 " + "        0 " * 11 + "            0          0          0                1        0"
    )
    assert lines[119] == (
        "   254  4096 "
        + "        0 " * 10
        + "        2 "
        + "            2          2          2                1        0"
    )
    assert lines[120] == ""
    total = lines[121]
    assert total.startswith(" Total       ")
    assert len(total) == len(lines[119])
    assert total[13 + 110 :].split() == [str(sum(column)) for column in totals(lines[1:120])]
    assert lines[122] == ""


def totals(rows: list[str]) -> list[list[int]]:
    """Return the columns of which the Total row has sums, but for those of the groups."""
    fields = [[int(field) for field in row.split()] for row in rows]
    return [[row[column] for row in fields] for column in (13, 14, 15, 17)]


def test_stop_is_refused_while_the_machine_swaps_to_the_disk_unless_it_is_forced(words: Words) -> None:
    words.swaps = ["/dev/nbd3"]
    words.refuses("stop=1", "EBUSY /dev/nbd3 is swapped to: swapoff")
    assert words.stopped == 0
    words.set("stop=force")
    assert words.stopped == 1
    words.swaps = []
    words.set("stop=1")
    assert words.stopped == 2


def test_a_disk_grows_and_keeps_what_it_holds(words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zramd.device.life.RESET_SECONDS", 0.01)
    words.refuses("grow=8M", "EINVAL zram3 is not")
    words.set("mem_limit=1M", "disksize=4M")
    data = make_data("text", 1, PAGE_SIZE)
    write(words.opened.device, (4 << 20) - PAGE_SIZE, data)
    uuid = words.opened.device.identity.uuid
    hung_up = []
    with pytest.raises(AttributeRefusedError, match="EINVAL the disk has 4194304 bytes"):
        words.set("grow=4M")
    words.set("grow=8M")
    assert words.read("disksize") == f"{8 << 20}\n"
    assert read(words.opened.device, (4 << 20) - PAGE_SIZE, 2 * PAGE_SIZE) == bytes(data) + bytes(PAGE_SIZE)
    write(words.opened.device, (8 << 20) - PAGE_SIZE, data)
    assert words.opened.device.identity.uuid == uuid
    assert words.read("mem_limit") == f"{1 << 20}\n"
    with words.disk.connected(lambda: hung_up.append(1)):
        words.refuses("grow=16M", "EBUSY a client")
    assert hung_up == [1]
    assert words.read("disksize") == f"{8 << 20}\n"
    with words.disk.connected(lambda: None) as opened:
        assert opened.device.disksize == 8 << 20


def test_a_disk_that_cannot_grow_is_as_it_was(words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    words.set("disksize=4M")
    data = make_data("text", 1, PAGE_SIZE)
    write(words.opened.device, 0, data)
    with monkeypatch.context() as patched:
        patched.setattr(Device, "recover", fail_once(Device.recover))
        words.refuses("grow=8M", "ENOMEM")
    assert words.read("disksize") == f"{4 << 20}\n"
    assert read(words.opened.device, 0, PAGE_SIZE) == data
    words.set("grow=8M")
    assert read(words.opened.device, 0, PAGE_SIZE) == data


def test_a_growth_that_was_cut_short_leaves_the_disk_as_it_was(words: Words, tmp_path: Path) -> None:
    words.set("disksize=4M")
    data = make_data("text", 1, PAGE_SIZE)
    write(words.opened.device, 0, data)
    words.opened.close()
    for region in (tmp_path / "state").iterdir():
        if region.name != "superblock":
            os.truncate(region, 2 * region.stat().st_size)
    words.disk.open(Wanted(4 << 20))
    assert read(words.opened.device, 0, PAGE_SIZE) == data
    words.set("grow=16M")
    assert read(words.opened.device, 0, PAGE_SIZE) == data


def fail_once(recover: Callable[[Device], None]) -> Callable[[Device], None]:
    failed: list[Device] = []

    def failing(device: Device) -> None:
        if not failed:
            failed.append(device)
            raise NoMemoryError("no room")
        recover(device)

    return failing
