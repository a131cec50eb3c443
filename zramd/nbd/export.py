"""An export: a disk under a name, and what a client is told of it."""

from collections.abc import Iterator
from dataclasses import dataclass

from zramd.device.disk import Disk
from zramd.layout import PAGE_SIZE
from zramd.nbd.protocol import TransmissionFlag

MINIMUM_BLOCK = 1
PREFERRED_BLOCK = PAGE_SIZE
MAXIMUM_PAYLOAD = 64 << 20
"""Block sizes in bytes. Less than a page works, by reading and rewriting the page; whole pages are what is fast."""


@dataclass(frozen=True, slots=True)
class Export:
    """A disk that clients find under `name`."""

    name: str
    description: str
    disk: Disk

    @property
    def flags(self) -> TransmissionFlag:
        """Return the transmission flags.

        CAN_MULTI_CONN holds because all connections see one device, and a write is in it before it is answered.
        """
        return (
            TransmissionFlag.HAS_FLAGS
            | TransmissionFlag.SEND_FLUSH
            | TransmissionFlag.SEND_FUA
            | TransmissionFlag.SEND_TRIM
            | TransmissionFlag.SEND_WRITE_ZEROES
            | TransmissionFlag.CAN_MULTI_CONN
            | TransmissionFlag.SEND_CACHE
        )


class Exports:
    """The exports of a server. The first is the default: a client that asks for the empty name gets it."""

    def __init__(self, exports: list[Export]) -> None:
        self._exports = {export.name: export for export in exports}
        self._default = exports[0]

    def __iter__(self) -> Iterator[Export]:
        return iter(self._exports.values())

    def find(self, name: str) -> Export | None:
        """Return the export of a name, or None."""
        return self._default if name == "" else self._exports.get(name)
