"""The supervisor: a small process, locked in memory, that starts the server anew when it dies.

A Python that has to be loaded from disk may never come up on a machine that is out of memory. So the supervisor has
everything loaded that a server needs, and the server is a fork of it.

    SIGTERM, SIGINT   passed on to the server; the supervisor ends when the server does so without having failed
    SIGHUP            upgrade: check the program that is installed now, and if it is well become it. The server goes on
                      until its successor is loaded, and then gets
    SIGUSR1           (the server) leave, whoever uses the disk: somebody will take over

Whoever the supervisor was before an exec, the processes that it had started are its children afterwards too.
"""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress

from zramd.reclaim import protect

SERVER, STOPPING = "ZRAMD_SERVER", "ZRAMD_STOPPING"
"""In the environment of a supervisor after an upgrade: the server's pid, and (not empty) that it was told to stop."""
HAND_OVER = signal.SIGUSR1
HAND_OVER_SECONDS = 10.0
"""A server that has not left by then is killed, which loses nothing."""
SHORT_LIFE = 1.0
"""Seconds. A server that lived no longer is not started again at once."""
LONGEST_PAUSE = 5.0

_STOP = {signal.SIGTERM, signal.SIGINT}
_SIGNALS = _STOP | {signal.SIGHUP, signal.SIGCHLD}

log = logging.getLogger(__name__)

Started = Callable[[], None]
"""To be called by the server once it serves."""


def supervise() -> tuple[Started, bool]:
    """Return in the server's process, whenever one is needed; the process that called this ends with it.

    The second value says whether another has served before: the machine may then have no memory until this one does.
    The caller has blocked all signals of both, has only one thread, and has loaded all that a server needs.

    Raises:
        SystemExit: in the supervisor: the server has ended as asked, or could not start.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    protect(0)
    predecessor = int(os.environ.pop(SERVER, "0"))
    if predecessor:
        _relieve(predecessor)
    supervisor = _Supervisor(has_served=bool(predecessor), stopping=bool(os.environ.pop(STOPPING, "")))
    while True:
        started = supervisor.fork()
        if started is not None:
            return started, supervisor.has_served
        supervisor.watch()


def _relieve(server: int) -> None:
    """End a server whose place is taken by another."""
    deadline = time.monotonic() + HAND_OVER_SECONDS
    wanted = HAND_OVER
    try:
        while os.waitpid(server, os.WNOHANG) == (0, 0):
            os.kill(server, wanted)
            if time.monotonic() > deadline:
                wanted = signal.SIGKILL
            signal.sigtimedwait({signal.SIGCHLD}, 0.1)
    except ChildProcessError:
        log.warning("%s in the environment is no server of this process", SERVER)


class _Supervisor:
    """The supervisor of one server after the other.

    `has_served` says whether one ever did serve; `stopping`, that it was told to stop, which a server may put off.
    """

    def __init__(self, *, has_served: bool, stopping: bool) -> None:
        self.has_served = has_served
        self._server = 0
        self._check: subprocess.Popen[str] | None = None
        self._pipe = -1
        self._born = 0.0
        self._pause = 0.0
        self._stopping = stopping

    def fork(self) -> Started | None:
        """Start a server. Return in it what it has to call, and None in the supervisor."""
        pipe, server_end = os.pipe()
        self._born = time.monotonic()
        self._server = os.fork()
        if self._server == 0:
            # Ctrl-C is for the supervisor, which passes it on.
            os.setpgid(0, 0)
            os.close(pipe)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS - _STOP)

            def started() -> None:
                # A supervisor that is being upgraded waits no longer.
                with suppress(BrokenPipeError):
                    os.write(server_end, b"\1")
                os.close(server_end)

            return started
        os.close(server_end)
        self._pipe = pipe
        if self._stopping:
            os.kill(self._server, signal.SIGTERM)
        return None

    def watch(self) -> None:
        """Pass signals on until the server has died and another is to be started."""
        while True:
            match signal.sigwait(_SIGNALS):
                case signal.SIGHUP:
                    self._check_program()
                case signal.SIGCHLD:
                    self._end_check()
                    died = os.waitpid(self._server, os.WNOHANG)
                    if died != (0, 0):
                        self._bury(os.waitstatus_to_exitcode(died[1]))
                        return
                case stop:
                    self._stopping = True
                    os.kill(self._server, stop)

    def _bury(self, status: int) -> None:
        """Note a server's death, and wait a little if it died early.

        Raises:
            SystemExit: it was to end, or cannot start.
        """
        self.has_served |= os.read(self._pipe, 1) == b"\1"
        os.close(self._pipe)
        if status == 0 or not self.has_served or (self._stopping and status > 0):
            raise SystemExit(status if status >= 0 else 1)
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        log.error("the server died (%s); it is started again", how)
        if time.monotonic() - self._born > SHORT_LIFE:
            self._pause = 0.0
            return
        if signal.sigtimedwait(_STOP, self._pause):
            raise SystemExit(1)
        self._pause = min(2 * self._pause or 0.1, LONGEST_PAUSE)

    def _check_program(self) -> None:
        """Find out whether the program that is installed now would serve."""
        if self._check is None:
            command = [sys.executable, *sys.orig_argv[1:], "--check"]
            self._check = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def _end_check(self) -> None:
        """Become the program that was found well."""
        check = self._check
        if check is None or check.poll() is None:
            return
        self._check = None
        _, errors = check.communicate()
        if check.returncode:
            log.error("no upgrade, since what is installed would not serve: %s", errors.strip().rpartition("\n")[2])
            return
        os.environ[SERVER] = str(self._server)
        os.environ[STOPPING] = "1" if self._stopping else ""
        os.close(self._pipe)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 (its own command line)
