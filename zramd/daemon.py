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
from zramd.device.opening import OpenDevice, Wanted
from zramd.device.superblock import StateError
from zramd.layout import PAGE_SIZE
from zramd.memory import NoMemoryError, RegionError, RegionStore
from zramd.nbd.export import Export, Exports
from zramd.nbd.server import ListenError, Server, listen_tcp, listen_unix
from zramd.paths import DEVICE_NAME
from zramd.sizes import format_size
from zramd.status.attributes import Served
from zramd.status.server import StatusServer

STACK_BYTES = 512 << 10
"""Of each thread. The codecs keep their state on the heap; liblz4's fast compressor puts 16 KiB on the stack."""
STOP_SECONDS = 0.4

log = logging.getLogger(__name__)


class DaemonError(Exception):
    """The daemon cannot start; the text is one line."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What to serve and where. `state` None keeps nothing; `mem_limit` None is as the kept state says."""

    wanted: Wanted
    mem_limit: int | None
    state: Path | None
    unix: Path | None
    tcp: tuple[str, int] | None
    status: Path


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
        # Never closed: unmapping is left to the end of the process, since a thread may still look at the regions.
        opened = OpenDevice(RegionStore(settings.state), settings.wanted)
        if settings.mem_limit is not None:
            opened.device.set_mem_limit(settings.mem_limit)
        with _serving(settings, opened) as served:
            for line in _introduction(settings, opened, served):
                announce(line)
            gc.collect()
            gc.freeze()
            signal.sigwait(stop_signals)
        if settings.state is not None:
            opened.leave()
            announce(f"stopped; the contents stay in {settings.state} until it is removed or the machine restarts")
    except (StateError, NoMemoryError, RegionError, ListenError) as error:
        raise DaemonError(str(error)) from error


@contextlib.contextmanager
def _serving(settings: Settings, opened: OpenDevice) -> Iterator[Served]:
    export = Export(DEVICE_NAME, "zramd compressed memory", opened.device, opened.flush)
    server = Server(Exports([export]))
    served = Served(DEVICE_NAME, opened.device, _uris(settings), lambda: server.connections)
    with contextlib.ExitStack() as sockets:
        listeners = []
        if settings.unix is not None:
            listeners.append(listen_unix(settings.unix))
            sockets.callback(settings.unix.unlink, missing_ok=True)
        if settings.tcp is not None:
            listeners.append(listen_tcp(*settings.tcp))
        status = StatusServer(listen_unix(settings.status), served)
        sockets.callback(settings.status.unlink, missing_ok=True)
        for listener in listeners:
            server.serve(listener)
        status.start()
        try:
            yield served
        finally:
            status.stop()
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


def _introduction(settings: Settings, opened: OpenDevice, served: Served) -> Iterator[str]:
    identity = opened.device.identity
    where = "a memfd (volatile)" if settings.state is None else str(settings.state)
    yield (
        f"{served.name}: {format_size(identity.disksize)}, {identity.codec.name} level {identity.codec.level}, "
        f"chain size {identity.chain_size}, regions in {where}"
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
