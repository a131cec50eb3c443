"""The daemon: its disks, their NBD server and their status sockets, from start to signal.

SIGTERM and SIGINT stop it; SIGHUP does not, and upgrades a server that has a supervisor. While the machine swaps to one
of its disks it says so and goes on until that is over, since what is swapped out would be lost. `supervisor.HAND_OVER`
stops it in any case.
"""

import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from urllib.parse import quote

from zramd import noswap
from zramd.activation import activated, standard_input
from zramd.attach.module import has_nbd
from zramd.attach.swaps import swaps_of
from zramd.device.disk import Disk
from zramd.device.superblock import StateError
from zramd.disks import UnfitError, open_disk, require_fit
from zramd.listeners import PLAIN_TCP, ListenError, is_public, listen_tcp, listen_unix
from zramd.log import logging_aside
from zramd.memory import NoMemoryError, RegionError
from zramd.native import Engine, choose
from zramd.nbd.export import Export, Exports
from zramd.nbd.server import Server
from zramd.nbd.tls import TlsError, TlsMode, make_context
from zramd.notify import notify
from zramd.paths import make_runtime_directory
from zramd.policy.loop import Policy
from zramd.policy.rules import Mode
from zramd.reclaim import Measure, own_memory, private_ranges, protect, protect_thread
from zramd.settings import DiskSettings, Settings, UnixAddress
from zramd.sizes import format_size
from zramd.status.attributes import Served
from zramd.status.history import History
from zramd.status.http import HttpServer, Paths
from zramd.status.scraping import metrics_paths
from zramd.status.server import READ_PAUSE, AdminServer, StatusServer
from zramd.status.web import Web
from zramd.supervisor import HAND_OVER, supervise

STACK_BYTES = 512 << 10
"""Of each thread. The codecs keep their state on the heap; liblz4's fast compressor puts 16 KiB on the stack."""
STOP_SECONDS = 0.4
"""That those who wait for an answer are given at the end, `zramd stop` among them."""
SWAPOFF_SECONDS = 1.0
"""Between two looks whether the machine still swaps to a server that is to stop."""
SWITCH_SECONDS = 0.0005
"""Most time that a busy Python thread keeps the compiled engine waiting when a pool, its device locked, has to grow."""

_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, HAND_OVER}

log = logging.getLogger(__name__)


class DaemonError(Exception):
    """The daemon cannot start; the text is one line."""


def run(settings: Settings, announce: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM, or with `stdio` until the client has left.

    Raises:
        DaemonError: the daemon could not start.
        OSError: the regions cannot be opened, or not be left in order.
        SystemExit: in a supervisor, when its server has ended.
    """
    # Before any thread is made, so that only the waiting below ever receives them.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    if os.isatty(0):
        # Who closes the terminal means to end what runs there.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
    threading.stack_size(STACK_BYTES)
    if choose() is Engine.NATIVE:
        sys.setswitchinterval(SWITCH_SECONDS)
    try:
        require_fit(settings)
        started, again = supervise() if settings.swap else (_nobody_waits, False)
        with ExitStack() as sockets:
            if settings.swap:
                sockets.enter_context(logging_aside())
            daemon = _Daemon(settings, sockets, again=again)
            for line in daemon.introduction():
                announce(line)
            gc.collect()
            gc.freeze()
            started()
            if again:
                daemon.settle()
            notify("READY=1", f"STATUS={daemon.summary()}")
            daemon.wait()
            notify("STOPPING=1")
        for disk, chosen in daemon.disks:
            if chosen.state is not None and disk.leave():
                announce(f"stopped; the contents stay in {chosen.state} until it is removed or the machine restarts")
    except (UnfitError, StateError, NoMemoryError, RegionError, ListenError, TlsError) as error:
        raise DaemonError(str(error)) from error


def _nobody_waits() -> None:
    """Nobody waits for the server to have started."""


class _Daemon:
    """What runs; `sockets` ends it. If it serves `again`, it takes another's place while the machine swaps."""

    def __init__(self, settings: Settings, sockets: ExitStack, *, again: bool) -> None:
        self._settings = settings
        self._sockets = sockets
        self._supervisor = os.getppid()
        self._lacking: set[str] = set()
        self._measures = protect(whole=not again) if settings.swap else []
        self._shared = private_ranges() if again else []
        tls = settings.tls
        context = None if tls.mode is TlsMode.OFF else make_context(tls)
        given = activated()
        self._named = dict(reversed(given))
        client = standard_input() if settings.stdio else None
        names = {name for disk in settings.disks for name in _socket_names(settings, disk)}
        listeners = [listener for name, listener in given if name not in names]
        self._unix, self._activated = settings.unix, tuple(listeners)
        if not (self._unix or settings.tcp or listeners or settings.stdio):
            self._unix = (UnixAddress(make_runtime_directory() / f"{settings.disks[0].name}.nbd"),)
        # Whoever is refused here has not yet touched the disks.
        for address in self._unix:
            listeners.append(listen_unix(address.path, address.mode, address.owner, address.group))
            sockets.callback(address.path.unlink, missing_ok=True)
        for host, port in settings.tcp:
            listeners += listen_tcp(host, port)
        pages = _listen_on_loopback("web", *settings.web) if settings.web else []
        scraped = settings.metrics if settings.metrics != settings.web else None
        metrics = _listen_on_loopback("metrics", *scraped) if scraped else []
        for sock in (*listeners, *self._named.values(), *([client] if client else ())):
            _require_private(settings, is_public(sock))
        self.disks = [(open_disk(chosen, swap=settings.swap), chosen) for chosen in settings.disks]
        exports = [Export(disk.name, chosen.description, disk, chosen.read_only) for disk, chosen in self.disks]
        self._server = server = Server(
            Exports(exports), settings.limits, settings.access, tls.mode, context, self._enter_thread
        )
        self._served: list[Served] = []
        for disk, chosen in self.disks:
            self._serve_attributes(disk, chosen)
        sockets.callback(_stop, server)
        self._serve_web(pages)
        self._serve_http(metrics, metrics_paths(self._served))
        for listener in listeners:
            server.accept_on(listener)
        if client is not None:
            server.adopt(client, lambda: os.kill(os.getpid(), signal.SIGTERM))

    def _enter_thread(self) -> None:
        """Make a connection's thread what the first thread is: it should have inherited that."""
        if self._settings.swap:
            self._lacking |= {measure.name for measure in protect_thread() if not measure.in_force}

    def _report(self, chosen: DiskSettings) -> list[Measure] | None:
        """Return what is done for swapping to a disk, and what is missing, or None if that was not asked for."""
        if not self._settings.swap or chosen.state is None:
            return None
        measures = [
            Measure(name, missing or ("a serving thread lacks it" if name in self._lacking else ""))
            for name, missing in ((measure.name, measure.missing) for measure in self._measures)
        ]
        alive = os.getppid() == self._supervisor
        measures.append(Measure("supervisor", "" if alive else "it died: restart the server after swapoff"))
        return [*measures, noswap.check(chosen.state)]

    def _swaps_of(self, disk: Disk) -> list[str]:
        opened = disk.opened
        return swaps_of(str(opened.device.identity.uuid), self._server.peer_pids()) if opened else []

    def _swaps(self) -> list[str]:
        return [path for disk, _ in self.disks for path in self._swaps_of(disk)]

    def settle(self) -> None:
        """Have all memory of its own, as the first server has at its start, once somebody is connected again."""
        threading.Thread(target=own_memory, args=(self._shared, self._is_used), name="settling", daemon=True).start()

    def _is_used(self) -> bool:
        return any(disk.clients for disk, _ in self.disks)

    def wait(self) -> None:
        """Return when the server is to end."""
        while (wanted := signal.sigwait(_SIGNALS)) == signal.SIGHUP:
            log.warning("SIGHUP changes nothing without --swap: restart the server, which keeps what it serves")
        self._wait_for_swapoff(wanted)

    def _wait_for_swapoff(self, wanted: int | None) -> None:
        while wanted != HAND_OVER and (swaps := self._swaps()):
            if wanted is not None:
                text = f"not stopped, since the machine swaps to {' '.join(swaps)}: swapoff first (zramd swapoff)"
                log.error(text)
                notify(f"STATUS={text}")
            received = signal.sigtimedwait(_SIGNALS, SWAPOFF_SECONDS)
            wanted = received.si_signo if received else None

    def summary(self) -> str:
        """Return a line on what is served."""
        disks = (f"{disk.name} of {format_size(disk.disksize)}, {disk.algorithm()}" for disk, _ in self.disks)
        return f"serving {'; '.join(disks)}"

    def _serve_attributes(self, disk: Disk, chosen: DiskSettings) -> None:
        """Open the status and the admin socket of a disk, unless they are among those of socket activation."""
        if chosen.status is None or chosen.admin is None:
            return
        policy = Policy(disk, chosen.policy)
        policy.switch(chosen.policy.mode)
        self._sockets.callback(policy.switch, Mode.OFF)
        served = Served(
            disk,
            self._uris(disk.name),
            chosen.admin,
            partial(self._report, chosen),
            partial(self._swaps_of, disk),
            partial(os.kill, os.getpid(), HAND_OVER),
            partial(_control_policy, policy),
        )
        self._served.append(served)
        status_name, admin_name = _socket_names(self._settings, chosen)
        reading = self._named.get(status_name)
        if reading is None:
            group = -1 if chosen.group is None else chosen.group
            reading = listen_unix(chosen.status, 0o600 if chosen.group is None else 0o660, group=group)
            self._sockets.callback(chosen.status.unlink, missing_ok=True)
        changing = self._named.get(admin_name)
        if changing is None:
            changing = listen_unix(chosen.admin)
            self._sockets.callback(chosen.admin.unlink, missing_ok=True)
        status, admin = StatusServer(served), AdminServer(served)
        status.accept_on(reading, READ_PAUSE)
        admin.accept_on(changing)
        self._sockets.callback(status.stop, 0)
        self._sockets.callback(admin.stop, STOP_SECONDS)

    def _serve_web(self, listeners: list[socket.socket]) -> None:
        """Open the page for browsers, if it has any listeners."""
        if not listeners:
            return
        history = History([served.disk for served in self._served])
        history.start()
        self._sockets.callback(history.stop)
        self._serve_http(listeners, {**Web(self._served, history).paths(), **metrics_paths(self._served)})

    def _serve_http(self, listeners: list[socket.socket], paths: Paths) -> None:
        server = HttpServer(paths)
        for listener in listeners:
            server.accept_on(listener, READ_PAUSE)
        self._sockets.callback(server.stop, 0)

    def _uris(self, name: str) -> tuple[str, ...]:
        """Return where clients find a disk; the first needs no name."""
        path = "" if name == self._settings.disks[0].name else name
        scheme = "nbds" if self._settings.tls.mode is TlsMode.REQUIRE else "nbd"
        places = [str(address.path) for address in self._unix]
        places += [sock.getsockname() for sock in self._activated if sock.family == socket.AF_UNIX]
        unix = [f"{scheme}+unix:///{path}?socket={quote(place)}" for place in places]
        tcp = [f"{scheme}://{_authority(host, port)}{path and '/' + path}" for host, port in self._settings.tcp]
        return (*unix, *tcp)

    def introduction(self) -> Iterator[str]:
        """Yield what there is to say to who started the daemon."""
        for disk, chosen in self.disks:
            opened = disk.opened
            where = "a memfd (volatile)" if chosen.state is None else str(chosen.state)
            if opened is None:
                yield f"{disk.name}: not initialised; zramd set disksize=SIZE does that, regions in {where}"
            else:
                identity = opened.device.identity
                yield (
                    f"{disk.name}: {format_size(identity.disksize)}, {identity.codec.name} level "
                    f"{identity.codec.level}, chain size {identity.chain_size}, regions in {where}"
                )
                if opened.recovered:
                    stored = opened.device.mm_stat().orig_data_size
                    yield f"recovered: {format_size(stored)} of data that an earlier run left"
            for uri in self._uris(disk.name):
                yield f"NBD URI: {uri}"
        if self._activated:
            yield f"NBD on {len(self._activated)} sockets of LISTEN_FDS"
        yield from self._advice()

    def _advice(self) -> Iterator[str]:
        first = self._settings.disks[0]
        if self._settings.web:
            yield f"page:    http://{_authority(*self._settings.web)}/"
        if self._settings.metrics:
            yield f"metrics: http://{_authority(*self._settings.metrics)}/metrics"
        command = self._attach_command()
        if command:
            yield f"attach:  {command}"
        if first.status is not None:
            yield f"status:  zramd status --status {first.status}"

    def _attach_command(self) -> str | None:
        """Return what a user may paste to get a block device, None where the kernel cannot have one."""
        if self._settings.tls.mode is TlsMode.REQUIRE or not self._uris(self._settings.disks[0].name):
            return None
        how = "" if has_nbd() else " --fuse"
        return f"zramd attach{how} --uri '{self._uris(self._settings.disks[0].name)[0]}'"


def _control_policy(policy: Policy, word: str) -> str:
    """Carry out what the admin socket, or the status socket (`last`), asks of a policy."""
    if word == "last":
        return policy.last()
    if word == "explain":
        return policy.explain()
    policy.switch(Mode(word))
    return ""


def _socket_names(settings: Settings, disk: DiskSettings) -> tuple[str, str]:
    """Return the names, in socket activation, of a disk's status and admin sockets: zram0.status; or just status."""
    prefix = "" if len(settings.disks) == 1 else f"{disk.name}."
    return f"{prefix}status", f"{prefix}admin"


def _require_private(settings: Settings, public: bool) -> None:
    """Refuse to show memory to a network.

    Raises:
        DaemonError: it would, and nobody has allowed it.
    """
    if public and settings.tls.mode is not TlsMode.REQUIRE and not settings.public:
        raise DaemonError(PLAIN_TCP)


def _listen_on_loopback(what: str, host: str, port: int) -> list[socket.socket]:
    """Listen for those who look at the page or the metrics, who show no certificate.

    Raises:
        DaemonError: others than users of this machine could.
        ListenError: the address cannot be used.
    """
    listeners = listen_tcp(host, port)
    if any(map(is_public, listeners)):
        raise DaemonError(
            f"--{what} is for this machine: a loopback address, not {host or 'all'}; ssh -L takes it further"
        )
    return listeners


def _stop(server: Server) -> None:
    if not server.stop(STOP_SECONDS):
        log.warning("a client did not take its replies in time and was cut off")


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host or 'localhost'}:{port}"
