"""The kernel as the keeper of a device sees it: the nbd family, the files of devices, an NBD client on each socket."""

import errno
import os
import select
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

from tests.nbd_bytes import READ, REPLY_BYTES, receive, reply, request, write_request
from zramd.attach.netlink import NbdFamily

FAMILY = 0x1D
CONNECT, DISCONNECT, RECONFIGURE, LINK_DEAD, STATUS = 1, 2, 3, 4, 5
INDEX, SIZE, BLOCK_SIZE, TIMEOUT, FLAGS, SOCKETS, DEAD_TIMEOUT, DEVICES, BACKEND = 1, 2, 3, 4, 5, 7, 8, 9, 10
DEVICE_COUNT = 4
OVERRUN = b"overrun"


class Events(socket.socket):
    """A socket for which the kernel may have had more than it could keep."""

    def recvmsg_into(self, *args: object) -> tuple[int, list[tuple[int, int, bytes]], int, object]:
        received = super().recvmsg_into(*args)  # type: ignore[arg-type]
        if received[0] == len(OVERRUN):
            raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
        return received


class Device:
    """A /dev/nbdN: a socket for each connection, None where it is dead."""

    def __init__(self, index: int, root: Path) -> None:
        self.index = index
        self.sockets: list[socket.socket | None] = []
        self.directory = root / f"sys/block/nbd{index}"
        self.directory.mkdir(parents=True)
        self.set("size", "0")
        (root / f"dev/nbd{index}").touch()

    def set(self, attribute: str, text: str) -> None:
        (self.directory / attribute).write_text(f"{text}\n")

    def remove(self, attribute: str) -> None:
        """Remove a file; whoever has it open finds it empty, where sysfs would give an error."""
        (self.directory / attribute).write_text("")
        (self.directory / attribute).unlink()


class FakeKernel:
    """A kernel with four devices. What it is asked for is carried out in a thread, and kept in `asked`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: list[tuple[int, dict[int, bytes]]] = []
        self.dropped = 0
        self.mute = False
        self.busy = 0
        for name, text in (("proc/swaps", "Filename\n"), ("proc/self/mounts", "")):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        (root / "dev").mkdir()
        self.devices = [Device(index, root) for index in range(DEVICE_COUNT)]
        requests, self._requests = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        events, self._events = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._family_sockets = requests, Events(fileno=events.detach())
        self._wakeups, self._wake = os.pipe()
        self._lock = threading.RLock()
        self._ended = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    @property
    def family(self) -> NbdFamily:
        """The family as one process has opened it. There may be several, one after the other."""
        return NbdFamily(*self._family_sockets, FAMILY)

    def close(self) -> None:
        self._ended = True
        os.write(self._wake, b"x")
        self._thread.join()
        for device in self.devices:
            self._shut(device)
        for sock in (*self._family_sockets, self._requests, self._events):
            sock.close()
        os.close(self._wakeups)
        os.close(self._wake)

    def commands(self) -> list[int]:
        """Return the commands that change something, in order."""
        return [command for command, _ in self.asked if command != STATUS]

    def given(self, command: int) -> list[int]:
        """Return how many sockets each of these commands had. An item takes 12 bytes."""
        return [
            len(attributes[SOCKETS]) // 12 if SOCKETS in attributes else 0
            for asked, attributes in self.asked
            if asked == command
        ]

    def alive(self, index: int = 0) -> int:
        """Return how many connections of a device are alive."""
        return sum(sock is not None for sock in self.devices[index].sockets)

    def lose_events(self) -> None:
        """Have less room for events than there are."""
        self.mute = True

    def tell_of_lost_events(self) -> None:
        self.mute = False
        self._events.send(OVERRUN)

    def cut(self, index: int, number: int) -> None:
        """End one connection of a device, as a server would."""
        sock = self.devices[index].sockets[number]
        assert sock is not None
        sock.shutdown(socket.SHUT_RDWR)

    def write(self, offset: int, data: bytes, index: int = 0) -> None:
        assert self._transfer(index, write_request(7, offset, data), 0) == reply(7)

    def read(self, offset: int, length: int, index: int = 0) -> bytes:
        return self._transfer(index, request(READ, 7, offset, length), length)[REPLY_BYTES:]

    def _transfer(self, index: int, sent: bytes, length: int) -> bytes:
        with self._lock:
            sock = next(sock for sock in self.devices[index].sockets if sock is not None)
            sock.sendall(sent)
            return receive(sock, REPLY_BYTES + length)

    def disconnect(self, index: int) -> None:
        """Disconnect a device, as somebody else would."""
        with self._lock:
            device = self.devices[index]
            if device.sockets:
                self._shut(device)
                for attribute in ("pid", "backend"):
                    device.remove(attribute)
                device.set("size", "0")

    def _shut(self, device: Device) -> None:
        for sock in device.sockets:
            if sock is not None:
                sock.close()
        device.sockets = []
        # A socket that is polled is not really closed.
        os.write(self._wake, b"x")

    def _run(self) -> None:
        while not self._ended:
            poll = select.poll()
            poll.register(self._requests, select.POLLIN)
            poll.register(self._wakeups, select.POLLIN)
            owners: dict[int, tuple[Device, int]] = {}
            with self._lock:
                for device in self.devices:
                    for number, sock in enumerate(device.sockets):
                        if sock is not None:
                            owners[sock.fileno()] = device, number
                            poll.register(sock, select.POLLRDHUP)
            for fd, _ in poll.poll():
                if fd == self._requests.fileno():
                    self._answer(self._requests.recv(1 << 16))
                elif fd == self._wakeups:
                    os.read(self._wakeups, 64)
                elif fd in owners:
                    self._bury(*owners[fd])

    def _bury(self, device: Device, number: int) -> None:
        with self._lock:
            if number >= len(device.sockets) or (sock := device.sockets[number]) is None:
                return
            sock.close()
            device.sockets[number] = None
        if not self.mute:
            payload = bytes([LINK_DEAD, 1, 0, 0]) + attribute(INDEX, struct.pack("<I", device.index))
            self._events.send(message(FAMILY, 0, payload))

    def _answer(self, data: bytes) -> None:
        _, _, _, sequence, _ = struct.unpack_from("<IHHII", data)
        command, attributes = data[16], dict(parse(data[20:]))
        with self._lock:
            try:
                answer = self._carry_out(command, attributes)
            except OSError as error:
                number, answer = error.errno or 0, b""
            else:
                number = 0
            self.asked.append((command, attributes))
        if answer:
            self._requests.send(message(FAMILY, sequence, bytes([command, 1, 0, 0]) + answer))
        self._requests.send(message(2, sequence, struct.pack("<i", -number) + data[:16]))

    def _carry_out(self, command: int, attributes: dict[int, bytes]) -> bytes:
        wanted = struct.unpack("<I", attributes[INDEX])[0] if INDEX in attributes else None
        if command == CONNECT:
            return self._connect(wanted, attributes)
        if wanted is None or wanted >= DEVICE_COUNT:
            raise OSError(errno.EINVAL, "no such device")
        device = self.devices[wanted]
        if command == STATUS:
            item = attribute(1, struct.pack("<I", wanted)) + attribute(2, bytes([bool(device.sockets)]))
            return attribute(DEVICES, attribute(1, item))
        if command == DISCONNECT:
            self.disconnect(wanted)
        elif command == RECONFIGURE:
            self._reconfigure(device, attributes)
        return b""

    def _connect(self, wanted: int | None, attributes: dict[int, bytes]) -> bytes:
        if self.busy:
            self.busy -= 1
            raise OSError(errno.EBUSY, "somebody has it open")
        index = next(device.index for device in self.devices if not device.sockets) if wanted is None else wanted
        device = self.devices[index]
        if device.sockets:
            raise OSError(errno.EBUSY, "it is connected")
        device.sockets = list(sockets(attributes[SOCKETS]))
        if len(device.sockets) > 1 and not struct.unpack("<Q", attributes[FLAGS])[0] & 1 << 8:
            self._shut(device)
            raise OSError(errno.EINVAL, "the server does not support several connections")
        device.set("pid", "1")
        device.set("backend", attributes[BACKEND].rstrip(b"\0").decode())
        self._resize(device, attributes)
        return attribute(INDEX, struct.pack("<I", index))

    def _reconfigure(self, device: Device, attributes: dict[int, bytes]) -> None:
        backend = attributes.get(BACKEND, b"").rstrip(b"\0").decode()
        if not device.sockets or (device.directory / "backend").read_text() != f"{backend}\n":
            raise OSError(errno.EINVAL, "not connected, or to something else")
        self._resize(device, attributes)
        for sock in sockets(attributes.get(SOCKETS, b"")):
            if None in device.sockets:
                device.sockets[device.sockets.index(None)] = sock
            else:
                self.dropped += 1
                sock.close()

    def _resize(self, device: Device, attributes: dict[int, bytes]) -> None:
        if SIZE in attributes:
            device.set("size", str(struct.unpack("<Q", attributes[SIZE])[0] // 512))


def message(kind: int, sequence: int, payload: bytes) -> bytes:
    return struct.pack("<IHHII", 16 + len(payload), kind, 0, sequence, 0) + payload


def attribute(kind: int, payload: bytes) -> bytes:
    return struct.pack("<HH", 4 + len(payload), kind) + payload + bytes(-len(payload) % 4)


def parse(data: bytes) -> Iterator[tuple[int, bytes]]:
    while data:
        length, kind = struct.unpack_from("<HH", data)
        yield kind & 0x3FFF, data[4:length]
        data = data[(length + 3) & ~3 :]


def sockets(items: bytes) -> Iterator[socket.socket]:
    """Yield sockets of the kernel's own for the descriptors of this process that it is given."""
    for _, item in parse(items):
        ((_, fd),) = parse(item)
        yield socket.socket(fileno=os.dup(struct.unpack("<I", fd)[0]))
