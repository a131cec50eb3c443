"""What a keeper is to do, and how it is told: as words on its command line.

    unix=/run/zramd/zram0.nbd  tcp=10809:127.0.0.1  name=zram0  device=nbd0  connections=1  ...

It imports next to nothing, as all that a keeper imports.
"""

import os

from zramd.nbd.client import Address

MAX_CONNECTIONS = 16
DEFAULT_DEAD_SECONDS = 86400
DEFAULT_IO_TIMEOUT_MS = 3000


class Order:
    """What a keeper is to attach, and how.

    `name` is that of the export at `addresses`, `device` that of the block device, "" for any that is free. When all
    connections are lost, requests wait for `dead_seconds` for a new one. A request that was in flight is sent again at
    most `io_timeout` milliseconds after that. With `swap`, the keeper is protected against the reclaim that waits for
    it. `runtime` is where its pid file lies; unless it is to stay in the `foreground`, so does its log.
    """

    __slots__ = (
        "addresses",
        "connections",
        "dead_seconds",
        "device",
        "foreground",
        "io_timeout",
        "name",
        "runtime",
        "swap",
    )

    def __init__(
        self,
        addresses: list[Address],
        name: str,
        device: str = "",
        *,
        connections: int = 1,
        dead_seconds: int = DEFAULT_DEAD_SECONDS,
        io_timeout: int = DEFAULT_IO_TIMEOUT_MS,
        swap: bool = True,
        foreground: bool = False,
        runtime: str = "/run/zramd",
    ) -> None:
        self.addresses = addresses
        self.name = name
        self.device = device
        self.connections = connections
        self.dead_seconds = dead_seconds
        self.io_timeout = io_timeout
        self.swap = swap
        self.foreground = foreground
        self.runtime = runtime

    def words(self) -> list[str]:
        """Return the order as words."""
        places = [
            f"unix={address}" if isinstance(address, str) else f"tcp={address[1]}:{address[0]}"
            for address in self.addresses
        ]
        return [
            *places,
            f"name={self.name}",
            f"device={self.device}",
            f"connections={self.connections}",
            f"dead_seconds={self.dead_seconds}",
            f"io_timeout={self.io_timeout}",
            f"swap={self.swap:d}",
            f"foreground={self.foreground:d}",
            f"runtime={self.runtime}",
        ]

    def save(self) -> None:
        """Leave the order, once its device is attached, for a later keeper of that.

        Raises:
            OSError: it cannot be written.
        """
        with open(_path(self.runtime, self.device), "w") as file:
            file.write("\0".join(self.words()))

    @classmethod
    def load(cls, runtime: str, device: str) -> "Order | None":
        """Return the order by which a device was attached, if that is known."""
        try:
            with open(_path(runtime, device)) as file:
                return cls.parse(file.read().split("\0"))
        except FileNotFoundError:
            return None

    def forget(self) -> None:
        """Remove what `save` left: the device is not attached any more."""
        os.unlink(_path(self.runtime, self.device))

    @classmethod
    def parse(cls, words: list[str]) -> "Order":
        """Return the order that `words` made."""
        order = cls([], "")
        for word in words:
            key, _, value = word.partition("=")
            if key == "unix":
                order.addresses.append(value)
            elif key == "tcp":
                port, _, host = value.partition(":")
                order.addresses.append((host, int(port)))
            elif key in ("name", "device", "runtime"):
                setattr(order, key, value)
            elif key in ("swap", "foreground"):
                setattr(order, key, value == "1")
            else:
                setattr(order, key, int(value))
        return order


def _path(runtime: str, device: str) -> str:
    return os.path.join(runtime, f"{device}.order")
