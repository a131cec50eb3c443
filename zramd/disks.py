"""The disks of a daemon: whether this program can serve them, and their opening."""

from dataclasses import replace
from functools import cache
from pathlib import Path

from zramd import noswap
from zramd.device.algorithms import PRIMARY
from zramd.device.codecs import Codec, Parameters, codec
from zramd.device.disk import Disk
from zramd.device.kept import check_kept, find_kept
from zramd.device.selftest import SelfTestError, selftest
from zramd.device.superblock import StateError
from zramd.device.wanted import DEFAULT_ALGORITHM
from zramd.layout import PAGE_SHIFT
from zramd.memory import NoMemoryError, is_memory_backed
from zramd.nbd.tls import TlsError, TlsMode, make_context
from zramd.nbd.warmup import WarmUpError, warm_up
from zramd.settings import DiskSettings, Settings


class UnfitError(Exception):
    """What is asked for cannot be served; the text is one line."""


def check(settings: Settings) -> None:
    """Find out whether this program can serve these settings, without touching any disk or socket.

    A server that is to be replaced goes only if this says so: there would be none if its successor refused to start.

    Raises:
        UnfitError: it cannot, or is broken.
    """
    require_fit(settings)
    try:
        if settings.tls.mode is not TlsMode.OFF:
            make_context(settings.tls)
        for disk in settings.disks:
            if disk.state is not None:
                check_kept(disk.state, disk.wanted)
    except (StateError, TlsError) as error:
        raise UnfitError(str(error)) from error


def require_fit(settings: Settings) -> None:
    """Find out whether the disks can be swapped to, if they are to be, and whether the engine works.

    Raises:
        UnfitError: they cannot, or it does not.
    """
    for disk in settings.disks:
        if settings.swap and (disk.state is None or not is_memory_backed(_existing(disk.state))):
            raise UnfitError(
                f"{disk.name} cannot be swapped to: its regions must outlive the server, in memory; choose another "
                "--state, and neither --volatile nor --stdio"
            )
    for disk in settings.disks:
        for chosen in (disk.wanted.codec or codec(DEFAULT_ALGORITHM), *disk.wanted.secondary.values()):
            _try_out(chosen)


@cache
def _try_out(codec: Codec) -> None:
    """Find out whether the engine works with a codec.

    Raises:
        UnfitError: it does not.
    """
    try:
        selftest(codec)
        warm_up(codec)
    except (SelfTestError, WarmUpError, NoMemoryError) as error:
        raise UnfitError(str(error)) from error


def _existing(path: Path) -> Path:
    """Return the path, or the lowest directory above it that there is."""
    return next(place for place in (path, *path.parents) if place.exists())


def open_disk(settings: DiskSettings, *, swap: bool) -> Disk:
    """Make the disk, and find its device in kept regions; else initialise it, unless it is to have no size yet.

    Raises:
        UnfitError, StateError, NoMemoryError, RegionError, OSError: it cannot be served.
    """
    wanted = settings.wanted
    if swap and settings.state is not None:
        noswap.mount(settings.state)
    disk = Disk(settings.name, settings.state, wanted.chain_size, swap=swap, integrity=wanted.integrity)
    if wanted.disksize != 0 or (settings.state and find_kept(settings.state)):
        # Never closed: unmapping is left to the end of the process, since a thread may still look at the regions.
        _try_out(disk.open(wanted).device.identity.codec)
    else:
        for priority, chosen in ({PRIMARY: wanted.codec} | wanted.secondary if wanted.codec else {}).items():
            disk.set_algorithm(chosen.name, priority)
            disk.set_parameters(Parameters(chosen.level, chosen.dictionary), priority)
        if wanted.backing:
            disk.set_backing(wanted.backing)
    if settings.mem_limit is not None:
        disk.set_mem_limit(settings.mem_limit)
    limit = settings.writeback_limit
    if limit is not None and not disk.writeback.limited:
        disk.set_writeback(lambda before: replace(before, limit=limit >> PAGE_SHIFT, limited=True))
    return disk
