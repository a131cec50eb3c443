"""The keeper of an attached device: it hands the kernel connections to the server, and new ones when they die.

    server <- socket - kernel's NBD client - /dev/nbdN
       ^                  | LINK_DEAD
       '---- keeper <-----'   GO, by the device's UUID; then RECONFIGURE with the new sockets

When the server dies, the kernel lets requests wait (NBD_ATTR_DEAD_CONN_TIMEOUT) until it is given a new socket. Those
that were in flight it sends again once their timer (queue/io_timeout) runs out. So a server that finds its device
again after a crash loses nothing, and whoever reads or writes waits. No nbd-client does this.

While it waits, memory reclaim may wait for this process: it runs in one thread, imports little, and allocates nothing
that stays.
"""

import errno
import os
import select
import time
from collections.abc import Callable

from zramd.attach.netlink import LostEventsError, NbdFamily, NetlinkError
from zramd.attach.order import Order
from zramd.attach.pidfile import PidFile, TakenError, holder, is_held
from zramd.attach.sysfs import BlockDevice, block_devices
from zramd.nbd.client import BLOCK_SIZE, Address, ClientError, Connection, UnknownExportError, connect
from zramd.nbd.identity import find_uuid

RETRY_SECONDS = 0.05
CHECK_SECONDS = 1.0
"""How often to see whether the device is still attached: nobody is told when it is disconnected."""
REPEAT_SECONDS = 5.0
"""The least time between two lines on why there is no new connection."""
BUSY_SECONDS = 2.0
"""How long others, such as udev, may have a device open, which keeps it from being connected."""
PREDECESSOR_SECONDS = 5.0
"""How long another keeper of the device may take to notice that it has none any more."""
LEAVE_SECONDS = 10.0
QUEUE_KIB = 1024
"""Most of a request; the kernel's default for nbd is 128."""


class KeeperError(Exception):
    """The device cannot be attached; the text says why and what to do."""


class Keeper:
    """Keeps an attached device attached. Made by `attach`.

    `payload` is how many bytes the server takes in a request; 0 for a device that was taken over as it was.
    """

    def __init__(
        self,
        family: NbdFamily,
        device: BlockDevice,
        uuid: str,
        order: Order,
        say: Callable[[str], None],
    ) -> None:
        self.device = device
        self.payload = 0
        self._family = family
        self._index = index_of(device.name)
        self._uuid = uuid
        self._addresses = order.addresses
        self._dead_seconds = order.dead_seconds
        self._say = say
        self._connections = order.connections
        # Held open: once the device is disconnected it reads as gone for good, whoever connects it again.
        self._backend = os.open(device.file("backend"), os.O_RDONLY)
        self._dead = 0
        self._lost_at = self._next_try = self._said_at = 0.0
        self._said = ""

    @classmethod
    def attach(cls, family: NbdFamily, order: Order, say: Callable[[str], None], root: str = "/") -> "Keeper":
        """Attach the export of an order; or take the device over, if it is attached and nobody keeps it.

        Raises:
            KeeperError: it cannot be attached.
            OSError: the kernel is not as it should be.
        """
        device = BlockDevice(order.device, root) if order.device else None
        if device and family.is_connected(index_of(device.name)):
            return cls._take_over(family, order, device, say)
        try:
            first = connect(order.addresses, order.name)
        except (OSError, ClientError) as error:
            raise KeeperError(f"cannot attach what {_places(order.addresses)} serves: {_reason(error)}") from error
        made = [first]
        try:
            uuid = find_uuid(first.description)
            if uuid is None:
                raise KeeperError(
                    "the server does not tell its device's UUID, and without that nobody knows after a restart whether "
                    "it is the same: only zramd can be attached this way, use nbd-client"
                )
            others = [other for other in block_devices("nbd", root) if other.read("backend") == uuid]
            if others and device:
                raise KeeperError(f"it is attached already, as {others[0].path}: zramd detach {others[0].path} first")
            if not others:
                made += [connect(order.addresses, uuid) for _ in range(order.connections - 1)]
                index = _connect(family, index_of(device.name) if device else None, made, uuid, order.dead_seconds)
                keeper = cls(family, BlockDevice(f"nbd{index}", root), uuid, order, say)
                keeper.payload = first.payload
                return keeper
        except (ClientError, OSError) as error:
            raise KeeperError(f"cannot attach it: {_reason(error)}") from error
        finally:
            for connection in made:
                connection.sock.close()
        return cls._take_over(family, order, others[0], say)

    @classmethod
    def _take_over(cls, family: NbdFamily, order: Order, device: BlockDevice, say: Callable[[str], None]) -> "Keeper":
        """Keep a device that is attached already; which of its connections are dead is not known."""
        uuid = device.read("backend")
        if not uuid:
            raise KeeperError(f"{device.path} is attached, but not by zramd: disconnect it first (nbd-client -d)")
        pid_file = pid_path(order.runtime, device.name)
        if is_held(pid_file):
            raise KeeperError(f"{device.path} is attached already, and process {holder(pid_file)} keeps it")
        before = Order.load(order.runtime, device.name)
        if before is not None:
            order.connections = before.connections
        keeper = cls(family, device, uuid, order, say)
        keeper._lose(keeper._connections)
        try:
            keeper._reconnect()
        except UnknownExportError as error:
            remedy = f"start the server that has it, or zramd detach {device.path}"
            raise KeeperError(f"{device.path} is attached to the disk {uuid}, and {error}: {remedy}") from error
        return keeper

    def take_pid_file(self, runtime: str) -> PidFile:
        """Become the one process that keeps the device.

        Raises:
            KeeperError: another one does.
        """
        try:
            return PidFile(pid_path(runtime, self.device.name), PREDECESSOR_SECONDS)
        except TakenError as error:
            if self.payload:
                self._family.disconnect(self._index)
            raise KeeperError(f"{self.device.path} is kept by another: {error}") from error

    def keep(self, wakeups: int, woken: Callable[[], int | None]) -> int:
        """Keep the device until it is disconnected. Return the exit status of the process.

        `woken` is called now and then, and soon after the descriptor `wakeups` becomes readable; it ends this by
        returning a status.
        """
        poll = select.poll()
        poll.register(self._family.events, select.POLLIN)
        poll.register(wakeups, select.POLLIN)
        while True:
            poll.poll(self._pause() * 1000)
            if (status := woken()) is not None:
                return status
            if not self.is_attached():
                self._tell("is disconnected")
                return 0
            self._note_losses()
            if self._dead and time.monotonic() >= self._next_try:
                try:
                    self._reconnect()
                except UnknownExportError as error:
                    self._complain(str(error))
            if self._dead and time.monotonic() - self._lost_at > self._dead_seconds:
                self._tell(f"gives up: no connection for {self._dead_seconds} s")
                return 1

    def is_whole(self) -> bool:
        """Say whether all connections are alive, as far as is known."""
        return not self._dead

    def is_attached(self) -> bool:
        """Say whether the device is still the one that was attached."""
        try:
            return os.pread(self._backend, 64, 0).rstrip(b"\n") == self._uuid.encode()
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
            return False

    def leave(self) -> bool:
        """Disconnect the device unless somebody uses it; say whether it was."""
        users = self.device.users()
        claim = -1
        if not users and self.is_whole():
            # Its partition table may have to be read first, so not without a server.
            try:
                claim = os.open(self.device.node, os.O_RDONLY | os.O_EXCL)
            except OSError as error:
                users = [f"somebody has it ({error.strerror})"]
        if users:
            self._tell(f"stays attached: {', '.join(users)}")
            return False
        self._family.disconnect(self._index)
        if claim >= 0:
            os.close(claim)
        deadline = time.monotonic() + LEAVE_SECONDS
        while self.is_attached():
            if time.monotonic() > deadline:
                self._tell("is disconnected, but still open somewhere")
                return True
            time.sleep(RETRY_SECONDS)
        self._tell("is disconnected")
        return True

    def _tell(self, text: str) -> None:
        self._say(f"{self.device.path} {text}")

    def _pause(self) -> float:
        """Return the seconds until there is something to do, if nothing happens."""
        return max(0.0, self._next_try - time.monotonic()) if self._dead else CHECK_SECONDS

    def _note_losses(self) -> None:
        try:
            dead = self._family.dead_connections(self._index)
        except LostEventsError:
            dead = self._connections
        if dead:
            self._lose(dead)

    def _lose(self, dead: int) -> None:
        if not self._dead:
            self._lost_at = time.monotonic()
            self._said = ""
        self._dead = min(self._dead + dead, self._connections)

    def _reconnect(self) -> None:
        """Try to give the kernel a connection in place of each that is dead.

        Raises:
            UnknownExportError: the server does not have the device.
        """
        self._next_try = time.monotonic() + RETRY_SECONDS
        made: list[Connection] = []
        reason: Exception | None = None
        try:
            try:
                while len(made) < self._dead:
                    made.append(self._connect())
            except (OSError, ClientError) as error:
                reason = error
            if made:
                self._family.reconfigure(self._index, self._uuid, [each.sock.fileno() for each in made])
                self._dead -= len(made)
                # Only now that there is somebody to serve what is in flight: a resize waits for that.
                if made[-1].size > self.device.size:
                    self._family.reconfigure(self._index, self._uuid, size=made[-1].size)
                    self._tell(f"has grown to {made[-1].size} bytes")
        except OSError as error:
            reason = error
        finally:
            for connection in made:
                connection.sock.close()
        if isinstance(reason, UnknownExportError):
            raise reason
        if reason is not None:
            self._complain(_reason(reason))
        if not self._dead:
            self._tell(f"has its connections again, after {time.monotonic() - self._lost_at:.1f} s")

    def _connect(self) -> Connection:
        """Connect to the very device that the kernel has."""
        connection = connect(self._addresses, self._uuid)
        size = self.device.size
        if find_uuid(connection.description) != self._uuid:
            connection.sock.close()
            raise UnknownExportError("the server has another device")
        if connection.size < size:
            connection.sock.close()
            raise ClientError(f"the server's device has {connection.size} bytes, which is less than {size}")
        return connection

    def _complain(self, reason: str) -> None:
        now = time.monotonic()
        if reason != self._said and (not self._said or now - self._said_at > REPEAT_SECONDS):
            self._tell(f"has lost {self._dead} of {self._connections} connections: {reason}; trying again")
            self._said, self._said_at = reason, now


def prepare(device: BlockDevice, io_timeout: int, payload: int, say: Callable[[str], None]) -> None:
    """Set the queue of a device that has just been connected, and have its partition table read.

    `io_timeout` is in milliseconds, `payload` in bytes. Not for the keeper's process: this waits for requests, and for
    the keeper if the server dies meanwhile.
    """
    most = min(QUEUE_KIB, payload >> 10, int(device.read("queue/max_hw_sectors_kb") or QUEUE_KIB))
    for attribute, value in ("scheduler", "none"), ("io_timeout", str(io_timeout)), ("max_sectors_kb", str(most)):
        try:
            device.write(f"queue/{attribute}", value)
        except OSError as error:
            say(f"{device.path} goes on without {attribute}={value}: {error.strerror}")
    os.close(os.open(device.node, os.O_RDONLY))


def index_of(name: str) -> int:
    """Return the number in nbdN."""
    return int(name.removeprefix("nbd"))


def pid_path(runtime: str, name: str) -> str:
    """Return where the keeper of a device has its pid."""
    return os.path.join(runtime, f"{name}.pid")


def _connect(family: NbdFamily, index: int | None, made: list[Connection], uuid: str, dead_seconds: int) -> int:
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            return family.connect(
                index,
                [each.sock.fileno() for each in made],
                size=made[0].size,
                block_size=BLOCK_SIZE,
                flags=made[0].flags,
                dead_seconds=dead_seconds,
                backend=uuid,
            )
        except NetlinkError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
        time.sleep(RETRY_SECONDS)


def _places(addresses: list[Address]) -> str:
    return " or ".join(each if isinstance(each, str) else f"{each[0]}:{each[1]}" for each in addresses)


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
