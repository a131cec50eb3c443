"""The daemon: one device, its NBD server and its status socket, from start to signal."""

import contextlib
import gc
import logging
import shlex
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from zramd.attach.kernel import has_nbd
from zramd.device.codecs import Parameters
from zramd.device.disk import Disk
from zramd.device.opening import Wanted
from zramd.device.superblock import StateError
from zramd.layout import PAGE_SIZE
from zramd.listeners import ListenError, listen_tcp, listen_unix
from zramd.memory import NoMemoryError, RegionError
from zramd.nbd.export import Export, Exports
from zramd.nbd.server import Server
from zramd.paths import DEVICE_NAME
from zramd.sizes import format_size
from zramd.status.attributes import Served
from zramd.status.server import READ_PAUSE, AdminServer, StatusServer

STACK_BYTES = 512 << 10
"""Of each thread. The codecs keep their state on the heap; liblz4's fast compressor puts 16 KiB on the stack."""
STOP_SECONDS = 0.4

log = logging.getLogger(__name__)


class DaemonError(Exception):
    """The daemon cannot start; the text is one line."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What to serve and where.

    A disksize of 0 leaves the disk uninitialised. `mem_limit` None is as the kept state says. `state` None keeps
    nothing. `group` is the gid that may read the status socket.
    """

    wanted: Wanted
    mem_limit: int | None
    state: Path | None
    unix: Path | None
    tcp: tuple[str, int] | None
    status: Path
    admin: Path
    group: int | None


def run(settings: Settings, announce: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises:
        DaemonError: the daemon could not start.
        OSError: the regions cannot be opened, or not be left in order.
    """
    stop_signals = {signal.SIGINT, signal.SIGTERM}
    # Before any thread is made, so that only sigwait below ever receives them.
    signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals)
    threading.stack_size(STACK_BYTES)
    try:
        disk = _open_disk(settings)
        with _serving(settings, disk) as served:
            for line in _introduction(settings, served):
                announce(line)
            gc.collect()
            gc.freeze()
            signal.sigwait(stop_signals)
        if settings.state is not None and disk.leave():
            announce(f"stopped; the contents stay in {settings.state} until it is removed or the machine restarts")
    except (StateError, NoMemoryError, RegionError, ListenError) as error:
        raise DaemonError(str(error)) from error


def _open_disk(settings: Settings) -> Disk:
    """Make the disk, and find its device in kept regions or initialise it unless it is to have no size yet."""
    wanted = settings.wanted
    disk = Disk(DEVICE_NAME, settings.state, wanted.chain_size)
    if wanted.disksize != 0:
        # Never closed: unmapping is left to the end of the process, since a thread may still look at the regions.
        disk.open(wanted)
    elif wanted.codec:
        disk.set_algorithm(wanted.codec.name)
        disk.set_parameters(Parameters(wanted.codec.level, wanted.codec.dictionary), None)
    if settings.mem_limit is not None:
        disk.set_mem_limit(settings.mem_limit)
    return disk


@contextlib.contextmanager
def _serving(settings: Settings, disk: Disk) -> Iterator[Served]:
    server = Server(Exports([Export(disk.name, "zramd compressed memory", disk)]))
    served = Served(disk, _uris(settings), lambda: len(server), settings.admin)
    with contextlib.ExitStack() as sockets:
        listeners = []
        if settings.unix is not None:
            listeners.append(listen_unix(settings.unix))
            sockets.callback(settings.unix.unlink, missing_ok=True)
        if settings.tcp is not None:
            listeners.append(listen_tcp(*settings.tcp))
        status, admin = StatusServer(served), AdminServer(served)
        reading = listen_unix(settings.status, settings.group)
        sockets.callback(settings.status.unlink, missing_ok=True)
        changing = listen_unix(settings.admin)
        sockets.callback(settings.admin.unlink, missing_ok=True)
        for listener in listeners:
            server.accept_on(listener)
        status.accept_on(reading, READ_PAUSE)
        admin.accept_on(changing)
        try:
            yield served
        finally:
            status.stop(0)
            admin.stop(0)
            if not server.stop(STOP_SECONDS):
                log.warning("a client did not take its replies in time and was cut off")


def _uris(settings: Settings) -> tuple[str, ...]:
    uris = []
    if settings.unix is not None:
        uris.append(f"nbd+unix:///?socket={quote(str(settings.unix))}")
    if settings.tcp is not None:
        host, port = settings.tcp
        uris.append(f"nbd://[{host}]:{port}" if ":" in host else f"nbd://{host or 'localhost'}:{port}")
    return tuple(uris)


def _introduction(settings: Settings, served: Served) -> Iterator[str]:
    opened = served.disk.opened
    where = "a memfd (volatile)" if settings.state is None else str(settings.state)
    if opened is None:
        yield f"{served.disk.name}: not initialised; zramd set disksize=SIZE does that, regions in {where}"
    else:
        identity = opened.device.identity
        yield (
            f"{served.disk.name}: {format_size(identity.disksize)}, {identity.codec.name} level "
            f"{identity.codec.level}, chain size {identity.chain_size}, regions in {where}"
        )
        if opened.recovered:
            stored = opened.device.mm_stat().orig_data_size
            yield f"recovered: {format_size(stored)} of data that an earlier run left"
    for uri in served.uris:
        yield f"NBD URI: {uri}"
    yield f"attach:  {_attach_command(settings)}"
    yield f"status:  zramd status --status {settings.status}"


def _attach_command(settings: Settings) -> str:
    """Return what a user may paste to get a block device: by the kernel's NBD client, or by nbdfuse and loop."""
    uri = _uris(settings)[0]
    if has_nbd():
        target = f"-unix {shlex.quote(str(settings.unix))}" if settings.unix else "{} {}".format(*settings.tcp or ())
        return f"nbd-client {target} /dev/nbd0 -b {PAGE_SIZE}"
    directory = shlex.quote(str(settings.status.with_suffix(".mnt")))
    return (
        f"mkdir -p {directory}; nbdfuse {directory}/nbd '{uri}' & "
        f"sleep 1; losetup --find --show --direct-io=on --sector-size={PAGE_SIZE} {directory}/nbd"
    )
