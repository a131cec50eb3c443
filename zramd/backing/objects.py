"""What an object is in a backing store: encrypted, and tied to its number, so that nothing else passes for it.

     0        8      12        20       22         24
    +--------+------+---------+--------+----------+-----------------+---------+
    | number | salt | counter | length | reserved | data, encrypted | tag, 16 |
    +--------+------+---------+--------+----------+-----------------+---------+
             |     nonce      |

The data are encrypted with AES-256-GCM; the header in front of them is in clear, and authenticated by the tag. The key
is only in memory. No nonce is ever used twice: `counter` counts, and survives the process; `salt` is random in each
process, for the case that somebody puts back an older copy of what survives.
"""

import os
import struct
from typing import TYPE_CHECKING

from zramd.layout import BACKING_UNIT_SHIFT, OBJECT_OVERHEAD

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

HEADER = struct.Struct("<QIQHH")
NONCE = slice(8, 20)
TAG_BYTES = OBJECT_OVERHEAD - HEADER.size
KEY_BYTES = 32
UNIT = 1 << BACKING_UNIT_SHIFT


class DamagedObjectError(Exception):
    """What lies in a store is not what was put there."""


def units_of(length: int) -> int:
    """Return how many units an object with so many bytes of data takes."""
    return length + OBJECT_OVERHEAD + UNIT - 1 >> BACKING_UNIT_SHIFT


class Sealer:
    """Makes objects with a key, and finds out whether they are whole. `cryptography` is loaded for the first one."""

    def __init__(self, key: bytes) -> None:
        self._cipher = _cipher(key)
        self._salt = int.from_bytes(os.urandom(4), "little")

    def seal(self, number: int, counter: int, data: bytes) -> bytes:
        """Return an object; nobody else may use this `counter`."""
        header = HEADER.pack(number, self._salt, counter, len(data), 0)
        return header + self._cipher.encrypt(header[NONCE], data, header)

    def unseal(self, number: int, length: int, sealed: memoryview) -> bytes:
        """Return the data of an object that starts where `sealed` does.

        Raises:
            DamagedObjectError: it is not the object of that number and length.
        """
        from cryptography.exceptions import InvalidTag

        header = sealed[: HEADER.size].tobytes()
        found, _, _, size, _ = HEADER.unpack(header)
        if (found, size) != (number, length):
            raise DamagedObjectError("something else lies there")
        try:
            return self._cipher.decrypt(header[NONCE], sealed[HEADER.size : OBJECT_OVERHEAD + length], header)
        except InvalidTag:
            raise DamagedObjectError("it is not what was written") from None


def _cipher(key: bytes) -> "AESGCM":
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(key)
