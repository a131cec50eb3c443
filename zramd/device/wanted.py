"""What is asked for when a device is opened, and what a new one is to be by that."""

import uuid
from dataclasses import dataclass, field
from pathlib import Path

from zramd.device.algorithms import Algorithms
from zramd.device.codecs import Codec, codec
from zramd.device.superblock import (
    Identity,
    StateError,
)
from zramd.layout import PRIORITIES
from zramd.memory import round_up_to_page
from zramd.zsmalloc import FitRule, geometry
from zramd.zsmalloc.classes import DEFAULT_CHAIN_SIZE
from zramd.zsmalloc.pool import max_disksize

DEFAULT_DISKSIZE = 1 << 30
DEFAULT_ALGORITHM = "lz4"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What was asked for; None is "as the kept state says, or the default". A device may `grow` to the disksize.

    With `keep_size`, one that is kept has its own disksize, whatever is asked for: that was for this machine's memory.
    `secondary` has the codecs to recompress with, by priority; `integrity` is for a device that is made. `backing` is
    where pages are written back to, or where the store is now that the device has. A device that is to be as `filled`
    says is made, and counts for nothing until it is `finish`ed.
    """

    disksize: int | None = None
    codec: Codec | None = None
    chain_size: int | None = None
    grow: bool = False
    secondary: dict[int, Codec] = field(default_factory=dict)
    integrity: bool = False
    backing: Path | None = None
    filled: Identity | None = None
    keep_size: bool = False


def new_identity(wanted: Wanted) -> Identity:
    """Return what a device that is made is to be.

    Raises:
        StateError: it would be too large.
    """
    chain_size = wanted.chain_size or DEFAULT_CHAIN_SIZE
    rule = FitRule.LEAST_WASTE
    disksize = round_up_to_page(wanted.disksize or DEFAULT_DISKSIZE)
    limit = max_disksize(geometry(chain_size, rule))
    if disksize > limit:
        raise StateError(f"a disk of {disksize} bytes is too large: at most {limit} with chain size {chain_size}")
    codecs: list[Codec | None] = [wanted.codec or codec(DEFAULT_ALGORITHM)]
    codecs += [wanted.secondary.get(priority) for priority in range(1, PRIORITIES)]
    return Identity(disksize, Algorithms(codecs), chain_size, rule, uuid.uuid4(), wanted.integrity)


def check_identity(identity: Identity, first_disksize: int, wanted: Wanted, where: Path | None) -> None:
    """Check that kept state is what was asked for. The size that a device had before it grew may be asked for, or 0.

    Raises:
        StateError: it is not.
    """
    remedy = f"ask for the same, or remove {where} to start afresh, or choose another --state or --volatile"
    sizes = (None, 0, identity.disksize, first_disksize)
    if not wanted.keep_size and (wanted.disksize and round_up_to_page(wanted.disksize)) not in sizes:
        raise StateError(f"the device kept in {where} has {identity.disksize} bytes: {remedy}")
    if wanted.chain_size is not None and wanted.chain_size != identity.chain_size:
        raise StateError(f"the device kept in {where} has chain size {identity.chain_size}: {remedy}")
