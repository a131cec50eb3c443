"""What client and server agreed on in a handshake, for the transmission that follows."""

from dataclasses import dataclass
from enum import Enum, auto

from zramd.nbd.block_status import Context


class Mode(Enum):
    """How requests and replies are framed."""

    SIMPLE = auto()
    STRUCTURED = auto()
    EXTENDED = auto()


@dataclass(frozen=True, slots=True)
class Terms:
    """The terms of a transmission: framing, the contexts of BLOCK_STATUS, whether the client may change anything."""

    mode: Mode = Mode.SIMPLE
    contexts: tuple[Context, ...] = ()
    read_only: bool = False


DEFAULT_TERMS = Terms()
"""What EXPORT_NAME right after the greeting leads to."""
