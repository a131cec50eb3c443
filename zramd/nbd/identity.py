"""How clients tell one device from another behind the same name: the description of its export ends with its UUID.

    zramd compressed memory, UUID 6f9619ff-8b86-4d01-b42d-00cf4fc964ff

The UUID is a name of the export too. A kernel that has lost its server asks for the device by it, so that it never goes
on with an empty disk, or another one, as if that were what it had written to.
"""

from zramd.nbd.protocol import MAX_STRING

_MARK = "UUID "
_SEPARATOR = ", "
_DASHES = (8, 13, 18, 23)
UUID_LENGTH = 36
"""Bytes, and the shortest limit there may be on names of exports."""
MAX_DESCRIPTION = MAX_STRING - len(_SEPARATOR) - len(_MARK) - UUID_LENGTH
"""Bytes in a description to which the UUID is added."""


def add_uuid(description: str, uuid: str) -> str:
    """Return the description of an export whose device has this UUID."""
    return f"{description}{_SEPARATOR if description else ''}{_MARK}{uuid}"


def find_uuid(description: str) -> str | None:
    """Return the UUID that a description ends with, or None. It is in lower case, with dashes."""
    start = len(description) - UUID_LENGTH
    uuid = description[start:] if start >= 0 else ""
    return uuid if is_uuid(uuid) and description[:start].endswith(_MARK) else None


def is_uuid(text: str) -> bool:
    """Say whether a text is a UUID, in lower case and with dashes."""
    return len(text) == UUID_LENGTH and all(
        character == "-" if position in _DASHES else character in "0123456789abcdef"
        for position, character in enumerate(text)
    )
