import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import ServerProcess, start_server
from tests.fake_kernel import (
    BACKEND,
    BLOCK_SIZE,
    CONNECT,
    DEAD_TIMEOUT,
    DISCONNECT,
    FLAGS,
    INDEX,
    RECONFIGURE,
    SIZE,
    TIMEOUT,
    FakeKernel,
)
from zramd.attach import keeper as keeper_module
from zramd.attach.keeper import Keeper, KeeperError, pid_path, prepare
from zramd.attach.order import Order
from zramd.attach.pidfile import PidFile, holder, is_held
from zramd.attach.process import command
from zramd.attach.sysfs import BlockDevice
from zramd.nbd.client import connect

MIB = 1 << 20
PAGE = b"page" * 1024
UUID = "0f3c9a52-6d1b-4f0e-9c55-3a1f6f2f7a10"


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Place:
    """A server that comes and goes, always at the same socket, with disks that are kept."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.server: ServerProcess | None = None

    @property
    def unix(self) -> str:
        return str(self.directory / "zram0.nbd")

    @property
    def uuid(self) -> str:
        assert self.server is not None
        uuid: str = json.loads(self.server.ask("json"))["uuid"]
        return uuid

    @property
    def clients(self) -> int:
        assert self.server is not None
        clients: int = json.loads(self.server.ask("json"))["connections"]
        return clients

    def start(self, state: str = "state", size: str | None = None) -> None:
        options = ["--state", str(self.directory / state)] + (["--size", size] if size else [])
        self.server = start_server(self.directory, *options, volatile=False)

    def kill(self) -> None:
        assert self.server is not None
        self.server.process.kill()
        self.server.process.communicate()
        self.server = None

    def stop(self) -> None:
        if self.server is not None:
            self.server.stop()
            self.server = None


class Running:
    """A keeper at work in a thread, and what it says."""

    def __init__(self, kernel: FakeKernel, order: Order) -> None:
        self.said: list[str] = []
        self.order = order
        self.keeper = Keeper.attach(kernel.family, order, self.said.append, str(kernel.root))
        self.status: int | None = None
        self._wants_to_leave = False
        self._ends = False
        self._wakeups, self._wake = os.pipe()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self.status = self.keeper.keep(self._wakeups, self._woken)

    def _woken(self) -> int | None:
        if self._ends:
            return 77
        if self._wants_to_leave:
            self._wants_to_leave = False
            return 0 if self.keeper.leave() else None
        return None

    def leave(self) -> None:
        """Ask it to disconnect the device."""
        self._wants_to_leave = True
        os.write(self._wake, b"x")

    def die(self) -> None:
        """End it, and leave the device alone."""
        self._ends = True
        os.write(self._wake, b"x")
        self.join()

    def join(self) -> int | None:
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self.status

    def has_said(self, text: str) -> bool:
        return any(text in line for line in self.said)


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_module, "CHECK_SECONDS", 0.01)
    monkeypatch.setattr(keeper_module, "REPEAT_SECONDS", 0)


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[FakeKernel]:
    kernel = FakeKernel(tmp_path / "root")
    yield kernel
    kernel.close()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    directory = tmp_path / "server"
    directory.mkdir()
    place = Place(directory)
    place.start(size="8M")
    yield place
    place.stop()


@pytest.fixture
def order(place: Place, tmp_path: Path) -> Order:
    (tmp_path / "run").mkdir()
    return Order([place.unix], "", runtime=str(tmp_path / "run"))


Attach = Callable[..., Running]


@pytest.fixture
def attach(kernel: FakeKernel, order: Order) -> Iterator[Attach]:
    """Attach by the order, changed as the test says; what is still kept at the end is given up."""
    runs: list[Running] = []

    def attach(**changes: object) -> Running:
        for name, value in changes.items():
            setattr(order, name, value)
        runs.append(Running(kernel, order))
        return runs[-1]

    yield attach
    for run in runs:
        run.die()


def refused(kernel: FakeKernel, order: Order) -> str:
    with pytest.raises(KeeperError) as caught:
        Keeper.attach(kernel.family, order, lambda _: None, str(kernel.root))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_kernel_gets_a_socket_and_all_it_has_to_know(kernel: FakeKernel, place: Place, attach: Attach) -> None:
    run = attach(dead_seconds=4711)
    ((command, asked),) = kernel.asked
    numbers = {kind: int.from_bytes(asked[kind], "little") for kind in (SIZE, BLOCK_SIZE, TIMEOUT, DEAD_TIMEOUT, FLAGS)}
    assert command == CONNECT
    assert numbers == {SIZE: 8 * MIB, BLOCK_SIZE: 4096, TIMEOUT: 0, DEAD_TIMEOUT: 4711, FLAGS: 0b1101_0110_1101}
    assert asked[BACKEND] == place.uuid.encode() + b"\0"
    assert INDEX not in asked
    assert run.keeper.device.path == "/dev/nbd0"
    assert run.keeper.payload == 64 * MIB
    kernel.write(4096, PAGE)
    assert kernel.read(4096, 4096) == PAGE


def test_the_keeper_has_no_copies_of_the_sockets(kernel: FakeKernel, attach: Attach, place: Place) -> None:
    attach(connections=3)
    assert place.clients == 3
    kernel.disconnect(0)
    # A copy would keep the connection open.
    wait_for(lambda: place.clients == 0)


def test_a_device_that_is_named_is_the_one(kernel: FakeKernel, attach: Attach) -> None:
    assert attach(device="nbd2").keeper.device.name == "nbd2"
    assert kernel.alive(2) == 1


def test_a_server_that_was_killed_is_replaced_and_nothing_is_lost(
    kernel: FakeKernel, place: Place, attach: Attach
) -> None:
    run = attach()
    kernel.write(0, PAGE)
    for _ in range(3):
        place.kill()
        wait_for(lambda: kernel.alive() == 0)
        place.start()
        wait_for(lambda: kernel.alive() == 1)
        assert kernel.read(0, 4096) == PAGE
    assert kernel.commands() == [CONNECT] + 3 * [RECONFIGURE]
    assert run.has_said("has lost 1 of 1 connections")
    assert run.has_said("has its connections again")
    assert all(line.startswith("/dev/nbd0 ") for line in run.said)


def test_a_server_that_stops_and_comes_back_is_no_different(kernel: FakeKernel, place: Place, attach: Attach) -> None:
    attach()
    kernel.write(0, PAGE)
    place.stop()
    place.start()
    wait_for(lambda: kernel.alive() == 1)
    assert kernel.read(0, 4096) == PAGE


def test_a_server_with_another_disk_is_never_given_to_the_kernel(
    kernel: FakeKernel, place: Place, attach: Attach
) -> None:
    run = attach()
    kernel.write(0, PAGE)
    place.kill()
    place.start("other", "8M")
    wait_for(lambda: run.has_said("the server does not have it"))
    assert kernel.commands() == [CONNECT]
    place.stop()
    place.start()
    wait_for(lambda: kernel.alive() == 1)
    assert kernel.read(0, 4096) == PAGE


def test_a_disk_that_is_made_anew_under_the_same_server_is_another(
    kernel: FakeKernel, place: Place, attach: Attach
) -> None:
    run = attach()
    assert place.server
    place.server.ask("reset force")
    place.server.ask("disksize 8M")
    wait_for(lambda: run.has_said("the server does not have it"))
    assert kernel.commands() == [CONNECT]


def test_a_disk_that_has_grown_is_served_before_the_kernel_is_told(
    kernel: FakeKernel, place: Place, attach: Attach
) -> None:
    run = attach()
    assert place.server
    place.server.ask("grow 16M")
    wait_for(lambda: run.has_said("has grown to 16777216 bytes"))
    assert kernel.commands() == [CONNECT, RECONFIGURE, RECONFIGURE]
    first, second = (attributes for command, attributes in kernel.asked if command == RECONFIGURE)
    assert SIZE not in first
    assert int.from_bytes(second[SIZE], "little") == 16 * MIB
    assert kernel.given(RECONFIGURE) == [1, 0]
    assert BlockDevice("nbd0", str(kernel.root)).size == 16 * MIB


def test_all_of_several_connections_are_replaced(kernel: FakeKernel, place: Place, attach: Attach) -> None:
    attach(connections=4)
    assert kernel.given(CONNECT) == [4]
    kernel.write(0, PAGE)
    place.kill()
    wait_for(lambda: kernel.alive() == 0)
    place.start()
    wait_for(lambda: kernel.alive() == 4)
    assert sum(kernel.given(RECONFIGURE)) == 4
    assert kernel.dropped == 0
    assert kernel.read(0, 4096) == PAGE


def test_only_the_connection_that_died_is_replaced(kernel: FakeKernel, attach: Attach) -> None:
    attach(connections=4)
    kernel.cut(0, 2)
    wait_for(lambda: kernel.commands() == [CONNECT, RECONFIGURE] and kernel.alive() == 4)
    assert kernel.given(RECONFIGURE) == [1]


def test_connections_of_other_devices_are_none_of_its_business(
    kernel: FakeKernel, attach: Attach, tmp_path: Path
) -> None:
    attach(device="nbd1")
    directory = tmp_path / "second"
    directory.mkdir()
    other = Place(directory)
    other.start(size="8M")
    order = Order([other.unix], "", runtime=str(tmp_path / "run"))
    Keeper.attach(kernel.family, order, lambda _: None, str(kernel.root))
    other.kill()
    wait_for(lambda: kernel.alive(0) == 0)
    kernel.cut(1, 0)
    wait_for(lambda: kernel.commands() == [CONNECT, CONNECT, RECONFIGURE])
    assert kernel.alive(0) == 0


def test_when_events_were_lost_every_connection_may_be_dead(kernel: FakeKernel, attach: Attach) -> None:
    attach(connections=4)
    kernel.lose_events()
    kernel.cut(0, 1)
    kernel.cut(0, 3)
    wait_for(lambda: kernel.alive() == 2)
    kernel.tell_of_lost_events()
    wait_for(lambda: kernel.alive() == 4 and kernel.dropped == 2)
    kernel.write(0, PAGE)
    assert kernel.read(0, 4096) == PAGE


def test_a_smaller_disk_is_refused(kernel: FakeKernel, place: Place, attach: Attach) -> None:
    run = attach()
    place.kill()
    wait_for(lambda: kernel.alive() == 0)
    kernel.devices[0].set("size", str(16 * MIB // 512))
    place.start()
    wait_for(lambda: run.has_said("less than 16777216"))
    assert kernel.commands() == [CONNECT]


def test_a_server_that_takes_any_name_is_found_out(
    kernel: FakeKernel, place: Place, attach: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = attach()
    place.kill()
    place.start("other", "8M")
    monkeypatch.setattr(keeper_module, "connect", lambda addresses, _: connect(addresses, ""))
    wait_for(lambda: run.has_said("another device"))
    assert kernel.commands() == [CONNECT]


def test_after_the_dead_timeout_it_gives_up(kernel: FakeKernel, place: Place, attach: Attach) -> None:
    run = attach(dead_seconds=1)
    place.kill()
    assert run.join() == 1
    assert run.has_said("gives up: no connection for 1 s")
    assert kernel.commands() == [CONNECT]


def test_it_ends_when_the_device_is_disconnected(kernel: FakeKernel, attach: Attach) -> None:
    run = attach()
    kernel.disconnect(0)
    assert run.join() == 0
    assert run.said == ["/dev/nbd0 is disconnected"]


def test_it_does_not_touch_a_device_that_was_attached_anew_by_another(kernel: FakeKernel, attach: Attach) -> None:
    run = attach()
    kernel.disconnect(0)
    kernel.devices[0].set("backend", UUID)
    assert run.join() == 0
    assert kernel.commands() == [CONNECT]


# Leaving


def test_asked_to_leave_it_disconnects_the_device(kernel: FakeKernel, attach: Attach) -> None:
    run = attach()
    run.leave()
    assert run.join() == 0
    assert kernel.commands() == [CONNECT, DISCONNECT]
    assert kernel.devices[0].sockets == []


@pytest.mark.parametrize(
    ("file", "text", "why"),
    [
        ("proc/swaps", "Filename\n/dev/nbd0 partition 8188 0 100\n", "/dev/nbd0 is swapped to"),
        ("proc/self/mounts", "/dev/nbd0p1 /mnt ext4 rw 0 0\n", "/dev/nbd0p1 is mounted on /mnt"),
        ("sys/block/nbd0/holders/dm-0", "", "dm-0 is made of it"),
    ],
)
def test_it_stays_while_somebody_uses_the_device(
    kernel: FakeKernel, attach: Attach, file: str, text: str, why: str
) -> None:
    run = attach()
    path = kernel.root / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    run.leave()
    wait_for(lambda: run.has_said(f"stays attached: {why}"))
    kernel.write(0, PAGE)
    path.unlink() if "holders" in file else path.write_text("")
    run.leave()
    assert run.join() == 0
    assert kernel.commands() == [CONNECT, DISCONNECT]


def test_without_a_server_it_can_leave_too(kernel: FakeKernel, place: Place, attach: Attach) -> None:
    run = attach()
    place.kill()
    wait_for(lambda: run.has_said("has lost"))
    (kernel.root / "dev/nbd0").unlink()  # to open the device would have to wait for the server
    run.leave()
    assert run.join() == 0
    assert kernel.commands() == [CONNECT, DISCONNECT]


# Taking over


def test_a_device_without_a_keeper_is_taken_over_and_what_is_dead_replaced(
    kernel: FakeKernel, place: Place, attach: Attach, order: Order
) -> None:
    attach(connections=2, device="nbd0").die()
    order.save()
    kernel.write(0, PAGE)
    kernel.cut(0, 1)
    wait_for(lambda: kernel.alive() == 1)
    second = attach(connections=1)
    assert kernel.alive() == 2
    assert (kernel.commands(), kernel.dropped) == ([CONNECT, RECONFIGURE], 1)
    assert second.keeper.payload == 0
    place.kill()
    wait_for(lambda: kernel.alive() == 0)
    place.start()
    wait_for(lambda: kernel.alive() == 2)
    assert kernel.read(0, 4096) == PAGE


def test_it_is_taken_over_without_being_named_too(kernel: FakeKernel, attach: Attach) -> None:
    attach(device="nbd3").die()
    assert attach(device="").keeper.device.name == "nbd3"
    assert kernel.commands() == [CONNECT, RECONFIGURE]


def test_it_is_taken_over_while_the_server_is_away(kernel: FakeKernel, place: Place, attach: Attach) -> None:
    attach().die()
    kernel.write(0, PAGE)
    place.kill()
    wait_for(lambda: kernel.alive() == 0)
    second = attach(device="nbd0")
    wait_for(lambda: second.has_said("has lost 1 of 1"))
    place.start()
    wait_for(lambda: kernel.alive() == 1)
    assert kernel.read(0, 4096) == PAGE


def test_it_is_not_taken_over_for_a_server_that_has_another_disk(
    kernel: FakeKernel, place: Place, attach: Attach, order: Order
) -> None:
    run = attach(device="nbd0")
    uuid = place.uuid
    run.die()
    place.kill()
    place.start("other", "8M")
    assert f"/dev/nbd0 is attached to the disk {uuid}" in refused(kernel, order)
    assert kernel.commands() == [CONNECT]


@pytest.mark.parametrize("device", ["", "nbd0"])
def test_it_is_not_taken_from_a_keeper_that_lives(
    kernel: FakeKernel, attach: Attach, order: Order, device: str
) -> None:
    run = attach()
    pid_file = run.keeper.take_pid_file(order.runtime)
    order.device = device
    assert refused(kernel, order) == f"/dev/nbd0 is attached already, and process {os.getpid()} keeps it"
    pid_file.remove()


def test_a_disk_is_not_attached_twice(kernel: FakeKernel, attach: Attach, order: Order) -> None:
    attach()
    order.device = "nbd1"
    assert "zramd detach /dev/nbd0 first" in refused(kernel, order)
    assert kernel.commands() == [CONNECT]


@pytest.mark.parametrize("backend", ["", None])
def test_a_device_of_another_client_is_left_alone(kernel: FakeKernel, order: Order, backend: str | None) -> None:
    left, right = socket.socketpair()
    with left, right:
        kernel.devices[1].sockets = [left]
        if backend is not None:
            kernel.devices[1].set("backend", backend)
        order.device = "nbd1"
        assert "but not by zramd" in refused(kernel, order)
        kernel.devices[1].sockets = []


# Not attaching


def test_a_device_that_somebody_has_open_for_a_moment_is_waited_for(kernel: FakeKernel, attach: Attach) -> None:
    kernel.busy = 3
    attach(device="nbd0")
    assert kernel.commands() == 4 * [CONNECT]


def test_a_device_that_stays_open_is_not_waited_for_for_ever(
    kernel: FakeKernel, order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_module, "BUSY_SECONDS", 0)
    kernel.busy = 1000
    assert "busy" in refused(kernel, order)


def test_without_a_server_the_error_names_the_socket(kernel: FakeKernel, place: Place, order: Order) -> None:
    place.stop()
    assert refused(kernel, order) == f"cannot attach what {place.unix} serves: No such file or directory"


def test_an_unknown_export_is_told(kernel: FakeKernel, order: Order) -> None:
    order.name = "zram1"
    assert "does not have it (no such export)" in refused(kernel, order)


def test_a_server_that_does_not_tell_its_uuid_is_refused(
    kernel: FakeKernel, order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_module, "find_uuid", lambda _: None)
    assert "only zramd" in refused(kernel, order)
    assert kernel.commands() == []


def test_a_device_whose_pid_file_is_taken_is_not_left_without_a_keeper(
    kernel: FakeKernel, attach: Attach, order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_module, "PREDECESSOR_SECONDS", 0)
    other = PidFile(pid_path(order.runtime, "nbd0"), 0)
    run = attach()
    with pytest.raises(KeeperError, match=f"process {os.getpid()} has"):
        run.keeper.take_pid_file(order.runtime)
    assert kernel.commands() == [CONNECT, DISCONNECT]
    other.remove()


# The queue


def test_the_queue_is_set_to_what_kernel_and_server_take(kernel: FakeKernel) -> None:
    queue = kernel.devices[0].directory / "queue"
    queue.mkdir()
    for name in ("scheduler", "io_timeout", "max_sectors_kb"):
        (queue / name).touch()
    (queue / "max_hw_sectors_kb").write_text("32768\n")
    device = BlockDevice("nbd0", str(kernel.root))
    said: list[str] = []
    prepare(device, 3000, 64 * MIB, said.append)
    assert [device.read(f"queue/{name}") for name in ("scheduler", "io_timeout", "max_sectors_kb")] == [
        "none",
        "3000",
        "1024",
    ]
    prepare(device, 3000, 256 << 10, said.append)
    assert (device.read("queue/max_sectors_kb") or "")[:3] == "256"
    assert said == []


def test_a_queue_that_cannot_be_set_is_no_reason_to_fail(kernel: FakeKernel) -> None:
    said: list[str] = []
    prepare(BlockDevice("nbd0", str(kernel.root)), 3000, 64 * MIB, said.append)
    assert said == [
        f"/dev/nbd0 goes on without {setting}: No such file or directory"
        for setting in ("scheduler=none", "io_timeout=3000", "max_sectors_kb=1024")
    ]


# The order and the pid file


@pytest.mark.parametrize(
    "order",
    [
        Order(["/run/a b=c.nbd"], ""),
        Order(
            [("::1", 10809), ("127.0.0.1", 7), "/s"],
            "zwölf=1",
            "nbd7",
            connections=16,
            dead_seconds=1,
            io_timeout=100,
            swap=False,
            foreground=True,
            runtime="/x",
        ),
    ],
    ids=["least", "most"],
)
def test_an_order_is_understood_as_it_was_meant(order: Order) -> None:
    understood = Order.parse(order.words())
    assert all(getattr(understood, name) == getattr(order, name) for name in Order.__slots__)


def test_an_order_is_known_until_its_device_is_gone(tmp_path: Path) -> None:
    order = Order(["/a b.nbd"], "zram1", "nbd3", connections=5, runtime=str(tmp_path))
    assert Order.load(str(tmp_path), "nbd3") is None
    order.save()
    kept = Order.load(str(tmp_path), "nbd3")
    assert kept is not None
    assert kept.words() == order.words()
    order.forget()
    assert Order.load(str(tmp_path), "nbd3") is None


def test_a_pid_file_tells_who_has_it_and_is_worth_nothing_without_them(tmp_path: Path) -> None:
    path = str(tmp_path / "nbd0.pid")
    assert (is_held(path), holder(path)) == (False, None)
    pid_file = PidFile(path, 0)
    assert (is_held(path), holder(path)) == (True, os.getpid())
    assert Path(path).read_text() == f"{os.getpid()}\n"
    pid_file.remove()
    assert not Path(path).exists()
    Path(path).write_text("4711\n")  # as somebody leaves it who is killed
    assert (is_held(path), holder(path)) == (False, None)
    PidFile(path, 0).remove()


# The process


def test_its_process_loads_nothing_heavy(order: Order) -> None:
    program = command(order)
    load = program[program.index("-c") + 1].replace("import main; main()", "import command")
    show = "import zramd.reclaim, zramd.notify; print(*sys.modules)"
    loaded = subprocess.run(
        [*program[:4], f"{load}; {show}"], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "zramd.attach.keeper" in loaded
    assert not {"click", "dataclasses", "logging", "pathlib", "re", "subprocess", "typing", "urllib"} & set(loaded)
    assert not [name for name in loaded if name.startswith(("zramd.device", "zramd.zsmalloc", "zramd.native"))]


def test_without_nbd_in_the_kernel_it_ends_with_one_line(order: Order) -> None:
    if Path("/sys/module/nbd").exists():
        pytest.skip("this kernel has nbd: what is tested here is what happens without")
    done = subprocess.run(command(order), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "Error: the kernel has no NBD client (No such file or directory): modprobe nbd\n"
