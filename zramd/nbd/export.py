"""An export: a disk under a name, and what a client is told of it."""

from collections.abc import Iterator
from dataclasses import dataclass

from zramd.device.disk import Disk
from zramd.device.opening import OpenDevice
from zramd.layout import PAGE_SIZE
from zramd.nbd.identity import add_uuid, is_uuid
from zramd.nbd.protocol import TransmissionFlag
from zramd.nbd.terms import Mode, Terms

MINIMUM_BLOCK = 1
PREFERRED_BLOCK = PAGE_SIZE
"""Block sizes in bytes. Less than a page works, by reading and rewriting the page; whole pages are what is fast."""


@dataclass(frozen=True, slots=True)
class Export:
    """A disk that clients find under `name`, and may not change if it is `read_only`.

    While the disk has a size, its UUID is a name of the export too.
    """

    name: str
    description: str
    disk: Disk
    read_only: bool = False

    @property
    def uuid(self) -> str | None:
        """The UUID of the disk, None while it has no size."""
        opened = self.disk.opened
        return uuid_of(opened) if opened else None

    def describe(self, opened: OpenDevice | None) -> str:
        """Return what clients read about the export while it has this device."""
        return add_uuid(self.description, uuid_of(opened)) if opened else self.description

    def flags(self, terms: Terms) -> TransmissionFlag:
        """Return the transmission flags on these terms.

        CAN_MULTI_CONN holds because all connections see one device, and a write is in it before it is answered.
        """
        flags = (
            TransmissionFlag.HAS_FLAGS
            | TransmissionFlag.SEND_FLUSH
            | TransmissionFlag.SEND_FUA
            | TransmissionFlag.CAN_MULTI_CONN
            | TransmissionFlag.SEND_CACHE
        )
        if self.read_only:
            flags |= TransmissionFlag.READ_ONLY
        else:
            flags |= TransmissionFlag.SEND_TRIM
            flags |= TransmissionFlag.SEND_WRITE_ZEROES | TransmissionFlag.SEND_FAST_ZERO
        if terms.mode is not Mode.SIMPLE:
            flags |= TransmissionFlag.SEND_DF
        if terms.mode is Mode.EXTENDED and terms.contexts:
            flags |= TransmissionFlag.BLOCK_STATUS_PAYLOAD
        return flags


class Exports:
    """The exports of a server. The first is the default: a client that asks for the empty name gets it."""

    def __init__(self, exports: list[Export]) -> None:
        self._exports = {export.name: export for export in exports}
        self._default = exports[0]

    def __iter__(self) -> Iterator[Export]:
        return iter(self._exports.values())

    def find(self, name: str) -> Export | None:
        """Return the export of a name, or of a device's UUID, or None."""
        if is_uuid(name):
            return next((export for export in self if name == export.uuid), None)
        return self._default if name == "" else self._exports.get(name)


def uuid_of(opened: OpenDevice) -> str:
    """Return the UUID of a device, in lower case."""
    return str(opened.device.identity.uuid)
